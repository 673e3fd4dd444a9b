"""Orthogonal matching: what was planted is recovered, nothing is lost of the function, no step loses ground."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus.align import Symmetry, symmetry
from isthmus.align.nets.weights import weight_matching
from isthmus.align.residual import Alignment, fold_norms, orthogonal_matching, random_rotation, rotate
from isthmus.align.residual.heads import cross_products, find_turning
from isthmus.align.residual.probing import Bench
from isthmus.base.batches import Batch
from isthmus.base.errors import ArchitectureError, CheckpointError, DataError, NotFiniteError, SymmetryError

KINDS: dict[str, dict[str, Any]] = {
    "layer norm": {},
    "layer norm, tied": {"tied": True},
    "rms norm, no biases": {"norm": nn.RMSNorm, "bias": False},
    "rms norm, rotary, one key": {"norm": nn.RMSNorm, "rotary": True, "kv_heads": 1, "bias": False},
    "rms norm, rotary, grouped queries": {
        "norm": nn.RMSNorm,
        "rotary": True,
        "heads": 6,
        "kv_heads": 3,
        "bias": False,
    },
    "rms norm, rotary": {"norm": nn.RMSNorm, "rotary": True, "bias": False},
}


@pytest.fixture(scope="session")
def structure(nets: SimpleNamespace) -> Callable[[str], Symmetry]:
    """Give the symmetry of each kind of network, derived once."""
    return cache(lambda name: symmetry(nets.drawn(lambda: nets.Decoder(**KINDS[name])), nets.ids))


def planted(model: nn.Module, x: Tensor, seed: int, known: Symmetry | None = None, noise: float = 0.0) -> nn.Module:
    """Fold, rotate and permute at random, then give the norms of blocks gains again; with noise on every weight."""
    generator = torch.Generator().manual_seed(seed)
    folded = fold_norms(model, x, symmetry=known)
    turns = {s.name: random_rotation(s.size, generator, hold_ones=s.hold_ones) for s in folded.streams}
    drawn = folded.symmetry.random(generator)
    still = {**drawn.indices, **{name: folded.symmetry.identity().indices[name] for name in turns}}
    other = type(drawn)(folded.symmetry, still).apply(rotate(folded, turns))
    with torch.no_grad():
        for norm, readers in zip(folded.streams[0].norms, folded.streams[0].readers, strict=True):
            if norm.module != "norm":
                gain = 0.5 + torch.rand(12, generator=generator)
                other.get_parameter(norm.gain).copy_(gain)
                for reader in readers:
                    other.get_parameter(reader.name).div_(gain)
        for parameter in other.parameters():
            parameter.add_(noise * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return other


def change(before: list[Tensor], after: list[Tensor]) -> float:
    return float(max((x - y).detach().abs().max() / x.abs().max() for x, y in zip(before, after, strict=True)))


def apart(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return float(max((x - y).detach().abs().max() for x, y in pairs))


@pytest.mark.parametrize(
    ("name", "heads"),
    [*((name, True) for name in KINDS if "tied" not in name), ("layer norm", False), ("rms norm, rotary", False)],
)
def test_a_planted_rotation_and_permutation_are_undone(
    name: str, heads: bool, nets: SimpleNamespace, structure: Callable[[str], Symmetry]
) -> None:
    a = nets.drawn(lambda: nets.Decoder(**KINDS[name])).double()
    b = planted(a, nets.ids, 1, structure(name))
    found = orthogonal_matching(a, b, nets.ids, heads=heads, symmetry=structure(name))
    aligned = found.apply(b)
    assert found.reference is not None
    assert apart(found.reference, aligned) < 1e-8
    assert torch.allclose(aligned(nets.ids), a(nets.ids))
    assert min(float(score.nan_to_num(1.0).min()) for score in found.scores.values()) > 1 - 1e-8


@pytest.mark.parametrize("name", ["layer norm", "rms norm, rotary"])
def test_what_is_planted_is_recovered_through_noise(name: str, nets: SimpleNamespace) -> None:
    a = nets.drawn(lambda: nets.Decoder(**KINDS[name])).double()
    b = planted(a, nets.ids, 3, noise=0.1)
    found = orthogonal_matching(a, b, nets.ids, heads=False)
    assert found.reference is not None
    aligned = found.apply(b)
    before, after = (
        torch.cat([(x - y).flatten() for x, y in zip(found.reference.parameters(), m.parameters(), strict=True)]).norm()
        for m in (found.fold(b), aligned)
    )
    size = torch.cat([x.flatten() for x in found.reference.parameters()]).norm()
    assert after < 0.25 * size < before


@pytest.mark.parametrize(
    ("name", "by"),
    [*((name, "weights") for name in KINDS), ("layer norm", "activations"), ("rms norm, rotary, one key", "both")],
)
def test_the_function_stays_exactly_what_it_was(
    name: str, by: str, nets: SimpleNamespace, structure: Callable[[str], Symmetry]
) -> None:
    a, b = (nets.drawn(lambda: nets.Decoder(**KINDS[name]), seed).double() for seed in (0, 7))
    data = list(torch.randint(0, 19, (3, 4, 8), generator=torch.Generator().manual_seed(1)))
    kept = {key: tensor.clone() for key, tensor in b.state_dict().items()}
    found = orthogonal_matching(a, b, data, by=by, symmetry=structure(name))
    aligned = found.apply(b)
    assert all(torch.equal(kept[key], tensor) for key, tensor in b.state_dict().items())
    for net, moved in ((b, aligned), (a, found.reference), (b, found.fold(b))):
        assert moved is not None
        expected = net(nets.ids).detach()
        assert change([expected], [moved(nets.ids)]) <= 1e-9
    assert found.error is not None
    assert found.error <= 1e-9
    (stream,) = found.recipe.streams
    turn = found.rotation[stream.name]
    assert torch.allclose(turn @ turn.T, torch.eye(12).double(), atol=1e-10)
    if stream.hold_ones:
        assert torch.allclose(turn.sum(1), torch.ones(12).double(), atol=1e-10)
    scale = abs(found.objective)
    assert all(later >= earlier - 1e-9 * scale for earlier, later in itertools.pairwise(found.history))
    assert found.objective == pytest.approx(found.history[-1], rel=1e-12)


def test_the_objective_is_the_inner_product_and_beats_a_permutation(nets: SimpleNamespace) -> None:
    a, b = (nets.drawn(nets.Decoder, seed).double() for seed in (0, 7))
    found = orthogonal_matching(a, b, nets.ids)
    alone = orthogonal_matching(a, b, nets.ids, heads=False)
    assert found.reference is not None
    moved = {name for group in found.symmetry.groups for name, _ in group.axes}
    moved -= {gain for stream in found.recipe.streams for gain in stream.gains}

    def product(model: nn.Module) -> float:
        assert found.reference is not None
        ours, theirs = dict(found.reference.named_parameters()), dict(model.named_parameters())
        return float(sum((ours[name] * theirs[name]).sum().detach() for name in moved))

    assert found.objective == pytest.approx(product(found.apply(b)), rel=1e-9)
    folded = found.fold(b)
    parameters = [{k: p.detach() for k, p in m.named_parameters()} for m in (found.reference, folded)]
    permuted = weight_matching(found.symmetry, *parameters).permutation.apply(folded)
    assert product(folded) < product(permuted) < alone.objective < found.objective


def test_activations_recover_the_planted_rotation_too(nets: SimpleNamespace) -> None:
    a = nets.drawn(nets.Decoder).double()
    b = planted(a, nets.ids, 0)
    data = list(torch.randint(0, 19, (8, 16, 8), generator=torch.Generator().manual_seed(1)))
    found = orthogonal_matching(a, b, data, by="activations", heads=False)
    assert found.reference is not None
    assert apart(found.reference, found.apply(b)) < 1e-6
    assert change([b(nets.ids).detach()], [found.apply(b)(nets.ids)]) < 1e-9


@pytest.mark.parametrize("centred", [False, True])
def test_norms_without_parameters_are_aligned_by_either_way(centred: bool, nets: SimpleNamespace) -> None:
    a = nets.drawn(lambda: nets.PlainNorm(centred)).double()
    folded = fold_norms(a, nets.x.double())
    turn = random_rotation(12, torch.Generator().manual_seed(0), hold_ones=centred)
    b = rotate(folded, turn)
    data = torch.randn(200, 5, generator=torch.Generator().manual_seed(2)).double()
    for by in ("weights", "activations", "both"):
        found = orthogonal_matching(a, b, data, by=by)
        assert torch.allclose(found.apply(b)(data), a(data))
        assert found.objective > found.history[0]


def test_a_stream_that_enters_no_module_shows_no_activation(nets: SimpleNamespace) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Parameter(torch.zeros(12, 5)), nn.Parameter(torch.zeros(3, 12))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.rms_norm(x @ self.stem.T, (12,)) @ self.head.T

    a, b = (nets.drawn(Bare, seed) for seed in (0, 1))
    with pytest.raises(DataError, match="enters no module of its own"):
        orthogonal_matching(a, b, nets.x, by="activations")
    assert torch.allclose(orthogonal_matching(a, b, nets.x).apply(b)(nets.x), b(nets.x), atol=1e-5)


def test_the_same_seed_gives_the_same_bits(nets: SimpleNamespace) -> None:
    a, b = (nets.drawn(nets.Decoder, seed) for seed in (0, 7))
    known = symmetry(a, nets.ids)
    first, second = (orthogonal_matching(a, b, nets.ids, seed=4, symmetry=known, rounds=3) for _ in range(2))
    assert first.permutation == second.permutation
    assert all(torch.equal(matrix, second.rotation[name]) for name, matrix in first.rotation.items())
    assert first.history == second.history


# Parts


def test_what_turns_inside_heads(nets: SimpleNamespace) -> None:
    expected = {
        "layer norm": 4,
        "rms norm, rotary": 2,
        "rms norm, rotary, one key": 0,
        "rms norm, rotary, grouped queries": 2,
    }
    for name, count in expected.items():
        model = nets.drawn(lambda name=name: nets.Decoder(**KINDS[name]))
        found = symmetry(model, nets.ids)
        turning = find_turning(found, Bench.open(model, found, Batch((nets.ids,))))
        assert len(turning) == count
        assert all(found.by_name[group].kind == "within" for group in turning)


def test_cross_products_are_sums_over_all_weights(nets: SimpleNamespace) -> None:
    a, b = (nets.drawn(lambda: nets.Mlp(nn.LayerNorm(12)), seed) for seed in (0, 1))
    found = symmetry(a, nets.x)
    group = next(g for g in found.groups if g.size == 12 and "stem" in g.name)
    v, w = ({k: t.double().numpy() for k, t in m.state_dict().items()} for m in (a, b))
    total = sum(
        v[k].reshape(12, -1) @ w[k].reshape(12, -1).T
        for k in (
            "stem.weight",
            "stem.bias",
            "norm.weight",
            "norm.bias",
            "last.weight",
            "last.bias",
            "square.weight",
            "square.bias",
        )
    )
    total = total + v["head.weight"].T @ w["head.weight"] + v["square.weight"].T @ w["square.weight"]
    first, second = ({k: p.detach() for k, p in m.named_parameters()} for m in (a, b))
    assert torch.allclose(cross_products(found, first, second, group), torch.from_numpy(total))


# Files and what is refused


def test_an_alignment_is_saved_and_read(tmp_path: Path, nets: SimpleNamespace) -> None:
    a, b = (nets.drawn(lambda: nets.Decoder(tied=True), seed).double() for seed in (0, 7))
    found = orthogonal_matching(a, b, nets.ids)
    again = Alignment.load(found.save(tmp_path / "found.safetensors"))
    assert again.reference is None
    assert again.streams == found.streams
    assert again.history == found.history
    assert again.recipe.streams == found.recipe.streams
    assert {k: v.tolist() for k, v in again.scores.items()} == {k: v.tolist() for k, v in found.scores.items()}
    assert apart(again.apply(b), found.apply(b)) < 1e-14  # where a matrix lies in memory changes its last digit
    assert found.reference is not None
    assert apart(again.fold(a), found.reference) == 0
    state = again.apply(b.state_dict())
    assert all(torch.allclose(tensor, state[name]) for name, tensor in found.apply(b).state_dict().items())
    with pytest.raises(CheckpointError, match="not a file of the form"):
        Alignment.load(found.permutation.save(tmp_path / "other.safetensors"))
    with pytest.raises(CheckpointError, match=r"end the name in \.safetensors"):
        found.save(tmp_path / "found.pt")


def test_networks_with_other_ties_are_refused(nets: SimpleNamespace) -> None:
    a, b = nets.drawn(lambda: nets.Decoder(tied=True)), nets.drawn(nets.Decoder)
    with pytest.raises(ArchitectureError, match=r"model b ties nothing.*words\.weight = head\.weight"):
        orthogonal_matching(a, b, nets.ids)


def test_wrong_use_is_refused_before_work(nets: SimpleNamespace) -> None:
    a = nets.drawn(nets.Decoder)
    other = nets.drawn(lambda: nets.Decoder(bias=False))
    cases: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (DataError, "unknown way.*did you mean weights", (a, a, nets.ids), {"by": "weight"}),
        (DataError, "needs data", (a, a), {"by": "activations", "example_inputs": nets.ids}),
        (DataError, "needs inputs", (a, a), {}),
        (DataError, "iterator", (a, a, iter([nets.ids])), {"by": "both"}),
        (DataError, "at least 1, not 0", (a, a, nets.ids), {"rounds": 0}),
        (DataError, "no batch", (a, a, []), {}),
        (ArchitectureError, "not the same architecture", (a, other, nets.ids), {}),
        (SymmetryError, "treats its units one by one", (nets.Squashed(True), nets.Squashed(True), nets.x), {}),
    ]
    for error, said, arguments, options in cases:
        with pytest.raises(error, match=said):
            orthogonal_matching(*arguments, **options)
    with torch.no_grad():
        other = nets.drawn(nets.Decoder, 1)
        other.norm.bias[0] = torch.inf
    with pytest.raises(NotFiniteError, match=r"model b: norm\.bias"):
        orthogonal_matching(a, other, nets.ids)


def test_without_verification_nothing_is_claimed(nets: SimpleNamespace) -> None:
    a, b = (nets.drawn(nets.Decoder, seed) for seed in (0, 7))
    found = orthogonal_matching(
        a, b, example_inputs=nets.ids, symmetry=symmetry(a, nets.ids), verify=False, rounds=1, device="cpu"
    )
    assert found.error is None
    assert torch.allclose(found.apply(b)(nets.ids), b(nets.ids), atol=1e-3)

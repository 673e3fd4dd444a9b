"""Learned alignments: the loss between networks falls, the function stays, what was planted is found again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from isthmus.align import Permutation
from isthmus.align.residual import Alignment, fold_norms, orthogonal_matching, random_rotation, rotate
from isthmus.align.residual.dual import find_dual
from isthmus.align.residual.learned import LearnedAlignment, learned_alignment
from isthmus.align.residual.probing import Bench
from isthmus.align.residual.turning import Turns, cayley
from isthmus.base.batches import Batch
from isthmus.base.errors import ArchitectureError, DataError, NotFiniteError, SymmetryError
from isthmus.base.evaluation import evaluate
from isthmus.base.interpolation import interpolate

Batches = list[tuple[Tensor, Tensor]]

KINDS: dict[str, dict[str, Any]] = {
    "layer norm": {},
    "layer norm, tied": {"tied": True},
    "rms norm, rotary, grouped queries": {
        "norm": nn.RMSNorm,
        "rotary": True,
        "heads": 6,
        "kv_heads": 3,
        "bias": False,
    },
}


class Pair(SimpleNamespace):
    """A network, one that was made of it by a rotation and a permutation, labelled batches, and the way back."""

    a: nn.Module
    b: nn.Module
    data: Batches
    truth: Alignment


@pytest.fixture(scope="module")
def pair(nets: SimpleNamespace) -> Callable[[str], Pair]:
    """Give the pair of each kind; the labels are what the network says itself."""
    return cache(lambda name: _pair(nets, name))


def _pair(nets: SimpleNamespace, name: str) -> Pair:
    a = nets.drawn(lambda: nets.Decoder(**KINDS[name]))
    generator = torch.Generator().manual_seed(1)
    folded = fold_norms(a, nets.ids)
    turns = {s.name: random_rotation(s.size, generator, hold_ones=s.hold_ones) for s in folded.streams}
    drawn = folded.symmetry.random(generator)
    still = {**drawn.indices, **{name: folded.symmetry.identity().indices[name] for name in turns}}
    b = Permutation(folded.symmetry, still).apply(rotate(folded, turns))
    data = []
    for _ in range(5):
        ids = torch.randint(0, 19, (16, 8), generator=generator)
        data.append((ids, a(ids).detach().argmax(-1)))
    # with fresh structure where folding has untied what was tied
    truth = orthogonal_matching(a, a, nets.ids, symmetry=folded.symmetry)
    other = a if "tied" in name else b
    if other is b:
        truth = orthogonal_matching(a, b, nets.ids, symmetry=folded.symmetry)
    return Pair(a=a, b=other, data=data, truth=truth)


def beside(truth: Alignment, angle: float, seed: int = 0) -> Alignment:
    """Turn the streams away from where they belong."""
    turns = {}
    for stream in truth.recipe.streams:
        free = torch.randn(stream.size, stream.size, generator=torch.Generator().manual_seed(seed)).double() * angle
        if stream.hold_ones:
            centring = torch.eye(stream.size).double() - 1 / stream.size
            free = centring @ free @ centring
        turns[stream.name] = torch.linalg.matrix_exp(free - free.T) @ truth.rotation[stream.name]
    return replace(truth, rotation={**truth.rotation, **turns})


def halfway(found: Alignment, pair: Pair, alpha: float = 0.5) -> nn.Module:
    """Make the network between, by other means than the search does."""
    middle = found.fold(pair.a)
    middle.load_state_dict(interpolate(middle.state_dict(), found.apply(pair.b).state_dict(), alpha))
    return middle


# What was planted


@pytest.mark.parametrize("name", ["layer norm", "rms norm, rotary, grouped queries"])
def test_a_planted_rotation_is_found_from_beside_it(name: str, pair: Callable[[str], Pair]) -> None:
    case = pair(name)
    start = beside(case.truth, 0.1)
    # what the network itself gives is reached by nothing but the network itself
    data = [(ids, case.a(ids).detach()) for ids, _ in case.data]
    found = learned_alignment(
        case.a, case.b, data, start=start, steps=50, lr=0.03, dense=False, held=1, loss=F.mse_loss, verify=False,
        progress=False,
    )  # fmt: skip
    assert found.candidates[-1] < 0.05 * found.candidates[0]
    for stream in found.recipe.streams:
        turned = [(each.rotation[stream.name] - case.truth.rotation[stream.name]).norm() for each in (start, found)]
        assert turned[1] < 0.3 * turned[0]


def test_exchanged_units_are_put_back(pair: Callable[[str], Pair]) -> None:
    case = pair("layer norm")
    name = next(group.name for group in case.truth.symmetry.groups if group.size == 20)
    wrong = case.truth.permutation.indices[name].clone()
    wrong[:2] = wrong[:2].flip(0)
    permutation = Permutation(case.truth.symmetry, {**case.truth.permutation.indices, name: wrong})
    start = replace(case.truth, permutation=permutation)
    data = [(ids, case.a(ids).detach()) for ids, _ in case.data]
    options: dict[str, Any] = {"start": start, "lr": 1e-4, "loss": F.mse_loss, "verify": False, "progress": False}
    found = learned_alignment(case.a, case.b, data, **options, steps=60, soft=0.8)
    assert found.permutation == case.truth.permutation
    assert learned_alignment(case.a, case.b, data, **options, steps=2).permutation == start.permutation
    assert found.candidates[-1] < found.candidates[0]


# The function, and what is said of it


@pytest.mark.parametrize("name", KINDS)
def test_the_function_stays_exactly_what_it_was(
    name: str, pair: Callable[[str], Pair], nets: SimpleNamespace, tmp_path: Path
) -> None:
    case = pair(name)
    a, b = case.a, nets.drawn(lambda: nets.Decoder(**KINDS[name]), 7)
    kept = [{key: tensor.clone() for key, tensor in model.state_dict().items()} for model in (a, b)]
    start = orthogonal_matching(a, b, nets.ids, symmetry=case.truth.symmetry)
    found = learned_alignment(
        a, b, case.data, start=start, steps=8, soft=0.5, soft_lr=0.5, held=1, every=4, progress=False
    )
    assert isinstance(found, LearnedAlignment)
    for model, tensors in zip((a, b), kept, strict=True):
        assert all(torch.equal(tensors[key], tensor) for key, tensor in model.state_dict().items())
    assert found.error is not None
    assert found.error <= 1e-9
    assert min(found.candidates[1:]) < found.candidates[0]
    assert found.permutation != start.permutation
    exact = b.double()
    expected = exact(nets.ids).detach()
    assert torch.allclose(found.apply(exact)(nets.ids), expected, rtol=1e-9, atol=1e-9)
    b.float()
    free = {group for group, _ in found.recipe.dual}
    assert free == found.rotation.keys() - set(found.streams)
    for group, turn in found.rotation.items():
        product = turn @ turn.mT
        assert torch.allclose(product, torch.eye(turn.shape[-1]).double(), atol=1e-12 if group not in free else 1.0)
        assert group not in free or not torch.allclose(product, torch.eye(turn.shape[-1]).double(), atol=1e-3)
    for stream in found.recipe.streams:
        if stream.hold_ones:
            assert torch.allclose(found.rotation[stream.name].sum(1), torch.ones(12).double(), atol=1e-12)
    loaded = Alignment.load(found.save(tmp_path / "found.safetensors"))
    for key, tensor in loaded.apply(b.state_dict()).items():
        assert torch.equal(tensor, found.apply(b.state_dict())[key])
    assert (loaded.by, loaded.history) == ("learned", found.history)


def test_a_change_of_the_function_does_not_pass(pair: Callable[[str], Pair]) -> None:
    case = pair("layer norm")
    stretched = {name: 1.01 * turn for name, turn in case.truth.rotation.items()}
    with pytest.raises(SymmetryError, match="float64"):
        learned_alignment(
            case.a, case.b, case.data, start=replace(case.truth, rotation=stretched), steps=1, progress=False
        )


def test_candidates_and_losses_are_those_of_the_networks_between(pair: Callable[[str], Pair]) -> None:
    case = pair("layer norm")
    start = beside(case.truth, 0.15)
    found = learned_alignment(
        case.a, case.b, case.data, start=start, steps=9, held=2, every=4, seed=3, points="uniform", progress=False
    )
    assert len(found.losses) == 9
    assert len(found.candidates) == 1 + 3
    assert found.candidates[0] == pytest.approx(evaluate(halfway(start, case), case.data[:2]).loss, rel=1e-4)
    assert min(found.candidates) == pytest.approx(evaluate(halfway(found, case), case.data[:2]).loss, rel=1e-4)
    alpha = float(torch.rand((), generator=torch.Generator().manual_seed(3)))
    assert found.losses[0] == pytest.approx(evaluate(halfway(start, case, alpha), case.data[2:3]).loss, rel=1e-4)
    assert found.reference is not None
    ours, theirs = dict(found.reference.named_parameters()), dict(found.apply(case.b).named_parameters())
    moved = {name for group in found.symmetry.groups for name, _ in group.axes}
    moved -= {gain for stream in found.recipe.streams for gain in stream.gains}
    product = float(sum((ours[name].double() * theirs[name].double()).sum().detach() for name in moved))
    assert found.objective == pytest.approx(product, rel=1e-5)
    assert found.history[-1] == found.objective
    assert all(float(score.nan_to_num(0.0).abs().max()) <= 1 + 1e-9 for score in found.scores.values())


def test_it_never_falls_behind_its_start(pair: Callable[[str], Pair]) -> None:
    case = pair("layer norm")
    options: dict[str, Any] = {"start": case.truth, "steps": 3, "every": 1, "lr": 10.0, "progress": False}
    with pytest.raises(NotFiniteError, match="lower lr"):
        learned_alignment(case.a, case.b, case.data, **options)
    found = learned_alignment(case.a, case.b, case.data, **options, dense=False)
    assert min(found.candidates[1:]) > found.candidates[0]
    assert found.permutation == case.truth.permutation
    assert all(torch.equal(found.rotation[name], turn) for name, turn in case.truth.rotation.items())


def test_without_a_start_it_begins_by_weights_and_activations(pair: Callable[[str], Pair]) -> None:
    case = pair("layer norm")
    symmetry = case.truth.symmetry
    plain = orthogonal_matching(case.a, case.b, case.data, by="both", symmetry=symmetry, progress=False)
    found = learned_alignment(case.a, case.b, case.data, symmetry=symmetry, steps=1, progress=False)
    assert found.candidates[0] == pytest.approx(evaluate(halfway(plain, case), case.data).loss, rel=1e-4)


def test_the_same_seed_gives_the_same_result(pair: Callable[[str], Pair]) -> None:
    case = pair("layer norm")
    state = torch.get_rng_state()
    start = beside(case.truth, 0.15)
    runs = [
        learned_alignment(
            case.a, case.b, case.data, start=start, steps=4, soft=0.5, held=1, seed=seed, device="cpu", verify=False,
            progress=False,
        )
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    assert runs[0].losses == runs[1].losses != runs[2].losses
    assert runs[0].candidates == runs[1].candidates
    assert all(torch.equal(turn, runs[1].rotation[name]) for name, turn in runs[0].rotation.items())
    assert runs[0].error is None


def test_low_precision_lowers_the_loss_too(pair: Callable[[str], Pair]) -> None:
    case = pair("layer norm")
    found = learned_alignment(
        case.a, case.b, case.data, start=beside(case.truth, 0.15), steps=20, lr=0.02, precision=torch.bfloat16,
        verify=False, progress=False,
    )  # fmt: skip
    assert min(found.candidates) < 0.8 * found.candidates[0]


# Bases inside heads


@pytest.mark.parametrize("name", KINDS)
def test_the_sides_of_products_in_heads_are_found(
    name: str, pair: Callable[[str], Pair], nets: SimpleNamespace
) -> None:
    truth = pair(name).truth
    turning = [group for group in truth.rotation if group not in truth.streams]
    bench = Bench.open(pair(name).a, truth.symmetry, Batch((nets.ids,)))
    found = find_dual(truth.symmetry, bench, turning)
    sides = {frozenset(key.split(".")[3] for group, key in found if group == own) for own in turning}
    queries = () if "rotary" in name else ({"k"}, {"q"})
    assert len(sides) == (1 if "rotary" in name else 2)
    assert all(side in ({"o"}, {"v"}, *queries) for side in sides)


def test_any_basis_inside_heads_does_better_than_a_rotation(pair: Callable[[str], Pair]) -> None:
    case = pair("layer norm")
    dense = learned_alignment(case.a, case.b, case.data, start=case.truth, steps=1, verify=False, progress=False)
    group = next(name for name in case.truth.rotation if name not in case.truth.streams)
    stretched = case.truth.rotation[group] @ torch.diag(torch.tensor([0.5, 1.0, 1.5, 2.0])).double()
    start = replace(dense, rotation={**case.truth.rotation, group: stretched}, permutation=case.truth.permutation)
    data = [(ids, case.a(ids).detach()) for ids, _ in case.data]
    free, held = (
        learned_alignment(
            case.a, case.b, data, start=start, steps=40, lr=0.03, dense=each, loss=F.mse_loss, progress=False
        )
        for each in (True, False)
    )
    assert free.error is not None
    assert min(free.candidates) < 0.2 * free.candidates[0]
    assert min(free.candidates) < 0.5 * min(held.candidates)


# Rotations as numbers


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 6), st.integers(0, 1000), st.floats(0.0, 5.0))
def test_cayley_gives_rotations_that_begin_like_the_exponential(size: int, seed: int, scale: float) -> None:
    free = torch.randn(2, size, size, generator=torch.Generator().manual_seed(seed)).double()
    turn = cayley(scale * free)
    assert torch.allclose(turn @ turn.mT, torch.eye(size).double().expand_as(turn), atol=1e-10)
    assert bool((torch.linalg.det(turn) > 0).all())
    small = 1e-3 * free
    assert torch.allclose(cayley(small), torch.linalg.matrix_exp(small - small.mT), atol=1e-6)


def test_turns_go_on_from_the_start(pair: Callable[[str], Pair]) -> None:
    truth = pair("layer norm").truth
    turns = Turns(truth.recipe.streams, truth.rotation, torch.zeros((), dtype=torch.float64))
    assert all(torch.allclose(turn, truth.rotation[name]) for name, turn in turns.exact().items())
    with torch.no_grad():
        for at, tensor in enumerate(turns.free.values()):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(at)))
    further = turns.matrices()
    for name, turn in turns.exact().items():
        assert torch.allclose(turn, further[name].detach() @ truth.rotation[name])
        assert not torch.allclose(turn, truth.rotation[name], atol=0.1)
    (stream,) = truth.recipe.streams
    assert torch.allclose(further[stream.name].sum(1), torch.ones(stream.size).double())


# Bad input


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"lr": -1.0}, "lr"),
        ({"held": 0}, "held"),
        ({"every": 0}, "every"),
        ({"soft_lr": 0.0}, "soft_lr"),
        ({"soft": 1.0}, "soft"),
        ({"points": "midpiont"}, "midpoint"),
        ({"precision": torch.float16}, "bfloat16"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], named: str, pair: Callable[[str], Pair]) -> None:
    case = pair("layer norm")
    with pytest.raises(DataError, match=named):
        learned_alignment(case.a, case.b, case.data, start=case.truth, **options)


def test_bad_data_and_networks_are_refused(pair: Callable[[str], Pair], nets: SimpleNamespace) -> None:
    case = pair("layer norm")
    with pytest.raises(DataError, match="iterator"):
        learned_alignment(case.a, case.b, iter(case.data), start=case.truth)
    with pytest.raises(DataError, match="no batch"):
        learned_alignment(case.a, case.b, [], start=case.truth)
    with pytest.raises(DataError, match="labels"):
        learned_alignment(case.a, case.b, [x for x, _ in case.data], start=case.truth)
    with pytest.raises(ArchitectureError):
        learned_alignment(case.a, nets.Decoder(bias=False), case.data, start=case.truth)
    with pytest.raises(ArchitectureError, match="ties"):
        learned_alignment(nets.Decoder(tied=True), nets.Decoder(tied=True), case.data, start=case.truth)
    broken = nets.Decoder()
    with torch.no_grad():
        next(broken.parameters())[0] = torch.nan
    for a, b, named in ((case.a, broken, "model b"), (broken, case.a, "model a")):
        with pytest.raises(NotFiniteError, match=named):
            learned_alignment(a, b, case.data, start=case.truth)

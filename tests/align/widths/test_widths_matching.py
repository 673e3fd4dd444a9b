"""Matching of unequal widths, against every choice of partners tried in turn and against planted networks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from isthmus.align import add_group, symmetry
from isthmus.align.terms import Arranged, Fixed, Product, Units
from isthmus.align.widths.matching import WidthMatching, match_widths
from isthmus.align.widths.padding import Side, frame
from isthmus.align.widths.rectangular import scaled
from isthmus.base.errors import ArchitectureError, CheckpointError, DataError, NotFiniteError, SymmetryError
from isthmus.zoo import resnet

X = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def drawn(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan = max(parameter[0].numel(), 1) ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan + (parameter.ndim == 1) * 0.5)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                noise = torch.randn(buffer.shape, generator=generator)
                buffer.copy_(noise.abs() + 0.5 if name.endswith("var") else 0.3 * noise)
    return model.eval()


def mlp(*widths: int, inputs: int = 20, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    sizes = (inputs, *widths)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 3))


class Attention(nn.Module):
    """Heads of which number and size vary, in a residual stream of fixed normalisation."""

    def __init__(self, heads: int, size: int, stream: int = 10, norm: bool = False) -> None:
        super().__init__()
        self.shape = heads, size
        self.stem = nn.Linear(20, stream)
        self.norm = nn.LayerNorm(stream) if norm else nn.Identity()
        self.q, self.v = nn.Linear(stream, heads * size), nn.Linear(stream, heads * size)
        self.k = nn.Linear(stream, heads * size, bias=False)
        self.o = nn.Linear(heads * size, stream)
        self.head = nn.Linear(stream, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        q, k, v = (layer(x).unflatten(-1, self.shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.head(torch.tanh(x + self.o(mixed.transpose(1, 2).flatten(2))))


TOKENS = torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(1))


def planted(narrow: nn.Module, wide: nn.Module, inputs: Tensor, seed: int, noise: float = 0.0) -> WidthMatching:
    """Hide the narrow network in the wide one: embedded in its first units, and these in a random order."""
    both = frame(*(symmetry(m, inputs, verify=False) for m in (narrow, wide)))
    order = both.b.random(torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    state = wide.state_dict()
    with torch.no_grad():
        for name, tensor in narrow.state_dict().items():
            if tensor.is_floating_point():
                there = both.crop(name, both.pad(name, torch.ones_like(tensor), "a"), "b").bool()
                mine = both.crop(name, both.pad(name, tensor, "a"), "b")
                own = mine + noise * tensor.abs().mean() * torch.randn(mine.shape, generator=generator)
                state[name] = torch.where(there, own if name in dict(narrow.named_parameters()) else mine, state[name])
    wide.load_state_dict(order.apply(state))
    return WidthMatching(both, order.inverse(), 0.0, {})


def agrees(found: WidthMatching, hidden: WidthMatching) -> bool:
    """Whether every unit of the narrow network has the partner that was planted."""
    return all(torch.equal(pairs, hidden_pairs(hidden, name)) for name, pairs in found.matched.items())


# The optimum


@given(st.integers(2, 4), st.integers(2, 5), st.integers(0, 10_000))
@settings(max_examples=8, deadline=None)
def test_one_hidden_layer_is_matched_as_well_as_by_any_choice(n: int, m: int, seed: int) -> None:
    a, b = drawn(mlp(n, inputs=4), seed), drawn(mlp(m, inputs=4), seed + 1)
    found = match_widths(a, b, example_inputs=X[:, :4], verify=False)
    v, w = (
        {k: t.numpy() / np.sqrt((t.numpy() ** 2).mean()) for k, t in model.double().state_dict().items()}
        for model in (a, b)
    )
    similarity = v["0.weight"] @ w["0.weight"].T + np.outer(v["0.bias"], w["0.bias"]) + v["2.weight"].T @ w["2.weight"]
    small = similarity if n <= m else similarity.T
    few, many = small.shape
    best = max(small[range(few), list(choice)].sum() for choice in itertools.permutations(range(many), few))
    entries = few * (4 + 1 + 3)
    assert found.objective * entries == pytest.approx(best, rel=1e-5)
    chosen = found.matched["0"].numpy()
    assert similarity[chosen[:, 0], chosen[:, 1]].sum() == pytest.approx(best, rel=1e-5)


def test_blocks_are_matched_as_well_as_by_any_choice() -> None:
    """Two blocks of 2 channels beside three blocks of 3: 3! blocks and (3 · 2)² choices inside."""

    def make(blocks: int, size: int) -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(2, blocks * size, 1), nn.GroupNorm(blocks, blocks * size), nn.ReLU()),
            nn.Conv2d(blocks * size, 2, 1),
        )

    x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    for seed in range(4):
        a, b = drawn(make(2, 2), 2 * seed), drawn(make(3, 3), 2 * seed + 1)
        found = match_widths(a, b, example_inputs=x, verify=False)
        v, w = (
            {
                k: (t / t.square().mean().sqrt()).numpy().reshape(t.shape[0], -1)
                for k, t in m.double().state_dict().items()
            }
            for m in (a, b)
        )
        names = ("0.weight", "0.bias", "1.weight", "1.bias")
        similarity = sum(v[n] @ w[n].T for n in names) + v["3.weight"].T @ w["3.weight"]
        best = max(
            sum(similarity[2 * g + j, 3 * c + inner[g][j]] for g, c in enumerate(blocks) for j in range(2))
            for blocks in itertools.permutations(range(3), 2)
            for inner in itertools.product(itertools.permutations(range(3), 2), repeat=2)
        )
        chosen = found.matched["0:2"]
        assert len(chosen) == 4
        assert float(sum(similarity[i, j] for i, j in chosen.tolist())) == pytest.approx(best, rel=1e-5)
        assert found.matched["0"].shape == (2, 2)
        assert sorted(len(item.units) for item in found.surplus) == [1, 5]


def test_equal_widths_are_a_permutation() -> None:
    a = drawn(mlp(7, 6), 0)
    order = symmetry(a, X).random(torch.Generator().manual_seed(3))
    found = match_widths(a, order.apply(a), X)
    assert not found.surplus
    assert all(torch.equal(found.permutation.indices[name], order.inverse().indices[name]) for name in order.indices)
    assert all(torch.allclose(score, torch.ones_like(score)) for score in found.scores.values())
    restored = found.narrow(order.apply(a))
    assert all(torch.equal(restored[name], tensor) for name, tensor in a.state_dict().items())


# Planted networks


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_a_narrow_network_is_found_inside_a_wide_one(seed: int, noise: float) -> None:
    narrow, wide = drawn(mlp(14, 12, 10), seed), drawn(mlp(25, 20, 16), 50 + seed)
    hidden = planted(narrow, wide, X, seed, noise)
    found = match_widths(narrow, wide, X, seed=seed)
    assert agrees(found, hidden)
    restricted = mlp(14, 12, 10)
    restricted.load_state_dict(found.narrow(wide))
    if not noise:
        assert all(torch.equal(restricted.state_dict()[name], t) for name, t in narrow.state_dict().items())
        assert all(torch.allclose(score, torch.ones_like(score)) for score in found.scores.values())
    assert {item.group: len(item.units) for item in found.surplus} == {"0": 11, "2": 8, "4": 6}
    assert all(item.network == "b" and (item.scores < 0.999).all() for item in found.surplus)


def test_a_wide_first_network_is_restricted_as_well() -> None:
    narrow, wide = drawn(mlp(14, 12), 0), drawn(mlp(25, 20), 1)
    planted(narrow, wide, X, 2)
    found = match_widths(wide, narrow, X)
    assert found.wide == "a"
    assert all(torch.equal(found.narrow(wide)[name], t) for name, t in narrow.state_dict().items())
    assert {item.network for item in found.surplus} == {"a"}
    wider = mlp(25, 20)
    wider.load_state_dict(found.widen(narrow))
    assert torch.allclose(wider(X), narrow(X), atol=1e-6)


@pytest.mark.parametrize("shortcut", ["conv", "pad"])
def test_a_residual_network_with_batch_norms_is_found_and_embedded(shortcut: Literal["conv", "pad"]) -> None:
    make = lambda width: drawn(resnet(8, width, shortcut=shortcut, seed=0), width)  # noqa: E731
    narrow, wide = make(1), make(2)
    hidden = planted(narrow, wide, IMAGES, 3)
    found = match_widths(narrow, wide, example_inputs=IMAGES, restarts=1)
    assert agrees(found, hidden)
    restricted = resnet(8, 1, shortcut=shortcut)
    restricted.load_state_dict(found.narrow(wide))
    assert torch.allclose(restricted.eval()(IMAGES), narrow(IMAGES), atol=1e-5)
    wider = resnet(8, 2, shortcut=shortcut)
    wider.load_state_dict(found.widen(narrow))
    assert torch.allclose(wider.eval()(IMAGES), narrow(IMAGES), atol=1e-5)
    assert found.embedding is not None
    assert found.embedding < 1e-10


def test_heads_and_units_inside_them_are_found() -> None:
    narrow, wide = drawn(Attention(2, 3), 0), drawn(Attention(3, 5), 1)
    hidden = planted(narrow, wide, TOKENS, 4)
    found = match_widths(narrow, wide, example_inputs=TOKENS)
    assert agrees(found, hidden)
    assert torch.allclose(drawn_from(Attention(2, 3), found.narrow(wide))(TOKENS), narrow(TOKENS), atol=1e-6)
    # a head of zeros attends to everything alike and gives nothing: zeros leave the function as it is
    assert torch.allclose(drawn_from(Attention(3, 5), found.widen(narrow))(TOKENS), narrow(TOKENS), atol=1e-6)


def drawn_from(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    model.load_state_dict(state)
    return model.eval()


def test_groups_correspond_by_their_axes_whatever_their_names() -> None:
    narrow, wide = drawn(mlp(5, 4), 0), drawn(mlp(7, 6), 1)
    claim = symmetry(wide, X)
    held = symmetry(wide, X, hold=["0", "2"])
    other = add_group(held, "second", [("2.weight", 0), ("2.bias", 0), ("4.weight", 1)])
    other = add_group(other, "first", [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)])
    one = match_widths(narrow, wide, X, symmetry_b=claim)
    two = match_widths(narrow, wide, X, symmetry_b=other)
    assert all(torch.equal(one.matched[name], two.matched[name]) for name in ("0", "2"))


# Activations


def test_activations_find_a_network_whose_surplus_units_are_silenced() -> None:
    narrow, wide = drawn(mlp(14, 12, act=nn.LeakyReLU), 0), drawn(mlp(25, 20, act=nn.LeakyReLU), 1)
    hidden = planted(narrow, wide, X, 5)
    # what surplus units say is not heard: else the units that hear them do something else than in the narrow network
    a, b = hidden.frame.labels("0", "a"), hidden.frame.labels("0", "b", hidden.permutation)
    with torch.no_grad():
        wide.get_parameter("2.weight")[:, b[(a < 0) & (b >= 0)]] = 0
    data = list(torch.randn(300, 20, generator=torch.Generator().manual_seed(9)).split(100))
    found = match_widths(narrow, wide, data, method="activations")
    assert agrees(found, hidden)
    assert found.method == "activations"
    assert found.by_weights == ()
    assert found.objective == pytest.approx(14 + 12, rel=1e-5)
    assert all(torch.allclose(score, torch.ones_like(score), atol=1e-5) for score in found.scores.values())


def test_correlations_of_matched_units_are_those_of_numpy() -> None:
    a, b = drawn(mlp(4), 0), drawn(mlp(6), 1)
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(2))
    found = match_widths(a, b, x, method="activations")
    u, v = (F.relu(m.get_submodule("0")(x)).detach().double().numpy() for m in (a, b))
    table = np.nan_to_num(np.corrcoef(u.T, v.T)[:4, 4:])
    chosen = found.matched["0"].numpy()
    assert np.allclose(found.scores["0"].numpy(), table[chosen[:, 0], chosen[:, 1]], atol=1e-5)
    best = max(table[range(4), list(choice)].sum() for choice in itertools.permutations(range(6), 4))
    assert found.objective == pytest.approx(best, rel=1e-5)
    surplus = found.surplus[0]
    assert np.allclose(surplus.scores.numpy(), table[:, surplus.units.numpy()].max(0), atol=1e-5)


class Raw(nn.Module):
    """A hidden layer that no module shows."""

    def __init__(self, size: int, deep: bool = True) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, 20))
        self.out = nn.Parameter(torch.zeros(4, size))
        self.last = nn.Sequential(nn.Linear(4, size), nn.ReLU(), nn.Linear(size, 2)) if deep else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(F.linear(x, self.w).relu(), self.out))


def test_what_no_activation_shows_is_matched_by_weights() -> None:
    narrow, wide = drawn(Raw(6), 0), drawn(Raw(9), 1)
    hidden = planted(narrow, wide, X, 6)
    found = match_widths(narrow, wide, [X], method="activations", restarts=1)
    assert found.by_weights == ("w",)
    assert torch.allclose(found.scores["w"], torch.ones(6).double())
    assert len(found.matched["last.0"]) == 6
    assert torch.equal(found.matched["w"], hidden_pairs(hidden, "w"))
    narrow, wide = drawn(Raw(6, deep=False), 0), drawn(Raw(9, deep=False), 1)
    hidden = planted(narrow, wide, X, 6)
    assert agrees(match_widths(narrow, wide, [X], method="activations"), hidden)


def hidden_pairs(hidden: WidthMatching, group: str) -> Tensor:
    a, b = hidden.frame.labels(group, "a"), hidden.frame.labels(group, "b", hidden.permutation)
    return torch.stack([a, b], 1)[(a >= 0) & (b >= 0)]


def test_blocks_are_seen_by_activations() -> None:
    def make(blocks: int, size: int) -> nn.Module:
        channels = blocks * size
        return nn.Sequential(
            *(nn.Conv2d(3, channels, 3), nn.GroupNorm(blocks, channels), nn.LeakyReLU(), nn.Conv2d(channels, 2, 1))
        )

    a, b = drawn(make(2, 3), 0), drawn(make(3, 4), 1)
    seen = match_widths(a, b, [IMAGES], method="activations")
    assert seen.by_weights == ()
    u, v = (m[:3](IMAGES).movedim(1, -1).flatten(0, -2).detach().double().numpy() for m in (a, b))  # type: ignore[index]
    table = np.corrcoef(u.T, v.T)[:6, 6:]
    chosen = seen.matched["0:2"].numpy()
    assert np.allclose(seen.scores["0:2"].numpy(), table[chosen[:, 0], chosen[:, 1]], atol=1e-5)
    blocks = seen.matched["0"].numpy()
    assert {(i // 3, j // 4) for i, j in chosen} == set(map(tuple, blocks))
    value = lambda g, c: max(  # noqa: E731
        sum(table[3 * g + j, 4 * c + k] for j, k in enumerate(order)) for order in itertools.permutations(range(4), 3)
    )
    best = max(sum(value(g, c) for g, c in enumerate(order)) for order in itertools.permutations(range(3), 2))
    assert seen.scores["0:2"].sum() == pytest.approx(best, rel=1e-5)


# Mixed widths, and what cannot be


def test_a_network_wider_here_and_narrower_there_is_matched() -> None:
    a, b = drawn(mlp(9, 5), 0), drawn(mlp(6, 8), 1)
    found = match_widths(a, b, X)
    assert {(item.group, item.network, len(item.units)) for item in found.surplus} == {("0", "a", 3), ("2", "b", 3)}
    assert found.embedding is None
    for use in (found.narrow, found.widen):
        with pytest.raises(ArchitectureError, match="neither network is the wider one: a is wider in 0"):
            use(b)


@pytest.mark.parametrize(
    ("make", "inputs", "group"),
    [
        (lambda n: nn.Sequential(nn.Linear(20, n), nn.LayerNorm(n), nn.ReLU(), nn.Linear(n, 2)), X, "0"),
        (lambda n: nn.Sequential(nn.Linear(20, n), nn.Softmax(-1), nn.Linear(n, 2)), X, "0"),
        (lambda n: Attention(2, 3, n, norm=True), TOKENS, "stem"),
    ],
)
def test_widening_is_refused_where_zeros_are_counted(
    make: Callable[[int], nn.Module], inputs: Tensor, group: str
) -> None:
    narrow, wide = drawn(make(5), 0), drawn(make(8), 1)
    planted(narrow, wide, inputs, 1)
    found = match_widths(narrow, wide, example_inputs=inputs)
    assert found.embedding is not None
    assert found.embedding > 1e-3
    with pytest.raises(SymmetryError, match=f"surplus units of {group} change the outputs"):
        found.widen(narrow)
    drawn_from(make(5), found.narrow(wide))


def test_widening_needs_a_measurement() -> None:
    narrow, wide = drawn(mlp(5), 0), drawn(mlp(8), 1)
    found = match_widths(narrow, wide, X, verify=False)
    with pytest.raises(SymmetryError, match="has not been measured"):
        found.widen(narrow)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (mlp(5), mlp(5, 4), r"only network b has 4\.weight, of shape \(3, 4\)"),
        (
            mlp(5, inputs=20),
            mlp(5, inputs=19),
            r"axis 1 of 0\.weight.*\(5, 20\) in a and \(5, 19\) in b.*keeps its order",
        ),
    ],
)
def test_networks_that_do_not_correspond_are_refused(a: nn.Module, b: nn.Module, message: str) -> None:
    claims = [symmetry(m, X[:, : next(m.parameters()).shape[1]], verify=False) for m in (a, b)]
    with pytest.raises(ArchitectureError, match=message):
        match_widths(a, b, symmetry_a=claims[0], symmetry_b=claims[1])


def test_ranks_structure_and_groups_must_correspond() -> None:
    linear = nn.Sequential(nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 3))
    conv = nn.Sequential(nn.Conv1d(20, 6, 1), nn.ReLU(), nn.Conv1d(6, 3, 1))
    with pytest.raises(ArchitectureError, match=r"0\.weight has shape \(6, 20\) in a and \(6, 20, 1\) in b"):
        frame(symmetry(linear, X), symmetry(conv, X[..., None]))
    held = symmetry(linear, X, hold="0")
    with pytest.raises(ArchitectureError, match="made of 6 units of 0 in a and of 6 positions that keep their order"):
        frame(symmetry(linear, X), held)
    x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    normed = [nn.Sequential(nn.Conv2d(2, 6, 1), nn.GroupNorm(g, 6), nn.Conv2d(6, 2, 1)) for g in (1, 3)]
    with pytest.raises(ArchitectureError, match=r"6 units of 0 in a and of \(3 units of 0 times 2 units of 0:2\)"):
        frame(*(symmetry(m, x) for m in normed))


def test_nesting_must_correspond() -> None:
    x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.GroupNorm(3, 6), nn.Conv2d(6, 2, 1))
    nested = symmetry(model, x)
    loose = replace(nested, groups=tuple(replace(group, within=()) for group in nested.groups))
    with pytest.raises(ArchitectureError, match=r"group 0:2 lies within \('0',\) in a, of 2 units, and within nothing"):
        frame(nested, loose)


class Picky(nn.Module):
    """Refuses numbers beyond 1.5, and lays every unit and its square side by side."""

    def __init__(self, size: int, pieces: int = 2) -> None:
        super().__init__()
        self.pieces = pieces
        self.up, self.down = nn.Linear(20, size), nn.Linear(pieces * size, 3)
        self.table = nn.Embedding(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        known = self.table(x.round().long() + 1).sum(-2)
        return known + self.down(torch.stack([h, h.square()][: self.pieces], -1).flatten(-2))


def test_inputs_are_used_as_they_are_where_noise_is_refused() -> None:
    x = X.clamp(-1, 1)
    narrow, wide = drawn(Picky(5), 0), drawn(Picky(8), 1)
    hidden = planted(narrow, wide, x, 2)
    found = match_widths(narrow, wide, example_inputs=x)
    assert agrees(found, hidden)
    assert found.embedding is not None
    assert found.embedding < 1e-12
    with pytest.raises(ArchitectureError, match=r"\(5 units of up times 2 positions that keep their order\)"):
        frame(symmetry(Picky(5), x), symmetry(Picky(10, 1), x))


class Joined(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(20, size) for size in sizes)
        self.out = nn.Linear(sum(sizes), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([part(x).relu() for part in self.parts], -1))


def test_segments_must_correspond() -> None:
    one, two = symmetry(Joined(4, 5), X), symmetry(Joined(4, 5, 3), X)
    with pytest.raises(ArchitectureError, match=r"only network b has parts\.2"):
        frame(one, two)
    cut = replace(two, layout={name: two.layout[name] for name in one.layout})
    with pytest.raises(ArchitectureError, match=r"\(4 units of parts\.0 and then 5 units of parts\.1\) in a"):
        frame(one, cut)
    stirred = Product((Arranged(Units("parts.0", 4), (1, 0, 3, 2)), Fixed(2)))
    odd = replace(one, layout={**one.layout, "out.weight": (Fixed(3), stirred)})
    with pytest.raises(ArchitectureError, match=r"and of \(4 units of parts\.0 times 2 positions"):
        frame(one, odd)
    wide = drawn(Joined(6, 7), 1)
    narrow = drawn(Joined(4, 5), 0)
    hidden = planted(narrow, wide, X, 3)
    assert agrees(match_widths(narrow, wide, X), hidden)


class Tied(nn.Module):
    """Two layers of one width, with one order in common if their outputs are added."""

    def __init__(self, size: int, other: int | None = None) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(20, size), nn.Linear(20, other or size)
        self.out = nn.Linear(size, 3)
        self.apart = other is not None
        self.more = nn.Linear(other or size, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.one(x).relu(), self.two(x).relu()
        return self.out(a) + self.more(b) if self.apart else self.out(a + b) + self.more(a)


def test_groups_that_are_tied_in_one_network_only_are_refused() -> None:
    tied, apart = symmetry(Tied(5), X), symmetry(Tied(6, 6), X)
    with pytest.raises(ArchitectureError, match="of which one is"):
        frame(tied, apart)
    with pytest.raises(ArchitectureError, match="of which one is"):
        frame(apart, tied)


def test_bad_arguments_are_refused() -> None:
    a, b = drawn(mlp(5), 0), drawn(mlp(8), 1)
    with pytest.raises(DataError, match="did you mean weights"):
        match_widths(a, b, X, method="weight")
    with pytest.raises(DataError, match="needs data"):
        match_widths(a, b, method="activations")
    with pytest.raises(DataError, match="needs inputs"):
        match_widths(a, b)
    with pytest.raises(DataError, match="no batch"):
        match_widths(a, b, [])
    found = match_widths(a, b, X)
    with pytest.raises(ArchitectureError, match="network b of the matching"):
        found.narrow(a)
    with torch.no_grad():
        next(b.parameters())[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="model b"):
        match_widths(a, b, X)


# As data


@pytest.mark.parametrize("method", ["weights", "activations"])
def test_it_is_saved_and_read_again_and_the_same_seed_gives_the_same(tmp_path: Path, method: str) -> None:
    a, b = drawn(mlp(5, 4), 0), drawn(mlp(8, 7), 1)
    found, again = (match_widths(a, b, X, method=method, seed=3) for _ in range(2))
    path = found.save(tmp_path / "widths.safetensors")
    loaded = WidthMatching.load(path)
    for other in (again, loaded):
        assert other.permutation == found.permutation
        for name in ("objective", "history", "method", "seed", "by_weights", "embedding"):
            assert getattr(other, name) == getattr(found, name)
        assert all(torch.equal(other.matched[name], pairs) for name, pairs in found.matched.items())
        assert all(torch.equal(other.scores[name], score) for name, score in found.scores.items())
    assert all(torch.equal(loaded.narrow(b)[name], tensor) for name, tensor in found.narrow(b).items())
    with pytest.raises(CheckpointError, match=r"end the name in \.safetensors"):
        found.save(tmp_path / "widths.pt")
    (tmp_path / "none.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError):
        WidthMatching.load(tmp_path / "none.safetensors")


def test_the_objective_is_that_of_the_matched_weights() -> None:
    a, b = drawn(mlp(5, 4), 0), drawn(mlp(8, 7), 1)
    found = match_widths(a, b, X, seed=1)
    assert found.objective == max(line[-1] for line in found.history)
    v, w = ({k: t.double().numpy() for k, t in m.state_dict().items()} for m in (a, b))
    for name in v:  # of each tensor, the geometric mean of the two root mean squares
        size = ((v[name] ** 2).mean() * (w[name] ** 2).mean()) ** 0.25
        v[name], w[name] = v[name] / size, w[name] / size
    (i, j), (k, m) = found.matched["0"].T.numpy(), found.matched["2"].T.numpy()
    value = (v["0.weight"][i] * w["0.weight"][j]).sum() + (v["0.bias"][i] * w["0.bias"][j]).sum()
    value += (v["2.weight"][k][:, i] * w["2.weight"][m][:, j]).sum() + (v["2.bias"][k] * w["2.bias"][m]).sum()
    value += (v["4.weight"][:, k] * w["4.weight"][:, m]).sum()
    assert found.objective == pytest.approx(value / (5 * 20 + 5 + 4 * 5 + 4 + 3 * 4), rel=1e-5)
    x, y = (
        np.concatenate([u["0.weight"][p], u["0.bias"][p, None], u["2.weight"][q][:, p].T], 1)
        for u, p, q in ((v, i, k), (w, j, m))
    )
    expected = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert np.allclose(found.scores["0"].numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("factor", [0.01, 30.0])
def test_the_size_of_a_layers_weights_changes_nothing(factor: float) -> None:
    a, b = drawn(mlp(5, 4), 0), drawn(mlp(8, 7), 1)
    before = match_widths(a, b, X)
    with torch.no_grad():
        b.get_parameter("2.weight").mul_(factor)
    after = match_widths(a, b, X)
    assert all(torch.equal(before.matched[name], after.matched[name]) for name in before.matched)


@given(st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_cropping_undoes_padding(seed: int) -> None:
    sizes = torch.randint(2, 6, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
    a, b = drawn(Attention(*sizes[:2]), seed), drawn(Attention(*sizes[2:]), seed + 1)
    both = frame(*(symmetry(m, TOKENS, verify=False) for m in (a, b)))
    sides: tuple[tuple[Side, nn.Module], ...] = (("a", a), ("b", b))
    for side, model in sides:
        for name, tensor in model.state_dict().items():
            padded = both.pad(name, tensor, side)
            assert padded.shape == both.common.shapes[name]
            assert torch.equal(both.crop(name, padded, side), tensor)
            assert padded.sum() == pytest.approx(float(tensor.sum()), abs=1e-5)


def test_a_parameter_of_zeros_stays_as_it_is() -> None:
    a = drawn(mlp(4), 0)
    with torch.no_grad():
        a.get_parameter("0.bias").zero_()
    models = a, drawn(mlp(6), 1)
    both = frame(*(symmetry(m, X, verify=False) for m in models))
    assert not scaled(both, models)[0]["0.bias"].any()

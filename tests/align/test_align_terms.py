"""The algebra of axes, against position-by-position enumeration in plain Python."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.align.terms import (
    ONE,
    Fixed,
    Product,
    Sum,
    Units,
    concatenation,
    from_json,
    groups_of,
    leaves,
    pieces,
    product,
    take,
    to_json,
)

# `g` and `h` are free; `m` has an order for each unit of g; `k` one for each pair of units of g and m; `z` of g and h
SIZES = {"g": 2, "h": 3, "m": 3, "k": 2, "z": 2}
WITHIN = {"g": (), "h": (), "m": ("g",), "k": ("g", "m"), "z": ("g", "h")}

free_leaf = st.sampled_from([Units("h", 3), Fixed(1), Fixed(2), Fixed(3)])
block = st.sampled_from(
    [
        Units("g", 2),
        Product((Units("g", 2), Units("m", 3))),
        Product((Units("g", 2), Fixed(2), Units("m", 3))),
        Product((Units("m", 3), Units("g", 2))),
        Product((Units("g", 2), Units("m", 3), Units("k", 2))),
        Product((Units("h", 3), Units("g", 2), Units("z", 2))),
        Product((Units("g", 2), Sum((Units("m", 3), Fixed(2), Units("h", 3))))),
        Product((Sum((Units("g", 2), Units("h", 3))), Fixed(2))),
    ]
)
trees = st.recursive(
    st.one_of(free_leaf, block),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: Sum(tuple(parts))),
        st.tuples(st.sampled_from([Fixed(2), Units("h", 3)]), inner.filter(lambda t: not _has(t, "h"))).map(Product),
    ),
    max_leaves=4,
).filter(lambda term: term.size <= 60)


def _has(term: Any, group: str) -> bool:
    return group in groups_of([term])


def indices(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, outer in WITHIN.items():
        shape = [SIZES[o] for o in outer]
        rows = [torch.randperm(SIZES[name], generator=generator) for _ in range(math.prod(shape))]
        drawn[name] = torch.stack(rows).reshape(*shape, SIZES[name])
    return drawn


def digits(term: Any, position: int) -> list[tuple[Any, int]]:
    """The leaves that a position belongs to, each with the digit there."""
    if isinstance(term, Sum):
        for part in term.parts:
            if position < part.size:
                return digits(part, position)
            position -= part.size
    if isinstance(term, Product):
        found: list[tuple[Any, int]] = []
        for part in reversed(term.parts):
            found = digits(part, position % part.size) + found
            position //= part.size
        return found
    return [(term, position)]


def position(term: Any, values: list[int], segments: list[int]) -> int:
    """The position of some digits, in the segments where another position lies; both lists are used up."""
    if isinstance(term, Sum):
        at = segments.pop(0)
        return sum(part.size for part in term.parts[:at]) + position(term.parts[at], values, segments)
    if isinstance(term, Product):
        total = 0
        for part in term.parts:
            total = total * part.size + position(part, values, segments)
        return total
    return values.pop(0)


def segments(term: Any, at: int) -> list[int]:
    """Which segment of each concatenation a position lies in, in the order in which `position` asks."""
    if isinstance(term, Sum):
        for number, part in enumerate(term.parts):
            if at < part.size:
                return [number, *segments(part, at)]
            at -= part.size
    if isinstance(term, Product):
        found: list[int] = []
        for part in reversed(term.parts):
            found = segments(part, at % part.size) + found
            at //= part.size
        return found
    return []


def source(axes: list[Any], place: tuple[int, ...], permutations: dict[str, torch.Tensor]) -> tuple[int, ...]:
    """Where new[place] comes from: every digit through its group's permutation at the digits of the outer groups."""
    here = [digits(term, at) for term, at in zip(axes, place, strict=True)]

    def outer_digit(group: str, axis: int) -> int:
        order = [here[axis], *(found for other, found in enumerate(here) if other != axis)]
        return next(digit for found in order for leaf, digit in found if getattr(leaf, "group", None) == group)

    result = []
    for axis, (term, at) in enumerate(zip(axes, place, strict=True)):
        values = []
        for leaf, digit in here[axis]:
            if isinstance(leaf, Units) and leaf.group in permutations:
                table: Any = permutations[leaf.group]
                for name in WITHIN[leaf.group]:
                    table = table[outer_digit(name, axis)]
                digit = int(table[digit])
            values.append(digit)
        result.append(position(term, values, segments(term, at)))
    return tuple(result)


def brute_force(tensor: torch.Tensor, axes: list[Any], permutations: dict[str, torch.Tensor]) -> torch.Tensor:
    new = torch.empty_like(tensor)
    for place in itertools.product(*map(range, tensor.shape)):
        new[place] = tensor[source(axes, place, permutations)]
    return new


def permuted(tensor: torch.Tensor, axes: list[Any], permutations: dict[str, torch.Tensor]) -> torch.Tensor:
    new = tensor.clone()
    for piece in pieces(axes):
        piece.put(new, take(piece.get(tensor), piece, permutations, WITHIN))
    return new


@given(st.lists(trees, max_size=2))
def test_pieces_cover_every_position_once(axes: list[Any]) -> None:
    shape = [term.size for term in axes]
    count = torch.zeros(shape)
    for piece in pieces(axes):
        part = piece.get(count)
        assert list(part.shape) == [dim.size for dim in piece.dims]
        piece.put(count, part + 1)
    assert torch.equal(count, torch.ones(shape))


@settings(deadline=None)
@given(st.lists(trees, min_size=1, max_size=2), st.integers(0, 1000))
def test_take_and_put_are_the_permutation_of_every_position(axes: list[Any], seed: int) -> None:
    drawn = indices(seed)
    tensor = torch.arange(math.prod(term.size for term in axes)).reshape([term.size for term in axes])
    assert torch.equal(permuted(tensor, axes, drawn), brute_force(tensor, axes, drawn))


@pytest.mark.parametrize(
    "axes",
    [
        # the weight of a grouped convolution: the order of the inputs depends on the block, which the other axis holds
        [Product((Units("g", 2), Units("k", 2))), Units("m", 3), Fixed(2)],
        [Units("m", 3), Product((Units("g", 2), Units("h", 3)))],
        [Units("z", 2), Units("h", 3), Units("g", 2)],
        # both axes hold the block: each inner order follows the block beside it
        [Product((Units("g", 2), Units("m", 3))), Product((Units("g", 2), Units("m", 3)))],
        [Sum((Units("h", 3), Product((Units("g", 2), Units("m", 3))))), Units("h", 3)],
        [Units("h", 3), Units("h", 3), Units("h", 3)],
    ],
    ids=str,
)
def test_an_order_that_depends_on_another_axis(axes: list[Any]) -> None:
    tensor = torch.randn([term.size for term in axes], generator=torch.Generator().manual_seed(0))
    changed = 0
    for seed in range(8):
        expected = brute_force(tensor, axes, indices(seed))
        assert torch.equal(permuted(tensor, axes, indices(seed)), expected)
        changed += not torch.equal(expected, tensor)
    assert changed >= 6


@given(trees, st.sampled_from(sorted(SIZES)), st.integers(0, 100))
def test_groups_without_indices_stay(term: Any, group: str, seed: int) -> None:
    drawn = {name: index for name, index in indices(seed).items() if name == group}
    tensor = torch.arange(term.size)
    new = permuted(tensor, [term], drawn)
    assert torch.equal(new, brute_force(tensor, [term], drawn))
    if not _has(term, group):
        assert torch.equal(new, tensor)


@given(trees)
def test_a_term_survives_json(term: Any) -> None:
    assert from_json(json.loads(json.dumps(to_json(term)))) == term


@pytest.mark.parametrize("value", ["x", [], ["/", 2, 3], {"group": "a"}, None, 2.5])
def test_other_json_is_no_term(value: Any) -> None:
    with pytest.raises(ValueError, match="not a term"):
        from_json(value)


@given(st.lists(trees, max_size=4))
def test_joined_factors_and_segments_are_flat_and_keep_the_size(parts: list[Any]) -> None:
    for join, kind, neutral, size in (
        (product, Product, 1, math.prod(part.size for part in parts)),
        (concatenation, Sum, 0, sum(part.size for part in parts)),
    ):
        joined = join(parts)
        assert joined.size == size
        if isinstance(joined, kind):
            assert len(joined.parts) != 1
            assert not any(isinstance(part, kind) or part.size == neutral for part in joined.parts)
        kept = [leaf for part in parts for leaf in leaves(part) if leaf.size != 1]
        assert [leaf for leaf in leaves(joined) if leaf.size != 1] == kept


def test_nothing_is_one_position_or_none() -> None:
    assert product([]) == ONE
    assert product([Fixed(1), ONE]) == ONE
    assert concatenation([Sum(()), Fixed(4)]) == Fixed(4)
    assert concatenation([]).size == 0

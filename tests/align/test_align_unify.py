"""Equations between axes: after each, both sides are permuted alike, or what cannot be is pinned."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.align.depend import admit, dependencies, mix
from isthmus.align.terms import ONE, Product, Sum, concatenation, leaves, product
from isthmus.align.unify import blocks, cut, equate, factor
from isthmus.align.unknown import Reason, Unknown, contexts, fixed, normal, pin, unknowns

REASON = Reason("operator", "test", "the test says so")
INPUT = Reason("input", "input", "an input")


def free(*terms: Any) -> list[Unknown]:
    return [leaf for leaf in dict.fromkeys(x for t in terms for x in leaves(normal(t))) if not leaf.pinned]


def digits(term: Any, at: int) -> list[tuple[Any, int]]:
    if isinstance(term, Sum):
        for part in term.parts:
            if at < part.size:
                return digits(part, at)
            at -= part.size
    if isinstance(term, Product):
        found: list[tuple[Any, int]] = []
        for part in reversed(term.parts):
            found = digits(part, at % part.size) + found
            at //= part.size
        return found
    return [(term, at)]


def paths(term: Any, at: int) -> list[int]:
    """The segments around a position, in order from the outside and the left."""
    if isinstance(term, Sum):
        for number, part in enumerate(term.parts):
            if at < part.size:
                return [number, *paths(part, at)]
            at -= part.size
    if isinstance(term, Product):
        found: list[int] = []
        for part in reversed(term.parts):
            found = paths(part, at % part.size) + found
            at //= part.size
        return found
    return []


def action(term: Any, drawn: dict[Unknown, torch.Tensor], within: dict[Unknown, tuple[Unknown, ...]]) -> list[int]:
    """Where every position of an axis comes from, found by comparing digits position by position."""
    term = normal(term)
    keys = [(tuple(paths(term, at)), tuple(digits(term, at))) for at in range(term.size)]
    place = {key: at for at, key in enumerate(keys)}
    sources = []
    for path, here in keys:
        known = dict(reversed(here))
        moved = []
        for leaf, digit in here:
            if leaf in drawn:
                table: Any = drawn[leaf]
                for outer in within[leaf]:
                    table = table[known[outer]]
                digit = int(table[digit])
            moved.append((leaf, digit))
        sources.append(place[path, tuple(moved)])
    return sources


def draw(*terms: Any, seed: int = 0) -> tuple[dict[Unknown, torch.Tensor], dict[Unknown, tuple[Unknown, ...]]]:
    """Random permutations of the free unknowns, dependent on what stands beside them in all the terms."""
    admit([[term] for term in terms])
    within = dependencies(free(*terms))
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for leaf, outer in within.items():
        shape = [other.size for other in outer]
        rows = [torch.randperm(leaf.size, generator=generator) for _ in range(math.prod(shape))]
        drawn[leaf] = torch.stack(rows).reshape(*shape, leaf.size)
    return drawn, within


def assert_alike(*terms: Any) -> None:
    """Every symmetry that is left acts in the same way on all terms, and on each as a permutation."""
    for seed in range(3):
        drawn, within = draw(*terms, seed=seed)
        first, *others = [action(term, drawn, within) for term in terms]
        assert sorted(first) == list(range(len(first)))
        for other in others:
            assert other == first


@st.composite
def terms(draw: st.DrawFn, size: int, pool: list[Unknown], depth: int = 2) -> Any:
    """A term of a given size over unknowns, some of which occur again."""
    splits = [n for n in range(2, size) if size % n == 0]
    kind = draw(st.sampled_from(["leaf", "product", "sum"]))
    if kind == "product" and splits and depth:
        n = draw(st.sampled_from(splits))
        return product([draw(terms(n, pool, depth - 1)), draw(terms(size // n, pool, depth - 1))])
    if kind == "sum" and size > 1 and depth:
        n = draw(st.integers(1, size - 1))
        return concatenation([draw(terms(n, pool, depth - 1)), draw(terms(size - n, pool, depth - 1))])
    if size == 1:
        return ONE
    again = [leaf for leaf in pool if leaf.size == size]
    if again and draw(st.booleans()):
        return draw(st.sampled_from(again))
    if draw(st.integers(0, 4)) == 0:
        return fixed(size, INPUT)
    pool.append(Unknown(size))
    return pool[-1]


@st.composite
def equations(draw: st.DrawFn) -> list[tuple[Any, Any]]:
    pool: list[Unknown] = []
    found = []
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.sampled_from([2, 3, 4, 6, 8, 12]))
        found.append((draw(terms(size, pool)), draw(terms(size, pool))))
    return found


@settings(deadline=None, max_examples=300)
@given(equations())
def test_any_equations_are_solved_or_pinned(pairs: list[tuple[Any, Any]]) -> None:
    for a, b in pairs:
        equate(a, b, REASON)
    for a, b in pairs:
        assert normal(a).size == normal(b).size == a.size
    admit([[term] for pair in pairs for term in pair])
    for a, b in pairs:
        assert_alike(a, b)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_splitting_and_cutting_keep_every_position(data: st.DataObject) -> None:
    pool: list[Unknown] = []
    size = data.draw(st.sampled_from([4, 6, 8, 12]))
    term = data.draw(terms(size, pool))
    if data.draw(st.booleans()):
        sizes = [data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))]
        sizes.append(size // sizes[0])
        joined = product(factor(term, sizes, REASON))
    else:
        sizes = [data.draw(st.integers(0, size))]
        sizes += [0, size - sizes[0]]
        parts = cut(term, sizes, REASON)
        assert [part.size for part in parts] == sizes
        joined = concatenation(parts)
    assert joined.size == size
    assert_alike(term, joined)


@pytest.mark.parametrize("seed", range(3))
def test_products_of_unequal_factors_meet_in_their_common_refinement(seed: int) -> None:
    a, b = [Unknown(8), Unknown(3)], [Unknown(4), Unknown(6)]
    equate(product(a), product(b), REASON)
    # 8 × 3 = 4 × 6: cut at 4 and at 8, into 4 × 2 × 3
    assert [leaf.size for leaf in leaves(normal(product(a)))] == [4, 2, 3]
    assert normal(product(a)) == normal(product(b))
    drawn, within = draw(product(a), product(b), seed=seed)
    assert any(action(product(a), drawn, within)[at] != at for at in range(24))


def test_products_without_a_common_refinement_are_pinned() -> None:
    a, b = [Unknown(6), Unknown(4)], [Unknown(4), Unknown(6)]
    equate(product(a), product(b), REASON)
    assert free(*a, *b) == []
    assert {leaf.pinned for leaf in unknowns([*a, *b])} == {REASON}


def test_sums_of_unequal_segments_meet_in_all_cuts() -> None:
    a, b = [Unknown(5), Unknown(3)], [Unknown(2), Unknown(4), Unknown(2)]
    equate(concatenation(a), concatenation(b), REASON)
    # cut at 5 and at 2, 6: segments of 2, 3, 1, 2
    assert [part.size for part in normal(concatenation(a)).parts] == [2, 3, 1, 2]
    assert_alike(concatenation(a), concatenation(b))
    assert len(free(*a)) == 3


def test_a_sum_of_whole_blocks_is_a_product_whose_blocks_are_cut() -> None:
    total = concatenation([Unknown(4), Unknown(6)])
    block = product([Unknown(5), Unknown(2)])
    equate(total, block, REASON)
    assert_alike(total, block)
    # 2 blocks, 3 blocks, and one order inside all of them
    assert sorted(leaf.size for leaf in free(total)) == [2, 2, 3]


def test_a_sum_across_blocks_is_pinned() -> None:
    total = concatenation([Unknown(3), Unknown(7)])
    block = product([Unknown(5), Unknown(2)])
    equate(total, block, REASON)
    assert free(total, block) == []


def test_cutting_through_blocks_pins() -> None:
    block = product([Unknown(5), Unknown(2)])
    parts = cut(block, [3, 7], REASON)
    assert free(block, *parts) == []
    assert [part.size for part in parts] == [3, 7]


def test_the_pinned_stay_pinned_with_the_first_reason() -> None:
    held, loose = fixed(6, INPUT), Unknown(6)
    equate(loose, held, REASON)
    pin(loose, REASON)
    assert {leaf.pinned for leaf in unknowns([loose])} == {INPUT}
    assert [leaf.pinned for leaf in factor(held, [2, 3], REASON)] == [INPUT, INPUT]
    assert [leaf.pinned for leaf in cut(held, [2, 4], REASON)] == [INPUT, INPUT]
    outer = product([Unknown(2), Unknown(3)])
    equate(outer, held, REASON)
    assert free(outer) == []


def test_sizes_that_differ_are_a_fault_of_the_rule() -> None:
    with pytest.raises(AssertionError, match="sizes 4 and 6 equated by test"):
        equate(Unknown(4), Unknown(6), REASON)


def test_blocks_of_a_concatenation_stay_in_their_segment() -> None:
    whole = concatenation([Unknown(4), Unknown(6)])
    blocks(whole, 2, REASON)
    assert [part.size for part in normal(whole).parts] == [4, 6]
    assert [[leaf.size for leaf in leaves(part)] for part in normal(whole).parts] == [[2, 2], [3, 2]]
    across = concatenation([Unknown(3), Unknown(7)])
    blocks(across, 5, REASON)
    assert free(across) == []


def test_an_inner_order_may_depend_on_the_block_unless_positions_are_mixed() -> None:
    axis, other = Unknown(6), Unknown(4)
    outer, inner = factor(axis, [2, 3], REASON)
    admit([[axis], [other, axis]])
    assert dependencies([outer, inner, other]) == {outer: (), inner: (outer,), other: (outer, inner)}
    mix([outer, inner, other], [0])
    found = dependencies([outer, inner, other])
    assert found[inner] == ()
    assert found[outer] == ()


def test_contexts_do_not_reach_into_other_segments() -> None:
    left, right, beside, block, inner = Unknown(2), Unknown(3), Unknown(4), Unknown(5), Unknown(2)
    found = dict(contexts([concatenation([left, right, product([block, inner])]), beside]))
    assert found[left] == {left, beside}
    assert found[right] == {right, beside}
    assert found[inner] == {inner, block, beside}
    assert found[beside] == {beside}


@given(st.integers(2, 5), st.integers(0, 50))
def test_dependencies_have_no_cycle(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    leaves_ = [Unknown(2) for _ in range(count)]
    for _ in range(4):
        kept = torch.rand(count, generator=generator) < 0.8
        admit([[leaf for leaf, keep in zip(leaves_, kept, strict=True) if keep]])
    found = dependencies(leaves_)
    for leaf, outer in found.items():
        assert leaf not in outer
        for position, other in enumerate(outer):
            assert set(found[other]) <= set(outer[:position])  # outermost first, all of them named
    for a, b in itertools.permutations(leaves_, 2):
        assert not (b in found[a] and a in found[b])

"""Assignments, against every permutation tried in turn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.align.assignment import assign, assign_blocks
from isthmus.base.errors import NotFiniteError


def best_flat(matrix: np.ndarray) -> float:
    n = len(matrix)
    return max(sum(matrix[i, p[i]] for i in range(n)) for p in itertools.permutations(range(n)))


def best_wreath(outer: np.ndarray, inner: dict[str, np.ndarray]) -> float:
    """The largest value over all orders of the blocks and, for each, all orders inside every block of every group."""
    size = len(outer)
    best = -np.inf
    for blocks in itertools.permutations(range(size)):
        value = sum(outer[a, blocks[a]] for a in range(size))
        for table in inner.values():
            m = table.shape[1]
            orders = itertools.product(itertools.permutations(range(m)), repeat=size)
            value += max(
                sum(table[a, j, blocks[a], order[a][j]] for a in range(size) for j in range(m)) for order in orders
            )
        best = max(best, value)
    return best


@given(st.integers(1, 6), st.integers(0, 10**6), st.booleans())
def test_an_assignment_is_the_best_of_all(n: int, seed: int, whole: bool) -> None:
    matrix = np.random.default_rng(seed).normal(size=(n, n))
    matrix = np.round(matrix) if whole else matrix  # ties
    found = assign(torch.from_numpy(matrix))
    assert sorted(found.tolist()) == list(range(n))
    assert matrix[np.arange(n), found.numpy()].sum() == pytest.approx(best_flat(matrix), abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.lists(st.integers(1, 3), max_size=2), st.integers(0, 10**6), st.booleans())
def test_a_block_assignment_is_the_best_of_the_wreath_product(
    size: int, widths: list[int], seed: int, whole: bool
) -> None:
    rng = np.random.default_rng(seed)

    def drawn(*shape: int) -> np.ndarray:
        values = rng.normal(size=shape)
        return np.round(values) if whole else values

    outer = drawn(size, size)
    inner = {f"i{k}": drawn(size, m, size, m) for k, m in enumerate(widths)}
    before = outer.copy()
    matched, picked = assign_blocks(torch.from_numpy(outer), {k: torch.from_numpy(v) for k, v in inner.items()})
    assert sorted(matched.tolist()) == list(range(size))
    value = outer[np.arange(size), matched.numpy()].sum()
    for name, table in inner.items():
        m = table.shape[1]
        assert picked[name].shape == (size, m)
        for a in range(size):
            assert sorted(picked[name][a].tolist()) == list(range(m))
            value += sum(table[a, j, matched[a], picked[name][a, j]] for j in range(m))
    assert value == pytest.approx(best_wreath(outer, inner), abs=1e-12)
    assert np.array_equal(outer, before)


def test_the_inside_of_the_blocks_decides_which_blocks_belong_together() -> None:
    outer = torch.zeros(2, 2)
    inner = torch.zeros(2, 2, 2, 2)
    inner[0, 0, 1, 1] = inner[0, 1, 1, 0] = inner[1, 0, 0, 0] = inner[1, 1, 0, 1] = 1.0
    matched, picked = assign_blocks(outer, {"units": inner})
    assert matched.tolist() == [1, 0]
    assert picked["units"].tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    matrix = torch.eye(3)
    matrix[1, 2] = bad
    with pytest.raises(NotFiniteError, match=r"\(3, 3\) holds NaN or infinity"):
        assign(matrix)
    inner = torch.zeros(2, 3, 2, 3)
    inner[0, 1, 1, 2] = bad
    with pytest.raises(NotFiniteError, match=r"similarity of units, of shape \(2, 3, 2, 3\)"):
        assign_blocks(torch.eye(2), {"units": inner})
    with pytest.raises(NotFiniteError):
        assign_blocks(torch.full((2, 2), bad), {"units": torch.zeros(2, 3, 2, 3)})

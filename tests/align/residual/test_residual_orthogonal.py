"""Orthogonal matrices, against scipy and by their properties."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.align.residual import procrustes, random_rotation
from isthmus.align.residual.heads import assign_heads
from isthmus.align.residual.orthogonal import complement


@settings(deadline=None, max_examples=20)
@given(size=st.integers(2, 12), seed=st.integers(0, 1000), hold_ones=st.booleans())
def test_a_drawn_rotation_is_orthogonal_and_holds_the_ones_if_told_to(size: int, seed: int, hold_ones: bool) -> None:
    drawn = random_rotation(size, torch.Generator().manual_seed(seed), hold_ones=hold_ones)
    assert torch.allclose(drawn.T @ drawn, torch.eye(size).double(), atol=1e-12)
    if hold_ones:
        assert torch.allclose(drawn @ torch.ones(size).double(), torch.ones(size).double(), atol=1e-12)
    assert torch.equal(drawn, random_rotation(size, torch.Generator().manual_seed(seed), hold_ones=hold_ones))


def test_several_are_drawn_at_once() -> None:
    drawn = random_rotation(4, torch.Generator().manual_seed(0), copies=(3,))
    assert drawn.shape == (3, 4, 4)
    assert torch.allclose(drawn @ drawn.mT, torch.eye(4).double().expand(3, 4, 4))


@pytest.mark.parametrize("size", [2, 3, 17])
def test_the_complement_is_orthonormal_and_sums_to_zero(size: int) -> None:
    basis = complement(size)
    assert torch.allclose(basis.T @ basis, torch.eye(size - 1).double())
    assert basis.sum(0).abs().max() < 1e-12


@settings(deadline=None, max_examples=20)
@given(size=st.integers(2, 9), seed=st.integers(0, 1000))
def test_procrustes_is_that_of_scipy(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, size, 2 * size))
    oracle, _ = scipy.linalg.orthogonal_procrustes(b.T, a.T)  # minimises |b.T R - a.T|
    found = procrustes(torch.from_numpy(a @ b.T))
    assert np.allclose(found.numpy(), oracle.T, atol=1e-9)


@settings(deadline=None, max_examples=15)
@given(size=st.integers(3, 9), seed=st.integers(0, 1000))
def test_with_the_ones_held_it_is_no_worse_than_any_such_rotation(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cross = torch.randn(size, size, generator=generator).double()
    best = procrustes(cross, hold_ones=True)
    assert torch.allclose(best @ best.T, torch.eye(size).double(), atol=1e-10)
    assert torch.allclose(best.sum(1), torch.ones(size).double(), atol=1e-10)
    value = (best * cross).sum()
    assert value <= (procrustes(cross) * cross).sum() + 1e-9
    for _ in range(10):
        other = random_rotation(size, generator, hold_ones=True)
        assert (other * cross).sum() <= value + 1e-9
        assert (best @ other * cross).sum() <= value + 1e-9


def test_a_planted_rotation_with_the_ones_held_is_recovered() -> None:
    generator = torch.Generator().manual_seed(0)
    turn = random_rotation(6, generator, hold_ones=True)
    b = torch.randn(6, 30, generator=generator).double()
    assert torch.allclose(procrustes(turn @ b @ b.T, hold_ones=True), turn, atol=1e-10)


def test_heads_are_assigned_under_any_rotation_inside_them() -> None:
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(5, 4, 20, generator=generator).double()
    order = torch.randperm(5, generator=generator)
    a = random_rotation(4, generator, copies=(5,)) @ b[order]
    assert torch.equal(assign_heads([torch.einsum("gmr,hnr->ghmn", a, b)], torch.zeros(5, 5)), order)

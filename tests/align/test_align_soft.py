"""Soft permutations: at a vertex the permutation itself, and linear in between."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from isthmus import symmetry
from isthmus.align.soft import one_hot, soft_apply, soft_take
from isthmus.align.terms import Units, pieces


class Heads(nn.Module):
    """Attention with units inside each head, a residual stream, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.side = nn.Linear(8, 3)
        self.leave = nn.Linear(11, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return self.leave(torch.cat([x, self.side(x).relu()], -1))


@pytest.mark.parametrize("seed", range(3))
def test_at_a_vertex_it_is_the_permutation(seed: int) -> None:
    model, x = Heads().double(), torch.randn(2, 3, 5, dtype=torch.float64)
    drawn = symmetry(model, x).random(torch.Generator().manual_seed(seed))
    state = model.state_dict()
    soft = soft_apply(drawn.symmetry, state, one_hot(drawn, torch.float64))
    assert {group.kind for group in drawn.symmetry.groups} >= {"free", "heads", "within"}
    for name, tensor in drawn.apply(state).items():
        assert torch.equal(soft[name], tensor), name


def test_equals_the_product_of_dense_matrices() -> None:
    terms = (Units("a", 3), Units("b", 4))
    a, b = torch.rand(3, 3), torch.rand(6, 4)  # not square: as many units as there are rows
    w = torch.randn(3, 4)
    found = soft_take(w, pieces(terms)[0], {"a": a, "b": b}, {"a": (), "b": ()})
    torch.testing.assert_close(found, a @ w @ b.T)


def test_is_differentiable_in_matrices_and_weights() -> None:
    model, x = Heads().double(), torch.randn(2, 3, 5, dtype=torch.float64)
    found = symmetry(model, x)
    state = {name: tensor.detach().requires_grad_() for name, tensor in model.state_dict().items()}
    matrices = {name: matrix.requires_grad_() for name, matrix in one_hot(found.identity(), torch.float64).items()}
    soft = soft_apply(found, state, matrices)
    torch.stack([(tensor * state[name].detach()).sum() for name, tensor in soft.items()]).sum().backward()
    assert all(matrix.grad is not None and matrix.grad.abs().sum() > 0 for matrix in matrices.values())
    # at the identity <w, P w> grows by |w|² where w itself moves
    torch.testing.assert_close(state["side.weight"].grad, state["side.weight"].detach())

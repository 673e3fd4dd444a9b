"""Where units are seen: in projections, beside unknown orders, on several axes of one activation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from isthmus.align import symmetry
from isthmus.align.nets.activations import activation_matching
from isthmus.align.nets.iterated import iterated_activation_matching
from isthmus.align.nets.views import views
from isthmus.align.symmetry import Point
from isthmus.align.terms import Units
from isthmus.base.batches import Batch


def correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    size = x.shape[1]
    return np.corrcoef(x.T, y.T)[:size, size:]


def transformer(seed: int = 0) -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 3, 10, dropout=0.1, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.Linear(5, 12), layer, nn.Linear(12, 4))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model.eval()


def test_heads_are_seen_in_a_projection_that_is_no_module() -> None:
    model = transformer()
    data = [torch.randn(6, 7, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    found = symmetry(model, data[0], verify=False)
    inner = {"1.self_attn", "1.self_attn:2", "1.self_attn:3"}
    assert inner <= set(found.by_name)
    fast = torch.backends.mha.get_fastpath_enabled()
    for seed in range(3):
        planted = found.random(torch.Generator().manual_seed(seed))
        result = activation_matching(found, model, planted.apply(model), [Batch((x,)) for x in data])
        assert result.unseen == ()
        assert result.permutation == planted.inverse()
        for name in inner:
            assert torch.allclose(result.scores[name], torch.ones(1, dtype=torch.float64), atol=1e-4)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    # without the model its attention cannot be looked into
    assert views(found)["1.self_attn"] == []


def test_nothing_comes_back_through_a_projection_and_the_rest_is_enough() -> None:
    model = transformer(1)
    data = [torch.randn(6, 7, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    found = symmetry(model, data[0], verify=False)
    planted = found.random(torch.Generator().manual_seed(0))
    result = iterated_activation_matching(found, model, planted.apply(model), data)
    assert result.permutation == planted.inverse()
    assert result.converged


class Across(nn.Module):
    """Attention to another stream, whose projections are three weights: only that of the queries reads the first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.other = nn.Linear(5, 12), nn.Linear(5, 8)
        self.attend = nn.MultiheadAttention(12, 3, kdim=8, vdim=8, batch_first=True)
        self.head = nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.other(x).tanh()
        x = self.stem(x).tanh()
        return self.head(x + self.attend(x, memory, memory, need_weights=False)[0])


def test_of_attention_to_another_stream_the_queries_are_seen() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Across().eval()
    data = [torch.randn(6, 7, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    found = symmetry(model, data[0], verify=False)
    values = {g.name for g in found.groups if ("attend.v_proj_weight", 0) in g.axes and g.kind == "within"}
    assert len(values) == 1
    planted = found.random(torch.Generator().manual_seed(0))
    result = activation_matching(found, model, planted.apply(model), [Batch((x,)) for x in data])
    assert set(result.unseen) == values
    for name in set(found.by_name) - values:
        assert torch.equal(result.permutation.indices[name], planted.inverse().indices[name])
    # where weights count as well, the values are found with the rest; the network has a single output
    assert iterated_activation_matching(found, model, planted.apply(model), data).permutation == planted.inverse()


class Outer(nn.Module):
    """The outer product of two hidden layers, flattened: beside each unit stand all of the other, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 4), nn.Linear(6, 5), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.left(x).tanh()[:, :, None] * self.right(x).exp()[:, None]).flatten(1))


def test_beside_an_unknown_order_units_are_seen_by_sorted_values() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        a, b = Outer(), Outer()
    data = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    found = symmetry(a, data)
    assert set(found.by_name) == {"left", "right"}
    result = activation_matching(found, a, b, [Batch((data,))])
    with torch.no_grad():
        x, y = ((m.left(data).tanh()[:, :, None] * m.right(data).exp()[:, None]).sort(2).values for m in (a, b))
    x, y = (z.transpose(1, 2).reshape(-1, 4).double().numpy() for z in (x, y))
    similarity = correlations(x, y)
    chosen = similarity[range(4), result.permutation.indices["left"].numpy()]
    assert result.scores["left"].numpy() == pytest.approx(chosen, abs=1e-5)
    assert chosen.sum() == pytest.approx(similarity[linear_sum_assignment(similarity, maximize=True)].sum(), abs=1e-5)
    planted = found.random(torch.Generator().manual_seed(1))
    assert activation_matching(found, a, planted.apply(a), [Batch((data,))]).permutation == planted.inverse()


class BlocksApart(nn.Module):
    """Blocks on an axis of their own, with one layer for the units of each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 12), nn.Linear(4, 4), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.norm(self.up(x).unflatten(-1, (3, 4)))).flatten(1))


def test_units_on_two_axes_of_one_activation_are_seen_together() -> None:
    """Samples of a unit must not run over blocks whose order differs between the networks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BlocksApart()
    data = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    found = symmetry(model, data)
    assert {name: group.size for name, group in found.by_name.items()} == {"up": 3, "up:2": 4, "norm": 4}
    blocks = Point("norm", 1, "input", 1, 3, Units("up", 3))
    found = replace(found, points=(*(p for p in found.points if p != blocks), blocks))
    assert [view.loose for view in views(found)["up:2"]] == [(1,)]
    for seed in range(3):
        planted = found.random(torch.Generator().manual_seed(seed))
        result = activation_matching(found, model, planted.apply(model), [Batch((data,))])
        assert result.unseen == ()
        assert result.permutation == planted.inverse()

"""The Sinkhorn operator against plain iterations that autograd unrolls; matching by it against planted permutations."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from isthmus.align import symmetry
from isthmus.align.nets.sinkhorn import sinkhorn
from isthmus.align.nets.sinkhorn_matching import Logits, sinkhorn_matching
from isthmus.align.nets.weights import weight_matching
from isthmus.base.errors import DataError, NotFiniteError

Parameters = dict[str, Tensor]


def scores(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unrolled(log_scores: Tensor, temperature: float, iterations: int = 3000) -> Tensor:
    """Sinkhorn & Knopp (1967) as it is written, for autograd to go through."""
    plan = (log_scores / temperature).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(-1, keepdim=True)
        plan = plan / plan.sum(-2, keepdim=True)
    return plan


# The operator


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 8),
    batch=st.integers(0, 3),
    seed=st.integers(0, 100),
    temperature=st.sampled_from([0.5, 1.0, 30.0]),
)
def test_rows_and_columns_sum_to_one(n: int, batch: int, seed: int, temperature: float) -> None:
    plan = sinkhorn(scores(*[2] * batch, n, n, seed=seed), temperature, tolerance=1e-9, iterations=20_000)
    assert plan.shape == (*[2] * batch, n, n)
    assert bool((plan >= 0).all())
    assert torch.allclose(plan.sum(-1), torch.ones(()).double(), atol=2e-9, rtol=0)
    assert torch.allclose(plan.sum(-2), torch.ones(()).double(), atol=2e-9, rtol=0)


def test_two_units_have_a_closed_form() -> None:
    s, temperature = scores(2, 2), 0.7
    expected = torch.sigmoid((s[0, 0] + s[1, 1] - s[0, 1] - s[1, 0]) / (2 * temperature))
    assert float(sinkhorn(s, temperature, tolerance=1e-12)[0, 0]) == pytest.approx(float(expected), abs=1e-12)


def test_it_is_the_unrolled_iteration() -> None:
    s = scores(3, 6, 6)
    assert torch.allclose(sinkhorn(s, 0.5, tolerance=1e-13), unrolled(s, 0.5), atol=1e-12, rtol=0)


def test_what_is_added_to_a_row_or_column_changes_nothing() -> None:
    s = scores(5, 5)
    shifted = s + 40 * scores(5, 1, seed=1) + 40 * scores(1, 5, seed=2)
    assert torch.allclose(sinkhorn(s, tolerance=1e-13), sinkhorn(shifted, tolerance=1e-13), atol=1e-11, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_a_low_temperature_it_is_the_best_assignment(dtype: torch.dtype) -> None:
    s = scores(7, 7, dtype=dtype)
    plan = sinkhorn(s, 1e-3)
    assert plan.dtype == dtype
    rows, columns = linear_sum_assignment(s.numpy(), maximize=True)
    assert torch.allclose(plan[rows, columns], torch.ones((), dtype=dtype), atol=1e-3)


@pytest.mark.parametrize("spread", [1e2, 1e4, 1e6])
def test_scores_far_apart_neither_overflow_nor_stop_gradients(spread: float) -> None:
    s = (spread * scores(2, 20, 20, dtype=torch.float32)).requires_grad_()
    plan = sinkhorn(s)
    assert bool(plan.isfinite().all())
    assert torch.allclose(plan.sum(-2), torch.ones(()), atol=1e-5)
    (plan * scores(2, 20, 20, seed=1, dtype=torch.float32)).sum().backward()
    assert s.grad is not None
    assert bool(s.grad.isfinite().all())


# Its gradient


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_the_gradient_is_that_of_finite_differences(temperature: float) -> None:
    s = scores(2, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, temperature, tolerance=1e-14, iterations=5000), (s,))


@pytest.mark.parametrize(("n", "temperature"), [(1, 1.0), (2, 0.5), (6, 0.2), (12, 1.0)])
def test_the_gradient_is_that_of_the_unrolled_iteration(n: int, temperature: float) -> None:
    weight = scores(3, n, n, seed=1)
    s, t = (scores(3, n, n).requires_grad_() for _ in range(2))
    (sinkhorn(s, temperature, tolerance=1e-13, iterations=50_000) * weight).sum().backward()
    (unrolled(t, temperature) * weight).sum().backward()
    assert s.grad is not None
    assert t.grad is not None
    assert torch.allclose(s.grad, t.grad, atol=1e-9, rtol=0)
    # no direction leads out of the scores that differ
    assert torch.allclose(s.grad.sum(-1), torch.zeros(()).double(), atol=1e-9)
    assert torch.allclose(s.grad.sum(-2), torch.zeros(()).double(), atol=1e-9)


def test_it_leaves_no_graph_of_iterations() -> None:
    plan = sinkhorn(scores(6, 6).requires_grad_(), 0.05)
    node, depth = plan.grad_fn, 0
    while node is not None:
        depth += 1
        node = node.next_functions[0][0] if node.next_functions else None
    assert depth == 3  # the operator, the division by the temperature, the leaf


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (torch.zeros(2, 3), {}, r"\(2, 3\)"),
        (torch.zeros(3), {}, r"\(3,\)"),
        (torch.zeros(2, 2, dtype=torch.int64), {}, "int64"),
        (torch.zeros(2, 2), {"temperature": 0.0}, "positive"),
        (torch.zeros(2, 2), {"temperature": float("nan")}, "positive"),
        (torch.zeros(2, 2), {"iterations": 0}, "positive"),
        (torch.zeros(2, 2), {"tolerance": -1.0}, "positive"),
    ],
)
def test_wrong_scores_and_numbers_are_refused(given: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        sinkhorn(given, **options)


def test_nan_and_overflow_are_refused() -> None:
    with pytest.raises(NotFiniteError, match=r"\(2, 2\)"):
        sinkhorn(torch.tensor([[0.0, float("nan")], [0.0, 0.0]]))
    with pytest.raises(NotFiniteError, match="over the temperature"):
        sinkhorn(torch.full((2, 2), 1e38), 1e-3)


# Logits


def test_the_first_matrices_hold_the_start_with_its_share(cases: dict[str, Any]) -> None:
    case = cases["group norm"]
    model = case.model(1)
    start = symmetry(model, case.data()).random(torch.Generator().manual_seed(3))
    logits = Logits(start.symmetry, start, dict(model.named_parameters()), 10, (0.5, 0.1), 0.7, 0)
    for name, matrix in logits.matrices(0).items():
        n = matrix.shape[-1]
        expected = 0.7 * nn.functional.one_hot(start.indices[name], n) + 0.3 / n
        assert torch.allclose(matrix, expected, atol=0.03)
    assert logits.rounded() == start
    undecided = Logits(start.symmetry, None, dict(model.named_parameters()), 10, (0.5, 0.1), 0.7, 0)
    for matrix in undecided.matrices(0).values():
        assert torch.allclose(matrix, torch.full((), 1 / matrix.shape[-1]), atol=0.03)


def test_the_temperature_falls_geometrically(cases: dict[str, Any]) -> None:
    case = cases["mlp"]
    model = case.model(1)
    logits = Logits(symmetry(model, case.data()), None, {}, 3, (4.0, 1.0), 0.5, 0)
    for name, tensor in logits.tensors.items():
        with torch.no_grad():
            tensor.copy_(scores(*tensor.shape, dtype=torch.float32))
        for step, temperature in enumerate((4.0, 2.0, 1.0)):
            assert torch.allclose(logits.matrices(step)[name], sinkhorn(tensor, temperature), atol=1e-2)


# Matching


def parameters(model: nn.Module) -> Parameters:
    return {name: p.detach() for name, p in model.named_parameters()}


PLANTED = ("mlp", "conv and batch norm", "flatten", "group norm", "residual", "attention", "nested", "tied embedding")


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_permutation_is_found(name: str, cases: dict[str, Any]) -> None:
    case = cases[name]
    model = case.model(3)
    found = symmetry(model, case.data(), verify=False)
    planted = found.random(torch.Generator().manual_seed(1))
    moved = planted.apply(model)
    result = sinkhorn_matching(found, parameters(model), parameters(moved), steps=120)
    assert result.permutation == planted.inverse()
    assert len(result.losses) == 120
    assert result.losses[-1] < result.losses[0]


@pytest.mark.parametrize("name", ["mlp", "conv and batch norm", "group norm"])
def test_it_needs_no_polish_to_find_it(name: str, cases: dict[str, Any]) -> None:
    case = cases[name]
    model = case.model(3)
    found = symmetry(model, case.data(), verify=False)
    planted = found.random(torch.Generator().manual_seed(1))
    result = sinkhorn_matching(found, parameters(model), parameters(planted.apply(model)), steps=150, polish=False)
    assert result.permutation == planted.inverse()
    assert result.losses[-1] < 0.1 * result.losses[0]
    assert len(result.history[0]) == 1


def one_hidden_layer(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))


def test_one_hidden_layer_is_matched_as_well_as_the_best_of_all_permutations() -> None:
    for seed in range(3):
        a, b = (parameters(one_hidden_layer(2 * seed + k)) for k in (0, 1))
        result = sinkhorn_matching(symmetry(one_hidden_layer(0), torch.ones(1, 3)), a, b, steps=20)
        v, w = ({n: t.double().numpy() for n, t in state.items()} for state in (a, b))
        best = max(
            (v["0.weight"] * w["0.weight"][p]).sum()
            + (v["0.bias"] * w["0.bias"][p]).sum()
            + (v["2.weight"] * w["2.weight"][:, p]).sum()
            for p in map(list, itertools.permutations(range(5)))
        )
        assert result.objective == pytest.approx(best, rel=1e-12)
        assert result.objective == max(result.history[0])


def test_the_first_loss_is_the_distance_to_the_mean_unit() -> None:
    """Undecided matrices replace every unit by the mean of all."""
    a, b = (parameters(one_hidden_layer(k)) for k in (0, 1))
    result = sinkhorn_matching(symmetry(one_hidden_layer(0), torch.ones(1, 3)), a, b, steps=1)
    v, w = ({n: t.double().numpy() for n, t in state.items()} for state in (a, b))
    apart = scale = 0.0
    for name, axis in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)):
        apart += ((v[name] - w[name].mean(axis, keepdims=True)) ** 2).sum()
        scale += ((v[name] ** 2).sum() + (w[name] ** 2).sum()) / 2
    assert np.isclose(result.losses[0], apart / scale, rtol=1e-2)


def test_it_never_falls_behind_its_start(cases: dict[str, Any]) -> None:
    case = cases["mlp"]
    a, b = (parameters(case.model(seed)) for seed in (3, 4))
    found = symmetry(case.model(3), case.data())
    start = weight_matching(found, a, b).permutation
    # two steps at a huge rate scatter the logits
    result = sinkhorn_matching(found, a, b, start=start, steps=2, lr=1e3, polish=False)
    assert result.permutation == start
    assert result.history[0][0] == result.objective > result.history[0][1]


def test_the_same_seed_gives_the_same_result_and_nothing_is_changed() -> None:
    a, b = (parameters(one_hidden_layer(k)) for k in (0, 1))
    copies = [{name: tensor.clone() for name, tensor in state.items()} for state in (a, b)]
    found, state = symmetry(one_hidden_layer(0), torch.ones(1, 3)), torch.get_rng_state()
    runs = [sinkhorn_matching(found, a, b, steps=10, seed=seed, device="cpu") for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert runs[0].losses == runs[1].losses != runs[2].losses
    assert runs[0].permutation == runs[1].permutation
    for now, before in zip((a, b), copies, strict=True):
        assert all(torch.equal(now[name], before[name]) for name in before)


def test_a_network_without_groups_stays() -> None:
    net = nn.Linear(3, 2)
    result = sinkhorn_matching(symmetry(net, torch.ones(1, 3)), parameters(net), parameters(net), steps=3)
    assert result.permutation.is_identity
    assert (result.objective, result.losses) == (0.0, ())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"lr": -0.1}, "lr is -0.1"),
        ({"temperature": (1.0, 0.0)}, r"temperature\[1\] is 0"),
        ({"sharpness": 1.0}, "sharpness is 1"),
    ],
)
def test_wrong_numbers_are_refused(options: dict[str, Any], message: str) -> None:
    net = one_hidden_layer(0)
    with pytest.raises(DataError, match=message):
        sinkhorn_matching(symmetry(net, torch.ones(1, 3)), parameters(net), parameters(net), **options)


def test_nan_is_refused_with_its_name() -> None:
    a, b = (parameters(one_hidden_layer(k)) for k in (0, 1))
    b["2.weight"] = b["2.weight"].clone().fill_(float("nan"))
    with pytest.raises(NotFiniteError, match=r"b: 2\.weight"):
        sinkhorn_matching(symmetry(one_hidden_layer(0), torch.ones(1, 3)), a, b)

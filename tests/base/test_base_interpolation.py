import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from isthmus.base.errors import ArchitectureError, DataError, NotFiniteError
from isthmus.merge import interpolate, weighted_mean


def states(count, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "w": torch.randn(3, 4, generator=generator).to(dtype),
            "b": torch.randn(3, generator=generator).to(dtype),
            "num_batches_tracked": torch.tensor(index + 5),
            "flag": torch.tensor([index == 0]),
        }
        for index in range(count)
    ]


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.3, 0.5, 0.9, 1.0, 2.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-15), (torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)],
)
def test_equals_numpy(alpha, dtype, tolerance):
    a, b = states(2, dtype)
    point = interpolate(a, b, alpha)
    for name in ("w", "b"):
        x, y = (state[name].double().numpy() for state in (a, b))
        np.testing.assert_allclose(point[name].double().numpy(), (1 - alpha) * x + alpha * y, atol=tolerance * 4)
        assert point[name].dtype == dtype
    assert point["num_batches_tracked"] == 5
    assert point["flag"].item() is True


def test_half_types_are_rounded_once():
    a, b = states(2, torch.bfloat16)
    exact = torch.lerp(a["w"].double(), b["w"].double(), 0.3).to(torch.bfloat16)
    assert torch.equal(interpolate(a, b, 0.3)["w"], exact)


@settings(max_examples=50, deadline=None)
@given(alpha=st.floats(-3, 3), seed=st.integers(0, 1000))
def test_ends_and_equal_entries_are_exact(alpha, seed):
    a, b = states(2, seed=seed)
    assert all(torch.equal(interpolate(a, b, 0.0)[name], a[name]) for name in a)
    assert all(torch.equal(interpolate(a, b, 1.0)[name], b[name]) for name in ("w", "b"))
    assert all(torch.equal(interpolate(a, a, alpha)[name], a[name]) for name in a)


def test_out_is_written_and_inputs_are_not():
    a, b = states(2)
    kept = {name: tensor.clone() for name, tensor in a.items()}
    out = {name: torch.zeros_like(tensor) for name, tensor in a.items()}
    assert interpolate(a, b, 0.25, out=out) is out
    fresh = interpolate(a, b, 0.25)
    assert all(torch.equal(out[name], fresh[name]) for name in a)
    assert all(torch.equal(kept[name], a[name]) for name in a)
    assert fresh["num_batches_tracked"].data_ptr() != a["num_batches_tracked"].data_ptr()


def test_writes_into_a_live_model():
    a, b, out = (nn.Linear(2, 3) for _ in range(3))
    interpolate(a.state_dict(), b.state_dict(), 0.5, out=out.state_dict())
    torch.testing.assert_close(out.weight, (a.weight + b.weight) / 2)


def test_mixed_types_take_the_type_of_the_first():
    a, b = {"w": torch.tensor([1.0], dtype=torch.float16)}, {"w": torch.tensor([3.0], dtype=torch.float64)}
    assert interpolate(a, b, 0.5)["w"].dtype == torch.float16
    assert interpolate(a, b, 0.5)["w"].item() == 2


def test_a_mask_with_the_same_infinities_is_kept():
    mask = torch.full((3, 3), -torch.inf).triu(1)
    a, b = ({"mask": mask.clone(), "w": torch.full((2,), value)} for value in (0.0, 1.0))
    assert torch.equal(interpolate(a, b, 0.5)["mask"], mask)
    assert torch.equal(weighted_mean([a, b])["mask"], mask)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_refuses_what_is_not_finite(value):
    a, b = states(2)
    b["w"][1, 2] = value
    with pytest.raises(NotFiniteError, match=r"network b: w of shape \(3, 4\) holds 1"):
        interpolate(a, b, 0.5)
    with pytest.raises(NotFiniteError, match="network 1: w"):
        weighted_mean([a, b], [1, 0])


def test_refuses_another_architecture():
    a, b = states(2)
    b["w"] = b["w"].T
    with pytest.raises(ArchitectureError, match=r"w: \(3, 4\) in a, \(4, 3\) in b"):
        interpolate(a, b, 0.5)
    with pytest.raises(ArchitectureError, match="only out has extra"):
        interpolate(a, a, 0.5, out={**a, "extra": torch.zeros(1)})
    with pytest.raises(ArchitectureError, match="0"):
        weighted_mean([a, {}])


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_refuses_alpha_that_is_no_place(alpha):
    a, b = states(2)
    with pytest.raises(DataError, match="expected a finite number"):
        interpolate(a, b, alpha)


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.floats(0, 10), min_size=1, max_size=5).filter(lambda w: sum(w) > 0.1), seed=st.integers(0, 99)
)
def test_weighted_mean_equals_numpy(weights, seed):
    parts = states(len(weights), seed=seed)
    mean = weighted_mean(parts, weights)
    for name in ("w", "b"):
        expected = np.average([part[name].double().numpy() for part in parts], axis=0, weights=weights)
        np.testing.assert_allclose(mean[name].numpy(), expected, atol=3e-6)
    assert mean["num_batches_tracked"] == 5


def test_weighted_mean_of_equals_is_exact_and_one_hot_selects():
    a, b, c = states(3)
    assert torch.equal(weighted_mean([a, a, a], [0.1, 0.2, 0.4])["w"], a["w"])
    assert torch.equal(weighted_mean([a, b, c], [0, 3, 0])["w"], b["w"])
    assert torch.equal(weighted_mean([a, b])["w"], interpolate(a, b, 0.5)["w"])
    assert weighted_mean([a, b])["w"].dtype == torch.float32


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "1 weights for 2"),
        ([1.0, -1.0], "none negative"),
        ([0.0, 0.0], "not all zero"),
        ([1.0, float("nan")], "finite"),
        ([1.0, float("inf")], "finite"),
    ],
)
def test_refuses_weights(weights, message):
    with pytest.raises(DataError, match=message):
        weighted_mean(states(2), weights)


def test_refuses_nothing():
    with pytest.raises(DataError, match="nothing to average"):
        weighted_mean([])

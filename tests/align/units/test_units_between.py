"""What the unit-level tools accept, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.align.units.between import between, warn_few_samples
from isthmus.base.errors import DataError, LayerNotFoundError, NotFiniteError
from isthmus.metrics import Moments, unit_correlation

NAN = float("nan")


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, units, generator=generator, dtype=torch.float64) for units in (4, 5))
    x[:, 1] = 3.0
    y[:, [0, 4]] = 0.0
    return x, y


def test_a_matrix_and_moments_give_the_same() -> None:
    x, y = samples()
    moments = Moments()
    moments.update({"x": x, "y": y})
    for found in (between(unit_correlation(x, y)), between(moments, "x", "y")):
        assert (found.constant_a, found.constant_b, found.shape) == ((1,), (0, 4), (4, 5))
        assert found.units_a.tolist() == [0, 2, 3]
        rows = [[np.corrcoef(x[:, i], y[:, j])[0, 1] for j in (1, 2, 3)] for i in (0, 2, 3)]
        np.testing.assert_allclose(found.values.numpy(), rows, atol=1e-12)


def test_lists_keep_their_digits_and_whole_numbers_are_refused() -> None:
    assert between([[0.1, 0.2]]).values.tolist() == [[0.1, 0.2]]
    with pytest.raises(DataError, match="floating point"):
        between([[1, 2]])
    with pytest.raises(DataError, match="expected numbers"):
        between([["a", "b"]])  # pyright: ignore[reportArgumentType]


def test_nan_outside_whole_rows_is_named() -> None:
    with pytest.raises(NotFiniteError, match=r"shape \(2, 2\) is NaN at \(0, 1\)"):
        between([[0.5, NAN], [0.1, 0.2]])
    with pytest.raises(NotFiniteError, match="infinity"):
        between([[0.5, float("inf")], [0.1, 0.2]])


def test_layers_go_with_moments_only() -> None:
    x, y = samples()
    moments = Moments([("x", "y")])
    moments.update({"x": x, "y": y})
    with pytest.raises(DataError, match="name two layers"):
        between(moments, "x")
    with pytest.raises(DataError, match="beside a matrix"):
        between(unit_correlation(x, x[:, [0, 2, 3]]), "x", "y")
    with pytest.raises(LayerNotFoundError, match="were not kept"):
        between(moments, "x", "x")


def test_a_layer_without_varying_units_is_refused() -> None:
    with pytest.raises(DataError, match="none of the 2 units of a varies"):
        between([[NAN], [NAN]])


def test_few_samples_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="'fc' has 9 units but 5 samples: read the held-out value"):
        warn_few_samples(5, 9, "fc", "read the held-out value")
    warn_few_samples(10, 9, "fc", "nothing is said")

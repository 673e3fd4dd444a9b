"""Matched units against the same after random rotations."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.optimize import linear_sum_assignment
from scipy.stats import ks_2samp, ortho_group

from isthmus.align.units.rotation import rotation_test
from isthmus.base.errors import DataError, LayerNotFoundError
from isthmus.metrics.moments import Moments

module = import_module("isthmus.align.units.rotation")


def moments(pairs: Any = "all", **layers: Any) -> Moments:
    found = Moments(pairs)
    found.update({name: torch.as_tensor(x) for name, x in layers.items()})
    return found


def pair(n=120, p=6, q=8, seed=0) -> Any:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p)) @ rng.standard_normal((p, p)) + 2
    return x, np.maximum(x @ rng.standard_normal((p, q)), 0) + rng.standard_normal((n, q))


def standardised(x):
    return (x - x.mean(0)) / x.std(0)


def matched(x, y, statistic):
    r = np.corrcoef(x.T, y.T)[: x.shape[1], x.shape[1] :]
    return r.max(1) if statistic == "semi" else r[linear_sum_assignment(-r)]


@pytest.mark.parametrize("statistic", ["bipartite", "semi"])
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(("p", "q"), [(6, 8), (8, 5)])
def test_rotated_correlations_are_those_of_rotated_samples(statistic, whiten, both, p, q, monkeypatch):
    rotations = {size: ortho_group.rvs(size, random_state=size) for size in (p, q)}
    monkeypatch.setattr(module, "_haar", lambda size, generator: torch.tensor(rotations[size]))
    x, y = pair(p=p, q=q)
    found = rotation_test(moments(a=x, b=y), "a", "b", rotations=2, statistic=statistic, whiten=whiten, both=both)
    x, y = standardised(x), standardised(y)
    if whiten:
        x, y = (z @ np.linalg.inv(np.asarray(sqrtm(np.corrcoef(z.T)))) for z in (x, y))
    observed = matched(x, y, statistic)
    rotated = matched(x @ rotations[p] if both else x, y @ rotations[q], statistic)
    assert found.observed == pytest.approx(observed.mean())
    assert found.rotated.tolist() == pytest.approx([rotated.mean()] * 2)
    np.testing.assert_allclose(found.curve, np.sort(observed)[::-1], atol=1e-9)
    np.testing.assert_allclose(found.rotated_curves[1], np.sort(rotated)[::-1], atol=1e-9)
    assert found.units.nanmean().item() == pytest.approx(observed.mean())
    assert int(found.units.isnan().sum()) == p - len(observed)


def test_rotations_are_uniform():
    generator = torch.Generator().manual_seed(0)
    ours = torch.stack([module._haar(4, generator) for _ in range(800)]).numpy()
    theirs = ortho_group.rvs(4, size=800, random_state=1)
    np.testing.assert_allclose(ours @ ours.transpose(0, 2, 1), np.broadcast_to(np.eye(4), ours.shape), atol=1e-12)
    for value in (lambda r: r[:, 0, 0], lambda r: r[:, 3, 1], lambda r: np.trace(r, axis1=1, axis2=2)):
        test: Any = ks_2samp(value(ours), value(theirs))
        assert test.pvalue > 0.01
    assert abs(np.linalg.det(ours).mean()) < 0.15


@pytest.mark.parametrize("options", [{}, {"statistic": "semi"}, {"whiten": True}])
def test_a_permuted_copy_is_local_and_a_rotated_one_is_not(options):
    rng = np.random.default_rng(0)
    n, p = 2000, 24
    x = rng.standard_normal((n, p))
    noise = 0.3 * rng.standard_normal((n, p))
    turned = {f"turned {i}": x @ ortho_group.rvs(p, random_state=i) + noise for i in range(4)}
    found = moments(a=x, local=x[:, rng.permutation(p)] + noise, **turned)
    local = rotation_test(found, "a", "local", rotations=19, **options)
    assert local.observed > 0.9
    assert local.rotated.max() < 0.6
    assert (local.p_value, local.effect > 10) == (0.05, True)
    tests = [rotation_test(found, "a", layer, rotations=19, **options) for layer in turned]
    assert np.median([test.p_value for test in tests]) > 0.05
    assert max(abs(test.effect) for test in tests) < 4
    for test in tests:
        assert test.observed == pytest.approx(float(test.rotated.mean()), abs=0.08)


@pytest.mark.parametrize("statistic", ["bipartite", "semi"])
def test_p_values_of_a_random_basis_are_uniform(statistic):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((60, 5))
    white = np.linalg.qr(standardised(x + rng.standard_normal((60, 5))))[0]
    p_values = [
        rotation_test(
            moments(a=x, b=white @ ortho_group.rvs(5, random_state=seed)),
            "a", "b", rotations=9, seed=seed, whiten=True, statistic=statistic,
        ).p_value
        for seed in range(120)
    ]  # fmt: skip
    # uniform on 0.1, 0.2, ..., 1
    counts = np.bincount(np.round(np.array(p_values) * 10).astype(int), minlength=11)[1:]
    assert counts.sum() == 120
    assert ((counts - 12) ** 2 / 12).sum() < 21.7  # the 0.01 quantile of chi² with 9 degrees of freedom
    assert np.mean(p_values) == pytest.approx(0.55, abs=0.08)


def test_a_permuted_copy_is_local_too_where_both_are_rotated():
    x, _ = pair(500, 12)
    found = rotation_test(moments(a=x, b=x[:, ::-1].copy()), "a", "b", both=True)
    assert found.observed == pytest.approx(1)
    assert found.p_value == 1 / 21
    assert found.both


def test_p_value_and_effect_are_counted_as_said():
    found = rotation_test(moments(**dict(zip("ab", pair(), strict=True))), "a", "b", rotations=30)
    rotated = found.rotated.numpy()
    assert found.p_value == (1 + (rotated >= found.observed).sum()) / 31
    assert found.effect == pytest.approx((found.observed - rotated.mean()) / rotated.std(ddof=1))
    np.testing.assert_allclose(found.rotated_curves.mean(1), rotated)
    assert found.rotated.dtype == torch.float64
    again = rotation_test(moments(**dict(zip("ab", pair(), strict=True))), "a", "b", rotations=30)
    other = rotation_test(moments(**dict(zip("ab", pair(), strict=True))), "a", "b", rotations=30, seed=1)
    assert found.rotated.tolist() == again.rotated.tolist() != other.rotated.tolist()


def test_units_follow_their_order_and_scale():
    x, y = pair()
    found = rotation_test(moments(a=x, b=y), "a", "b", rotations=1)
    moved = rotation_test(moments(a=3 * x[:, ::-1].copy() + 1, b=y[:, ::-1].copy()), "a", "b", rotations=1)
    assert moved.units.tolist() == pytest.approx(found.units.flip(0).tolist())
    assert np.isnan(found.effect)


def test_units_that_do_not_vary_are_left_out_and_named():
    x, y = pair()
    full = rotation_test(moments(a=x, b=y), "a", "b", rotations=3)
    x, y = np.insert(x, 2, 5, 1), np.insert(y, [0, 4], 0, 1)
    found = rotation_test(moments(a=x, b=y), "a", "b", rotations=3)
    assert (found.constant_a, found.constant_b) == ((2,), (0, 5))
    assert found.units[2].isnan()
    assert found.rotated.tolist() == pytest.approx(full.rotated.tolist())
    with pytest.raises(DataError, match="none of the 6 units"):
        rotation_test(moments(a=x[:, :6] * 0, b=y), "a", "b")


def test_one_unit_can_only_change_its_sign():
    x, _ = pair()
    found = rotation_test(moments(a=x, b=x[:, :1]), "a", "b", rotations=20)
    assert found.observed == pytest.approx(1)
    assert found.p_value > 0.2


def test_whitening_goes_by_the_span_of_dependent_units():
    x, y = pair(300)
    whole = rotation_test(moments(a=x, b=y), "a", "b", rotations=1, whiten=True)
    twice = rotation_test(
        moments(a=np.hstack([x, x[:, :1]]), b=y), "a", "b", rotations=1, whiten=True, statistic="semi"
    )
    assert np.isfinite(twice.observed)
    assert twice.units[0].item() == pytest.approx(twice.units[6].item())
    assert whole.whiten


def test_only_what_is_needed_must_be_kept():
    x, y = pair()
    few = moments([("a", "b"), ("b", "b")], a=x, b=y)
    assert rotation_test(few, "a", "b", rotations=2).rotated.isfinite().all()
    with pytest.raises(LayerNotFoundError, match="were not kept"):
        rotation_test(few, "a", "b", whiten=True)
    with pytest.raises(LayerNotFoundError, match="were not kept"):
        rotation_test(few, "a", "b", both=True)


def test_bad_arguments_are_refused_and_few_samples_warned_about():
    x, y = pair()
    found = moments(a=x, b=y)
    greedy: Any = "greedy"
    with pytest.raises(DataError, match="rotations is 0"):
        rotation_test(found, "a", "b", rotations=0)
    with pytest.raises(DataError, match="statistic is 'greedy'"):
        rotation_test(found, "a", "b", statistic=greedy)
    with pytest.raises(LayerNotFoundError):
        rotation_test(found, "a", "c")
    with pytest.warns(UserWarning, match="layer 'b' has 8 units but 8 samples") as caught:
        rotation_test(moments(a=x[:8], b=y[:8]), "a", "b", whiten=True)
    assert caught[0].filename == __file__


def test_the_picture_and_the_file_hold_the_curves():
    import matplotlib.pyplot as plt

    found = rotation_test(moments(**dict(zip("ab", pair(), strict=True))), "a", "b", rotations=3)
    ax = found.plot()
    lines = ax.get_lines()
    assert len(lines) == 4
    np.testing.assert_allclose(np.asarray(lines[3].get_ydata()), found.curve)
    assert found.plot(ax) is ax
    plt.close("all")
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["rotated"] == found.rotated.tolist()
    assert content["statistic"] == "bipartite"

from __future__ import annotations

import math
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from isthmus.align.units.one_to_one import bipartite_matching, semi_matching
from isthmus.align.units.stability import matching_stability
from isthmus.base.errors import DataError, LayerNotFoundError
from isthmus.metrics import Moments


def layers(n=200, p=8, q=10, noise=0.3, seed=0):
    """The first half of the units of x is seen by y, the rest of both is noise."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((n, p)) + 5, rng.standard_normal((n, q))
    y[:, : p // 2] = x[:, : p // 2][:, ::-1] + noise * rng.standard_normal((n, p // 2))
    return x, y


def folds(x, y, parts=10, pairs: Any = "all", **others):
    rows = np.array_split(np.arange(len(x)), parts)
    found = [Moments(pairs) for _ in rows]
    for moments, chosen in zip(found, rows, strict=True):
        moments.update({name: torch.tensor(z[chosen]) for name, z in {"x": x, "y": y, **others}.items()})
    return found


def direct(x, y):
    p = x.shape[1]
    partner = np.full(p, -1)
    rows, columns = linear_sum_assignment(-np.corrcoef(x.T, y.T)[:p, p:])
    partner[rows] = columns
    return partner


@pytest.mark.parametrize(("parts", "share", "size"), [(6, 0.5, 3), (5, 0.2, 1), (4, 0.9, 3), (4, 0.01, 1)])
def test_every_draw_is_the_matching_of_its_samples(parts, share, size):
    x, y = layers(noise=2)
    found = matching_stability(folds(x, y, parts), "x", "y", share=share, draws=10**6)
    assert [tuple(chosen) for chosen in found.drawn.tolist()] == list(combinations(range(parts), size))
    rows = np.array_split(np.arange(len(x)), parts)
    assert found.matching.partner.tolist() == direct(x, y).tolist()
    for chosen, partners in zip(found.drawn, found.partners, strict=True):
        seen = np.concatenate([rows[part] for part in chosen])
        assert partners.tolist() == direct(x[seen], y[seen]).tolist()
    expected = (found.partners.numpy() == direct(x, y)).mean(0)
    np.testing.assert_allclose(found.frequency, expected, rtol=1e-15)
    assert 0 < found.mean < 1
    assert found.mean == pytest.approx(expected.mean())


def test_units_that_are_shared_are_reliable_and_others_are_not():
    found = matching_stability(folds(*layers()), "x", "y")
    assert found.matching.partner[:4].tolist() == [3, 2, 1, 0]
    assert found.reliable().tolist() == [True] * 4 + [False] * 4
    assert found.reliable(0).all()
    assert found.frequency[:4].tolist() == [1] * 4
    assert found.partners.shape == (50, 8)
    assert found.drawn.shape == (50, 5)
    assert repr(found).startswith("Stability(50 draws of 5 parts: mean frequency 0.")
    assert repr(found).endswith("4 of 8 units reliable)")


def test_draws_are_distinct_and_repeatable():
    parts = folds(*layers(), parts=6)
    found, again, other = (matching_stability(parts, "x", "y", draws=15, seed=seed) for seed in (0, 0, 1))
    drawn = [tuple(chosen) for chosen in found.drawn.tolist()]
    assert len(set(drawn)) == 15
    assert all(list(chosen) == sorted(set(chosen)) for chosen in drawn)
    assert torch.equal(found.partners, again.partners)
    assert torch.equal(found.drawn, again.drawn)
    assert not torch.equal(found.drawn, other.drawn)


def test_parts_are_left_as_they_are_and_other_layers_do_not_matter():
    x, y = layers()
    parts = folds(x, y, z=x**2, w=x - 1)
    before = [part.covariance("x", "y").clone() for part in parts]
    found = matching_stability(parts, "x", "y", draws=5)
    for part, covariance in zip(parts, before, strict=True):
        assert part.count("x") == 20
        assert part.names == ("x", "y", "z", "w")
        assert torch.equal(part.covariance("x", "y"), covariance)
    few = matching_stability(folds(x, y, pairs=[("y", "x")]), "x", "y", draws=5)
    assert torch.equal(found.partners, few.partners)
    back = matching_stability(parts, "y", "x", draws=5)
    assert back.matching.partner.tolist() == found.matching.inverse().partner.tolist()


def test_another_matcher():
    x, y = layers()
    parts = folds(x, y)
    semi = matching_stability(parts, "x", "y", draws=4, matcher=semi_matching)
    assert semi.matching.kind == "semi"
    assert semi.matching.partner.tolist() == np.corrcoef(x.T, y.T)[:8, 8:].argmax(1).tolist()
    limited = matching_stability(parts, "x", "y", draws=4, matcher=partial(bipartite_matching, minimum=0.5))
    assert limited.matching.partner.tolist() == [3, 2, 1, 0, -1, -1, -1, -1]
    assert limited.frequency.nan_to_num(-1).tolist() == [1, 1, 1, 1, -1, -1, -1, -1]
    assert limited.mean == 1
    assert limited.reliable(0).tolist() == [True] * 4 + [False] * 4


def test_constant_units_are_named():
    x, y = layers()
    x[:, 1], y[:, 9] = 1e6 + 0.1, 0
    found = matching_stability(folds(x, y), "x", "y", draws=5)
    assert found.matching.constant_a == (1,)
    assert found.matching.constant_b == (9,)
    assert found.frequency.isnan().tolist() == [False, True] + [False] * 6
    assert (found.partners[:, 1] == -1).all()


def test_a_layer_that_is_still_in_a_draw_matches_nothing_there():
    x, y = layers(n=90)
    y[30:] = 1.0
    found = matching_stability(folds(x, y, 3), "x", "y", share=1 / 3)
    assert found.partners[0].ge(0).all()
    assert found.partners[1:].eq(-1).all()
    np.testing.assert_allclose(found.frequency, (found.partners[0] == found.matching.partner) / 3)


def test_wrong_use_is_refused():
    x, y = layers()
    parts = folds(x, y, 4)
    for wrong, message in (
        ({"parts": parts[:1]}, "there are 1 parts"),
        ({"parts": [*parts, parts[0]]}, "given twice"),
        ({"parts": [*parts, *folds(x, y[:, :7], 2)]}, "part 0 of the data has units .*'y': 10.*, part 4 has .*'y': 7"),
        ({"draws": 0}, "draws is 0"),
        ({"share": 1.0}, "share is 1.0"),
        ({"share": 0.0}, "share is 0.0"),
        ({"share": math.nan}, "share is nan"),
    ):
        with pytest.raises(DataError, match=message):
            matching_stability(**({"parts": parts, "a": "x", "b": "y"} | wrong))
    with pytest.raises(DataError, match="none of the 10 units of b varies"):
        matching_stability(folds(x, np.zeros_like(y), 4), "x", "y")
    with pytest.raises(LayerNotFoundError, match=r"part 0 of the data: .*'z'"):
        matching_stability(parts, "x", "z")
    with pytest.raises(LayerNotFoundError, match=r"part 4 of the data: .*no batch"):
        matching_stability([*parts, Moments()], "x", "y")
    with pytest.raises(LayerNotFoundError, match="were not kept"):
        matching_stability(folds(x, y, 4, pairs="none"), "x", "y")
    with pytest.raises(DataError, match="level is 95"):
        matching_stability(parts, "x", "y").reliable(95)

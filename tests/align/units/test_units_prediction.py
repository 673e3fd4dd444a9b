"""Predictions of units from units, against scikit-learn on the samples themselves."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Lasso, LinearRegression, Ridge, orthogonal_mp
from sklearn.metrics import r2_score

from isthmus.align import (
    Prediction,
    bipartite_matching,
    omp_prediction,
    one_to_one_prediction,
    ridge_prediction,
    sparse_prediction,
)
from isthmus.base.errors import DataError, LayerNotFoundError, NotFiniteError
from isthmus.metrics import Moments


def samples(n: int = 400, p: int = 7, q: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated predictors with means and scales of their own, and targets of some of them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p)) @ (np.eye(p) + 0.4 * rng.standard_normal((p, p)))
    x = np.maximum(x, -1) * rng.uniform(0.3, 3, p) + rng.uniform(-5, 5, p)
    weights = rng.standard_normal((p, q)) * (rng.random((p, q)) < 0.5)
    return x, x @ weights + rng.standard_normal((n, q)) * rng.uniform(0.1, 1, q) + 3


def moments(x: np.ndarray, y: np.ndarray) -> Moments:
    found = Moments([("x", "x"), ("x", "y")])
    found.update({"x": torch.from_numpy(x), "y": torch.from_numpy(y)})
    return found


def parts(x: np.ndarray, y: np.ndarray, count: int) -> list[Moments]:
    return [moments(a, b) for a, b in zip(np.array_split(x, count), np.array_split(y, count), strict=True)]


def standard(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / x.std(0)


def dense(found: Prediction) -> np.ndarray:
    return found.coefficients.to_dense().numpy()


def objective(x: np.ndarray, y: np.ndarray, w: np.ndarray, penalty: float) -> np.ndarray:
    return np.square(y - x @ w.T).sum(0) / (2 * len(x)) + penalty * np.abs(w).sum(1)


@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("penalty", [0.003, 0.05, 0.3])
def test_lasso_is_that_of_scikit_learn(penalty: float, standardise: bool) -> None:
    x, y = samples()
    found = sparse_prediction(moments(x, y), "x", "y", penalty=penalty, standardise=standardise, tolerance=1e-10)
    given_x, given_y = (standard(x), standard(y)) if standardise else (x - x.mean(0), y - y.mean(0))
    expected = Lasso(penalty, tol=1e-12, max_iter=100_000).fit(given_x, given_y).coef_
    mine = dense(found) if standardise else found.raw_coefficients.numpy()
    np.testing.assert_array_equal(mine != 0, expected != 0)
    np.testing.assert_allclose(mine, expected, atol=1e-7)
    ours, theirs = (objective(given_x, given_y, w, penalty) for w in (mine, expected))
    assert (ours <= theirs * (1 + 1e-7)).all()
    np.testing.assert_array_equal(found.count.numpy(), (expected != 0).sum(1))
    assert float(found.kkt_violation.max()) <= 1e-10


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.02, 1.2), n=st.integers(12, 60))
def test_conditions_of_optimality_hold_on_the_samples(seed: int, share: float, n: int) -> None:
    x, y = (standard(z) for z in samples(n, 9, 3, seed))
    penalty = share * float(np.abs(x.T @ y).max()) / n
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer samples than predictors
        found = sparse_prediction(moments(x, y), "x", "y", penalty=penalty, tolerance=1e-9)
    w = dense(found)
    slope = x.T @ (y - x @ w.T) / n
    assert (np.abs(slope) <= penalty + 1e-8).all()
    np.testing.assert_allclose(slope[w.T != 0], penalty * np.sign(w.T[w.T != 0]), atol=1e-8)
    np.testing.assert_allclose(found.loss, np.square(y - x @ w.T).mean(0) / 2, atol=1e-8)


def test_a_path_is_that_of_single_penalties() -> None:
    x, y = samples()
    many = [0.5, 0.1, 0.02, 0.004]
    path = sparse_prediction(moments(x, y), "x", "y", penalty=[0.02, 0.5, 0.004, 0.1], tolerance=1e-9).path
    assert path.penalties.tolist() == many
    for place, penalty in enumerate(many):
        alone = sparse_prediction(moments(x, y), "x", "y", penalty=penalty, tolerance=1e-9)
        torch.testing.assert_close(path.r2_train[:, place], alone.r2_train, atol=1e-8, rtol=0)
        assert torch.equal(path.count[:, place], alone.count)


def test_sums_of_two_units_are_found() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 30))
    pairs = np.stack([rng.permutation(30)[:2] for _ in range(12)])
    y = x[:, pairs[:, 0]] + x[:, pairs[:, 1]] + 0.1 * rng.standard_normal((2000, 12))
    found = sparse_prediction(parts(x, y, 5), "x", "y", rule="one_se", held_out=moments(x[:500], y[:500]))
    for target, pair in enumerate(pairs):
        heaviest = np.abs(dense(found)[target]).argsort()[-2:]
        assert set(heaviest) == set(pair)
    few = sparse_prediction(moments(x, y), "x", "y", penalty=0.2)
    assert [set(row.nonzero()[0]) for row in dense(few)] == [set(pair) for pair in pairs]
    greedy = omp_prediction(moments(x, y), "x", "y", count=2)
    assert [set(row.nonzero()[0]) for row in dense(greedy)] == [set(pair) for pair in pairs]


MAKERS: dict[str, Callable[..., Prediction]] = {
    "lasso": lambda given, **how: sparse_prediction(given, "x", "y", penalty=0.05, **how),
    "ridge": lambda given, **how: ridge_prediction(given, "x", "y", penalty=0.1, **how),
    "omp": lambda given, **how: omp_prediction(given, "x", "y", count=3, **how),
    "one-to-one": lambda given, **how: one_to_one_prediction(given, "x", "y", **how),
}


@pytest.mark.parametrize("method", MAKERS)
def test_r2_is_that_of_the_predictions(method: str) -> None:
    x, y = samples(seed=1)
    unseen_x, unseen_y = (z + 0.3 for z in samples(150, seed=2))  # other means: the intercept counts
    found = MAKERS[method](moments(x, y), held_out=moments(unseen_x, unseen_y))
    assert found.method == method
    assert found.r2 is not None
    np.testing.assert_allclose(found.r2_train, r2_score(y, found.predict(x).numpy(), multioutput="raw_values"))
    predicted = found.predict(torch.from_numpy(unseen_x)).numpy()
    np.testing.assert_allclose(found.r2, r2_score(unseen_y, predicted, multioutput="raw_values"), rtol=1e-9)
    np.testing.assert_allclose(found.loss, np.square(unseen_y - predicted).mean(0) / y.var(0) / 2, rtol=1e-9)
    scaled = dense(found) * y.std(0)[:, None] / x.std(0)
    np.testing.assert_allclose(found.raw_coefficients, scaled, atol=1e-12)
    assert f"by {method}: mean held-out R²" in repr(found)


@pytest.mark.parametrize("method", MAKERS)
def test_parts_are_the_whole(method: str) -> None:
    x, y = samples(seed=3)
    whole, pieces = MAKERS[method](moments(x, y)), MAKERS[method](parts(x, y, 7))
    np.testing.assert_allclose(dense(whole), dense(pieces), atol=1e-9)
    torch.testing.assert_close(whole.intercept, pieces.intercept)


def test_ridge_is_that_of_scikit_learn() -> None:
    x, y = samples()
    found = ridge_prediction(moments(x, y), "x", "y", penalty=[0.01, 1.0])
    assert found.penalty == 0.01
    models = [Ridge(penalty * len(x)).fit(standard(x), standard(y)) for penalty in (1.0, 0.01)]
    for place, model in enumerate(models):
        score = r2_score(standard(y), model.predict(standard(x)), multioutput="raw_values")
        np.testing.assert_allclose(found.path.r2_train[:, place], score, atol=1e-10)
    np.testing.assert_allclose(dense(found), models[1].coef_, atol=1e-10)


def test_no_penalty_is_least_squares_of_least_norm() -> None:
    x, y = samples()
    expected = LinearRegression().fit(x, y)
    found = sparse_prediction(moments(x, y), "x", "y", penalty=0)
    np.testing.assert_allclose(found.raw_coefficients, expected.coef_, atol=1e-9)
    np.testing.assert_allclose(found.intercept, expected.intercept_, atol=1e-8)
    doubled = np.concatenate([x, x], 1)
    split = sparse_prediction(moments(doubled, y), "x", "y", penalty=0)
    np.testing.assert_allclose(dense(split)[:, :7], dense(split)[:, 7:], atol=1e-7)
    np.testing.assert_allclose(split.r2_train, found.r2_train, atol=1e-9)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_matching_pursuit_is_that_of_scikit_learn(count: int) -> None:
    x, y = samples(seed=5)
    expected = np.asarray(orthogonal_mp(standard(x), standard(y), n_nonzero_coefs=count))
    found = omp_prediction(moments(x, y), "x", "y", count=count)
    np.testing.assert_allclose(dense(found), expected.T, atol=1e-9)
    assert float(found.kkt_violation.max()) < 1e-9


def test_matching_pursuit_stops_where_nothing_is_left() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((100, 3))
    x = np.concatenate([x, x[:, :1]], 1)  # a copy
    y = np.stack([x[:, 0] * 2, x[:, 0] + x[:, 1]], 1)
    found = omp_prediction(moments(x, y), "x", "y", count=9)
    assert found.count.tolist() == [1, 2]
    np.testing.assert_allclose(found.r2_train, 1)


def test_one_to_one_takes_the_partner_that_is_given() -> None:
    x, y = samples()
    matching = bipartite_matching(np.corrcoef(y.T, x.T)[:4, 4:])
    found = one_to_one_prediction(moments(x, y), "x", "y", matching=matching.partner)
    for target, partner in enumerate(matching.partner.tolist()):
        slope = np.corrcoef(x[:, partner], y[:, target])[0, 1]
        np.testing.assert_allclose(dense(found)[target], np.eye(7)[partner] * slope, atol=1e-12)
    np.testing.assert_allclose(found.r2_train, matching.similarity.square(), atol=1e-12)
    best = one_to_one_prediction(moments(x, y), "x", "y")
    assert (best.r2_train >= found.r2_train - 1e-12).all()
    np.testing.assert_allclose(best.r2_train, np.square(np.corrcoef(x.T, y.T)[:7, 7:]).max(0))
    none = one_to_one_prediction(moments(x, y), "x", "y", matching=[-1, 2, -1, -1])
    assert none.count.tolist() == [0, 1, 0, 0]
    with pytest.raises(DataError, match="each of 4 targets the place of one of 7"):
        one_to_one_prediction(moments(x, y), "x", "y", matching=[7, 0, 0, 0])


@pytest.mark.parametrize("rule", ["best", "one_se"])
@pytest.mark.parametrize("per_target", [False, True])
def test_cross_validation_is_an_explicit_loop(rule: Any, per_target: bool) -> None:
    x, y = samples(120, seed=8)
    folds = 4
    found = ridge_prediction(parts(x, y, folds), "x", "y", penalties=9, rule=rule, per_target=per_target)
    values = np.geomspace(10, 1e-3, 9)
    scores = np.empty((folds, 9, 4))
    for fold, place in enumerate(np.array_split(np.arange(120), folds)):
        rest = np.setdiff1d(np.arange(120), place)
        mean_x, scale_x, mean_y, scale_y = x[rest].mean(0), x[rest].std(0), y[rest].mean(0), y[rest].std(0)
        for index, value in enumerate(values):
            model = Ridge(value * len(rest)).fit((x[rest] - mean_x) / scale_x, (y[rest] - mean_y) / scale_y)
            fitted = model.predict((x[place] - mean_x) / scale_x) * scale_y + mean_y
            scores[fold, index] = r2_score(y[place], fitted, multioutput="raw_values")
    judged = scores if per_target else scores.mean(2, keepdims=True)
    mean, error = judged.mean(0), judged.std(0, ddof=1) / np.sqrt(folds)
    best = mean.argmax(0)
    if rule == "one_se":
        floor = np.take_along_axis(mean - error, best[None], 0)
        best = (mean >= floor).argmax(0)
    expected = values[np.broadcast_to(best, 4)]
    assert found.penalty is not None
    np.testing.assert_allclose(np.broadcast_to(np.asarray(found.penalty), 4), expected)
    assert found.r2 is not None
    assert found.path.r2 is not None
    np.testing.assert_allclose(found.path.r2.T, scores.mean(0), atol=1e-9)
    np.testing.assert_allclose(found.r2, scores.mean(0)[np.broadcast_to(best, 4), range(4)], atol=1e-9)


def test_the_penalty_of_the_lasso_is_chosen_and_judged_elsewhere() -> None:
    x, y = samples(600, seed=9)
    unseen = samples(300, seed=9)
    found = sparse_prediction(parts(x, y, 5), "x", "y", held_out=moments(*unseen), penalties=20)
    assert len(found.path.penalties) == 20
    assert found.penalty in found.path.penalties.tolist()
    assert found.r2 is not None
    np.testing.assert_allclose(
        found.r2, r2_score(unseen[1], found.predict(unseen[0]).numpy(), multioutput="raw_values"), atol=1e-9
    )
    assert (found.path.count[:, 0] == 0).all()  # the first penalty predicts nothing
    assert float(found.path.r2_train[:, 0].abs().max()) < 1e-9


def test_a_path_is_left_where_the_parts_left_out_are_past_their_best() -> None:
    # Forty predictors of pure noise beside one that counts: small penalties fit the noise.
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 41))
    y = x[:, :1] + rng.standard_normal((60, 3))
    given = parts(x, y, 12)  # pooled to five
    found = sparse_prediction(given, "x", "y", penalties=30)
    assert 3 < len(found.path.penalties) < 30
    assert found.r2 is not None
    assert found.path.r2 is not None
    best = found.path.r2.mean(0).argmax()
    assert found.penalty == float(found.path.penalties[best])
    whole = sparse_prediction(given, "x", "y", penalties=30, per_target=True)
    assert len(whole.path.penalties) == 30
    assert whole.path.r2 is not None
    at = int((whole.path.penalties == found.penalty).nonzero())
    torch.testing.assert_close(whole.path.r2[:, at], found.r2, atol=1e-3, rtol=0)
    assert float(whole.path.r2.mean(0).max()) == pytest.approx(float(found.r2.mean()), abs=1e-3)


def test_units_that_do_not_vary_are_left_out_and_named() -> None:
    x, y = samples(seed=4)
    with_dead_x = np.insert(x, [0, 3], [[7.0, -2.0]], axis=1)
    with_dead_y = np.insert(y, 2, 1.5, axis=1)
    plain, found = (
        sparse_prediction(moments(*given), "x", "y", penalty=0.05) for given in ((x, y), (with_dead_x, with_dead_y))
    )
    assert found.constant_predictors == (0, 4)
    assert found.constant_targets == (2,)
    np.testing.assert_allclose(np.delete(np.delete(dense(found), [0, 4], 1), 2, 0), dense(plain), atol=1e-12)
    assert not dense(found)[:, [0, 4]].any()
    assert not dense(found)[2].any()
    assert found.r2_train[2].isnan()
    np.testing.assert_allclose(found.predict(with_dead_x)[:, 2], 1.5)
    assert found.path.count[2].tolist() == [-1]
    pooled = sparse_prediction(parts(with_dead_x, with_dead_y, 3), "x", "y", penalty=0.05)
    assert (pooled.constant_predictors, pooled.constant_targets) == ((0, 4), (2,))


def test_a_unit_that_is_dead_in_one_part_only_is_no_trouble() -> None:
    x, y = samples(90, seed=6)
    x[:30, 1], y[:30, 0] = 0.0, 0.0
    found = sparse_prediction(parts(x, y, 3), "x", "y", penalties=5)
    assert found.r2 is not None
    assert found.r2.isfinite().all()


def test_nothing_to_predict_from() -> None:
    _, y = samples(50)
    zeros = Moments([("x", "x"), ("x", "y")])
    zeros.update({"x": torch.zeros(50, 3), "y": torch.from_numpy(y).float()})
    with pytest.raises(DataError, match="none of the 3 predictors varies"):
        sparse_prediction(zeros, "x", "y", penalty=0.1)


def test_wrong_arguments_are_refused() -> None:
    x, y = samples(60)
    given = moments(x, y)
    for penalty in (-0.1, float("nan"), float("inf"), [], [0.1, -1.0]):
        with pytest.raises(DataError, match="penalty is"):
            sparse_prediction(given, "x", "y", penalty=penalty)
        with pytest.raises(DataError, match="penalty is"):
            ridge_prediction(given, "x", "y", penalty=penalty)
    for make in (sparse_prediction, ridge_prediction, omp_prediction):
        with pytest.raises(DataError, match=r"give a sequence of Moments of disjoint parts.*or a penalty"):
            make(given, "x", "y")
    with pytest.raises(DataError, match="each unit would predict itself"):
        sparse_prediction(given, "x", "x", penalty=0.1)
    with pytest.raises(DataError, match="rule is 'worst'"):
        sparse_prediction(given, "x", "y", penalty=0.1, rule="worst")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="penalties is 0"):
        sparse_prediction([given, given], "x", "y", penalties=0)
    with pytest.raises(DataError, match="count is 0"):
        omp_prediction(given, "x", "y", count=0)
    with pytest.raises(DataError, match="no moments to learn from"):
        sparse_prediction([], "x", "y", penalty=0.1)
    with pytest.raises(DataError, match="part 1"):
        sparse_prediction([given, moments(x[:, :3], y)], "x", "y", penalty=0.1)
    with pytest.raises(LayerNotFoundError, match="'z'"):
        sparse_prediction(given, "z", "y", penalty=0.1)
    with pytest.raises(LayerNotFoundError, match="were not kept"):
        sparse_prediction(given, "y", "x", penalty=0.1)
    found = sparse_prediction(given, "x", "y", penalty=0.1)
    with pytest.raises(DataError, match="samples x 7 predictors"):
        found.predict(x[:, :3])
    with pytest.raises(NotFiniteError):
        found.predict(x * np.nan)


def test_few_samples_are_warned_about() -> None:
    x, y = samples(6)
    with pytest.warns(UserWarning, match="'x' has 7 units but 6 samples: R² on the training samples says little"):
        found = sparse_prediction(moments(x, y), "x", "y", penalty=0.01)
    assert float(found.kkt_violation.max()) <= 1e-6


def test_the_curve_is_the_path() -> None:
    x, y = samples(seed=7)
    found = sparse_prediction(parts(x, y, 4), "x", "y", penalties=8)
    one = one_to_one_prediction(moments(x, y), "x", "y")
    ax = found.plot(one_to_one=one)
    drawn = {str(line.get_label()): line for line in ax.lines}
    assert found.path.r2 is not None
    np.testing.assert_allclose(np.asarray(drawn["on held-out samples"].get_ydata()), found.path.r2.mean(0))
    np.testing.assert_allclose(np.asarray(drawn["on held-out samples"].get_xdata()), found.path.count.double().mean(0))
    np.testing.assert_allclose(np.asarray(drawn["one-to-one partner"].get_ydata()), [float(one.r2_train.mean())])
    assert found.plot(ax) is ax


def test_the_content_is_plain_json() -> None:
    x, y = samples()
    y[:, 1] = 0.0
    found = json.loads(json.dumps(omp_prediction(moments(x, y), "x", "y", count=2).to_dict()))
    assert found["r2_train"][1] is None
    assert found["r2"] is None
    assert found["path"]["penalties"] == [1.0, 2.0]
    assert found["constant_targets"] == [1]


def test_targets_that_nothing_correlates_with() -> None:
    x = np.tile([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], (10, 1))
    y = np.tile([[1.0], [1.0], [-1.0], [-1.0]], (10, 1))
    found = sparse_prediction([moments(x, y), moments(x, y)], "x", "y")
    assert found.count.tolist() == [0]
    assert found.r2 is not None
    assert float(found.r2[0]) == 0

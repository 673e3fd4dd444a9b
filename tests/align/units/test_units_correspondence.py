"""The whole study of a pair of networks, on planted structure and beside the tools that it is made of."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

import isthmus
from isthmus.align import ANALYSES, Correspondence, bipartite_matching, correspond, correspondence_of
from isthmus.base.errors import DataError, LayerNotFoundError
from isthmus.metrics import capture, unit_folds

UNITS = 8


def network(seed: int, units: int = UNITS) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, units), nn.ReLU(), nn.Linear(units, units), nn.ReLU())


def permuted(model: nn.Sequential, order: torch.Tensor) -> nn.Sequential:
    other = network(99)
    state = {name: values.clone() for name, values in model.state_dict().items()}
    state["0.weight"], state["0.bias"] = state["0.weight"][order], state["0.bias"][order]
    state["2.weight"] = state["2.weight"][:, order]
    other.load_state_dict(state)
    return other


@pytest.fixture(scope="module")
def data() -> list[torch.Tensor]:
    return list(torch.randn(1200, 6, generator=torch.Generator().manual_seed(0)).split(70))


@pytest.fixture(scope="module")
def order() -> torch.Tensor:
    return torch.randperm(UNITS, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def planted(data: list[torch.Tensor], order: torch.Tensor) -> Correspondence:
    model = network(0)
    return correspond(
        model, permuted(model, order), data, layers=["1", "3"], information=True, clusters=3, rotations=10, draws=10
    )


def test_a_planted_permutation_comes_back_in_every_tool(planted: Correspondence, order: torch.Tensor) -> None:
    pair = planted["1"]
    expected = order.argsort()
    assert torch.equal(pair.matching.partner, expected)
    assert torch.equal(pair.semi.partner, expected)
    assert pair.information is not None
    assert torch.equal(pair.information.partner, expected)
    torch.testing.assert_close(pair.held_out, torch.ones(UNITS, dtype=torch.float64))
    assert pair.stability is not None
    assert pair.stability.mean == 1.0
    assert pair.one_to_one is not None
    assert pair.prediction is not None
    assert pair.one_to_one.r2 is not None
    assert pair.prediction.r2 is not None
    torch.testing.assert_close(pair.one_to_one.r2, torch.ones(UNITS, dtype=torch.float64))
    assert float(pair.prediction.r2.min()) > 0.99
    assert pair.clusters is not None
    assert torch.equal(pair.clusters.labels_a, pair.clusters.labels_b[expected])
    assert pair.scores is not None
    torch.testing.assert_close(pair.scores.subspace, torch.ones(3, dtype=torch.float64))
    assert pair.transport is not None
    assert pair.transport.value == pytest.approx(1.0)
    assert pair.rotation is not None
    assert pair.rotation.p_value == pytest.approx(1 / 11)
    assert pair.means is not None
    assert pair.means.pearson == pytest.approx(1.0)
    assert planted["3"].matching.partner.tolist() == list(range(UNITS))


def test_the_null_is_near_zero_and_what_is_held_out_was_not_seen(planted: Correspondence) -> None:
    for pair in planted:
        assert pair.null_held_out is not None
        assert abs(float(pair.null_held_out.nanmean())) < 0.15
        assert pair.samples == (960, 240)
        merged = planted.folds.train.count("model_a.1"), planted.folds.held_out.count("model_a.1")
        assert pair.samples == merged


def test_held_out_correlations_are_those_of_the_held_out_samples(data: list[torch.Tensor]) -> None:
    a, b = network(0), network(1, units=5)
    found = correspond(a, b, data, layers="1", analyses=())
    x = torch.cat(data)
    with torch.no_grad(), capture(a) as in_a, capture(b) as in_b:
        a(x)
        b(x)
        acts_a, acts_b = in_a["1"].double().numpy(), in_b["1"].double().numpy()
    unseen = (found.folds.assignment >= 8).numpy()
    pair = found[0]
    for unit, partner in enumerate(pair.matching.partner.tolist()):
        if partner < 0:
            assert pair.held_out[unit].isnan()
        else:
            expected = np.corrcoef(acts_a[unseen, unit], acts_b[unseen, partner])[0, 1]
            assert float(pair.held_out[unit]) == pytest.approx(expected, abs=1e-9)
    again = bipartite_matching(np.corrcoef(acts_a[~unseen].T, acts_b[~unseen].T)[:UNITS, UNITS:])
    assert torch.equal(again.partner, pair.matching.partner)
    assert len(pair.matching.unmatched_a) == 3


def test_other_layers_and_other_architectures(data: list[torch.Tensor]) -> None:
    found = correspond(network(0), network(1, units=5), data, pairs=[("1", "3"), ("1", "1")], analyses=["transport"])
    assert [(pair.layer_a, pair.layer_b) for pair in found] == [("1", "3"), ("1", "1")]
    assert found["1", "3"] is found.pairs[0]
    assert found[1] is found.pairs[1]
    assert found[1].transport is not None
    assert found[1].transport.coupling.shape == (UNITS, 5)
    with pytest.raises(LayerNotFoundError, match="more than one pair of layers '1'"):
        found["1"]
    with pytest.raises(LayerNotFoundError, match=r"no pair of layers '2'; the pairs are \('1', '3'\)"):
        found["2"]


def test_only_what_was_asked_for(data: list[torch.Tensor]) -> None:
    found = correspond(network(0), network(1), data, layers="1", analyses=["means"])
    summary = found.summary()[0]
    assert {"stability", "sparse_r2", "clusters", "transport", "rotated", "information"}.isdisjoint(summary)
    assert found[0].means is not None
    assert found[0].prediction is None
    assert "cluster" not in found[0].rows()[0]
    assert set(ANALYSES) > {"means"}
    with pytest.raises(DataError, match="no analysis 'cluster'; did you mean clusters"):
        correspond(network(0), network(1), data, layers="1", analyses="cluster")


def test_more_can_be_read_off_without_another_pass(data: list[torch.Tensor], planted: Correspondence) -> None:
    kept = unit_folds(network(0), network(1), data, layers="1")
    one = correspondence_of(kept, kept.pairs[0], penalty=0.05, clusters=2, rotations=2, draws=2)
    same = correspond(network(0), network(1), data, layers="1", penalty=0.05, clusters=2, rotations=2, draws=2)
    assert one.summary() == same[0].summary()
    assert one.summary()["penalty"] == 0.05
    assert repr(one.rows()) == repr(same[0].rows())


def test_rows_are_sorted_and_whole(planted: Correspondence) -> None:
    rows = planted["3"].rows()
    assert sorted(row["unit"] for row in rows) == list(range(UNITS))
    held_out = [row["held_out"] for row in rows if row["held_out"] == row["held_out"]]
    assert held_out == sorted(held_out, reverse=True)
    assert all(row["held_out"] != row["held_out"] for row in rows[len(held_out) :])
    for row in rows:
        assert row["partner"] == int(planted["3"].matching.partner[row["unit"]])


def test_a_dead_unit_is_left_out_of_everything(data: list[torch.Tensor]) -> None:
    a, b = network(0), network(1)
    with torch.no_grad():
        a[0].bias[3] = -100.0  # pyright: ignore[reportIndexIssue]
        b[0].bias[[1, 5]] = -100.0  # pyright: ignore[reportIndexIssue]
    found = correspond(a, b, data, layers="1", clusters=2, rotations=2, draws=2)[0]
    assert (found.matching.constant_a, found.matching.constant_b) == ((3,), (1, 5))
    assert (found.summary()["constant_a"], found.summary()["constant_b"]) == (1, 2)
    row = next(row for row in found.rows() if row["unit"] == 3)
    assert (row["partner"], row["cluster"]) == (-1, -1)
    assert row["held_out"] != row["held_out"]
    assert row["sparse_r2"] != row["sparse_r2"]
    assert found.prediction is not None
    assert not found.prediction.coefficients.to_dense()[:, [1, 5]].any()


def test_same_seed_same_result(data: list[torch.Tensor]) -> None:
    def run(seed: int) -> str:
        found = correspond(network(0), network(1), data, layers="1", seed=seed, rotations=3, draws=5, clusters=2)
        return repr(found.to_dict())

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_curves_are_those_of_the_pair(planted: Correspondence) -> None:
    pair = planted["3"]
    ax = pair.plot()
    drawn = {line.get_label(): np.asarray(line.get_ydata()) for line in ax.lines}
    assert set(drawn) == {"best partner", "one-to-one", "one-to-one, shuffled samples"}
    known = pair.held_out[pair.held_out.isfinite()].sort(descending=True).values.numpy()
    np.testing.assert_array_equal(drawn["one-to-one"], known)
    assert pair.plot(ax) is ax


def test_front_door_gives_the_same_function() -> None:
    assert isthmus.correspond is correspond
    assert isthmus.Correspondence is Correspondence


@pytest.mark.parametrize(
    "wrong", [{"clusters": 0}, {"draws": 0}, {"rotations": 0}, {"penalty": float("nan")}, {"minimum": float("inf")}]
)
def test_wrong_numbers_are_refused_before_the_pass(wrong: dict[str, float]) -> None:
    def data() -> Iterator[torch.Tensor]:
        raise AssertionError("the data was read")
        yield torch.zeros(0)

    with pytest.raises(DataError, match=f"{next(iter(wrong))} is"):
        correspond(network(0), network(1), data(), layers="1", **wrong)  # pyright: ignore[reportArgumentType]

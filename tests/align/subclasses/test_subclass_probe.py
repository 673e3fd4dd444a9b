"""Linear probes on labels and on clusters: against scikit-learn, and on what was planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from isthmus.align.subclasses import cluster_and_probe, linear_probe, subclasses
from isthmus.base.errors import DataError, NotFiniteError


def mixture(samples: int, seed: int, gap: float = 3.0) -> tuple[Tensor, Tensor]:
    """Draw four Gaussians in six dimensions of very different scale, far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    fine = torch.arange(samples) % 4
    x = gap * torch.eye(6, dtype=torch.float64)[fine] + torch.randn(samples, 6, generator=generator).double()
    return x * torch.logspace(-3, 3, 6, dtype=torch.float64) + 50, fine


@pytest.mark.parametrize("scale", ["whiten", "standardise", "none"])
def test_the_probe_is_the_minimum_that_scikit_learn_finds(scale: str) -> None:
    x, fine = mixture(200, 0)
    if scale == "none":
        x = (x - 50) / torch.logspace(-3, 3, 6, dtype=torch.float64)
    probe = linear_probe(x, fine, scale=scale, penalty=1e-2)  # pyright: ignore[reportArgumentType]
    assert probe.converged
    z = (x - x.mean(0)).numpy()
    if scale == "standardise":
        z = z / z.std(0)
    elif scale == "whiten":
        u, _, _ = np.linalg.svd(z, full_matrices=False)
        z = u * np.sqrt(len(z))
    oracle = LogisticRegression(C=1 / (1e-2 * 200), tol=1e-9, max_iter=5000).fit(z, fine.numpy())
    np.testing.assert_allclose(probe.logits(x).softmax(1).numpy(), oracle.predict_proba(z), atol=1e-5)


def test_whitening_makes_the_probe_free_of_any_linear_map() -> None:
    x, fine = mixture(120, 1)
    turn = torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    z = (x - x.mean(0)) / x.std(0)
    one, two = (linear_probe(part, fine, penalty=1e-2).logits(part) for part in (z, z @ turn + 7))
    np.testing.assert_allclose(one.softmax(1).numpy(), two.softmax(1).numpy(), atol=1e-5)


@pytest.mark.parametrize("scale", ["whiten", "standardise"])
def test_labels_keep_their_names_and_constant_units_their_silence(scale: str) -> None:
    x, fine = mixture(80, 0, gap=8.0)
    x = torch.cat([x, torch.full((80, 1), 3.0, dtype=torch.float64)], 1)
    probe = linear_probe(x, 10 * fine, scale=scale)  # pyright: ignore[reportArgumentType]
    assert probe.names.tolist() == [0, 10, 20, 30]
    assert set(probe.predict(x).tolist()) == {0, 10, 20, 30}
    assert float(probe.weight[:, -1].abs().max()) < 1e-6
    assert probe.accuracy(x, 10 * fine) > 0.9
    assert "4 classes" in repr(probe)


def test_a_fit_that_stops_early_says_so() -> None:
    x, fine = mixture(80, 0)
    with pytest.warns(UserWarning, match="stopped after"):
        probe = linear_probe(x, fine, steps=2)
    assert not probe.converged


def collapsed(x: Tensor, fine: Tensor) -> Tensor:
    return 1e5 * torch.eye(6, dtype=torch.float64)[fine // 2 + 4] + x


def test_clusters_stand_in_for_fine_labels_inside_collapsed_classes() -> None:
    (x, fine), (y, test_fine) = (
        ((x - 50) / torch.logspace(-3, 3, 6, dtype=torch.float64), fine)
        for x, fine in (mixture(240, 0, 8.0), mixture(120, 1, 8.0))
    )
    x, y = collapsed(x, fine), collapsed(y, test_fine)
    result = cluster_and_probe(x, fine // 2, fine, y, test_fine, count=2, project="pca", dims=2)
    assert result.agreement.purity == 1.0
    assert result.accuracy == result.oracle == 1.0
    assert result.gap == 0
    assert torch.equal(result.predict(y), test_fine)
    assert result.table.tolist() == torch.diag(torch.full((4,), 30)).tolist()
    given = cluster_and_probe(x, fine // 2, fine, y, test_fine, found=result.found)
    assert given.accuracy == 1.0


def test_accuracy_counts_what_each_probe_gets_right() -> None:
    (x, fine), (y, test_fine) = mixture(160, 0, 2.0), mixture(90, 1, 2.0)
    result = cluster_and_probe(x, fine // 2, fine, y, test_fine, count=2, project="whiten", penalty=1e-2)
    assert 0.25 < result.accuracy < result.oracle < 1
    assert result.accuracy == pytest.approx(float((result.predict(y) == test_fine).double().mean()))
    oracle = linear_probe(x, fine, penalty=1e-2)
    assert result.oracle == pytest.approx(float((oracle.predict(y) == test_fine).double().mean()))
    assert int(result.table.sum()) == 90
    assert result.table.sum(1).tolist() == test_fine.bincount().tolist()


def test_shares_of_clusters_of_one_label_are_added_up() -> None:
    x, fine = mixture(200, 0, 8.0)
    result = cluster_and_probe(x, fine // 4, fine // 2, x, fine // 2, count=4, project="whiten", dims=6)
    assert result.agreement.matching.tolist().count(-1) == 2  # four clusters, two fine labels
    shares = result.probe.logits(x).softmax(1)
    named = result.agreement.named()[result.probe.names]
    added = torch.stack([shares[:, named == label].sum(1) for label in (0, 1)], 1)
    assert torch.equal(result.predict(x), added.argmax(1))
    assert result.accuracy > 0.95


def test_noise_is_left_out_of_training() -> None:
    x, fine = mixture(200, 0, 12.0)
    x = (x - 50) / torch.logspace(-3, 3, 6, dtype=torch.float64)
    x[:2] = torch.tensor([[300.0] * 6, [-300.0] * 6], dtype=torch.float64)
    found = subclasses(x, fine // 2, method="hdbscan", project="none")
    result = cluster_and_probe(x, fine // 2, fine, x, fine, found=found)
    assert found.labels[:2].tolist() == [-1, -1]
    assert result.probe.names.tolist() == [0, 1, 2, 3]
    assert result.accuracy > 0.95


def test_results_are_data_and_can_be_drawn() -> None:
    import matplotlib.pyplot as plt

    x, fine = mixture(80, 0, 8.0)
    result = cluster_and_probe(x, fine // 2, fine, x, fine, fine_names="abcd", count=2, project="whiten", dims=3)
    told = result.to_dict()
    assert told["gap"] == pytest.approx(told["oracle"] - told["accuracy"])
    assert told["found"] == {"method": "kmeans in whitened components (3)", "counts": [2, 2]}
    assert told["probe"]["converged"] is True
    assert "oracle" in repr(result)
    axes = result.plot()
    assert [text.get_text() for text in axes.get_xticklabels()] == list("abcd")
    plt.close("all")


X, FINE = mixture(24, 0)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"scale": "sphere"}, "scale is 'sphere'"),
        ({"penalty": -1.0}, "penalty is -1; expected at least 0"),
        ({"steps": 0}, "steps is 0"),
        ({"labels": torch.zeros(24, dtype=torch.int64)}, "all samples have the label 0"),
        ({"labels": FINE[:3]}, "3 entries, but there are 24"),
        ({"features": torch.ones(24, 2)}, "all 24 samples have the same features"),
    ],
)
def test_what_no_probe_fits_is_refused(how: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"features": X, "labels": FINE, **how}
    with pytest.raises(DataError, match=message):
        linear_probe(given.pop("features"), given.pop("labels"), **given)  # pyright: ignore[reportArgumentType]


def test_what_a_probe_cannot_read_is_refused() -> None:
    probe = linear_probe(X, FINE)
    with pytest.raises(DataError, match=r"shape \(24, 3\), the probe reads 6 units"):
        probe.predict(X[:, :3])
    with pytest.raises(NotFiniteError, match="penalty is nan"):
        linear_probe(X, FINE, penalty=float("nan"))
    with pytest.raises(NotFiniteError, match="NaN or infinity"):
        linear_probe(X / 0, FINE)


def test_what_no_clusters_are_probed_for_is_refused() -> None:
    def attempt(**change: object) -> None:
        given = {"features": X, "labels": FINE // 2, "fine": FINE, "test_features": X, "test_fine": FINE, **change}
        how = {key: given.pop(key) for key in list(given) if key in ("found", "count")}
        cluster_and_probe(*given.values(), **how)  # pyright: ignore[reportArgumentType]

    found = subclasses(X, FINE // 2, count=2, project="pca")
    for change, message in (
        ({"test_features": X[:, :4]}, r"features have shape \(24, 6\), test_features \(24, 4\)"),
        ({"test_fine": FINE + 3, "found": found}, "test_fine goes up to 6, the fine labels of training to 3"),
        ({"test_fine": FINE[:4]}, "test_fine has 4 entries"),
        ({"found": found, "count": 2}, "count was given beside `found`"),
        ({"found": found, "labels": FINE}, "other classes"),
    ):
        with pytest.raises(DataError, match=message):
            attempt(**change)

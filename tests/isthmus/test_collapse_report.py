"""Features, pictures, studies and pages of collapse, from Python."""

from __future__ import annotations

import doctest
import importlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import isthmus
from isthmus import collapse_figures
from isthmus.align.subclasses import subclasses
from isthmus.base.errors import DataError, LayerNotFoundError
from isthmus.collapse_report import feature_pictures, value_table, write_collapse
from isthmus.features import Features, read_features
from isthmus.means_plane import on_means
from isthmus.metrics.collapse import collapse_over
from isthmus.subclass_study import coarse_labels, coarse_map, subclass_study
from isthmus.subclasses_report import agreement_table, class_table, tiles, write_subclasses

MODULES = (
    "collapse_figures", "collapse_report", "commands.collapse", "features", "means_plane", "subclass_study",
    "subclasses_report",
)  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"isthmus.{name}"))
    assert results.attempted > 0
    assert results.failed == 0


def test_the_front_door_has_collapse() -> None:
    from isthmus.metrics.collapse import collapse

    assert isthmus.collapse is collapse


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(units: int = 12, classes: int = 4, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, units), nn.ReLU(), nn.Linear(units, classes))


def blobs(samples: int = 160, fine: int = 8, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    labels = torch.arange(samples) % fine
    x = 3 * torch.randn(fine, 6, generator=generator(7))[labels] + torch.randn(samples, 6, generator=generator(seed))
    return [(x[:100], labels[:100]), (x[100:], labels[100:])]


GROUPS = [[0, 1], [2, 3], [4, 5], [6, 7]]


class TestFeatures:
    def test_what_goes_into_the_classifier_in_the_order_of_the_data(self) -> None:
        model, data = network().train(), blobs()
        found = read_features(model, data, inputs=True)
        x = torch.cat([batch[0] for batch in data])
        torch.testing.assert_close(found.values, model[:2](x).detach())
        assert found.inputs is not None
        assert found.weight is not None
        torch.testing.assert_close(found.inputs, x)
        torch.testing.assert_close(found.bias, model.get_parameter("2.bias").detach())
        torch.testing.assert_close(found.weight, model.get_parameter("2.weight").detach())
        assert found.labels.tolist() == [*range(8)] * 20
        assert model.training
        assert not model[2]._forward_pre_hooks

    def test_a_layer_of_feature_maps(self) -> None:
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
        x = torch.randn(10, 1, 6, 6, generator=generator())
        data = [(x, torch.arange(10) % 2)]
        mean = read_features(model, data, layer="1")
        torch.testing.assert_close(mean.values, model[:2](x).detach().mean((2, 3)))
        flat = read_features(model, data, layer="1", positions="features")
        torch.testing.assert_close(flat.values, model[:2](x).detach().flatten(1))
        assert mean.weight is None
        assert mean.layer == "1"

    def test_a_classifier_that_is_a_convolution_and_one_that_is_the_whole_network(self) -> None:
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        x = torch.randn(10, 1, 6, 6, generator=generator())
        found = read_features(model, [(x, torch.arange(10) % 2)])
        assert found.layer == "1.input"
        torch.testing.assert_close(found.values, model[:1](x).detach().mean((2, 3)))
        alone = read_features(nn.Linear(3, 2), [(torch.randn(4, 3), torch.arange(4) % 2)])
        assert alone.layer == "input"

    @settings(max_examples=15, deadline=None)
    @given(st.integers(1, 40), st.integers(0, 5), st.integers(1, 30))
    def test_a_draw_is_of_single_samples_once_each(self, limit: int, seed: int, batch: int) -> None:
        x = torch.arange(35.0)[:, None]
        data = [(x[start : start + batch], x[start : start + batch, 0].long()) for start in range(0, 35, batch)]
        found = read_features(nn.Identity(), data, layer="", limit=limit, seed=seed)
        assert len(found) == min(limit, 35)
        assert found.values[:, 0].long().tolist() == found.labels.tolist()
        assert found.labels.tolist() == sorted(set(found.labels.tolist()))
        again = read_features(nn.Identity(), data, layer="", limit=limit, seed=seed)
        assert torch.equal(found.values, again.values)

    def test_every_sample_is_drawn_as_often(self) -> None:
        x = torch.arange(12.0)[:, None]
        data = [(x[:5], torch.arange(5)), (x[5:], torch.arange(5, 12))]
        counts = torch.zeros(12)
        for seed in range(400):
            counts[read_features(nn.Identity(), data, layer="", limit=3, seed=seed, progress=False).labels] += 1
        # Binomial: mean 100, standard deviation 8.7.
        assert 60 < counts.min() <= counts.max() < 140

    def test_bad_input(self) -> None:
        x, y = torch.randn(6, 6), torch.arange(6)
        for data, message in (
            ([x], "no labels"),
            ([(x, y.double())], "whole number"),
            ([(x, y[:, None])], r"shape \(6, 1\)"),
        ):
            with pytest.raises(DataError, match=message):
                read_features(network(), data)
        with pytest.raises(DataError, match="limit is 0"):
            read_features(network(), [(x, y)], limit=0)
        with pytest.raises(DataError, match="several rows"):
            read_features(network(), [(x, y)], layer="0", positions="samples")
        with pytest.raises(LayerNotFoundError):
            read_features(network(), [(x, y)], classifier="9")
        with pytest.raises(DataError, match="one floating-point tensor"):
            read_features(nn.Embedding(6, 3), [(y, y)], layer="", inputs=True)

        class Halved(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x[::2]

        with pytest.raises(DataError, match="3 rows of features for 6 labels"):
            read_features(Halved(), [(x, y)], layer="")


class TestPlane:
    def test_by_principal_components_of_the_means(self) -> None:
        labels = torch.arange(60) % 4
        x = torch.randn(60, 5, generator=generator()) + 2 * torch.randn(4, 5, generator=generator(1))[labels]
        found = on_means(x, labels)
        means = np.stack([x[labels == c].double().mean(0).numpy() for c in range(4)])
        centred = means - means.mean(0)
        values, vectors = np.linalg.eigh(centred.T @ centred)
        top = vectors[:, ::-1][:, :2]
        assert found.share == pytest.approx(values[::-1][:2].sum() / values.sum(), rel=1e-9)
        expected = (x.double().numpy() - means.mean(0)) @ top
        np.testing.assert_allclose(np.abs(found.points.numpy()), np.abs(expected), atol=1e-5)
        within = x.double().numpy() - means[labels]
        assert found.inside == pytest.approx(np.square(within @ top).sum() / np.square(within).sum(), rel=1e-9)
        assert found.rows is None

    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, 1000), st.sampled_from([2, 3]))
    def test_three_classes_keep_their_distances(self, seed: int, dims: int) -> None:
        means = torch.randn(5, 7, generator=generator(seed), dtype=torch.float64)
        labels = torch.arange(30) % 5
        found = on_means(means[labels], labels, classes=[4, 0, 2], dims=dims)
        assert found.share == pytest.approx(1, abs=1e-9)
        torch.testing.assert_close(
            torch.pdist(found.means), torch.pdist(means[[4, 0, 2]]).float(), rtol=1e-4, atol=1e-5
        )
        assert found.samples.tolist() == [place for place in range(30) if place % 5 in (0, 2, 4)]
        assert found.points.shape == (18, dims)

    def test_a_dual_classifier_lies_on_the_means(self) -> None:
        means = torch.randn(4, 6, generator=generator())
        labels = torch.arange(12) % 4
        found = on_means(means[labels], labels, weight=5 * (means - means.mean(0)) + 1)
        assert found.rows is not None
        torch.testing.assert_close(found.rows, found.means, rtol=1e-4, atol=1e-4)

    def test_two_classes_leave_one_direction_empty(self) -> None:
        found = on_means(torch.tensor([[0.0, 1], [0, 1], [2, 3], [2, 3]]), torch.tensor([0, 0, 1, 1]))
        assert found.points[:, 1].abs().max() == 0
        assert np.isnan(found.inside)

    def test_classes_in_one_place(self) -> None:
        found = on_means(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]))
        assert np.isnan(found.share)

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ({"dims": 4}, "dims is 4"),
            ({"classes": [1]}, "two different classes"),
            ({"classes": [1, 1]}, "two different classes"),
            ({"classes": [0, 9]}, "class 9 has no sample"),
            ({"labels": torch.arange(5)}, "for features of shape"),
            ({"weight": torch.zeros(3, 9)}, "of 2 units"),
            ({"weight": torch.zeros(2, 2)}, "a row for each class up to 2"),
        ],
    )
    def test_bad_input(self, more: dict[str, Any], message: str) -> None:
        arguments = {"features": torch.randn(6, 2), "labels": torch.arange(6) % 3, **more}
        with pytest.raises(DataError, match=message):
            on_means(**arguments)


class TestPictures:
    def test_a_plane_holds_points_means_rows_and_names(self) -> None:
        labels = torch.arange(40) % 4
        plane = on_means(torch.randn(40, 5, generator=generator()), labels, classes=[1, 3], weight=torch.randn(4, 5))
        figure = collapse_figures.plane_figure(plane, labels, ["a", "b", "c", "d"])
        (ax,) = figure.axes
        assert [text.get_text() for text in ax.texts] == ["b", "d"]
        assert sum(len(np.asarray(points.get_offsets())) for points in ax.collections) == 20
        assert len(ax.lines) == 3  # the means, and two rows
        legend = ax.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == ["b", "d"]

    def test_in_space_and_by_fine_labels(self) -> None:
        labels = torch.arange(40) % 4
        plane = on_means(torch.randn(40, 5, generator=generator()), labels, dims=3)
        figure = collapse_figures.plane_figure(plane, labels, list("abcd"), fine=torch.arange(40) % 30)
        assert figure.axes[0].name == "3d"
        assert figure.axes[0].get_legend() is None  # thirty names are too many

    def test_tsne_keeps_groups_apart(self) -> None:
        labels = torch.arange(60) % 2
        x = torch.randn(60, 5, generator=generator()) + 20 * labels[:, None]
        places = collapse_figures.embedding(x, perplexity=10)
        means = torch.stack([places[labels == name].mean(0) for name in (0, 1)])
        nearest = torch.cdist(places, means).argmin(1)
        assert torch.equal(nearest, labels)
        assert torch.equal(places, collapse_figures.embedding(x, perplexity=10))

    @pytest.mark.skipif(find_spec("umap") is None, reason="umap-learn is not installed")
    @pytest.mark.filterwarnings("ignore")
    def test_umap_keeps_groups_apart(self) -> None:
        labels = torch.arange(60) % 2
        places = collapse_figures.embedding(torch.randn(60, 5, generator=generator()) + 20 * labels[:, None], "umap")
        means = torch.stack([places[labels == name].mean(0) for name in (0, 1)])
        assert torch.equal(torch.cdist(places, means).argmin(1), labels)

    def test_umap_gets_its_arguments(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: dict[str, Any] = {}

        class Fake:
            def __init__(self, **options: Any) -> None:
                seen.update(options)

            def fit_transform(self, x: np.ndarray) -> np.ndarray:
                return x[:, :2]

        module = ModuleType("umap")
        module.UMAP = Fake  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, "umap", module)
        places = collapse_figures.embedding(torch.randn(20, 4), "umap", perplexity=12, seed=5)
        assert places.shape == (20, 2)
        assert seen == {"n_neighbors": 6, "random_state": 5, "n_jobs": 1}

    def test_bad_embeddings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "umap", None)
        with pytest.raises(DataError, match="umap-learn"):
            collapse_figures.embedding(torch.randn(20, 4), "umap")
        with pytest.raises(DataError, match="no embedding 't-sne'"):
            collapse_figures.embedding(torch.randn(20, 4), "t-sne")  # pyright: ignore[reportArgumentType]
        with pytest.raises(DataError, match="ten samples"):
            collapse_figures.embedding(torch.randn(9, 4))

    def test_clusters_have_the_colours_of_the_labels_they_match(self) -> None:
        fine = torch.tensor([0] * 10 + [1] * 30)
        x = 30.0 * fine[:, None] + torch.randn(40, 3, generator=generator())
        found = subclasses(x, 0 * fine, count=2, project="pca")
        assert found.labels[0] == 1  # the smaller cluster comes second
        by_cluster, by_label = collapse_figures.places_figure(found, ["one"], fine, ["few", "many"]).axes
        for above, below in zip(by_cluster.collections, by_label.collections, strict=True):
            np.testing.assert_array_equal(above.get_facecolor(), below.get_facecolor())
            np.testing.assert_allclose(np.asarray(above.get_offsets()), np.asarray(below.get_offsets()))
        legend = by_cluster.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == ["cluster 1", "cluster 0"]

    def test_more_clusters_than_labels_and_samples_in_none(self) -> None:
        fine = torch.arange(60) // 30
        x = 30.0 * (torch.arange(60) // 15)[:, None] + torch.randn(60, 2, generator=generator())
        four = subclasses(x, 0 * fine, count=4, project="none")
        axes = collapse_figures.places_figure(four, ["one"], fine).axes
        assert [len(ax.collections) for ax in axes] == [4, 2]
        lone = torch.cat([x, torch.tensor([[500.0, -500.0]])])
        noisy = subclasses(lone, torch.zeros(61, dtype=torch.long), method="hdbscan", project="none")
        assert bool((noisy.labels < 0).any())
        (ax,) = collapse_figures.places_figure(noisy, ["one"]).axes
        legend = ax.get_legend()
        assert legend is not None
        assert "none" in [text.get_text() for text in legend.get_texts()]

    def test_cosines_are_written_into_the_cells(self) -> None:
        figure = collapse_figures.cosines_figure({"axes": torch.tensor([[2.0, 0], [0, 3], [-1, 0]])}, list("abc"))
        texts = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
        assert texts == {(1, 0): "0.00", (0, 1): "0.00", (2, 0): "−1.00", (0, 2): "−1.00", (2, 1): "0.00",
                         (1, 2): "0.00"}  # fmt: skip
        many = collapse_figures.cosines_figure({"": torch.randn(25, 4)}, [str(name) for name in range(25)])
        assert not many.axes[0].texts


class TestCollapsePage:
    def test_curves_and_pictures(self, tmp_path: Path) -> None:
        coarse = [(x, y // 2) for x, y in blobs()]
        models = [network(seed=seed) for seed in range(2)]
        curves = collapse_over(models, coarse, steps=["first", "last"], layers=["1"])
        raw = read_features(models[1], blobs(), limit=50)
        features = Features(raw.values, raw.labels // 2, None, raw.layer, raw.weight)
        page = write_collapse(curves, tmp_path / "out", features=features, fine=raw.labels, measured_on="<blobs>")
        text = page.read_text()
        assert "&lt;blobs&gt;" in text
        assert "of the last checkpoint (last)" in text
        assert text.count("<svg") == 6
        content = json.loads((tmp_path / "out" / "collapse.json").read_text())
        assert content["collapses"][1]["values"]["1"]["nc1"] == curves.collapses[1].values["1"].nc1
        headers, rows = value_table(curves, "layer")
        assert headers[:2] == ("layer", "NC1")
        assert [row[0] for row in rows] == ["1", "2.input"]
        assert rows[0][headers.index("NC3")] == "–"

    def test_one_network_without_samples_to_draw(self, tmp_path: Path) -> None:
        found = isthmus.collapse(network(), [(x, y // 2) for x, y in blobs()])
        text = write_collapse(found, tmp_path).read_text()
        assert text.count("<svg") == 1
        assert "given in memory" in text
        assert "checkpoints" not in text

    def test_few_samples_are_not_embedded(self) -> None:
        features = Features(torch.randn(8, 3, generator=generator()), torch.arange(8) % 3, None, "fc.input")
        assert [name for name, _ in feature_pictures(features, list("abc"))] == ["means"]


class TestStudy:
    def test_planted_subclasses_are_found_and_noise_is_not(self, tmp_path: Path) -> None:
        data, test = blobs(), blobs(80, seed=3)
        data = [(10 * x, y) for x, y in data]
        test = [(10 * x, y) for x, y in test]

        class Deaf(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.sin(1e4 * x)

        found = subclass_study(nn.Identity(), data, test, groups=GROUPS, second=nn.Identity(), others={"deaf": Deaf()},
                               layer="", count=2, project="pca", fine_names=list("abcdefgh"))  # fmt: skip
        assert found.agreements["the network"].purity > 0.95
        assert found.agreements["deaf"].purity < 0.75
        assert found.probe is not None
        assert found.probe.accuracy > 0.9
        assert found.matching is not None
        assert found.matching.overlap == 1
        assert found.class_names == ("a+b", "c+d", "e+f", "g+h")
        assert found.features.inputs is None
        assert "raw inputs" in found.verdict
        names = [title for title, _ in tiles(found)]
        assert "Probe of clusters, test" in names
        headers, rows = agreement_table(found)
        assert [row[0] for row in rows] == ["the network", "raw inputs", "deaf"]
        assert rows[0][headers.index("one cluster each")] == "50.0 %"
        headers, rows = class_table(found)
        assert rows[0][:3] == ("a+b", "40", "2")
        assert rows[0][headers.index("overlap, second")] == "100.0 %"
        assert "deaf" in write_subclasses(found, tmp_path).read_text()
        assert json.loads((tmp_path / "subclasses.json").read_text())["class_names"][0] == "a+b"

    def test_without_fine_labels(self) -> None:
        found = subclass_study(network(), blobs(), count=2, project="none", class_names=list("abcdefgh"))
        assert found.verdict == "16 clusters inside 8 classes"
        assert found.fine is None
        assert found.to_dict()["probe"] is None

    def test_a_network_that_was_trained_on_other_classes(self, tmp_path: Path) -> None:
        model, data = network(classes=4), blobs()
        with torch.no_grad():
            decided = torch.cat([model(x).argmax(1) for x, _ in data])
        labels = torch.cat([y for _, y in data])
        right = float((decided == labels // 2).double().mean())
        found = subclass_study(model, data, groups=GROUPS, count=2, project="pca")
        assert found.collapse.accuracy == pytest.approx(right)
        assert right < 0.5
        assert found.caution is not None
        assert "Caution: the network puts" in write_subclasses(found, tmp_path).read_text()
        model.get_parameter("2.bias").data = torch.tensor([100.0, 0, 0, 0])
        one = subclass_study(model, [(x, y * 0 + y % 2) for x, y in data], count=1, project="pca")
        assert one.caution is None  # four outputs for two classes: no accuracy

    def test_bad_input(self) -> None:
        data = blobs()
        with pytest.raises(DataError, match="test was given"):
            subclass_study(network(), data, data)
        with pytest.raises(DataError, match="measured anyhow"):
            subclass_study(network(), data, groups=GROUPS, others={"raw inputs": network()})
        with pytest.raises(DataError, match="hold 0 to 3"):
            subclass_study(network(), data, groups=GROUPS[:2])
        with pytest.raises(DataError, match="2 names for 8"):
            subclass_study(network(), data, count=1, project="none", class_names=["a", "b"])

        class Shuffled:
            def __init__(self) -> None:
                self.turn = 0

            def __iter__(self) -> Any:
                self.turn += 1
                for x, y in data:
                    order = torch.randperm(len(y), generator=generator(self.turn))
                    yield x[order], y[order]

        with pytest.raises(DataError, match="the second network saw the samples in another order"):
            subclass_study(network(), Shuffled(), groups=GROUPS, second=network(), count=2, project="pca", inputs=False)

    def test_groups(self) -> None:
        assert coarse_map([[2, 0], [1]]).tolist() == [0, 1, 0]
        for wrong in ([], [[0], []], [[0, 2]], [[0, 0], [1]]):
            with pytest.raises(DataError, match="do not hold every fine label"):
                coarse_map(wrong)
        for labels in (torch.tensor([0, 5]), torch.tensor([-1, 0]), torch.tensor([0.0])):
            with pytest.raises(DataError, match="groups hold 0 to 1"):
                coarse_labels(labels, torch.tensor([0, 0]))

"""Clusters beside fine labels: against scikit-learn, and against every matching there is."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor

from isthmus.align.subclasses import agreement, agreements, subclasses
from isthmus.align.subclasses.tables import adjusted_rand, normalised_information
from isthmus.base.errors import DataError


def random_labels(seed: int, samples: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """Draw classes, clusters inside them (class 0: 0 and 1, class 1: 2, 3 and 4), and fine labels of any class."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.arange(samples) % 2
    within = torch.randint(6, (samples,), generator=generator)
    clusters = torch.where(coarse == 0, within % 2, 2 + within % 3)
    fine = torch.randint(4, (samples,), generator=generator)
    # Related, so that not everything is chance.
    return coarse, clusters, torch.where(torch.rand(samples, generator=generator) < 0.5, clusters % 4, fine)


def best_matching(table: np.ndarray) -> int:
    """Try every one-to-one matching of rows and columns."""
    table = table if table.shape[0] <= table.shape[1] else table.T
    return max(
        sum(table[row, column] for row, column in enumerate(chosen))
        for chosen in permutations(range(table.shape[1]), table.shape[0])
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_scores_are_those_of_the_definitions(seed: int) -> None:
    coarse, clusters, fine = random_labels(seed)
    found = agreement(clusters, fine, coarse=coarse)
    pure = sum(int(fine[clusters == cluster].bincount().max()) for cluster in clusters.unique())
    assert found.purity == pytest.approx(pure / 60)
    assert found.ari == pytest.approx(adjusted_rand_score(fine, clusters))
    assert found.nmi == pytest.approx(normalized_mutual_info_score(fine, clusters))
    table = found.table.numpy()
    right = best_matching(table[:2]) + best_matching(table[2:])
    assert found.matched_accuracy == pytest.approx(right / 60)
    known = found.matching[clusters]
    assert float((known == fine).double().mean()) == pytest.approx(right / 60)
    assert found.chance == pytest.approx(sum(int(fine[coarse == name].bincount().max()) for name in (0, 1)) / 60)
    for name in (0, 1):
        rows = coarse == name
        assert float(found.class_ari[name]) == pytest.approx(adjusted_rand_score(fine[rows], clusters[rows]))
        assert float(found.class_nmi[name]) == pytest.approx(normalized_mutual_info_score(fine[rows], clusters[rows]))
    assert found.within_ari == pytest.approx(float(found.class_ari.mean()))


@settings(max_examples=8, deadline=None)
@given(st.permutations(range(5)), st.integers(0, 100))
def test_names_and_order_change_nothing(names: list[int], seed: int) -> None:
    coarse, clusters, fine = random_labels(seed)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    one = agreement(clusters, fine, coarse=coarse)
    two = agreement(torch.tensor(names)[clusters][order], fine[order], coarse=coarse[order])
    for name in ("purity", "matched_accuracy", "chance", "ari", "nmi", "within_ari"):
        assert getattr(one, name) == pytest.approx(getattr(two, name)), name
    assert torch.equal(two.table[torch.tensor(names)], one.table)


def test_noise_counts_as_wrong_and_as_one_more_cluster_of_its_class() -> None:
    clusters = torch.tensor([0, 0, 0, -1, 1, 1, -1, -1])
    coarse = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    fine = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    found = agreement(clusters, fine, coarse=coarse)
    assert found.purity == found.matched_accuracy == 4 / 8
    assert found.ari == pytest.approx(adjusted_rand_score(fine, [0, 0, 0, 2, 1, 1, 3, 3]))
    assert found.class_nmi[1] == pytest.approx(1.0)
    assert found.samples == 8


def test_more_clusters_than_fine_labels_leave_some_without_a_match() -> None:
    found = agreement(torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([1, 1, 1, 1, 1, 0]))
    assert found.matching.tolist() == [1, -1, 0]
    assert found.named().tolist() == [1, 1, 0]
    assert found.matched_accuracy == pytest.approx(4 / 6)
    assert found.purity == 1.0


def test_a_match_without_a_sample_is_none() -> None:
    found = agreement(torch.tensor([0, 0, 1]), torch.tensor([1, 0, 1]))
    assert found.matched_accuracy == pytest.approx(2 / 3)
    assert agreement(torch.tensor([0, 0, 1]), torch.tensor([1, 1, 1])).matching.tolist() == [1, -1]


def test_one_label_on_either_side_is_the_same_partition() -> None:
    assert adjusted_rand(torch.tensor([[5]])) == normalised_information(torch.tensor([[5]])) == 1.0
    assert normalised_information(torch.tensor([[2, 3]])) == 0.0
    assert adjusted_rand(torch.tensor([[1]])) == 1.0


def test_features_are_compared_by_the_same_clustering() -> None:
    generator = torch.Generator().manual_seed(0)
    fine = torch.arange(80) % 4
    inputs = torch.randn(80, 1, 4, 4, generator=generator)
    signal = inputs.flatten(1)[:, :4] + 9 * torch.eye(4)[fine]
    found = agreements(
        {"features": signal, "pixels": inputs}, fine // 2, fine, fine_names="abcd", count=2, project="pca"
    )
    assert found["features"].purity == 1.0
    assert found["pixels"].purity < 0.8
    alone = agreement(subclasses(inputs, fine // 2, count=2, project="pca"), fine)
    assert torch.equal(found["pixels"].table, alone.table)
    with pytest.raises(DataError, match="no features to cluster"):
        agreements({}, fine, fine)


def test_results_are_data_and_can_be_drawn() -> None:
    import matplotlib.pyplot as plt

    coarse, clusters, fine = random_labels(1)
    found = agreement(clusters, fine, coarse=coarse, fine_names=("shirt", "shoe", "bag", "coat"))
    told = found.to_dict()
    assert told["table"] == found.table.tolist()
    assert told["fine_names"] == ["shirt", "shoe", "bag", "coat"]
    assert "purity" in repr(found)
    axes = found.plot()
    assert [text.get_text() for text in axes.get_xticklabels()] == ["shirt", "shoe", "bag", "coat"]
    assert [text.get_text() for text in axes.get_yticklabels()][-1] == "class 1, cluster 4"
    assert sorted(text.get_text() for text in axes.texts) == sorted(map(str, found.table[found.table > 0].tolist()))
    assert found.plot(axes) is axes
    plt.close("all")


@pytest.mark.parametrize(
    ("clusters", "fine", "how", "message"),
    [
        ([0, 0, 1], [0, 1], {}, "fine has 2 entries, but there are 3"),
        ([0, 0, 1], [0, 1, -1], {}, "fine has -1 at sample 2"),
        ([0, -2, 1], [0, 1, 1], {}, "found has -2 at sample 1"),
        ([-1, -1], [0, 1], {}, "none of them a cluster"),
        ([0, 0, 1], [0, 1, 1], {"coarse": [0, 1, 1]}, "cluster 0 has samples of several classes"),
        ([0, 0, 1], [0, 1, 2], {"fine_names": "ab"}, "fine_names has 2 names, but fine labels go up to 2"),
    ],
)
def test_bad_input_is_refused(clusters: list[int], fine: list[int], how: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        agreement(torch.tensor(clusters), fine, **how)  # pyright: ignore[reportArgumentType]


def test_classes_are_not_given_twice() -> None:
    found = subclasses(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), [0] * 6, count=2, project="pca")
    with pytest.raises(DataError, match="which know the classes"):
        agreement(found, [0] * 6, coarse=[0] * 6)

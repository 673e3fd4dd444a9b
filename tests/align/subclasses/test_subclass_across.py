"""Two networks: clusters matched to clusters, canonical angles, and what shuffled samples give."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles as scipy_angles
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from isthmus.align.subclasses import Subclasses, match_subclasses, subclasses, subspace_angles
from isthmus.base.errors import DataError, NotFiniteError

FINE = torch.arange(200) % 5
COARSE = (FINE > 1).long()  # two and three subclasses


def features(seed: int, gap: float = 6.0, units: int = 8) -> Tensor:
    """Draw what a network might make of the same subclasses, in directions of its own."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.linalg.qr(torch.randn(units, units, generator=generator, dtype=torch.float64))[0][:5]
    return gap * means[FINE] + torch.randn(200, units, generator=generator, dtype=torch.float64)


def clusters(seed: int, gap: float = 6.0) -> Subclasses:
    return subclasses(features(seed, gap), COARSE, count={0: 2, 1: 3}, project="pca", dims=3, seed=seed)


def test_the_same_subclasses_are_found_and_matched() -> None:
    a, b = clusters(0, 12.0), clusters(1, 12.0)
    found = match_subclasses(a, b)
    assert found.overlap == found.ari == 1.0
    assert found.p_value == pytest.approx(1 / 201)
    assert 0.4 < found.null_overlap < 0.65
    assert abs(found.null_ari) < 0.02
    assert torch.equal(found.partner[a.labels], b.labels)


def test_overlap_is_the_best_of_all_matchings_inside_classes() -> None:
    a, b = clusters(0, 1.5), clusters(1, 1.5)
    found = match_subclasses(a, b, shuffles=20)
    right = 0
    for name, members in ((0, [0, 1]), (1, [2, 3, 4])):
        part = found.table[members][:, members].numpy()
        best = max(sum(part[i, j] for i, j in enumerate(order)) for order in permutations(range(len(members))))
        rows = COARSE.eq(name)
        assert float(found.class_overlap[name]) == pytest.approx(best / int(rows.sum()))
        assert float(found.class_ari[name]) == pytest.approx(adjusted_rand_score(a.labels[rows], b.labels[rows]))
        right += int(best)
    assert found.overlap == pytest.approx(right / 200)
    assert 0.3 < found.overlap < 1


def test_unrelated_clusters_are_what_chance_gives() -> None:
    a, b = clusters(0), clusters(1)
    generator = torch.Generator().manual_seed(0)
    labels = b.labels.clone()
    for name in (0, 1):
        rows = COARSE.eq(name).nonzero().flatten()
        labels[rows] = labels[rows[torch.randperm(len(rows), generator=generator)]]
    found = match_subclasses(a, Subclasses(**{**vars(b), "labels": labels}))
    assert found.p_value > 0.05
    assert abs(found.overlap - found.null_overlap) < 0.1


def test_the_order_of_the_networks_does_not_matter() -> None:
    a, b = clusters(0, 2.0), clusters(1, 2.0)
    one, two = match_subclasses(a, b, shuffles=5), match_subclasses(b, a, shuffles=5)
    assert torch.equal(one.table, two.table.T)
    assert one.overlap == two.overlap
    assert one.ari == pytest.approx(two.ari)


def test_other_numbers_of_clusters_and_noise_leave_some_without_partner() -> None:
    a = clusters(0, 12.0)
    b = subclasses(features(1, 12.0), COARSE, count=2, project="pca", dims=3)
    labels = b.labels.clone()
    labels[:10] = -1
    found = match_subclasses(a, Subclasses(**{**vars(b), "labels": labels}), shuffles=5)
    assert found.partner.tolist().count(-1) == 1
    assert int(found.table.sum()) == 190
    assert found.overlap < 0.85
    both = match_subclasses(Subclasses(**{**vars(b), "labels": labels}), Subclasses(**{**vars(b), "labels": labels}))
    assert both.overlap == pytest.approx(0.95)
    assert both.ari == 1.0


def test_angles_are_those_of_scipy() -> None:
    x, y = features(0, 2.0), features(1, 2.0, units=11)
    found = subspace_angles(x, y, COARSE, dims=4, shuffles=3)
    for name in (0, 1):
        parts = [z[COARSE.eq(name)].numpy() for z in (x, y)]
        left, right = (np.linalg.svd(part - part.mean(0), full_matrices=False) for part in parts)
        oracle = scipy_angles(left[0][:, :4], right[0][:, :4])
        np.testing.assert_allclose(found.angles[name].numpy(), np.sort(oracle), atol=1e-7)
        variances = right[1] ** 2
        assert float(found.captured_b[name]) == pytest.approx(variances[:4].sum() / variances.sum())
    np.testing.assert_allclose(found.mean.numpy(), found.cosines.square().mean(1).numpy())


def test_shared_structure_stands_out_from_chance_and_noise_does_not() -> None:
    x, y = features(0, 12.0), features(1, 12.0)
    shared = subspace_angles(x, y, COARSE, dims=2, shuffles=100)
    assert bool((shared.p_values < 0.02).all())
    assert bool((shared.cosines[1] > 0.9).all())  # three subclasses span two dimensions
    generator = torch.Generator().manual_seed(3)
    noise = subspace_angles(x, torch.randn(200, 8, generator=generator), COARSE, dims=2, shuffles=100)
    assert bool((noise.p_values > 0.05).all())
    # The expected squared cosine of random subspaces: dims / (samples - 1).
    expected = 2 / (noise.samples.double() - 1)
    np.testing.assert_allclose(noise.null.numpy(), expected.numpy(), rtol=0.25)


def test_turns_scales_and_offsets_of_either_network_change_nothing() -> None:
    x, y = features(0), features(1)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64))[0]
    one, two = (subspace_angles(x, z, COARSE, shuffles=4) for z in (y, 1e-4 * y @ turn + 30))
    np.testing.assert_allclose(one.cosines.numpy(), two.cosines.numpy(), atol=1e-9)
    np.testing.assert_allclose(one.null.numpy(), two.null.numpy(), atol=1e-9)


def test_fewer_dimensions_than_asked_for_are_padded() -> None:
    x = features(0)
    found = subspace_angles(x[:, :2], x, COARSE, dims=5, shuffles=3)
    assert found.cosines.shape == (2, 5)
    assert found.cosines[:, 2:].isnan().all()
    assert found.to_dict()["cosines"][0][4] is None
    assert bool(found.mean.isfinite().all())


def test_results_are_data_and_can_be_drawn() -> None:
    import matplotlib.pyplot as plt

    a, b = clusters(0, 12.0), clusters(1, 12.0)
    found = match_subclasses(a, b, shuffles=5)
    assert found.to_dict()["partner"] == found.partner.tolist()
    assert "by chance" in repr(found)
    axes = found.plot()
    assert [text.get_text() for text in axes.get_xticklabels()] == [str(one) for one in found.partner.tolist()]
    angles = subspace_angles(features(0), features(1), COARSE, shuffles=5)
    assert angles.to_dict()["names"] == [0, 1]
    assert "2 classes, 5 dimensions" in repr(angles)
    assert len(angles.plot().get_lines()) == 3
    plt.close("all")


def test_bad_input_is_refused() -> None:
    a, b = clusters(0), clusters(1)
    x = features(0)
    with pytest.raises(DataError, match="the same samples in the same order"):
        match_subclasses(a, Subclasses(**{**vars(b), "coarse": 1 - COARSE}))
    with pytest.raises(DataError, match="shuffles is 0"):
        match_subclasses(a, b, shuffles=0)
    with pytest.raises(DataError, match="features_b has 20"):
        subspace_angles(x, x[:20], COARSE)
    with pytest.raises(DataError, match="dims is 0"):
        subspace_angles(x, x, COARSE, dims=0)
    with pytest.raises(DataError, match="shuffles is 0"):
        subspace_angles(x, x, COARSE, shuffles=0)
    with pytest.raises(DataError, match=r"class 0 has 80 samples, too few for 79 dimensions.*below 79"):
        subspace_angles(x, x, COARSE, dims=79)
    with pytest.raises(NotFiniteError, match="features_b"):
        subspace_angles(x, x / 0, COARSE)
    with pytest.warns(UserWarning, match="rounding"):
        subspace_angles(x, (1e-7 * x + 1).float()[:, :3], COARSE, shuffles=1)

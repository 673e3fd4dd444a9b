import math

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.collections import PolyCollection
from scipy import stats
from torch import nn

from isthmus.base.errors import DataError
from isthmus.merge import Path, connect
from isthmus.merge.paths.intervals import Contributions, above_chord, band, barrier_interval

mpl.use("Agg")

ALPHAS = np.linspace(0, 1, 11)


def path_of(sums, weights=None, alphas=ALPHAS):
    weights = np.ones(sums.shape[1]) if weights is None else weights
    loss = sums.sum(1) / weights.sum()
    parts = {"loss": Contributions(sums, weights)}
    return Path(alphas, loss, None, None, len(weights), None, contributions=parts)


def wiggling(generator, count, mean):
    """Losses of samples that wander about a mean curve, heavy tails and all, and the barrier of their source."""
    distance = ALPHAS[:, None] - ALPHAS
    root = np.linalg.cholesky(np.exp(-0.5 * (distance / 0.15) ** 2) + 1e-9 * np.eye(len(ALPHAS)))
    sums = root @ generator.normal(size=(len(ALPHAS), count)) * generator.lognormal(-0.5, 0.7, size=count)
    return mean[:, None] + sums, max(0.0, above_chord(mean, ALPHAS).max())


@pytest.mark.parametrize(
    ("mean", "least"),
    [
        (4 * ALPHAS * (1 - ALPHAS), 0.9),  # a hill
        (np.minimum(1, 5 * np.minimum(ALPHAS, 1 - ALPHAS)), 0.9),  # a plateau: any point of it may be the highest
        (0 * ALPHAS, 0.9),  # no barrier, and only chance lifts the path above its chord
        (-4 * ALPHAS * (1 - ALPHAS), 0.99),  # a valley
    ],
)
def test_covers_the_barrier_of_the_source(mean, least):
    generator = np.random.default_rng(0)
    inside = []
    for seed in range(120):
        sums, barrier = wiggling(generator, 100, mean)
        low, high = path_of(sums).barrier_interval(resamples=200, seed=seed)
        assert 0 <= low <= high
        inside.append(low <= barrier <= high)
    assert least <= np.mean(inside)


def test_equals_the_basic_bootstrap_of_scipy():
    generator = np.random.default_rng(1)
    sums = 1 + generator.normal(size=(3, 80)) * [[1], [3], [1]] + [[0], [4], [0]]
    alphas = np.linspace(0, 1, 3)

    def barrier(index, axis):
        means = sums[:, index].mean(-1)
        return means[1] - (means[0] + means[2]) / 2

    theirs = stats.bootstrap(
        (np.arange(80),), barrier, method="basic", n_resamples=4000, vectorized=True, axis=-1, rng=generator
    ).confidence_interval
    ours = path_of(sums, alphas=alphas).barrier_interval(resamples=4000)
    np.testing.assert_allclose(ours, theirs, atol=0.05)
    # and the textbook's for the mean at a point
    low, high = band(Contributions(sums, np.ones(80)), 0.9, 4000, 0)
    half = 1.645 * sums.std(1) / math.sqrt(80)
    np.testing.assert_allclose(high - low, 2 * half, rtol=0.06)
    np.testing.assert_allclose((high + low) / 2, sums.mean(1), atol=0.05)


def test_what_counts_twice_is_there_twice():
    parts = Contributions(np.array([[1.0, 6.0, 0.0]]), np.array([1.0, 2.0, 0.0]))
    means = parts.resampled(500, 0)[:, 0]
    # k first and l second ones among three drawn give (k + 6 l) / (k + 2 l); nothing, if all are third ones
    possible = {round((k + 6 * m) / (k + 2 * m), 9) for k in range(4) for m in range(4 - k) if k + m}
    assert {round(mean, 9) for mean in means[np.isfinite(means)]} == possible
    assert np.isnan(means).mean() == pytest.approx(1 / 27, abs=0.03)


def test_large_samples_are_drawn_in_parts(monkeypatch):
    generator = np.random.default_rng(0)
    parts = Contributions(generator.normal(size=(2, 50)), np.ones(50))
    whole = parts.resampled(30, 3)
    monkeypatch.setattr("isthmus.merge.paths.intervals._DRAWS", 120)
    again = parts.resampled(30, 3)
    assert whole.shape == again.shape == (30, 2)
    np.testing.assert_allclose(whole, again)


def test_same_seed_same_interval():
    sums, _ = wiggling(np.random.default_rng(0), 50, 8 * ALPHAS * (1 - ALPHAS))
    path = path_of(sums)
    assert path.barrier_interval(seed=1) == path.barrier_interval(seed=1) != path.barrier_interval(seed=2)
    narrow, wide = path.barrier_interval(level=0.5), path.barrier_interval(level=0.99)
    assert wide[0] <= narrow[0] <= narrow[1] <= wide[1]


def networks(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


def labelled(count=60, size=7):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 4, generator=generator)
    y = torch.randint(3, (count,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


def test_contributions_are_those_of_each_sample():
    a, b, data = networks(0), networks(1), labelled()
    path = connect(a, b, data, points=3)
    assert path.contributions is not None
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    with torch.no_grad():
        wanted = F.cross_entropy(b(x), y, reduction="none")
        right = b(x).argmax(1) == y
    np.testing.assert_allclose(path.contributions["loss"].sums[-1], wanted, rtol=1e-5)
    assert path.contributions["accuracy"].sums[-1].tolist() == right.double().tolist()
    np.testing.assert_allclose(path.contributions["loss"].sums.mean(1), path.loss)
    low, high = path.barrier_interval(quantity="accuracy")
    assert path.accuracy_barrier is not None
    assert 0 <= low <= high <= 1
    low, high = path.band(quantity="error")
    assert path.error is not None
    assert ((low <= path.error) & (path.error <= high)).all()


def test_losses_by_sample_and_by_batch():
    a, b, data = networks(0), networks(1), labelled()

    def by_sample(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="none")

    known = connect(a, b, data, points=3)
    sample = connect(a, b, data, points=3, loss=by_sample)
    batch = connect(a, b, data, points=3, loss=F.cross_entropy)
    np.testing.assert_allclose(sample.loss, known.loss, rtol=1e-7)
    np.testing.assert_allclose(batch.loss, known.loss, rtol=1e-6)
    np.testing.assert_allclose(sample.barrier_interval(), known.barrier_interval(), rtol=1e-5)
    assert batch.contributions is not None
    assert batch.contributions["loss"].weights.tolist() == [7] * 8 + [4]
    assert batch.band()[0].tolist() != known.band()[0].tolist()
    with pytest.raises(DataError, match="let it return one value for each sample"):
        connect(a, b, data[:1], points=3, loss=F.cross_entropy).barrier_interval()


class Shuffled:
    def __init__(self, data):
        self.data, self.generator = data, torch.Generator().manual_seed(0)

    def __iter__(self):
        for index in torch.randperm(len(self.data), generator=self.generator).tolist():
            yield self.data[index]


def test_an_order_that_changes_is_noticed():
    a, b, data = networks(0), networks(1), Shuffled(labelled())
    # read once: no order but one
    assert connect(a, b, data, points=3).barrier_interval()[0] >= 0
    held = connect(a, b, data, points=3, repair="rescale", repair_data=labelled())
    assert held.barrier_interval()[0] >= 0
    read = connect(a, b, data, points=3, repair="rescale", repair_data=labelled(), memory=1)
    np.testing.assert_allclose(read.loss, held.loss, rtol=1e-5)
    with pytest.raises(DataError, match="in another order"):
        read.barrier_interval()
    fixed = connect(a, b, labelled(), points=3, repair="rescale", memory=1)
    assert fixed.contributions is not None


def test_a_loss_that_is_not_finite_has_no_interval():
    sums = np.ones((3, 5))
    sums[1, 2] = np.inf
    with pytest.warns(UserWarning, match="NaN or infinite"):
        path = path_of(sums, alphas=np.linspace(0, 1, 3))
    assert all(map(math.isnan, path.barrier_interval()))
    assert np.isnan(path.band()).all()


@pytest.mark.parametrize("level", [0, 1, -0.5, 95, math.nan])
def test_refuses_levels(level):
    with pytest.raises(DataError, match=r"between 0 and 1, such as 0\.95"):
        path_of(np.ones((11, 5))).barrier_interval(level=level)


def test_refuses_the_rest():
    path = path_of(np.ones((11, 5)))
    for resamples in (1, 2.5, True):
        with pytest.raises(DataError, match="whole number of at least 2"):
            path.barrier_interval(resamples=resamples)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="'accuracy' was not measured"):
        path.barrier_interval(quantity="accuracy")
    with pytest.raises(DataError, match="put together by hand"):
        Path(path.alphas, path.loss, None, None, 5, None).barrier_interval()
    with pytest.raises(DataError, match="one sample"):
        barrier_interval(Contributions(np.ones((3, 1)), np.ones(1)), np.linspace(0, 1, 3), 0.9, 10, 0)


def test_a_band_is_shaded():
    path = connect(networks(0), networks(1), labelled(), points=3)
    ax = path.plot(band=0.95)
    (shade,) = [part for part in ax.collections if isinstance(part, PolyCollection)]
    low, high = path.band()
    found = shade.get_paths()[0].get_extents()
    assert (found.ymin, found.ymax) == (pytest.approx(low.min()), pytest.approx(high.max()))
    plt.close("all")

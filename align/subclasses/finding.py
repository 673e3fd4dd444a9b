"""Subclasses: clusters of the samples of each class, found without any finer labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from torch import Tensor

from ...base.errors import DataError
from ...base.plain import plain
from ...base.progress import progress as progress_bar
from .clustering import Method, Points, check_count
from .coordinates import Projection, check_projection, linear_coordinates, tsne
from .counting import OWN, Criterion, check_criterion, estimate_count
from .labelled import as_features, as_labels, class_names, warn_of_rounding, within_class

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

_NEIGHBOURS = 5  # that decide where a sample belongs which was not clustered itself
_SMALLEST = (10, 0.02)  # samples, and share of a class, that hdbscan takes for a cluster
_SHOWN = 2000


@dataclass(frozen=True, eq=False)
class Subclasses:
    """Clusters of the samples of each class, numbered class by class, the largest of a class first.

    Attributes:
        labels: (samples,) int64, the cluster of each sample; -1 for none, which "hdbscan" alone gives.
        coarse: (samples,) int64, the class of each sample.
        names: (classes,) int64, the classes that occur, rising.
        counts: (classes,) int64, the number of clusters in each.
        classes: (clusters,) int64, the class of each cluster.
        sizes: (clusters,) int64, the number of samples in each.
        method: How they were found, in a few words.
        criteria: For each class whose number of clusters was estimated, the criterion of each number; larger is better.
        places: (samples, 2) float32, the first two coordinates that each sample was clustered by, of each class its
            own; NaN for samples that were not clustered themselves.
    """

    labels: Tensor
    coarse: Tensor
    names: Tensor
    counts: Tensor
    classes: Tensor
    sizes: Tensor
    method: str
    criteria: dict[int, dict[int, float]]
    places: Tensor

    def __repr__(self) -> str:
        return f"Subclasses({len(self.labels)} samples, {len(self.names)} classes, {len(self.classes)} clusters)"

    def members(self, cluster: int) -> Tensor:
        """Give the samples of one cluster, rising.

        Raises:
            DataError: There is no such cluster.
        """
        if not 0 <= cluster < len(self.classes):
            raise DataError(f"there is no cluster {cluster}; there are {len(self.classes)}, from 0")
        return (self.labels == cluster).nonzero().flatten()

    def plot(self, ax: Axes | None = None, *, name: int | None = None, fine: Tensor | None = None) -> Axes:
        """Draw the samples of one class where they were clustered, at most 2000, coloured by cluster.

        Args:
            ax: Where to draw. Default: a new figure.
            name: The class. Default: the first.
            fine: (samples,) labels to colour by instead.

        Returns:
            The axes.

        Raises:
            DataError: There is no such class, or `fine` has another length.
        """
        from .pictures import scatter

        name = int(self.names[0]) if name is None else name
        if name not in self.names.tolist():
            raise DataError(f"there is no class {name}; there are {', '.join(map(str, self.names.tolist()))}")
        colours = self.labels if fine is None else as_labels(fine, len(self.labels), "fine")
        rows = ((self.coarse == name) & ~self.places[:, 0].isnan()).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:_SHOWN]]
        kind = "cluster" if fine is None else "fine label"
        return scatter(ax, self.places[rows], colours[rows], kind, f"class {name}: {self.method}")

    def to_dict(self) -> dict[str, Any]:
        """Give all but the places as plain lists and strings for JSON."""
        names = ("labels", "coarse", "names", "counts", "classes", "sizes", "method", "criteria")
        return plain({name: getattr(self, name) for name in names})


def subclasses(
    features: Tensor | ArrayLike,
    labels: Tensor | ArrayLike,
    *,
    method: Method = "kmeans",
    count: int | Mapping[int, int] | Criterion | None = None,
    project: Projection = "whiten",
    dims: int | None = None,
    perplexity: float = 30.0,
    largest: int = 10,
    limit: int | None = None,
    classes: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Subclasses:
    """Find clusters inside each class (Yang, Steinhardt & Hu 2023, "Are Neurons Actually Collapsed?", section 4).

    The features of each class are centred and divided by their own spread, in float64: where a network has collapsed,
    they differ by amounts that are tiny beside the class mean. Then they are projected and clustered, each class alone.

    Args:
        features: Samples x units, as of the last hidden layer; images are flattened.
        labels: (samples,) whole numbers from 0, the class that the network was trained on.
        method: "kmeans", "mixture" of Gaussians, "spectral", or "hdbscan", see `Points`; samples that the last one
            takes for noise are in no cluster, a cluster has ten samples and 2 % of its class, or more.
        count: Clusters in each class: one number, or a number for each class, or the criterion that chooses, see
            `estimate_count`. Default: "bic" for "mixture", else "eigengap".
        project: "whiten", principal components that all count alike; "pca", components as they are; "tsne" of these, as
            in the paper, which takes about a minute for 10,000 samples of a class; or "none". Inside a class the widest
            direction is often how sure the network is, which no subclass owns: whitening keeps it from ruling.
        dims: How many principal components. Default: 15 for "whiten", 10 for "pca", 50 for "tsne".
        perplexity: Of t-SNE.
        largest: The largest number of clusters that a criterion tries.
        limit: Cluster at most so many samples of each class, drawn at random; the others go where most of their five
            nearest neighbours are. Default: all.
        classes: How many classes there are, where all must occur. Default: those that occur.
        seed: Of starts and draws.
        progress: Show a bar: always, never, or on a terminal only (None).

    Returns:
        The clusters.

    Raises:
        DataError: Lengths differ; a label is out of range; a class has fewer samples than clusters, or they are all the
            same; or choices do not go together.
        NotFiniteError: The features hold NaN or infinity.

    >>> generator = torch.Generator().manual_seed(0)
    >>> fine = torch.arange(80) % 4
    >>> centres = 10 * torch.eye(4)
    >>> features = centres[fine] + torch.randn(80, 4, generator=generator)
    >>> found = subclasses(features, fine // 2, count=2, project="pca")
    >>> found.sizes.tolist(), found.classes.tolist()
    ([20, 20, 20, 20], [0, 0, 1, 1])
    """
    from threadpoolctl import threadpool_limits  # scikit-learn needs and brings it

    features, coarse, names, numbers = _checked(
        features, labels, method, count, project, dims, perplexity, largest, limit, classes
    )
    found = torch.full((len(coarse),), -1)
    places = torch.full((len(coarse), 2), float("nan"))
    counts: list[int] = []
    of_class: list[int] = []
    rounded: list[int] = []
    criteria: dict[int, dict[int, float]] = {}
    for name in progress_bar(names.tolist(), "subclasses", None, progress):
        rows = (coarse == name).nonzero().flatten()
        x = within_class(features[rows.to(features.device)], name, rounded)
        x = linear_coordinates(x, project, dims).cpu()
        chosen = _drawn(len(rows), limit, seed + name)
        # Sums in one order: the same seed gives the same clusters on any number of threads.
        with threadpool_limits(1):
            spot = x[chosen].numpy() if project != "tsne" else tsne(x[chosen].numpy(), perplexity, seed)
            own, values = _clusters(spot, method, numbers[name], largest, seed)
        own = _numbered(own if len(chosen) == len(rows) else _joined(x, chosen, own))
        found[rows] = torch.where(own >= 0, own + len(of_class), -1)
        places[rows[chosen]] = torch.from_numpy(np.pad(spot, ((0, 0), (0, 1)))[:, :2]).float()
        counts.append(int(own.max()) + 1)
        of_class += [name] * counts[-1]
        criteria.update({name: values} if values else {})
    warn_of_rounding(rounded, features.dtype)
    sizes = torch.bincount(found[found >= 0], minlength=len(of_class))
    told = _told(method, count, project, dims, limit)
    return Subclasses(found, coarse, names, torch.tensor(counts), torch.tensor(of_class), sizes, told, criteria, places)


def _checked(
    features: Tensor | ArrayLike, labels: Tensor | ArrayLike, method: str, count: Any, project: str, dims: int | None,
    perplexity: float, largest: int, limit: int | None, classes: int | None,
) -> tuple[Tensor, Tensor, Tensor, dict[int, int | str | None]]:  # fmt: skip
    for key, choice, known in (("method", method, Method), ("project", project, Projection)):
        if choice not in get_args(known):
            raise DataError(f"{key} is {choice!r}; expected one of {', '.join(get_args(known))}")
    check_projection(project, dims, perplexity)
    for key, number, least in (("largest", largest, 2), ("limit", limit, 3)):
        if number is not None and number < least:
            raise DataError(f"{key} is {number}; expected at least {least}")
    x = as_features(features)
    coarse = as_labels(labels, len(x))
    names = class_names(coarse, classes)
    numbers = _numbers(names.tolist(), method, count)
    for name, size in zip(names.tolist(), torch.bincount(coarse)[names].tolist(), strict=True):
        number = numbers[name]
        size = size if limit is None else min(size, limit)
        check_count(1 if number is None or isinstance(number, str) else number, size, name)
        if size < 3 and number != 1:
            raise DataError(f"class {name} has {size} samples; clusters need at least 3")
    return x, coarse, names, numbers


def _numbers(names: list[int], method: str, count: Any) -> dict[int, int | str | None]:
    """Give for each class its number of clusters, or the criterion that chooses it."""
    if count is None:
        return dict.fromkeys(names, OWN.get(method))
    if isinstance(count, str) or method == "hdbscan":
        check_criterion(method, count)  # pyright: ignore[reportArgumentType]
        return dict.fromkeys(names, count)
    if isinstance(count, Mapping):
        missing = [name for name in names if name not in count]
        if missing:
            raise DataError(f"count names no number of clusters for class {missing[0]}; give one for every class")
        return {name: count[name] for name in names}
    return dict.fromkeys(names, count)


def _drawn(samples: int, limit: int | None, seed: int) -> Tensor:
    if limit is None or samples <= limit:
        return torch.arange(samples)
    return torch.randperm(samples, generator=torch.Generator().manual_seed(seed))[:limit].sort().values


def _clusters(
    x: np.ndarray, method: Method, number: int | str | None, largest: int, seed: int
) -> tuple[Tensor, dict[int, float]]:
    points = Points(x, method, seed, number if isinstance(number, int) else min(largest, len(x) - 1))
    if number is None:
        return torch.from_numpy(points.dense_regions(_least(len(x)))), {}
    values: dict[int, float] = {}
    if isinstance(number, str):
        number, values = estimate_count(points, number, largest)  # pyright: ignore[reportArgumentType]
    return torch.from_numpy(points.labels(number)), values


def _least(samples: int) -> int:
    number, share = _SMALLEST
    return min(max(number, round(share * samples)), max(2, samples // 2))


def _joined(x: Tensor, chosen: Tensor, own: Tensor) -> Tensor:
    from sklearn.neighbors import KNeighborsClassifier

    near = KNeighborsClassifier(min(_NEIGHBOURS, len(chosen))).fit(x[chosen].numpy(), own.numpy())
    labels = torch.from_numpy(near.predict(x.numpy()))
    labels[chosen] = own
    return labels


def _numbered(own: Tensor) -> Tensor:
    """Number clusters by falling size, the one with the first sample first where sizes are equal; -1 stays."""
    names, inverse, sizes = own.unique(return_inverse=True, return_counts=True)
    first = torch.full((len(names),), len(own)).scatter_reduce_(0, inverse, torch.arange(len(own)), "amin")
    ranked = sorted(range(len(names)), key=lambda i: (int(names[i]) < 0, -int(sizes[i]), int(first[i])))
    new = torch.empty_like(names)
    new[ranked] = torch.arange(len(names))
    new[names < 0] = -1
    return new[inverse]


def _told(method: str, count: Any, project: str, dims: int | None, limit: int | None) -> str:
    where = {"none": "all units", "tsne": "t-SNE", "pca": "principal components", "whiten": "whitened components"}
    dims_told = f" of {dims}" if dims is not None and project == "tsne" else f" ({dims})" if dims is not None else ""
    how = OWN.get(method, "") if count is None else count if isinstance(count, str) else ""
    told = f"{method} in {where[project]}{dims_told}"
    told += f", number by {how}" if how else ""
    return told if limit is None else f"{told}, at most {limit} samples of a class"

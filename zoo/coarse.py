"""Coarse labels: classes of a data set merged into super-classes, with the fine labels kept beside."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from ..base.errors import DataError, nearest
from .data import Dataset

Groups = tuple[tuple[int, ...], ...]

PAIRINGS = ("neighbours", "random", "similar", "dissimilar")

SUPERCLASSES: dict[str, dict[str, tuple[int, ...]]] = {
    "cifar10": {"vehicles": (0, 1, 8, 9), "animals": (2, 3, 4, 5, 6, 7)},
    "fashion_mnist": {"tops": (0, 2, 4, 6), "trousers": (1,), "dresses": (3,), "shoes": (5, 7, 9), "bags": (8,)},
    "mnist": {"even": (0, 2, 4, 6, 8), "odd": (1, 3, 5, 7, 9)},
    "digits": {"even": (0, 2, 4, 6, 8), "odd": (1, 3, 5, 7, 9)},
}


@dataclass(frozen=True, eq=False)
class Coarse:
    """A data set with coarse labels.

    Attributes:
        dataset: The images with their coarse labels; what a network is trained on.
        fine: (n,) int64; the labels that it does not see.
        fine_classes: Name of each fine label.
        groups: For each coarse class the fine classes in it; with `by_sample`, each coarse class holds all of them.
    """

    dataset: Dataset
    fine: Tensor
    fine_classes: tuple[str, ...]
    groups: Groups


def coarsen(
    dataset: Dataset,
    groups: str | Sequence[Sequence[int]] = "neighbours",
    *,
    seed: int = 0,
    by_sample: bool = False,
) -> Coarse:
    """Merge classes, after Yang, Steinhardt & Hu (2023, "Are Neurons Actually Collapsed?").

    Args:
        dataset: With fine labels.
        groups: The fine classes of each coarse one, all of them once; or `"neighbours"` (0 and 1, 2 and 3, …),
            `"random"` pairs, `"similar"` or `"dissimilar"` pairs (by the cosine of the class means of pixels, in all
            the greatest or the least), or `"superclasses"`, for the data sets that have some. For a test set pass the
            `groups` of the training set: what is similar there need not be so here.
        seed: Of random pairs and of `by_sample`.
        by_sample: A control: as many images get each coarse label, but which ones is drawn, whatever their class.

    Raises:
        DataError: The groups leave a class out, name one twice or one that does not exist; the number of classes is
            odd; or there are no such groups.

    >>> from isthmus.zoo import load_data
    >>> found = coarsen(load_data("digits"))
    >>> found.dataset.classes, found.groups[1]
    (('0+1', '2+3', '4+5', '6+7', '8+9'), (2, 3))
    >>> bool((found.dataset.labels == found.fine // 2).all())
    True
    """
    names: tuple[str, ...] | None = None
    if groups == "superclasses":
        if dataset.name not in SUPERCLASSES:
            raise DataError(f"{dataset.name} has no super-classes here; those with some: {', '.join(SUPERCLASSES)}")
        names = tuple(SUPERCLASSES[dataset.name])
        chosen: Groups = tuple(SUPERCLASSES[dataset.name].values())
    elif isinstance(groups, str):
        chosen = pairs_of(dataset, groups, seed=seed)
    else:
        chosen = tuple(tuple(int(index) for index in group) for group in groups)
    to_coarse = _map(chosen, len(dataset.classes), dataset.name)
    labels = to_coarse.to(dataset.labels.device)[dataset.labels]
    if by_sample:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        labels = labels[order.to(labels.device)]
        chosen = (tuple(range(len(dataset.classes))),) * len(chosen)
    names = names or tuple("+".join(dataset.classes[index] for index in group) for group in chosen)
    note = "labels merged, then dealt out at random" if by_sample else "labels merged"
    merged = dataclasses.replace(dataset, labels=labels, classes=names, source=f"{dataset.source}; {note}")
    return Coarse(merged, dataset.labels, dataset.classes, chosen)


def pairs_of(dataset: Dataset, pairing: str, *, seed: int = 0) -> Groups:
    """Pair classes.

    Args:
        dataset: With an even number of classes.
        pairing: `"neighbours"`, `"random"`, `"similar"` or `"dissimilar"`; see `coarsen`.
        seed: Of random pairs.

    Raises:
        DataError: There is no such pairing, the number of classes is odd, or a class has no image.

    >>> from isthmus.zoo import load_data
    >>> pairs_of(load_data("digits"), "similar")
    ((0, 9), (1, 8), (2, 3), (4, 6), (5, 7))
    """
    if pairing not in PAIRINGS:
        known = (*PAIRINGS, "superclasses")
        raise DataError(f"no groups {pairing!r}{nearest(pairing, known)}; there are {', '.join(known)}")
    count = len(dataset.classes)
    if count % 2:
        raise DataError(f"{dataset.name} has {count} classes, which cannot be paired; pass groups as lists of classes")
    if pairing == "neighbours":
        return tuple((index, index + 1) for index in range(0, count, 2))
    if pairing == "random":
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        return _sorted(order[index : index + 2] for index in range(0, count, 2))
    likeness = _likeness(dataset)
    sign = 1 if pairing == "similar" else -1
    graph = nx.Graph()
    graph.add_weighted_edges_from(
        (one, other, sign * float(likeness[one, other])) for one in range(count) for other in range(one)
    )
    return _sorted(nx.max_weight_matching(graph, maxcardinality=True))


def _sorted(pairs: object) -> Groups:
    return tuple(sorted(tuple(sorted(pair)) for pair in pairs))  # pyright: ignore[reportGeneralTypeIssues]


def _likeness(dataset: Dataset) -> np.ndarray:
    """Give the cosine of the centred class means of pixels, (classes, classes)."""
    pixels = dataset.images.flatten(1).double()
    counts = torch.bincount(dataset.labels, minlength=len(dataset.classes))
    if not bool(counts.all()):
        missing = dataset.classes[int((counts == 0).nonzero()[0])]
        raise DataError(f"{dataset.name} holds no image of class {missing!r}, which has no mean to compare")
    sums = pixels.new_zeros(len(counts), pixels.shape[1]).index_add_(0, dataset.labels, pixels)
    means = sums / counts[:, None] - pixels.mean(0)
    unit = means / means.norm(dim=1, keepdim=True)
    return (unit @ unit.T).cpu().numpy()


def _map(groups: Groups, count: int, name: str) -> Tensor:
    flat = [index for group in groups for index in group]
    if sorted(flat) != list(range(count)) or not all(groups):
        raise DataError(
            f"the groups {[list(group) for group in groups]} do not hold each of the {count} classes of {name} once; "
            f"name every class from 0 to {count - 1} in one group"
        )
    to_coarse = torch.empty(count, dtype=torch.int64)
    for coarse, group in enumerate(groups):
        to_coarse[list(group)] = coarse
    return to_coarse

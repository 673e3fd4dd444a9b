"""What is left inside the classes of a network: clusters, beside finer labels, raw inputs and a second network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.align.subclasses import (
    Agreement,
    ClusterProbe,
    Subclasses,
    SubclassMatching,
    SubspaceAngles,
    agreement,
    cluster_and_probe,
    match_subclasses,
    subclasses,
    subspace_angles,
)
from isthmus.base.batches import Data
from isthmus.base.errors import DataError
from isthmus.base.plain import plain
from isthmus.metrics.collapse import CollapseValues, collapse_values

from .features import Features, read_features

NETWORK, INPUTS = "the network", "raw inputs"

Groups = Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class SubclassStudy:
    """Clusters inside the classes of a network, and what they were held against.

    Attributes:
        features: Of the network, on the training data.
        fine: (samples,) fine labels; None where none are known.
        found: The clusters inside each class.
        collapse: How far the features have collapsed, classes as the network was trained on.
        agreements: Clusters and fine labels, by what was clustered: the network, raw inputs, and further networks.
        probe: Cluster-and-linear-probe on test data; None without any.
        second: Clusters of the second network; None without any.
        matching: Clusters of the network and of the second one.
        angles: How alike both networks vary inside the classes.
        class_names: Name of each class.
        fine_names: Name of each fine label.
        settings: Everything that was chosen.
    """

    features: Features
    fine: Tensor | None
    found: Subclasses
    collapse: CollapseValues
    agreements: Mapping[str, Agreement]
    probe: ClusterProbe | None
    second: Subclasses | None
    matching: SubclassMatching | None
    angles: SubspaceAngles | None
    class_names: tuple[str, ...]
    fine_names: tuple[str, ...]
    settings: Mapping[str, Any]

    @property
    def verdict(self) -> str:
        """Say in a sentence what was found."""
        clusters, classes = len(self.found.classes), len(self.found.names)
        if NETWORK not in self.agreements:
            return f"{clusters} clusters inside {classes} classes"
        own = self.agreements[NETWORK]
        beside = f", those of raw inputs {self.agreements[INPUTS].purity:.1%}" if INPUTS in self.agreements else ""
        text = f"{clusters} clusters inside {classes} classes agree with the fine labels to {own.purity:.1%}{beside}"
        return text.replace("%", " %")

    @property
    def caution(self) -> str | None:
        """Say that these are hardly the classes that the network was trained on, where it gets most samples wrong."""
        share = self.collapse.accuracy
        if share is None or share >= 0.5:
            return None
        told = f"{share:.1%}".replace("%", " %")
        return f"the network puts {told} of these samples into their class: was it trained on other classes, or groups?"

    def to_dict(self) -> dict[str, Any]:
        """Give the content as plain lists, numbers and strings for JSON."""
        parts = {name: getattr(self, name) for name in ("probe", "second", "matching", "angles")}
        return plain(
            {
                "layer": self.features.layer,
                "class_names": self.class_names,
                "fine_names": self.fine_names,
                "collapse": self.collapse.to_dict(),
                "caution": self.caution,
                "found": self.found.to_dict(),
                "agreements": {name: each.to_dict() for name, each in self.agreements.items()},
                **{name: None if part is None else part.to_dict() for name, part in parts.items()},
                "settings": dict(self.settings),
            }
        )


def subclass_study(
    model: nn.Module,
    train: Data,
    test: Data | None = None,
    *,
    groups: Groups | None = None,
    class_names: Sequence[str] | None = None,
    fine_names: Sequence[str] | None = None,
    second: nn.Module | None = None,
    others: Mapping[str, nn.Module] | None = None,
    inputs: bool = True,
    layer: str | None = None,
    classifier: str | None = None,
    dims: int = 5,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    **how: Any,
) -> SubclassStudy:
    """Cluster the features of each class of a network, and hold the clusters against all that could explain them.

    After Yang, Steinhardt & Hu (2023, "Are Neurons Actually Collapsed?"): a network that was trained on coarse labels
    may keep the fine ones apart inside a collapsed class. Raw inputs are clustered in the same way, since clusters say
    something of the network only where they beat those.

    Args:
        model: The network, trained on coarse labels.
        train: Batches (x, y), y the fine label where `groups` are given, else the class. Read once for each network.
        test: The same of other samples, for the probe; needs `groups`.
        groups: The fine labels in each class, every one once. Default: nothing finer than the classes is known.
        class_names: Name of each class. Default: the names, or numbers, of its fine labels.
        fine_names: Name of each fine label. Default: its number.
        second: Another network on the same classes, whose clusters are matched with those of the first.
        others: Further networks to cluster in the same way, by name, an untrained one say; need `groups`.
        inputs: Cluster the raw inputs, too; needs `groups`.
        layer: See `read_features`.
        classifier: See `read_features`.
        dims: Dimensions in which both networks are compared inside a class.
        seed: Of all that is random.
        device: Where to run. Default: the device of each network.
        progress: Show bars: always, never, or on a terminal only (None).
        how: Other arguments of `subclasses`: method, count, project, limit, …

    Returns:
        Clusters, agreements, the probe, and the comparison with the second network.

    Raises:
        DataError: Data or choices do not fit, see `subclasses`; or something needs `groups`.
        LayerNotFoundError: See `read_features`.

    >>> from isthmus.zoo import load_data, loader, mlp
    >>> data = loader(load_data("digits", "test"))
    >>> pairs = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    >>> found = subclass_study(mlp(64, (16,), classes=5, seed=0), data, groups=pairs, count=2, project="pca")
    >>> list(found.agreements), len(found.found.classes)
    (['the network', 'raw inputs'], 10)
    """
    _check(groups, test, others)
    read = partial(read_features, layer=layer, classifier=classifier, device=device, progress=progress)
    cluster = partial(subclasses, seed=seed, progress=progress, **how)
    features = read(model, train, inputs=inputs and groups is not None)
    fine = None if groups is None else features.labels
    to_class = None if groups is None else coarse_map(groups)
    coarse = features.labels if to_class is None else coarse_labels(features.labels, to_class)
    found = cluster(features.values, coarse)
    agreements = {}
    if fine is not None:
        agree = partial(agreement, fine=fine, fine_names=fine_names)
        agreements[NETWORK] = agree(found)
        if features.inputs is not None:
            agreements[INPUTS] = agree(cluster(features.inputs, coarse))
        for name, other in (others or {}).items():
            agreements[name] = agree(cluster(_same(read(other, train), features, name).values, coarse))
    compared = _compare(_same(read(second, train), features, "the second network"), features.values, coarse, found,
                        cluster, dims, seed) if second is not None else (None, None, None)  # fmt: skip
    return SubclassStudy(
        features=replace(features, inputs=None),
        fine=fine,
        found=found,
        collapse=_collapse(features, coarse),
        agreements=agreements,
        probe=None if test is None else _probe(features, coarse, read(model, test), found, fine_names),
        second=compared[0],
        matching=compared[1],
        angles=compared[2],
        class_names=_class_names(class_names, fine_names, groups, int(coarse.max()) + 1),
        fine_names=_fine_names(fine_names, groups),
        settings={"groups": groups, "dims": dims, "seed": seed, "clusters": found.method, **how},
    )


def coarse_map(groups: Groups) -> Tensor:
    """Give the class of each fine label, (fine labels,) int64.

    Raises:
        DataError: The groups do not hold every fine label from 0 on once.

    >>> coarse_map([[0, 3], [1, 2]])
    tensor([0, 1, 1, 0])
    """
    flat = sorted(label for group in groups for label in group)
    if not flat or flat != list(range(len(flat))) or not all(len(group) for group in groups):
        told = [list(group) for group in groups]
        raise DataError(f"the groups {told} do not hold every fine label from 0 on once, with one or more in each")
    found = torch.empty(len(flat), dtype=torch.int64)
    for name, group in enumerate(groups):
        found[list(group)] = name
    return found


def _check(groups: Groups | None, test: Data | None, others: Mapping[str, nn.Module] | None) -> None:
    for name, value in (("test", test), ("others", others)):
        if groups is None and value is not None:
            raise DataError(f"{name} was given, but no fine labels are known; say by groups= which ones a class holds")
    for name in others or {}:
        if name in (NETWORK, INPUTS):
            raise DataError(f"others holds {name!r}, which is measured anyhow; give it another name")


def coarse_labels(labels: Tensor, to_class: Tensor) -> Tensor:
    """Give the class of each sample from its fine label.

    Raises:
        DataError: A label belongs to no class.

    >>> coarse_labels(torch.tensor([3, 1]), torch.tensor([0, 0, 1, 1]))
    tensor([1, 0])
    """
    if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= len(to_class):
        raise DataError(
            f"labels go from {labels.min()} to {labels.max()}, but the groups hold 0 to {len(to_class) - 1}; the data "
            "must have fine labels, and each of them a group"
        )
    return to_class.to(labels.device)[labels.long()]


def _same(features: Features, first: Features, name: str) -> Features:
    if not torch.equal(features.labels, first.labels):
        raise DataError(
            f"{name} saw the samples in another order, by their labels; give data that comes in one order every time"
        )
    return features


def _collapse(features: Features, coarse: Tensor) -> CollapseValues:
    weight, bias = features.weight, features.bias
    if weight is None or len(weight) != int(coarse.max()) + 1:
        return collapse_values(features.values, coarse)
    return collapse_values(features.values, coarse, weight=weight, bias=bias)


def _compare(
    other: Features, values: Tensor, coarse: Tensor, found: Subclasses, cluster: Any, dims: int, seed: int
) -> tuple[Subclasses, SubclassMatching, SubspaceAngles]:
    second = cluster(other.values, coarse)
    angles = subspace_angles(values, other.values, coarse, dims=dims, seed=seed)
    return second, match_subclasses(found, second, seed=seed), angles


def _probe(
    features: Features, coarse: Tensor, test: Features, found: Subclasses, names: Sequence[str] | None
) -> ClusterProbe:
    return cluster_and_probe(
        features.values, coarse, features.labels, test.values, test.labels, found=found, fine_names=names
    )


def _fine_names(names: Sequence[str] | None, groups: Groups | None) -> tuple[str, ...]:
    if names is not None or groups is None:
        return tuple(names or ())
    return tuple(map(str, range(sum(map(len, groups)))))


def _class_names(
    names: Sequence[str] | None, fine_names: Sequence[str] | None, groups: Groups | None, count: int
) -> tuple[str, ...]:
    if names is not None:
        if len(names) < count:
            raise DataError(f"class_names has {len(names)} names for {count} classes")
        return tuple(names)
    if groups is None:
        return tuple(map(str, range(count)))
    return tuple("+".join(_fine_names(fine_names, groups)[label] for label in group) for group in groups)

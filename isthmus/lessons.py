"""What a student is to learn of a teacher, by method: class probabilities, or those of subclasses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from isthmus.align.subclasses import subclasses
from isthmus.align.subclasses.projection import subclass_projection
from isthmus.base.batches import Batch, model_device
from isthmus.base.errors import DataError, nearest
from isthmus.base.running import evaluating
from isthmus.metrics.capture import as_samples, capture
from isthmus.metrics.collapse import find_classifier
from isthmus.zoo import Coarse, Dataset, loader
from isthmus.zoo.distillation import SoftTargets, taught

Method = Literal["labels", "logits", "projection", "random", "dealt", "clusters", "oracle"]

METHODS: dict[str, str] = {
    "labels": "class labels alone, no teacher",
    "logits": "the teacher's class probabilities (Hinton et al. 2015)",
    "projection": "pseudo-subclasses along principal directions of the teacher's features (Loo et al. 2024)",
    "random": "control: the same along random directions",
    "dealt": "control: the shares of 'projection' dealt out at random among the images of a class",
    "clusters": "clusters of the teacher's features inside each class (k-means on principal components)",
    "oracle": "the true fine labels as subclasses",
}


@dataclass(frozen=True, eq=False)
class Seen:
    """What a teacher says of the images of a training set.

    Attributes:
        features: (n x units), what its last linear layer reads, on the CPU.
        logits: (n x classes).
        weight: (classes x units) of the last linear layer.
    """

    features: Tensor
    logits: Tensor
    weight: Tensor


def ask(teacher: nn.Module, data: Dataset) -> Seen:
    """Run a teacher over images once, in evaluation mode.

    Raises:
        DataError: It has another number of classes than the data.
        LayerNotFoundError: No linear layer gives its outputs.
    """
    device = model_device(teacher)
    data = data.to(device)
    features, logits = [], []
    with evaluating(teacher), torch.no_grad():
        head = find_classifier(teacher, Batch((data.normalise(data.images[:2]),)))
        if len(head.weight) != len(data.classes):
            raise DataError(f"the teacher has {len(head.weight)} outputs, but {data.name} {len(data.classes)} classes")
        with capture(teacher, [head.name], inputs=True) as inputs:
            for x, _ in loader(data):
                logits.append(teacher(x).cpu())
                own = inputs[head.name]
                features.append(as_samples(own, "mean", unit_axis=1).cpu() if head.pooled else own.flatten(1).cpu())
    return Seen(torch.cat(features), torch.cat(logits), head.weight.cpu())


@dataclass(frozen=True)
class Teaching:
    """How a teacher's knowledge becomes targets.

    Attributes:
        count: Pseudo-subclasses of each class.
        temperature: Of the teacher's and the student's outputs (Hinton et al. 2015).
        share_temperature: Temperature of the shares of pseudo-subclasses; small numbers make them nearly one-hot.
        hard: Share of the loss on labels.
        null_space: Take off what the teacher's classifier reads before directions are found.
        rotate: Turn principal directions, see `subclass_projection`.
    """

    count: int = 2
    temperature: float = 1.0
    share_temperature: float = 0.3
    hard: float = 0.0
    null_space: bool = True
    rotate: bool = True


def lesson(
    method: Method, seen: Seen | None, data: Coarse | Dataset, teaching: Teaching | None = None, *, seed: int = 0
) -> Dataset:
    """Put what a student is to learn by a method beside the images.

    Subclasses that are known for the own class of an image only (clusters, fine labels) get the whole of its
    probability; the probability of each other class is spread evenly over its subclasses.

    Args:
        method: See `METHODS`.
        seen: What the teacher said; None for "labels".
        data: The training set, with fine labels for "oracle".
        teaching: Options.
        seed: Of directions, clusters and deals.

    Returns:
        The data set itself for "labels"; with targets otherwise.

    Raises:
        DataError: A choice cannot be, or the data and what the teacher saw do not fit.
    """
    teaching = teaching or Teaching()
    check_methods([method])
    images = data.dataset if isinstance(data, Coarse) else data
    if method == "labels":
        return images
    if seen is None or seen.logits.shape != (len(images), len(images.classes)):
        shape = "no teacher" if seen is None else f"logits of shape {tuple(seen.logits.shape)}"
        raise DataError(f"{shape} for {len(images)} images of {len(images.classes)} classes; pass what ask() gave")
    SoftTargets(torch.tensor([0]), teaching.temperature, teaching.hard)  # which refuses what cannot be
    p = (seen.logits.double() / teaching.temperature).softmax(1)
    labels = images.labels.cpu()
    if method == "logits":
        return taught(images, p)
    if method in ("clusters", "oracle"):
        own, of_class = _known(method, seen, data, teaching, seed)
        return taught(images, _whole(p, labels, own, of_class), of_class)
    found = subclass_projection(
        seen.features,
        labels,
        count=teaching.count,
        weight=seen.weight if teaching.null_space else None,
        directions="random" if method == "random" else "pca",
        rotate=teaching.rotate,
        seed=seed,
    )
    shares = found.shares(seen.features, teaching.share_temperature)
    if method == "dealt":
        shares = shares[_dealt(labels, seed)]
    return taught(images, (p[..., None] * shares).flatten(1), found.of_class)


def _known(method: Method, seen: Seen, data: Coarse | Dataset, teaching: Teaching, seed: int) -> tuple[Tensor, Tensor]:
    """Give the subclass of each image, and the class of each subclass."""
    if method == "oracle":
        if not isinstance(data, Coarse):
            raise DataError("method 'oracle' needs fine labels; pass what zoo.coarsen gives, not its data set alone")
        fine, kinds = data.fine.cpu(), len(data.fine_classes)
        pairs, own = (data.dataset.labels.cpu() * kinds + fine).unique(return_inverse=True)
        return own, pairs // kinds
    images = data.dataset if isinstance(data, Coarse) else data
    found = subclasses(seen.features, images.labels.cpu(), count=teaching.count, project="pca", seed=seed)
    return found.labels, found.classes


def _whole(p: Tensor, labels: Tensor, own: Tensor, of_class: Tensor) -> Tensor:
    """Give the known subclass all of the own class's probability, and spread that of the others evenly."""
    even = (p / torch.bincount(of_class, minlength=p.shape[1]))[:, of_class]
    targets = torch.where(of_class == labels[:, None], 0.0, even)
    rows = torch.arange(len(labels))
    targets[rows, own] = p[rows, labels]
    return targets


def _dealt(labels: Tensor, seed: int) -> Tensor:
    """Give each image another one of its class."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty_like(labels)
    for name in labels.unique():
        rows = (labels == name).nonzero().flatten()
        order[rows] = rows[torch.randperm(len(rows), generator=generator)]
    return order


def check_methods(methods: Sequence[str]) -> None:
    """Refuse unknown methods, and none at all.

    Raises:
        DataError: With the nearest names.
    """
    for method in methods:
        if method not in get_args(Method):
            raise DataError(f"there is no method {method!r} of distillation{nearest(method, METHODS)}")
    if not methods or len(set(methods)) < len(methods):
        raise DataError(f"methods are {list(methods)}; name one or more of {', '.join(METHODS)}, each once")

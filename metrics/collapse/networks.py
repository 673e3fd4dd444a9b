"""Neural collapse of a network on data: the features before its classifier, and any other layers on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...base.batches import Batch, Data, batches, model_device
from ...base.errors import DataError, LayerNotFoundError, nearest
from ...base.evaluation import IGNORED
from ...base.progress import progress as progress_bar
from ...base.running import evaluating, on_device
from ..capture import Activations, Positions, as_samples, capture
from ..gram import Gram
from ..reading import MASK, MaskNames, Reader, batch_count, one_side, reader
from .class_moments import ClassMoments
from .heads import Head, find_classifier, read_classifier
from .values import CollapseValues, collapse_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class Collapse:
    """Neural collapse of the layers of one network.

    Attributes:
        layers: Names in execution order; the features that go into the classifier come last, as "fc.input".
        values: By layer name.
        moments: Class moments by layer name, without covariance: counts, means and variances of the classes.
        classifier: Name of the classifier; None where the network was measured without one.
        convention: How features were read: "positions", "mask", "samples", "classes" and "weighted".
    """

    layers: tuple[str, ...]
    values: Mapping[str, CollapseValues]
    moments: Mapping[str, ClassMoments]
    classifier: str | None
    convention: Mapping[str, Any]

    @property
    def last(self) -> CollapseValues:
        """Values of the last layer: the features that the classifier reads."""
        return self.values[self.layers[-1]]

    def curve(self, name: str) -> list[float | None]:
        """Give one value for each layer, in their order.

        Args:
            name: An attribute of `CollapseValues`, "nc1" say.

        Raises:
            DataError: There is no such value.
        """
        check_value(name)
        return [getattr(self.values[layer], name) for layer in self.layers]

    def plot(self, ax: Axes | None = None, names: Sequence[str] | None = None) -> Axes:
        """Draw values along the depth of the network, on a logarithmic axis.

        Args:
            ax: Where to draw. Default: a new figure.
            names: Which. Default: NC1, its cheap form, the spread of the cosines, and NC3.

        Returns:
            The axes.

        Raises:
            DataError: There is no such value.
        """
        from .pictures import depth_curves

        return depth_curves(self, ax, names)

    def to_dict(self) -> dict[str, Any]:
        """Give the content as plain lists, numbers and strings for JSON."""
        return {
            "layers": list(self.layers),
            "values": {name: values.to_dict() for name, values in self.values.items()},
            "classifier": self.classifier,
            "convention": dict(self.convention),
        }


def check_value(name: str) -> None:
    """Refuse what is no value of `CollapseValues`.

    Raises:
        DataError: With the nearest names.
    """
    known = [*CollapseValues.__dataclass_fields__]
    if name not in known:
        raise DataError(f"there is no value {name!r} of collapse{nearest(name, known)}")


def collapse(
    model: nn.Module,
    data: Data,
    *,
    layers: str | Iterable[str] | None = None,
    classifier: str | None = None,
    classes: int | None = None,
    positions: Positions = "mean",
    mask: MaskNames = MASK,
    weighted: bool = False,
    margin: bool | None = None,
    max_bytes: int = 4 << 30,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Collapse:
    """Measure neural collapse (Papyan, Han & Donoho 2020) of a network: NC1 to NC4, and their generalised forms.

    The network runs over the data once. NC4 and the accuracies need the class means first, so features are kept, in
    float32, or float64 where they are: `max_bytes` of them in memory, more in a temporary file that is gone with the
    process. Decisions of the classifier are computed from the features that it reads, in float64.

    Args:
        model: The network; it runs in evaluation mode and comes back as it was.
        data: Batches (x, y), or mappings with their labels, integers from 0; those the network was trained on, for
            collapse as it is published. A label of -100 does not count.
        layers: More layers to measure on the way, without a classifier of their own: names, or "all" for every module
            without children.
        classifier: Name of the last linear layer, whose input is measured. Default: the one whose outputs are the
            network's.
        classes: Number of classes. Default: outputs of the classifier.
        positions: How places of feature maps and tokens of `layers` are read: averaged ("mean"), flattened into
            features ("features"), or as samples, each with the label of its image ("samples"). A feature map that a
            convolutional classifier reads is always averaged.
        mask: Name of the input that is 0 for padding, see `reader`.
        weighted: Let classes count by their size, see `collapse_of`.
        margin: Compute the one-vs-rest margin, see `collapse_of`.
        max_bytes: Bytes of features that stay in memory.
        device: Where to run. Default: the device of the model. A network that is elsewhere is copied there.
        progress: Show a bar: always, never, or on a terminal only (None).

    Returns:
        The values of each layer.

    Raises:
        DataError: Labels are missing or do not fit, a class has fewer than two samples, or a layer cannot be read.
        LayerNotFoundError: There is no such layer, or the classifier is not known.
        NotFiniteError: An input or a feature holds NaN or infinity.
        OutputError: The temporary file cannot be written.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> found = collapse(model, [(torch.randn(60, 5), torch.arange(60) % 3)], layers="all")
    >>> found.layers, found.classifier, found.last.features
    (('0', '1', '2', '2.input'), '2', 8)
    """
    device = torch.device(device) if device is not None else model_device(model)
    network = on_device(model, device)
    stream = batches(data, device)
    first = next(stream)
    head = _head(network, first, classifier, layers, classes)
    store = _Store(_classes(head, classes), max_bytes)
    total = batch_count(data)
    with ExitStack() as stack:
        watch = _Watch(network, head, layers, positions, mask, stack)
        for index, batch in enumerate(progress_bar(chain([first], stream), "collapse", total, progress)):
            store.add(watch(batch, index))
        store.check()
        order = watch.order
        convention = {**watch.convention, "samples": store.samples, "classes": store.classes, "weighted": weighted}
    values = {}
    for name in order:
        own = head if head is not None and name == _input_name(head) else None
        pair = (own.weight, own.bias) if own else (None, None)
        rows = store.rows(name)
        values[name] = collapse_of(store.moments[name], *pair, rows=rows, weighted=weighted, margin=margin)
    moments = {name: store.moments[name] for name in order}
    return Collapse(tuple(order), values, moments, head.name if head else None, convention)


def _input_name(head: Head) -> str:
    return f"{head.name}.input" if head.name else "input"


def _head(
    model: nn.Module, batch: Batch, name: str | None, layers: str | Iterable[str] | None, classes: int | None
) -> Head | None:
    if name is not None:
        return read_classifier(model, name)
    try:
        with evaluating(model):
            return find_classifier(model, batch)
    except LayerNotFoundError:
        if layers is None or classes is None:
            raise
        return None


def _classes(head: Head | None, classes: int | None) -> int:
    if head is None:
        assert classes is not None
        return classes
    if classes not in (None, len(head.weight)):
        raise DataError(
            f"classes is {classes}, but the classifier {head.name!r} has {len(head.weight)} outputs; leave classes "
            "out, or measure features by layers= and classes= of a network without its classifier"
        )
    return len(head.weight)


class _Watch:
    """Reads features with their labels, batch by batch."""

    def __init__(
        self,
        model: nn.Module,
        head: Head | None,
        layers: str | Iterable[str] | None,
        positions: Positions,
        mask: MaskNames,
        stack: ExitStack,
    ) -> None:
        self._model, self._head = model, head
        self._reader: Reader | None = None
        self._inputs: Activations | None = None
        if layers is not None:
            names = None if layers == "all" else layers
            how = {"positions": positions, "mask": mask, "reuse": True}
            self._reader = stack.enter_context(reader([one_side(model, names)], **how))
        else:
            stack.enter_context(evaluating(model))
            stack.enter_context(torch.no_grad())
        if head is not None:
            self._inputs = stack.enter_context(capture(model, [head.name], inputs=True))

    @property
    def order(self) -> list[str]:
        """Names of the layers, the features of the classifier last."""
        names = list(self._reader.names[0]) if self._reader else []
        return names if self._head is None else [*names, _input_name(self._head)]

    @property
    def convention(self) -> dict[str, Any]:
        if self._reader is None:
            return {"positions": "mean", "mask": None}
        return {key: self._reader.convention[key] for key in ("positions", "mask")}

    def __call__(self, batch: Batch, index: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Run the network once; gives features and labels of each layer, without those to be ignored."""
        labels = _labels(batch, index)
        if self._reader is None:
            batch.call(self._model)
            found = {}
        else:
            samples = self._reader(batch)
            found = {name: (rows, self._labels_of(name, rows, labels)) for name, rows in samples.items()}
        if self._head is not None:
            assert self._inputs is not None
            found[_input_name(self._head)] = _features(self._inputs[self._head.name], self._head, labels)
        return {name: _counted(rows, own) for name, (rows, own) in found.items()}

    def _labels_of(self, name: str, rows: Tensor, labels: Tensor) -> Tensor:
        if labels.ndim == 1:
            assert self._reader is not None
            return labels if len(rows) == len(labels) else labels[self._reader.owners(name).to(labels.device)]
        if len(rows) != labels.numel():
            raise DataError(
                f"layer {name!r} gives {len(rows)} rows for labels of shape {tuple(labels.shape)}; read tokens that "
                "have labels of their own with positions='samples' and mask=None"
            )
        return labels.flatten()


def _labels(batch: Batch, index: int) -> Tensor:
    labels = batch.targets
    if labels is None:
        raise DataError(f"batch {index} has no labels: pass batches (x, y), or mappings with a key such as 'labels'")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(
            f"batch {index}: labels of shape {tuple(labels.shape)} are {labels.dtype}; expected integers from 0, one "
            "for each sample"
        )
    return labels


def _features(inputs: Tensor, head: Head, labels: Tensor) -> tuple[Tensor, Tensor]:
    name, shape = _input_name(head), tuple(inputs.shape)
    if head.pooled:
        rows = as_samples(inputs, "mean", unit_axis=1, name=name)
    else:
        rows = as_samples(inputs, "samples", unit_axis=-1, name=name)
    if len(rows) != labels.numel():
        raise DataError(
            f"the classifier {head.name!r} reads features of shape {shape} beside labels of shape "
            f"{tuple(labels.shape)}; expected one label for each row of features"
        )
    return rows, labels.flatten()


def _counted(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    counted = labels != IGNORED
    return (rows, labels) if bool(counted.all()) else (rows[counted.to(rows.device)], labels[counted])


class _Store:
    """Keeps the features of every layer, and their moments."""

    def __init__(self, classes: int, max_bytes: int) -> None:
        self.classes = classes
        self.moments: dict[str, ClassMoments] = {}
        self._max_bytes = max_bytes
        self._gram: Gram | None = None
        self._labels: dict[str, list[Tensor]] = {}
        self.samples = 0

    def add(self, found: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        *_, (_, last) = found.values()
        if not len(last):
            return  # all are to be ignored
        if self._gram is None:
            wide = any(rows.dtype == torch.float64 for rows, _ in found.values())
            self._gram = Gram(dtype=torch.float64 if wide else torch.float32, max_bytes=self._max_bytes)
        for name, (rows, labels) in found.items():
            if name not in self.moments:
                self.moments[name] = ClassMoments(self.classes, covariance=False)
            self.moments[name].update(rows, labels)
            self._labels.setdefault(name, []).append(labels)
        self._gram.update({name: rows for name, (rows, _) in found.items()})
        self.samples += len(last)

    def check(self) -> None:
        if not self.samples:
            raise DataError(f"no label of the data counts: all are {IGNORED}, the label to be ignored")

    def rows(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        assert self._gram is not None
        start = 0
        for labels in self._labels[name]:
            stop = start + len(labels)
            yield self._gram.rows(name, start, stop, dtype=torch.float64, centred=False), labels
            start = stop

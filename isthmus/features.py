"""Features of samples with their labels, and their inputs beside: what clusters and pictures are made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from isthmus.base.batches import Batch, Data, batches, model_device
from isthmus.base.errors import DataError
from isthmus.base.progress import progress as progress_bar
from isthmus.base.running import evaluating, on_device
from isthmus.metrics.capture import Positions, as_samples, capture
from isthmus.metrics.collapse import find_classifier
from isthmus.metrics.collapse.heads import Head, read_classifier
from isthmus.metrics.reading import batch_count, one_side, reader


@dataclass(frozen=True, eq=False)
class Features:
    """What one layer does with labelled samples; everything is on the CPU.

    Attributes:
        values: (samples x units).
        labels: (samples,) int64.
        inputs: (samples x entries), the inputs flattened; None where they were not asked for.
        layer: Name of the layer; "fc.input" for what goes into the classifier fc.
        weight: (classes x units), rows of the classifier, where these features go into it.
        bias: (classes,), its bias; None without one.
    """

    values: Tensor
    labels: Tensor
    inputs: Tensor | None
    layer: str
    weight: Tensor | None = None
    bias: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


def read_features(
    model: nn.Module,
    data: Data,
    *,
    layer: str | None = None,
    classifier: str | None = None,
    positions: Positions = "mean",
    inputs: bool = False,
    limit: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Features:
    """Run a network over data once and keep what one layer does, sample by sample.

    Args:
        model: The network; it runs in evaluation mode and comes back as it was.
        data: Batches (x, y), or mappings with their labels; one whole number for each sample.
        layer: Name of the layer. Default: what goes into the classifier, see `isthmus.collapse`.
        classifier: Name of the last linear layer. Default: the one whose outputs are the network's.
        positions: How places of feature maps and tokens of `layer` are read: averaged ("mean"), or flattened into
            features ("features").
        inputs: Keep the inputs as well; they must be floating-point, one tensor in each batch.
        limit: Keep so many samples, drawn at random, at most. Default: all.
        seed: Of the draw.
        device: Where to run. Default: the device of the model. A network that is elsewhere is copied there.
        progress: Show a bar: always, never, or on a terminal only (None).

    Returns:
        Features of each sample, in the order of the data.

    Raises:
        DataError: Labels are missing, there is not one for each sample, or inputs cannot be kept.
        LayerNotFoundError: There is no such layer, or the classifier is not known.
        NotFiniteError: An input or a feature holds NaN or infinity.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> found = read_features(model, [(torch.randn(60, 5), torch.arange(60) % 3)], limit=20, inputs=True)
    >>> found.layer, found.values.shape, found.inputs.shape
    ('2.input', torch.Size([20, 8]), torch.Size([20, 5]))
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; keep at least one sample")
    if positions == "samples":
        raise DataError("positions='samples' gives several rows for one label; read features by 'mean' or 'features'")
    device = torch.device(device) if device is not None else model_device(model)
    network = on_device(model, device)
    stream = batches(data, device)
    first = next(stream)
    head = None if layer is not None else _head(network, first, classifier)
    kept = _Kept(limit, seed)
    with _reading(network, layer, head, positions) as read:
        for index, batch in enumerate(progress_bar(chain([first], stream), "features", batch_count(data), progress)):
            labels = _labels(batch, index)
            rows = read(batch)
            if len(rows) != len(labels):
                raise DataError(f"batch {index}: {len(rows)} rows of features for {len(labels)} labels")
            kept.add(rows, labels, _inputs(batch, index) if inputs else None)
    values, labels, pixels = kept.joined()
    name = layer if head is None else f"{head.name}.input" if head.name else "input"
    assert name is not None
    parts = (None, None) if head is None else (head.weight, head.bias)
    return Features(values, labels, pixels, name, *(None if part is None else part.cpu() for part in parts))


def _head(model: nn.Module, batch: Batch, classifier: str | None) -> Head:
    if classifier is not None:
        return read_classifier(model, classifier)
    with evaluating(model):
        return find_classifier(model, batch)


@contextmanager
def _reading(model: nn.Module, layer: str | None, head: Head | None, positions: Positions) -> Iterator:
    with ExitStack() as stack:
        if head is None:
            read = stack.enter_context(reader([one_side(model, layer)], positions=positions))
            yield lambda batch: next(iter(read(batch).values()))
            return
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        seen = stack.enter_context(capture(model, [head.name], inputs=True))

        def features(batch: Batch) -> Tensor:
            batch.call(model)
            found = seen[head.name]
            how: Positions = "mean" if head.pooled else "samples"
            return as_samples(found, how, unit_axis=1 if head.pooled else -1, name=f"{head.name}.input")

        yield features


def _labels(batch: Batch, index: int) -> Tensor:
    labels = batch.targets
    if labels is None or labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        told = "no labels" if labels is None else f"labels of shape {tuple(labels.shape)} and type {labels.dtype}"
        raise DataError(f"batch {index} has {told}; expected batches (x, y) with one whole number y for each sample")
    return labels


def _inputs(batch: Batch, index: int) -> Tensor:
    found = batch.tensors()
    if len(found) != 1 or not found[0].is_floating_point():
        told = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in found)
        raise DataError(f"batch {index}: inputs {told}; to be kept they must be one floating-point tensor")
    return found[0].flatten(1)


class _Kept:
    """Keeps samples: all, or those with the lowest of random keys, which is a uniform draw in one pass."""

    def __init__(self, limit: int | None, seed: int) -> None:
        self._limit = limit
        self._generator = torch.Generator().manual_seed(seed)
        self._parts: list[tuple[Tensor, ...]] = []
        self._keys: list[Tensor] = []

    def add(self, rows: Tensor, labels: Tensor, inputs: Tensor | None) -> None:
        tensors = (rows, labels.long(), *(() if inputs is None else (inputs,)))
        self._parts.append(tuple(x.detach().to("cpu", copy=True) for x in tensors))
        self._keys.append(torch.rand(len(rows), generator=self._generator, dtype=torch.float64))
        if self._limit is not None and sum(map(len, self._keys)) > 2 * self._limit:
            self._cut()

    def _cut(self) -> None:
        keys = torch.cat(self._keys)
        chosen = slice(None)
        if self._limit is not None and len(keys) > self._limit:
            chosen = keys.argsort()[: self._limit].sort().values
        self._parts = [tuple(torch.cat(column)[chosen] for column in zip(*self._parts, strict=True))]
        self._keys = [keys[chosen]]

    def joined(self) -> tuple[Tensor, Tensor, Tensor | None]:
        self._cut()
        values, labels, *inputs = self._parts[0]
        return values, labels, inputs[0] if inputs else None

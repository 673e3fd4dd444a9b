"""From networks and batches to samples x units: one forward pass per network and batch, each layer a matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..base.batches import Batch, Data
from ..base.errors import DataError, LayerNotFoundError, nearest
from ..base.running import evaluating, on_device
from .capture import (
    Activations,
    Positions,
    as_mask,
    as_samples,
    capture,
    check_positions,
    leaf_layers,
    masks,
    unit_axes,
)
from .owners import row_owners

Layers = str | Iterable[str] | None
MaskNames = str | Mapping[str, str] | None

MASK = "attention_mask"
"""The input that tells real tokens from padding where it is there: the name that tokenizers give it."""

_PASSING_ON = (nn.Identity, nn.Flatten, _DropoutNd)


@dataclass(frozen=True)
class Side:
    """One network and the layers that are read of it.

    Attributes:
        model: The network.
        layers: Names as for `capture`.
        chosen: Whether the user named the layers. Others are left out where they do not give samples x units.
        prefix: What tells its layers from those of another network.
    """

    model: nn.Module
    layers: tuple[str, ...]
    chosen: bool
    prefix: str = ""


def one_side(model: nn.Module, layers: Layers = None, prefix: str = "") -> Side:
    """Choose the layers of one network.

    Args:
        model: The network, where it is to run.
        layers: Names. Default: all modules without children, but for those that only pass data on (identity, dropout,
            flatten).
        prefix: Put before the layer names.

    >>> one_side(nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.ReLU())).layers
    ('0', '2')
    """
    if layers is not None:
        return Side(model, (layers,) if isinstance(layers, str) else tuple(layers), True, prefix)
    names = (name for name in leaf_layers(model) if not isinstance(model.get_submodule(name), _PASSING_ON))
    return Side(model, tuple(names), False, prefix)


def two_sides(
    model_a: nn.Module, model_b: nn.Module, layers: Layers | tuple[Layers, Layers], device: torch.device
) -> tuple[Side, Side]:
    """Choose the layers of two networks, which may be one and the same.

    Args:
        model_a: The network of "model_a." layers.
        model_b: The network of "model_b." layers. The same object as `model_a` runs once, without prefixes.
        layers: Names for both, or a tuple of two lists, one for each; either may be None.
        device: Where to run; a network that is elsewhere is copied.
    """
    per_side = isinstance(layers, tuple) and len(layers) == 2 and not any(isinstance(part, str) for part in layers)
    if not per_side and layers is not None and not isinstance(layers, str):
        layers = tuple(layers)  # pyright: ignore[reportAssignmentType]  # read once for each side
    chosen_a, chosen_b = layers if per_side else (layers, layers)  # pyright: ignore[reportGeneralTypeIssues]
    a = one_side(on_device(model_a, device), chosen_a, "model_a.")  # pyright: ignore[reportArgumentType]
    b_model = a.model if model_b is model_a else on_device(model_b, device)
    b = one_side(b_model, chosen_b, "model_b.")  # pyright: ignore[reportArgumentType]
    return (replace(a, prefix=""), replace(b, prefix="")) if model_a is model_b else (a, b)


def batch_count(data: Data) -> int | None:
    """Give the number of batches, for a progress bar; None where the data cannot say."""
    return None if isinstance(data, (Tensor, Mapping, tuple, Batch)) else length_hint(data) or None


class Reader:
    """Reads batches; `reader` makes it.

    Attributes:
        layers: Per side, the names of the layers as captured, in execution order; empty before the first batch, which
            chooses them.
    """

    def __init__(
        self,
        sides: Sequence[Side],
        captured: Mapping[nn.Module, Activations],
        positions: Positions,
        unit_axis: int | None,
        mask: MaskNames,
        subsample: float | None,
        seed: int,
    ) -> None:
        self.layers: tuple[tuple[str, ...], ...] = ()
        self._sides, self._captured = tuple(sides), captured
        self._positions: Positions = positions
        self._unit_axis = unit_axis
        self._mask, self._subsample, self._seed = mask, subsample, seed
        self._batches = 0
        # Fixed by the first batch, so that a coincidence of sizes in a later one changes no meaning.
        self._axes: dict[str, int | None] = {}
        self._of_tokens: dict[str, bool] = {}
        # Of the latest batch: activation, number of rows before any were drawn, and the mask whose tokens they are.
        self._latest: dict[str, tuple[Tensor, int, Tensor | None]] = {}
        self._drawn: dict[int, Tensor] = {}
        self._count = 0

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """Per side, the layer names with their prefix: the keys of what a batch gives."""
        return tuple(
            tuple(side.prefix + key for key in own) for side, own in zip(self._sides, self.layers, strict=True)
        )

    @property
    def convention(self) -> dict[str, Any]:
        """How the batches were read: "positions", "mask" (None where none applied), "subsample" and its "seed"."""
        mask = dict(self._mask) if isinstance(self._mask, Mapping) else self._mask
        used = mask if any(self._of_tokens.values()) else None
        found = {"positions": self._positions, "mask": used, "subsample": self._subsample}
        return found if self._subsample is None else {**found, "seed": self._seed}

    @property
    def mask_names(self) -> tuple[str, ...]:
        """Names of the inputs that are masks, where they are there."""
        return (self._mask,) if isinstance(self._mask, str) else tuple((self._mask or {}).values())

    def masks(self, batch: Batch) -> dict[str, Tensor]:
        """Find the masks of a batch: (N, tokens), bool, by the name of the part of the network whose tokens they mask.

        Raises:
            DataError: A mask that was named is missing, or cannot be read; the batch holds inputs of a decoder as well,
                and one name was given.
        """
        names = {"": self._mask} if isinstance(self._mask, str) else self._mask or {}
        if MASK in batch.kwargs or self._mask != MASK:
            return {part: self._read_mask(batch, name) for part, name in names.items()}
        return {}

    def _read_mask(self, batch: Batch, name: str) -> Tensor:
        if name not in batch.kwargs:
            raise DataError(
                f"batch {self._batches} has no mask {name!r}{nearest(name, batch.kwargs)}; a mask is an input by "
                "keyword"
            )
        decoder = next((key for key in batch.kwargs if key.startswith("decoder_")), None)
        if isinstance(self._mask, str) and decoder is not None:
            raise DataError(
                f"batch {self._batches} holds {decoder!r} beside the mask {name!r}: say whose tokens it masks, such as "
                "mask={'encoder': 'attention_mask', 'decoder': 'decoder_attention_mask'}, or mask=None"
            )
        return as_mask(batch.kwargs[name], len(batch), f"batch {self._batches}: the mask {name!r}")

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Run each network once on a batch and read its layers.

        Args:
            batch: Inputs, on the device of the networks.

        Returns:
            Samples x units by layer name, prefix included; layers with equal numbers of rows have rows of the same
            samples, also where a part of them was drawn.

        Raises:
            DataError: A layer or a mask cannot be read.
            LayerNotFoundError: A layer did not run, or gave no tensor.
            NotFiniteError: An activation holds NaN or infinity.
        """
        found = self.masks(batch)
        for model in self._captured:
            batch.call(model)
        self._count = len(batch)
        if not self.layers:
            self._choose(self._count)
        samples: dict[str, Tensor] = {}
        for side, own, names in zip(self._sides, self.layers, self.names, strict=True):
            for key, name in zip(own, names, strict=True):
                if name not in samples:
                    samples[name] = self._read(side, key, name, found, self._count)
        self._drawn = {}
        if self._subsample is not None:
            samples = {name: self._draw(rows) for name, rows in samples.items()}
        self._batches += 1
        return samples

    def owners(self, name: str) -> Tensor:
        """Tell which sample of the latest batch each row of a layer is of: (rows,) in int64, rising.

        Args:
            name: The layer, prefix included.

        Raises:
            DataError: The first axis of its activation is not that of the samples.
            LayerNotFoundError: No such layer was read.
        """
        if name not in self._latest:
            raise LayerNotFoundError(f"no layer {name!r} was read{nearest(name, self._latest)}")
        activation, rows, mask = self._latest[name]
        owners = row_owners(activation, rows, self._count, mask, name)
        return owners if self._subsample is None else owners[self._drawn[rows].to(owners.device)]

    def _choose(self, count: int) -> None:
        layers = []
        for side in self._sides:
            layers.append(tuple(_keys(side, self._captured[side.model], count)))
            axes = unit_axes(side.model, self._captured[side.model])
            self._axes |= {side.prefix + key: axes[key] for key in layers[-1]}
        self.layers = tuple(layers)

    def _read(self, side: Side, key: str, name: str, found: Mapping[str, Tensor], count: int) -> Tensor:
        activation = self._captured[side.model][key]
        if not side.chosen and activation.shape[:1] != (count,):
            raise DataError(
                f"batch {self._batches}: {name} has shape {tuple(activation.shape)} for {count} samples, although its "
                "first axis was that of the samples before: name the layers to read, without this one"
            )
        axis = self._axes[name] if self._unit_axis is None or activation.ndim == 2 else self._unit_axis
        mask = _mask_of(key, found)
        if mask is not None and name not in self._of_tokens:
            # One row per sample and one per token look alike where there is one token.
            flat = activation.ndim == 2 and mask.shape[1] == 1
            self._of_tokens[name] = masks(mask, activation, axis) and not flat
        mask = mask if self._of_tokens.get(name, False) else None
        rows = as_samples(activation, self._positions, unit_axis=axis, mask=mask, name=name)
        self._latest[name] = activation, len(rows), mask if self._positions == "samples" else None
        return rows

    def _draw(self, rows: Tensor) -> Tensor:
        assert self._subsample is not None
        count, drawn = len(rows), self._drawn
        if count not in drawn:
            # Made of the batch and the number of rows alone: the same rows whatever other layers are read.
            generator = torch.Generator().manual_seed(hash((self._seed, self._batches, count)) & (1 << 62) - 1)
            kept = max(1, round(self._subsample * count))
            drawn[count] = torch.randperm(count, generator=generator)[:kept].sort().values
        return rows[drawn[count].to(rows.device)]


@contextmanager
def reader(
    sides: Sequence[Side],
    *,
    positions: Positions = "samples",
    unit_axis: int | None = None,
    mask: MaskNames = MASK,
    subsample: float | None = None,
    seed: int = 0,
    reuse: bool = False,
) -> Iterator[Reader]:
    """Watch the layers of one or more networks, to be read batch by batch.

    The networks are in evaluation mode and compute no gradients inside the context, and come back as they were. The
    first batch fixes which layers are read: of a module with several outputs the first one with an axis of samples and
    one of units, unless another is named (`lstm[1][0]`); where no names were given, activations whose first axis is not
    that of the samples (position embeddings, tables of relative positions) are left out.

    Args:
        sides: The networks with their layers, from `one_side` or `two_sides`.
        positions: How places of feature maps and tokens are read, see `as_samples`.
        unit_axis: The axis of the units in every activation of more than two axes. Default: told by the kind of module
            in the first batch, see `unit_axes`.
        mask: Name of the input, (N, tokens) of 0 and 1, that is 0 for padding. Activations whose shape without the axis
            of the units is (N, tokens), or (N · tokens), in the first batch lose these tokens; all others, such as
            (N, heads, tokens, …), are left as they are. A mapping names a mask for each part of the network
            ({"encoder": "attention_mask"}), the longest fitting name first. Default: "attention_mask" where a batch
            holds it. None: padding counts as data.
        subsample: Share of the rows of each batch to keep, in (0, 1]: round(share · rows), at least one, drawn without
            replacement by a generator of the seed, the batch and the number of rows. Default: all.
        seed: Seed of the subsample.
        reuse: What a batch gives holds until the next one only, whose activations are written over it: faster.

    Yields:
        The reader: called with a batch it gives samples x units by layer name.

    Raises:
        DataError: An argument cannot be used.
        LayerNotFoundError: A network has no such layer.

    >>> from isthmus.base.batches import batches
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    >>> with reader([one_side(model)], subsample=0.5) as read:
    ...     for batch in batches(torch.zeros(4, 1, 5, 5)):
    ...         samples = read(batch)
    >>> {name: tuple(rows.shape) for name, rows in samples.items()}
    {'0': (18, 2), '1': (18, 2)}
    """
    check_positions(positions)
    _check_mask(mask, sides)
    _check_subsample(subsample, seed)
    with ExitStack() as stack:
        captured = _watch(sides, stack, reuse)
        yield Reader(sides, captured, positions, unit_axis, mask, subsample, seed)


def _check_mask(mask: MaskNames, sides: Sequence[Side]) -> None:
    names = [*mask.keys(), *mask.values()] if isinstance(mask, Mapping) else [] if mask is None else [mask]
    if not all(isinstance(name, str) for name in names):
        raise DataError(f"mask is {mask!r}; expected the name of an input, a mapping of layers to names, or None")
    if isinstance(mask, Mapping):
        known = {name for side in sides for name, _ in side.model.named_modules(remove_duplicate=False)}
        for part in mask:
            if part not in known:
                raise LayerNotFoundError(f"mask names {part!r}, which no network has{nearest(part, known)}")


def _check_subsample(subsample: float | None, seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise DataError(f"seed is {seed!r}; expected an integer")
    if subsample is None:
        return
    number = isinstance(subsample, (int, float)) and not isinstance(subsample, bool)
    if not number or not 0 < subsample <= 1:
        raise DataError(f"subsample is {subsample!r}; expected the share of rows to keep, above 0 and at most 1")


def _watch(sides: Sequence[Side], stack: ExitStack, reuse: bool) -> dict[nn.Module, Activations]:
    stack.enter_context(torch.no_grad())
    stack.enter_context(without_fast_path())
    layers = {
        side.model: [name for other in sides if other.model is side.model for name in other.layers] for side in sides
    }
    for model in layers:
        stack.enter_context(evaluating(model))
    return {model: stack.enter_context(capture(model, names, reuse=reuse)) for model, names in layers.items()}


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Keep `nn.TransformerEncoder` from packing real tokens into nested tensors, which have no rows to read."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _keys(side: Side, activations: Activations, count: int) -> list[str]:
    keys = list(_first_outputs(side, activations).values())
    keys = [key for key in activations if key in keys or key in side.layers]
    if side.chosen:
        for name in side.layers:
            if name not in keys and name not in {activations.origins[key] for key in keys}:
                activations[name]  # says why it is missing
    else:
        keys = [key for key in keys if _comparable(activations[key]) and activations[key].shape[0] == count]
    if not keys:
        raise LayerNotFoundError(f"{type(side.model).__name__}: no layer with samples x units ran; name some")
    return keys


def _first_outputs(side: Side, activations: Activations) -> dict[str, str]:
    """Choose one output of each call of each wanted module."""
    first: dict[str, str] = {}
    for key, module in activations.origins.items():
        if module in side.layers:
            call = module + key.removeprefix(module).split("[", 1)[0]
            if call not in first or (_comparable(activations[key]) and not _comparable(activations[first[call]])):
                first[call] = key
    return first


def _comparable(activation: Tensor) -> bool:
    return activation.is_floating_point() and not activation.is_nested and activation.ndim > 1


def _mask_of(key: str, found: Mapping[str, Tensor]) -> Tensor | None:
    fitting = [
        part for part in found if not part or key == part or key.startswith((f"{part}.", f"{part}[", f"{part}#"))
    ]
    return found[max(fitting, key=len)] if fitting else None

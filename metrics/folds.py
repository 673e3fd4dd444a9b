"""Moments of two networks on parts of the data: to choose on some what is then measured on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.batches import Data, batches, model_device
from ..base.errors import DataError, LayerNotFoundError, nearest
from ..base.files import PathLike
from ..base.progress import progress as progress_bar
from .batch_checks import Pair
from .capture import Positions
from .fold_pairs import LayerPairs, PairsOf, check_pairs, layer_pairs, null_of
from .folding_rows import Deal, FoldingRows, Groups
from .joint_counts import JointCounts, check_bins, quantile_edges
from .moments import Moments
from .reading import MASK, Layers, MaskNames, batch_count, reader, two_sides
from .state_file import read_state, write_state

_FORMAT = "isthmus.unit_folds.1"


@dataclass(frozen=True, eq=False)
class UnitFolds:
    """Moments of two networks, fold by fold of the samples; `unit_folds` makes it.

    Attributes:
        folds: Moments of each fold.
        pairs: The pairs (a, b) by their names in the moments: "model_a." and "model_b." before the names of the layers,
            or without them for one network with itself.
        layer_names: The same pairs by the names in the networks.
        held_out_folds: How many of the folds, the last ones, are held out.
        samples: Number of samples of all folds; each may have several rows, such as tokens.
        convention: How the data was read, and how it was dealt into folds.
        counts_train: Joint counts of the pairs in the training folds, where asked for.
        counts_held_out: Joint counts of the pairs in the folds held out, with the same bins.
    """

    folds: tuple[Moments, ...]
    pairs: tuple[Pair, ...]
    layer_names: tuple[Pair, ...]
    held_out_folds: int
    samples: int
    convention: Mapping[str, Any]
    counts_train: JointCounts | None = None
    counts_held_out: JointCounts | None = None

    @property
    def train_parts(self) -> tuple[Moments, ...]:
        """Moments of each fold but those held out."""
        return self.folds[: -self.held_out_folds]

    @cached_property
    def train(self) -> Moments:
        """Moments of all folds but those held out."""
        return _merged(self.train_parts)

    @cached_property
    def held_out(self) -> Moments:
        """Moments of the folds held out."""
        return _merged(self.folds[-self.held_out_folds :])

    @cached_property
    def all(self) -> Moments:
        """Moments of all samples."""
        return _merged([self.train, self.held_out])

    @property
    def assignment(self) -> Tensor:
        """The fold of each sample in the order of the data, (samples,) in int64."""
        return Deal(len(self.folds), self.convention["seed"])(self.samples)

    def null_name(self, b: str) -> str:
        """Name the shuffled layer that stands beside a layer b of a pair.

        Raises:
            DataError: Nothing was shuffled.
            LayerNotFoundError: No pair has such a second layer.
        """
        known = {name for _, name in self.pairs}
        if b not in known:
            raise LayerNotFoundError(f"no pair has {b!r} as its second layer{nearest(b, sorted(known))}")
        if not self.convention["shuffled"]:
            raise DataError(f"no shuffled samples of {b!r} were kept; run unit_folds with shuffled=True")
        return null_of(b)

    def save(self, path: PathLike) -> Path:
        """Write to a safetensors file, whole or not at all.

        Raises:
            OutputError: The file cannot be written.
        """
        counts = [part for part in (self.counts_train, self.counts_held_out) if part is not None]
        content: dict[str, Any] = {"folds": [], "counts": [], "pairs": self.pairs, "layer_names": self.layer_names}
        content |= {"held_out": self.held_out_folds, "samples": self.samples, "convention": dict(self.convention)}
        tensors: dict[str, Tensor] = {}
        for kind, parts in (("folds", self.folds), ("counts", counts)):
            for index, part in enumerate(parts):
                described, held = part._to_file()
                content[kind].append(described)
                tensors |= {f"{kind}.{index}.{key}": tensor for key, tensor in held.items()}
        return write_state(path, _FORMAT, content, tensors)

    @classmethod
    def load(cls, path: PathLike, device: torch.device | str = "cpu") -> UnitFolds:
        """Read what `save` wrote.

        Args:
            path: The file.
            device: Where to put the sums.

        Raises:
            CheckpointError: The file is missing, damaged, or holds something else.
        """
        return read_state(path, _FORMAT, cls._from_file, device)

    @classmethod
    def _from_file(cls, content: Any, tensors: dict[str, Tensor]) -> UnitFolds:
        def parts(kind: str, form: type[Any]) -> list[Any]:
            held = [{} for _ in content[kind]]
            for key, tensor in tensors.items():
                if key.startswith(f"{kind}."):
                    index, name = key.removeprefix(f"{kind}.").split(".", 1)
                    held[int(index)][name] = tensor
            return [form._from_file(*part) for part in zip(content[kind], held, strict=True)]

        pairs, layer_names = (tuple((a, b) for a, b in content[key]) for key in ("pairs", "layer_names"))
        whole = (pairs, layer_names, content["held_out"], content["samples"], content["convention"])
        return cls(tuple(parts("folds", Moments)), *whole, *parts("counts", JointCounts))


def unit_folds(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Data,
    *,
    layers: Layers | tuple[Layers, Layers] = None,
    pairs: PairsOf = "same",
    positions: Positions = "samples",
    unit_axis: int | None = None,
    mask: MaskNames = MASK,
    subsample: float | None = None,
    folds: int = 10,
    held_out: int = 2,
    shuffled: bool = True,
    information: bool = False,
    bins: int = 10,
    within: bool = True,
    seed: int = 0,
    product_dtype: torch.dtype = torch.float64,
    max_bytes: int = 4 << 30,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> UnitFolds:
    """Read the units of two networks once, and keep their moments for each of several parts of the samples.

    What is matched, fitted or chosen on some folds is then measured on others, as convergent learning asks (Li et al.
    2015, sections 3 and 4), without another pass. A sample is in one fold with all its positions or tokens. Of each run
    of `folds` samples every fold gets one, at random by the seed, whatever the size of the batches.

    The null (`shuffled`) tells what similarity would be without a common input: beside each layer b stands one in which
    each sample has the rows of the sample before it in the same fold, the first one those of the last, place by place;
    tokens beyond the end of that sample start over. It is never the sample itself, but its neighbour in the data: give
    samples in random order, or neighbours of one class are alike in the null as well.

    Both networks run in evaluation mode and come back as they were. About 64 MiB of rows are held back, and two samples
    of each fold, so that products are taken of many rows at once.

    Args:
        model_a: Network of the layers a.
        model_b: Network of the layers b. Given the same object twice, it runs once.
        data: Batches: `x`, `(x, y)` or mappings of keyword inputs; one tensor is one batch.
        layers: Layer names for both, or a tuple of two lists, one for each. Default: all modules without children that
            run and give samples x units, but for those that only pass data on. None where pairs are given by name.
        pairs: "same": each layer of a with the layer of the same name; "all"; or pairs (layer of a, layer of b).
        positions: How places of feature maps and tokens are read, see `as_samples`.
        unit_axis: The axis of the units in every activation. Default: told by the kind of module, see `as_samples`.
        mask: Name of the input that is 0 for padding, which then does not count, see `reader`. Default:
            "attention_mask" where a batch holds it.
        subsample: Share of the rows of each batch to keep, see `reader`. Default: all.
        folds: Number of parts of the samples, at least 2.
        held_out: How many of them, the last ones, are held out, at least 1 and fewer than all.
        shuffled: Keep the null: the cross-moments of each a with b shuffled.
        information: Keep joint counts of each pair, of the training folds and of those held out, see `JointCounts`. The
            bins of both are of equal frequency in the first batch, which should then be large.
        bins: For each unit, at least 2.
        within: Keep the moments inside each layer, (a, a) and (b, b), as sparse prediction and clustering need.
        seed: Of the folds and the subsample.
        product_dtype: The precision of the matrix products, see `Moments`.
        max_bytes: Refuse to keep more than this: the moments of the folds and of the two merged parts, and the counts.
        device: Where to run. Default: the device of `model_a`. A network that is elsewhere is copied there.
        progress: Show a bar: always, never, or on a terminal only (None).

    Returns:
        The moments of each fold, and the pairs.

    Raises:
        DataError: An argument makes no sense; layers of a pair differ in their number of rows, or names do not agree;
            a fold has fewer than two samples (without the null: none); it would take too much memory; the data cannot
            be read.
        LayerNotFoundError: A network lacks a layer, or did not call it.
        NotFiniteError: An activation holds NaN or infinity.

    >>> _ = torch.manual_seed(0)
    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))
    >>> found = unit_folds(a, b, torch.randn(100, 4), layers=["0", "1"])
    >>> found.pairs[0], found.train.count("model_a.0"), found.held_out.count("model_a.0")
    (('model_a.0', 'model_b.0'), 80, 20)
    >>> shuffled = found.null_name("model_b.0")
    >>> [round(float(found.all.correlation("model_a.0", b).abs().mean()), 2) for b in ("model_b.0", shuffled)]
    [0.46, 0.08]
    """
    _check_options(folds, held_out, product_dtype)
    check_bins(bins)
    wanted = check_pairs(pairs)
    if not isinstance(wanted, str):
        if layers is not None:
            raise DataError("layers and pairs both name layers; leave layers out, or take pairs='same' or pairs='all'")
        layers = tuple(list(dict.fromkeys(own)) for own in zip(*wanted, strict=True))  # pyright: ignore
    device = torch.device(device) if device is not None else model_device(model_a)
    options = _Options(folds, held_out, bins if information else None, product_dtype, max_bytes)
    how: dict[str, Any] = {"positions": positions, "unit_axis": unit_axis, "mask": mask, "subsample": subsample}
    with reader(two_sides(model_a, model_b, layers, device), **how, seed=seed, reuse=True) as read:
        kept: _Kept | None = None
        for batch in progress_bar(batches(data, device), "folds", batch_count(data), progress):
            rows = read(batch)
            if kept is None:
                kept = _Kept(layer_pairs(wanted, read, shuffled=shuffled, within=within), rows, options, seed)
            kept.add(rows, kept.pairs.owners(read, rows), len(batch))
        assert kept is not None  # without a batch, batches raises
        dealt = {"folds": folds, "held_out": held_out, "shuffled": shuffled, "seed": seed}
        return kept.finish(read.convention | dealt)


@dataclass(frozen=True)
class _Options:
    folds: int
    held_out: int
    bins: int | None
    product_dtype: torch.dtype
    max_bytes: int


class _Kept:
    """What is kept of all batches, made for the first one."""

    def __init__(self, pairs: LayerPairs, rows: Mapping[str, Tensor], options: _Options, seed: int) -> None:
        self.pairs, self._options = pairs, options
        rows = {name: rows[name] for name in pairs.all_names}
        _check_size(pairs, {name: x.shape[1] for name, x in rows.items()}, options)
        self._moments = tuple(Moments(pairs.moments, product_dtype=options.product_dtype) for _ in range(options.folds))
        self._counts: tuple[JointCounts, ...] = ()
        if options.bins is not None:
            self._counts = _empty_counts(pairs, rows, options.bins, options.max_bytes)
        self._folding = FoldingRows(options.folds, seed, pairs.nulls, self._update)

    def add(self, rows: Mapping[str, Tensor], owners: Mapping[str, Tensor], count: int) -> None:
        self._folding.add({name: rows[name] for name in owners}, owners, count)

    def _update(self, groups: Groups) -> None:
        for fold, group in groups.items():
            self._moments[fold].update(group)
        last = self._options.folds - self._options.held_out
        for counts, held_out in zip(self._counts, (False, True), strict=False):
            several = [group for fold, group in groups.items() if (fold >= last) == held_out]
            if several:
                counts.update({name: torch.cat([one[name] for one in several]) for name in self.pairs.all_names})

    def finish(self, convention: Mapping[str, Any]) -> UnitFolds:
        self._folding.finish()
        samples = self._folding.samples
        names, layers, held_out = self.pairs.names, self.pairs.layers, self._options.held_out
        convention = {**convention, "samples": samples}
        return UnitFolds(self._moments, names, layers, held_out, samples, convention, *self._counts)


def _check_options(folds: int, held_out: int, product_dtype: torch.dtype) -> None:
    if not isinstance(folds, int) or folds < 2:
        raise DataError(f"folds is {folds!r}; expected a whole number, at least 2")
    if not isinstance(held_out, int) or not 0 < held_out < folds:
        raise DataError(
            f"held_out is {held_out!r}; expected a whole number of the {folds} folds, from 1 to {folds - 1}"
        )
    Moments("none", product_dtype=product_dtype)  # refuses another precision before a network runs


def _check_size(pairs: LayerPairs, units: Mapping[str, int], options: _Options) -> None:
    units = {**units, **{null: units[name] for name, null in pairs.nulls.items()}}
    each = sum(8 * units[a] * units[b] for a, b in pairs.moments) + sum(24 * count for count in units.values())
    moments = each * (options.folds + 2)
    unique = {frozenset(pair): pair for pair in pairs.names}.values()
    counts = 0 if options.bins is None else 2 * sum(8 * units[a] * units[b] * options.bins**2 for a, b in unique)
    if moments + counts > options.max_bytes:
        remedies = ["fewer folds", "fewer layers or pairs"]
        remedies += ["within=False"] * pairs.within + ["shuffled=False"] * bool(pairs.nulls)
        remedies += ["fewer bins"] * bool(counts)
        raise DataError(
            f"the moments of {options.folds} folds and of their two merged parts would take {moments / 2**30:.3g} GiB, "
            f"joint counts {counts / 2**30:.3g} GiB, together more than max_bytes={options.max_bytes}: choose "
            f"{', '.join(remedies)}, or a larger max_bytes"
        )


def _empty_counts(
    pairs: LayerPairs, rows: Mapping[str, Tensor], bins: int, max_bytes: int
) -> tuple[JointCounts, JointCounts]:
    for name, x in rows.items():
        if len(x) < bins:
            raise DataError(
                f"layer {name!r}: the {len(x)} rows of the first batch are too few for {bins} bins; make it larger, or "
                "choose fewer bins"
            )
    edges = {name: quantile_edges(x, bins) for name, x in rows.items()}
    copies = {name: values.clone() for name, values in edges.items()}  # a file holds no tensor twice
    train, held_out = (JointCounts(pairs.names, bins=bins, edges=own, max_bytes=max_bytes) for own in (edges, copies))
    return train, held_out


def _merged(parts: Sequence[Moments]) -> Moments:
    merged = Moments(parts[0].pairs, product_dtype=parts[0].product_dtype)
    for part in parts:
        merged.merge(part)
    return merged

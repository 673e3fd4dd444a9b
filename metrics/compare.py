"""Similarity of the layers of two networks, from one pass over the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..base.batches import Batch, Data, batches, model_device
from ..base.errors import DataError
from ..base.progress import progress as progress_bar
from .batch_checks import check_pair
from .capture import Positions
from .cost import Space, plan
from .distributed import agree, check_met
from .gram import Gram
from .hsic import KernelIndex
from .index import Index
from .indices import as_index
from .minibatch import MinibatchHSIC
from .moments import Moments
from .precision import Precision, check_precision, products_in
from .reading import MASK, Layers, MaskNames, Reader, batch_count, reader, two_sides
from .similarity import Significance, check_significance, similarity
from .similarity_map import Similarity

_PRODUCTS = {"float32": torch.float32, "tf32": torch.float32, "float64": torch.float64, "bf16": torch.bfloat16}

Accumulator = Moments | Gram | MinibatchHSIC

MINIBATCH = "minibatch_cka"
"""Name of CKA from HSIC₁ averaged over the batches, which has no form on arrays."""


def compare(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Data,
    *,
    index: str | Index = "cka",
    layers: Layers | tuple[Layers, Layers] = None,
    positions: Positions = "samples",
    unit_axis: int | None = None,
    mask: MaskNames = MASK,
    subsample: float | None = None,
    significance: Significance | None = None,
    shuffles: int = 200,
    seed: int = 0,
    precision: Precision = "float32",
    space: Space = "auto",
    max_bytes: int = 4 << 30,
    distributed: bool = False,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    **parameters: Any,
) -> Similarity:
    """Compare each layer of one network with each layer of another on the same inputs, in one pass.

    Both networks run in evaluation mode and come back as they were. Of a module with several outputs the first is
    taken, unless another is named (`lstm[1][0]`). What the pass keeps is chosen by the index: units x units moments
    where these are enough and cheaper, else the samples, of which those beyond `max_bytes` go to a temporary file.

    Args:
        model_a: Network of the rows.
        model_b: Network of the columns. Given the same object twice, it runs once.
        data: Batches: `x`, `(x, y)` or mappings of keyword inputs; one tensor is one batch.
        index: A key of `INDICES`; "minibatch_cka", the average over batches of Nguyen et al. (2021), whose memory does
            not grow with the data; or an index such as `CKA(debiased=True)`.
        layers: Layer names for both, or a tuple of two lists, one for each. Default: all modules without children that
            run and give samples x units, but for those that only pass data on (identity, dropout, flatten).
        positions: How places of feature maps and tokens are read, see `as_samples`.
        unit_axis: The axis of the units in every activation. Default: told by the kind of module, see `as_samples`.
        mask: Name of the input that is 0 for padding, which then does not count, see `reader`. Default:
            "attention_mask" where a batch holds it.
        subsample: Share of the rows of each batch to keep, see `reader`. Default: all.
        significance: "permutation", "jackknife" or "both", see `similarity`.
        shuffles: Of the permutation null.
        seed: Of the subsample, the shuffles and the groups of the jackknife.
        precision: Of the products of CKA and HSIC: "float32", "float64", "bf16" or "tf32", taken of centred
            activations, see `cka_from_gram`.
        space: Where CKA and HSIC are computed, "sample", "feature", "mixed", or whichever costs least, see `plan`.
        max_bytes: Bound on what is held at once, see `similarity`.
        distributed: Each process of torch.distributed holds a share of the data; all get the result of the whole.
        device: Where to run. Default: the device of `model_a`. A network that is elsewhere is copied there.
        progress: Show a bar: always, never, or on a terminal only (None).
        **parameters: Of the index: `compare(a, b, data, index="cka", kernel="rbf", bandwidth=0.5)`.

    Returns:
        The similarities, with the names of the layers.

    Raises:
        DataError: The index or a parameter is unknown; layers differ in their number of samples; there are too few; the
            data cannot be read.
        LayerNotFoundError: A network lacks a layer, or did not call it.
        NotFiniteError: An activation holds NaN or infinity.

    >>> _ = torch.manual_seed(0)
    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))
    >>> similarity = compare(a, b, torch.randn(100, 4))
    >>> similarity.layers_a, similarity.values.shape
    (('0', '1', '2'), (3, 3))
    >>> compare(a, b, torch.randn(100, 4), index="svcca", threshold=0.9).values.shape
    (3, 3)
    """
    chosen = find_index(index, parameters)
    check_significance(significance)
    check_precision(precision)
    if distributed:
        check_met()
    if significance is not None and not isinstance(chosen, Index):
        raise DataError(f"{MINIBATCH} keeps no samples to shuffle or leave out; take index='cka', debiased=True")
    device = torch.device(device) if device is not None else model_device(model_a)
    sides = two_sides(model_a, model_b, layers, device)
    options: dict[str, Any] = {"precision": precision, "space": space, "max_bytes": max_bytes}
    how: dict[str, Any] = {"positions": positions, "unit_axis": unit_axis, "mask": mask, "subsample": subsample}
    with reader(sides, **how, seed=seed, reuse=True) as read:
        try:
            shown = progress_bar(batches(data, device), "compare", batch_count(data), progress)
            expected = None if distributed else data
            kept = _accumulated(read, shown, chosen, expected, options, reread=significance is not None)
        except Exception as error:
            if distributed:
                agree(error)  # the others would wait for this process
            raise
    if distributed:
        agree(None)
        kept.all_reduce()
    options |= {"significance": significance, "shuffles": shuffles, "seed": seed}
    return _read_off(kept, chosen, read, options)


def _accumulated(
    read: Reader,
    shown: Iterable[Batch],
    index: Index | Mapping[str, Any],
    data: Data | None,
    options: Mapping[str, Any],
    reread: bool,
) -> Accumulator:
    kept: Accumulator | None = None
    for batch in shown:
        samples = read(batch)
        if kept is None:
            for a, b in product(*read.names):
                check_pair(a, b, samples)
            expected = None if data is None else _expected(samples, data)
            kept = _accumulator(index, samples, read.names, expected, reread=reread, **options)
        with products_in(options["precision"]):
            kept.update(samples)
    assert kept is not None  # without a batch, batches raises
    return kept


def find_index(index: str | Index, parameters: Mapping[str, Any]) -> Index | dict[str, Any]:
    """Make the index that `compare` is asked for; of "minibatch_cka", give the checked parameters.

    Raises:
        DataError: There is no such index or parameter, or a value is wrong.
    """
    return _minibatch(parameters) if index == MINIBATCH else as_index(index, parameters)


def _minibatch(parameters: Mapping[str, Any]) -> dict[str, Any]:
    known = ("kernel", "bandwidth")
    for name in parameters:
        if name not in known:
            raise DataError(f"{MINIBATCH} has no parameter {name!r}; known: {', '.join(known)}")
    try:
        MinibatchHSIC(**parameters)  # refuses bad values before a network runs
    except TypeError as error:
        raise DataError(f"{MINIBATCH} does not take {dict(parameters)}: {error}") from error
    return dict(parameters)


def _expected(samples: Mapping[str, Tensor], data: Data) -> int | None:
    """Guess the number of samples from the first batch; None where the data does not tell how many batches it has."""
    first = len(next(iter(samples.values())))
    if isinstance(data, (Tensor, Mapping, tuple)):
        return first
    count = batch_count(data)
    return None if count is None else count * first


def _accumulator(
    index: Index | Mapping[str, Any],
    samples: Mapping[str, Tensor],
    names: Sequence[Sequence[str]],
    expected: int | None,
    precision: Precision,
    space: Space,
    max_bytes: int,
    reread: bool,
) -> Accumulator:
    """Choose what is kept: moments where they are enough, fit, and cost less than the samples."""
    dtype = _PRODUCTS[precision]
    kept = torch.promote_types(dtype, torch.float32)
    if not isinstance(index, Index):
        return MinibatchHSIC(**index, layers=(names[0], names[1]), product_dtype=kept, max_bytes=max_bytes)
    pairs = [*((name, name) for own in names for name in own), *product(*names)]
    units = {name: rows.shape[1] for name, rows in samples.items()}
    moments = sum(8 * units[a] * units[b] for a, b in dict.fromkeys(pairs))
    enough = index.from_moments and not reread and moments <= max_bytes
    if enough and _moments_cost_less(index, units, names, expected, space, max_bytes):
        exact = not isinstance(index, KernelIndex)
        return Moments(pairs, product_dtype=torch.float64 if exact else dtype)
    return Gram(dtype=kept, max_bytes=max_bytes)


def _moments_cost_less(
    index: Index,
    units: Mapping[str, int],
    names: Sequence[Sequence[str]],
    expected: int | None,
    space: Space,
    max_bytes: int,
) -> bool:
    if expected is None:
        return space in ("auto", "feature")
    if isinstance(index, KernelIndex):
        sides = [{name: units[name] for name in own} for own in names]
        return all(each == "feature" for each in plan(expected, sides[0], sides[1], space=space).space.values())
    # Where the samples fit, a factorisation of them is more accurate than one of their covariances.
    return 4 * expected * sum(units.values()) > max_bytes


def _read_off(
    kept: Accumulator, index: Index | Mapping[str, Any], read: Reader, options: Mapping[str, Any]
) -> Similarity:
    names_a, names_b = read.names
    layers_a, layers_b = read.layers
    if isinstance(kept, Gram):
        assert isinstance(index, Index)
        found = similarity(kept, index=index, layers=(names_a, names_b), **options)
        convention = {**read.convention, **found.convention, "kept": "samples"}
        return replace(found, layers_a=layers_a, layers_b=layers_b, convention=convention)
    if isinstance(kept, MinibatchHSIC):
        kernel = f"{kept.kernel} kernel" + (
            f", σ = {kept.bandwidth:g} × median distance" if kept.kernel == "rbf" else ""
        )
        estimator = f"HSIC₁ averaged over {kept.batches} batches, {kernel}"
        values, kind, samples = kept.cka(names_a, names_b), "batches", kept.samples
        name, distance = MINIBATCH, False
    else:
        assert isinstance(index, Index)
        values, kind, samples = index.scores_from_moments(kept, names_a, names_b), "moments", kept.count(names_a[0])
        estimator, name, distance = index.estimator, index.name, index.distance
    convention = read.convention | {"samples": samples, "estimator": estimator, "kept": kind}
    return Similarity(values.cpu().numpy(), layers_a, layers_b, name, convention, distance)

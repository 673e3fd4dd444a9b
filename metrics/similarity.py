"""Similarity of layers whose samples are kept: any index, with its chance level and its uncertainty."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..base.errors import DataError, LayerNotFoundError, nearest
from .batch_checks import check_alike
from .gram import Gram
from .hsic import KernelIndex
from .index import Index
from .indices import as_index
from .significance import jackknife_interval, permutation_null
from .similarity_map import Similarity
from .tiles import Precision, Space, cka_from_gram, hsic_from_gram

Significance = Literal["permutation", "jackknife", "both"]


def similarity(
    gram_a: Gram,
    gram_b: Gram | None = None,
    *,
    index: str | Index = "cka",
    layers: str | Iterable[str] | tuple[Iterable[str] | None, Iterable[str] | None] | None = None,
    significance: Significance | None = None,
    shuffles: int = 200,
    seed: int = 0,
    precision: Precision = "float32",
    space: Space = "auto",
    max_bytes: int = 4 << 30,
    **parameters: Any,
) -> Similarity:
    """Compare each layer of one network with each layer of another by what `collect` kept of them.

    Nothing is run again: one pass over the data serves every index. Several networks are put side by side with
    `Gram.join` and compared in one call.

    Args:
        gram_a: Samples of the layers of the rows.
        gram_b: Samples of the layers of the columns, the same samples in the same order. Default: `gram_a`.
        index: A key of `INDICES`, or an index such as `CKA(debiased=True)`.
        layers: Names for both, or a tuple of two lists, one for each. Default: all.
        significance: "permutation" shuffles the samples of b for `null_mean` and `p_values`; "jackknife" leaves groups
            of samples out for `interval`; "both". Samples must be independent of each other: positions of one image
            are not, so collect with positions="mean" or "features".
        shuffles: Of the permutation null.
        seed: Of the shuffles and the groups.
        precision: Of the products of CKA and HSIC, see `cka_from_gram`; all else is float64.
        space: Where CKA and HSIC are computed, see `cka_from_gram`.
        max_bytes: Bound on what is held beside the samples: tiles of CKA and HSIC; the prepared layers of other indices
            and of significance, which are refused beyond it.
        **parameters: Of the index: `similarity(a, b, index="svcca", threshold=0.95)`.

    Returns:
        The similarities, with the names of the layers.

    Raises:
        DataError: The samples differ in number or order; the index or a parameter is unknown; the layers take more than
            `max_bytes`; there are too few samples.
        LayerNotFoundError: There is no such layer.

    >>> x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    >>> gram = Gram()
    >>> gram.update({"x": x, "relu": x.relu()})
    >>> found = similarity(gram, index="cka", debiased=True, significance="permutation")
    >>> found.layers_a, round(float(found.values[0, 1]), 2), bool(found.p_values[0, 1] < 0.01)
    (('x', 'relu'), 0.76, True)
    """
    index = as_index(index, parameters)
    check_significance(significance)
    gram, (names_a, names_b), prefixes = _joined(gram_a, gram_b, layers)
    names = tuple(dict.fromkeys((*names_a, *names_b)))
    samples = _check_counts(gram, names, index)
    if significance is None and isinstance(index, KernelIndex):
        read = cka_from_gram if index.name == "cka" else hsic_from_gram
        values = read(
            gram, names_a, names_b, kernel=index.kernel, debiased=index.debiased, bandwidth=index.bandwidth,
            precision=precision, space=space, max_bytes=max_bytes,
        )  # fmt: skip
        found: dict[str, Any] = {}
    else:
        values, found = _scored(gram, names_a, names_b, index, significance, shuffles, seed, max_bytes)
    shown_a = tuple(name.removeprefix(prefixes[0]) for name in names_a)
    shown_b = tuple(name.removeprefix(prefixes[1]) for name in names_b)
    convention = {**gram.convention, "samples": samples, "estimator": index.estimator}
    if significance is not None:
        convention |= {"significance": significance, "shuffles": shuffles, "significance_seed": seed}
    return Similarity(values.cpu().numpy(), shown_a, shown_b, index.name, convention, index.distance, **found)


def check_significance(significance: str | None) -> None:
    """Refuse an unknown kind of significance.

    Raises:
        DataError: With the known ones.
    """
    known = get_args(Significance)
    if significance is not None and significance not in known:
        raise DataError(f"unknown significance {significance!r}; known: {', '.join(known)}, or None")


def _joined(
    gram_a: Gram, gram_b: Gram | None, layers: Any
) -> tuple[Gram, tuple[list[str], list[str]], tuple[str, str]]:
    per_side = isinstance(layers, tuple) and len(layers) == 2 and not any(isinstance(part, str) for part in layers)
    if isinstance(layers, str):
        layers = [layers]
    elif layers is not None and not per_side:
        layers = list(layers)
    chosen_a, chosen_b = layers if per_side else (layers, layers)
    if gram_b is None or gram_b is gram_a:
        return gram_a, (_names(gram_a, chosen_a, ""), _names(gram_a, chosen_b, "")), ("", "")
    joined = Gram.join({"a": gram_a, "b": gram_b})
    return joined, (_names(gram_a, chosen_a, "a."), _names(gram_b, chosen_b, "b.")), ("a.", "b.")


def _names(gram: Gram, chosen: Iterable[str] | None, prefix: str) -> list[str]:
    names = list(gram.names if chosen is None else chosen)
    for name in names:
        if name not in gram.names:
            raise LayerNotFoundError(f"no samples of layer {name!r}{nearest(str(name), gram.names)}")
    if not names:
        raise DataError("there is no layer to compare: collect some first, or name at least one in layers=")
    return [prefix + name for name in names]


def _check_counts(gram: Gram, names: Sequence[str], index: Index) -> int:
    first = names[0]
    for name in names:
        counts, devices = (gram.count(first), gram.count(name)), (gram.device(first), gram.device(name))
        check_alike(first, name, counts, devices)
    samples = gram.count(first)
    if samples < index.least:
        raise DataError(f"the layers have {samples} samples; {index.name} needs at least {index.least}")
    return samples


def _scored(
    gram: Gram,
    names_a: Sequence[str],
    names_b: Sequence[str],
    index: Index,
    significance: Significance | None,
    shuffles: int,
    seed: int,
    max_bytes: int,
) -> tuple[Tensor, dict[str, np.ndarray]]:
    names = tuple(dict.fromkeys((*names_a, *names_b)))
    _check_size(gram, names, index, max_bytes)
    samples = gram.count(names[0])
    found: dict[str, np.ndarray] = {}
    with torch.no_grad():
        states, constant = _prepared(gram, names, index)
        a, b = ([states[name] for name in own] for own in (names_a, names_b))
        values = index.scores(a, b)
        _warn_of_others(values, (names_a, names_b), constant, index.name)
        if significance in ("permutation", "both"):
            null = permutation_null(index, a, b, values, samples, shuffles=shuffles, seed=seed)
            found |= {"null_mean": null.mean, "p_values": null.p_values}
        if significance in ("jackknife", "both"):
            found["interval"] = jackknife_interval(index, a, b, values, samples, seed=seed)
    return values, found


def _check_size(gram: Gram, names: Sequence[str], index: Index, max_bytes: int) -> None:
    samples = gram.count(names[0])
    needed = sum(index.nbytes(samples, gram.units(name)) for name in names)
    if needed > max_bytes:
        raise DataError(
            f"{index.name} of {len(names)} layers and {samples} samples would hold {needed / 2**30:.3g} GiB, more than "
            f"max_bytes={max_bytes}: collect fewer samples (subsample=), name fewer layers, or raise max_bytes"
        )


def _prepared(gram: Gram, names: Sequence[str], index: Index) -> tuple[dict[str, Any], set[str]]:
    states, constant = {}, set()
    for name in names:
        # Float32 rows say that they are known to so many digits; what depends on the mean of each unit gets it.
        rows = gram.rows(name, centred=index.invariances.translation)
        if bool((rows == rows[0]).all()):
            constant.add(name)
            warnings.warn(f"layer {name!r} does not vary over the samples: its {index.name} is NaN", stacklevel=4)
        states[name] = index.prepare(rows)
    return states, constant


def _warn_of_others(values: Tensor, names: tuple[Sequence[str], Sequence[str]], constant: set[str], index: str) -> None:
    for row, a in zip(values.tolist(), names[0], strict=True):
        for value, b in zip(row, names[1], strict=True):
            if math.isnan(value) and not {a, b} & constant:
                warnings.warn(f"{index} of layers {a!r} and {b!r} is undefined for these samples: NaN", stacklevel=4)

"""The activations of one network over a data set, kept as samples x units: one pass, then any index."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..base.batches import Batch, Data, batches, model_device
from ..base.errors import DataError
from ..base.progress import progress as progress_bar
from ..base.running import on_device
from .capture import Positions
from .gram import Gram
from .reading import MASK, Layers, MaskNames, batch_count, one_side, reader

# Odd multipliers of 64 bits whose products spread over all bits (Steele, Lea & Flood 2014, SplitMix).
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)

_PIECE = 1 << 19
"""Entries of inputs that are hashed at a time."""


def collect(
    model: nn.Module,
    data: Data,
    *,
    layers: Layers = None,
    positions: Positions = "samples",
    unit_axis: int | None = None,
    mask: MaskNames = MASK,
    subsample: float | None = None,
    seed: int = 0,
    identify: bool = True,
    dtype: torch.dtype = torch.float32,
    max_bytes: int = 4 << 30,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    gram: Gram | None = None,
) -> Gram:
    """Run a network over data once and keep what its layers did.

    With each sample goes a fingerprint of its inputs, so that `Gram.join` refuses two networks whose loaders shuffled
    differently, or whose subsamples were drawn by different seeds or from different batches.

    Args:
        model: The network; it runs in evaluation mode and comes back as it was.
        data: Batches: `x`, `(x, y)` or mappings of keyword inputs; one tensor is one batch.
        layers: Layer names. Default: all modules without children that run and give samples x units, see `reader`.
        positions: How places of feature maps and tokens are read, see `as_samples`.
        unit_axis: The axis of the units in every activation. Default: told by the kind of module.
        mask: Name of the input that is 0 for padding, which then does not count, see `reader`. Default:
            "attention_mask" where a batch holds it.
        subsample: Share of the rows of each batch to keep, see `reader`. Default: all.
        seed: Seed of the subsample.
        identify: Keep the fingerprints. Switch it off where two networks get other inputs for the same samples, such as
            other tokens or another image size, and see to the order yourself.
        dtype: Precision of the rows in a new `Gram`.
        max_bytes: Bytes of rows that a new `Gram` keeps in memory; more go to a temporary file.
        device: Where to run. Default: the device of the model. A network that is elsewhere is copied there.
        progress: Show a bar: always, never, or on a terminal only (None).
        gram: Where to add the samples, of the same layers and with fingerprints as here. Default: a new one.

    Returns:
        The samples of each layer, by name. Layers may differ in their number of samples.

    Raises:
        DataError: The data or a layer cannot be read, or does not fit `gram`.
        LayerNotFoundError: The network lacks a layer, did not call it, or it gave no tensor.
        NotFiniteError: An activation holds NaN or infinity.
        OutputError: The temporary file cannot be written.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> gram = collect(model, [torch.randn(30, 4), torch.randn(20, 4)])
    >>> gram.names, gram.count("1"), gram.units("1")
    (('0', '1', '2'), 50, 8)
    """
    gram = Gram(dtype=dtype, max_bytes=max_bytes) if gram is None else gram
    device = torch.device(device) if device is not None else model_device(model)
    side = one_side(on_device(model, device), layers)
    how: dict[str, Any] = {"positions": positions, "unit_axis": unit_axis, "mask": mask, "subsample": subsample}
    with reader([side], **how, seed=seed, reuse=True) as read:
        for index, batch in enumerate(progress_bar(batches(data, device), "collect", batch_count(data), progress)):
            samples = read(batch)
            prints = None
            if identify:
                # A drawn subsample is another set of rows for another seed or another batch.
                salt = 0 if subsample is None else hash((seed, index))
                prints = identities(batch, read.masks(batch).values(), read.mask_names) + salt
            if gram.convention not in ({}, read.convention):
                raise DataError(
                    f"the store was filled by another convention, {gram.convention}, than {read.convention}; collect "
                    "into a new one"
                )
            gram.update(samples, samples=prints)
            gram.convention = read.convention
    return gram


def identities(batch: Batch, masks: Iterable[Tensor] = (), without: Iterable[str] = ()) -> Tensor:
    """Give a number per sample of a batch that depends on the content of its inputs alone.

    Equal inputs have equal numbers on every device, in every process and in every batch, whatever the length of their
    padding; floating-point inputs count in float32. It is the sum, over the entries, of a 64-bit hash of the entry
    times an odd number that depends on its place among the real tokens.

    Args:
        batch: Its tensors with samples first count, positional ones first, then the others by name; targets do not.
        masks: (N, tokens), bool: entries of an input of (N, tokens, …) where the mask of that shape is false do not
            count.
        without: Names of inputs that do not count.

    Returns:
        (N,) in int64.

    Raises:
        DataError: No input is left.

    >>> first, second, third = identities(Batch((torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]]),)))
    >>> bool(first == third), bool(first == second)
    (True, False)
    """
    without = set(without)
    named = [batch.kwargs[name] for name in sorted(batch.kwargs) if name not in without]
    inputs = [x for x in (*batch.args, *named) if isinstance(x, Tensor) and x.shape[:1] == (len(batch),)]
    if not inputs:
        raise DataError("the batch has no input with samples first to tell them by; collect with identify=False")
    masks = list(masks)
    total = torch.zeros(len(batch), dtype=torch.int64, device=inputs[0].device)
    with torch.no_grad():
        for x in inputs:
            mask = next((mask for mask in masks if mask.shape == x.shape[:2]), None)
            total = (total + _hashed(x.detach(), mask) + 1) * _SECOND
    return total


def _hashed(x: Tensor, mask: Tensor | None) -> Tensor:
    x = torch.view_as_real(x) if x.is_complex() else x
    if mask is None:
        x = x.flatten(1)
        factor = _odd(torch.arange(x.shape[1], device=x.device))
        # Pieces that stay in the cache of a processor.
        pieces = x.split(max(1, _PIECE // max(1, x.shape[1])))
        return torch.cat([_words(piece).mul_(factor).sum(1) for piece in pieces])
    words = _words(x).reshape(*mask.shape, -1)
    width = words.shape[2]
    places = (mask.cumsum(1) - 1)[..., None] * width + torch.arange(width, device=x.device)
    return words.mul_(_odd(places)).masked_fill_(~mask[..., None], 0).sum((1, 2))


def _words(x: Tensor) -> Tensor:
    if x.is_floating_point():
        x = (x.to(torch.float32) + 0.0).contiguous().view(torch.int32)  # one zero, not two
    words = x.to(torch.int64, copy=True).add_(1).mul_(_FIRST)
    # Products keep the low bits of a factor; those of a float are mostly zero.
    words ^= words >> 32
    return words


def _odd(places: Tensor) -> Tensor:
    mixed = (places + 1) * _FIRST
    mixed = (mixed ^ (mixed >> 29)) * _SECOND
    return (mixed ^ (mixed >> 32)) | 1

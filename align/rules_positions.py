"""Rules of the operators for which positions on an axis have a meaning: scans, windows, triangles, spectra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .depend import admit, mix
from .rules_compute import broadcast
from .terms import ONE, product
from .trace import Axes, Call, NoRuleError, rule
from .unify import cut, equate, factor
from .unknown import Unknown


def _held(call: Call, axes: Axes, dims: Sequence[int]) -> None:
    for dim in dims:
        call.pin(axes[dim])
    mix(axes, dims)


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "renorm")
def scan(call: Call) -> Axes | tuple[Axes, Axes]:
    """Go along an axis in order."""
    axes = call.axes(call["self"])
    if axes:
        _held(call, axes, [call["dim"]])
    return (axes, list(axes)) if isinstance(call.result, (tuple, list)) else axes


@rule("tril", "triu")
def triangle(call: Call) -> Axes:
    """Keep what lies on one side of the diagonal."""
    axes = call.axes(call["self"])
    call.pin(axes[-1])
    call.pin(axes[-2])
    return axes


@rule("eye")
def eye(call: Call) -> Axes:
    """Make the unit matrix, which the same order of rows and columns leaves as it is."""
    rows, columns = call.result.shape
    if rows != columns or rows < 2:
        return [call.fixed(rows), call.fixed(columns)]
    units = Unknown(rows)
    return [units, units]


@rule("diagonal")
def diagonal(call: Call) -> Axes:
    """Take the diagonal of two axes, which then have one order."""
    axes = call.axes(call["self"])
    first, second = ((call[name] if call[name] is not None else at) for at, name in enumerate(("dim1", "dim2")))
    first, second = first % len(axes), second % len(axes)
    if call["offset"] or axes[first].size != axes[second].size:
        raise NoRuleError
    equate(axes[first], axes[second], call.reason)
    return [*(term for dim, term in enumerate(axes) if dim not in (first, second)), axes[first]]


@rule("diag_embed")
def diag_embed(call: Call) -> Axes:
    """Lay the last axis on the diagonal of two."""
    if call["offset"] or call["dim1"] is not None or call["dim2"] is not None:
        raise NoRuleError
    axes = call.axes(call["self"])
    return [*axes, axes[-1]]


@rule("unfold")
def unfold(call: Call) -> Axes:
    """Cut an axis into windows; their positions come last."""
    axes = list(call.axes(call["self"]))
    dim = call["dimension"] % len(axes)
    call.pin(axes[dim])
    axes[dim] = call.fixed(call.result.shape[dim])
    return [*axes, call.fixed(call.result.shape[-1])]


@rule("im2col")
def im2col(call: Call) -> Axes:
    """Lay the windows of a picture side by side: (…, channels x offsets, windows)."""
    axes = call.axes(call["self"])
    _held(call, axes, [-2, -1])
    offsets = call.result.shape[-2] // axes[-3].size
    return [*axes[:-3], product([axes[-3], call.fixed(offsets)]), call.fixed(call.result.shape[-1])]


@rule("col2im")
def col2im(call: Call) -> Axes:
    """Add windows up to a picture."""
    axes = call.axes(call["self"])
    channels = call.result.shape[-3]
    kept, offsets = factor(axes[-2], (channels, axes[-2].size // channels), call.reason)
    call.pin(offsets)
    call.pin(axes[-1])
    mix([*axes[:-2], kept, offsets, axes[-1]], [-2, -1])
    return [*axes[:-2], kept, *(call.fixed(size) for size in call.result.shape[-2:])]


@rule("pixel_shuffle")
def pixel_shuffle(call: Call) -> Axes:
    """Turn blocks of channels into pixels."""
    axes = call.axes(call["self"])
    upscale: int = call["upscale_factor"]
    kept, offsets = factor(axes[-3], (call.result.shape[-3], upscale**2), call.reason)
    for term in (offsets, *axes[-2:]):
        call.pin(term)
    return [*axes[:-3], kept, *(call.fixed(size) for size in call.result.shape[-2:])]


@rule("pixel_unshuffle")
def pixel_unshuffle(call: Call) -> Axes:
    """Turn pixels into blocks of channels."""
    axes = call.axes(call["self"])
    call.pin(axes[-1])
    call.pin(axes[-2])
    offsets = call.fixed(call["downscale_factor"] ** 2)
    return [*axes[:-3], product([axes[-3], offsets]), *(call.fixed(size) for size in call.result.shape[-2:])]


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(call: Call) -> Axes:
    """Transpose blocks of channels and the channels inside them."""
    axes = list(call.axes(call["self"]))
    groups: int = call["groups"]
    outer, inner = factor(axes[1], (groups, axes[1].size // groups), call.reason)
    axes[1] = product([inner, outer])
    return axes


@rule("glu")
def glu(call: Call) -> Axes:
    """Gate one half of an axis by the other."""
    axes = list(call.axes(call["self"]))
    dim = (-1 if call["dim"] is None else call["dim"]) % len(axes)
    value, gate = cut(axes[dim], [axes[dim].size // 2] * 2, call.reason)
    equate(value, gate, call.reason)
    axes[dim] = value
    return axes


@rule("grid_sampler_2d", "grid_sampler_3d", "grid_sampler")
def grid_sampler(call: Call) -> Axes:
    """Read pictures at places that are computed: (N, channels, …)."""
    axes = call.axes(call["input"])
    for term in (*axes[2:], *call.axes(call["grid"])[1:]):
        call.pin(term)
    return [axes[0], axes[1], *(call.fixed(size) for size in call.result.shape[2:])]


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fft(call: Call) -> Axes:
    """Transform along some axes, whose positions have a meaning before and after."""
    axes = list(call.axes(call["self"]))
    _held(call, axes, call["dim"])
    for dim in call["dim"]:
        axes[dim] = call.fixed(call.result.shape[dim])
    return axes


@rule("view_as_real", "view_as_real_copy")
def view_as_real(call: Call) -> Axes:
    """Show real and imaginary parts on a last axis."""
    return [*call.axes(call["self"]), call.fixed(2)]


@rule("view_as_complex", "view_as_complex_copy")
def view_as_complex(call: Call) -> Axes:
    """Take a last axis of two as real and imaginary parts."""
    axes = call.axes(call["self"])
    call.pin(axes[-1])
    mix(axes, [-1])
    return axes[:-1]


@rule("complex", "polar")
def complex_(call: Call) -> Axes:
    """Put complex numbers together, each from two at its place."""
    return broadcast(call, [value for value in call.arguments.values() if isinstance(value, Tensor)])


@rule("_cdist_forward", "_euclidean_dist")
def cdist(call: Call) -> Axes:
    """Measure how far rows are from rows: (…, P, units) and (…, R, units) give (…, P, R)."""
    left, right = call.axes(call["x1"]), call.axes(call["x2"])
    equate(left[-1], right[-1], call.reason)
    batch: list[Any] = list(left[:-2])
    for at, (mine, other) in enumerate(zip(left[:-2], right[:-2], strict=False)):
        if mine is ONE or mine.size == 1:
            batch[at] = other
        elif other.size == mine.size:
            equate(mine, other, call.reason)
    admit([[*batch, left[-1]], [*batch, left[-2]], [*batch, right[-2]]])
    return [*batch, left[-2], right[-2]]

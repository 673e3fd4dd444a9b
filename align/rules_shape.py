"""Rules of the operators that move, join or cut axes and compute nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .terms import ONE, concatenation, product
from .trace import Axes, Call, NoRuleError, rule
from .unify import Unknown, cut, equate, factor


def constant_axes(shape: Sequence[int]) -> Axes:
    """Describe a tensor that holds one value everywhere: any order of it is the same."""
    return [Unknown(size) if size > 1 else ONE for size in shape]


@rule("clone", "detach", "alias", "contiguous", "_to_copy", "lift_fresh", "lift_fresh_copy", "to")
def same(call: Call) -> Axes:
    """Keep every axis."""
    return call.axes(call["self"])


@rule("zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "empty_like")
def constant(call: Call) -> Axes:
    """Make a constant tensor."""
    return constant_axes(call.result.shape)


@rule("new_zeros", "new_ones", "new_full", "new_empty", "zero", "fill")
def constant_like(call: Call) -> Axes:
    """Make a constant tensor from another, or fill one."""
    return call.axes(call["self"]) if call.operator in ("zero_", "fill_") else constant_axes(call.result.shape)


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy", "flatten", "unflatten")
def view(call: Call) -> Axes:
    """Split and merge axes: the sizes are matched from the left, in runs of equal product."""
    if call["dtype"] is not None:
        raise NoRuleError  # the same bytes read as another type
    old = [(term, size) for term, size in zip(call.axes(call["self"]), call["self"].shape, strict=True) if size != 1]
    shape = list(call.result.shape)
    if 0 in shape:
        return [call.fixed(size) for size in shape]
    new: Axes = []
    while shape:
        sizes = [shape.pop(0)]
        terms, count = [], 1
        while count != (wanted := _product(sizes)):
            if count < wanted:
                term, size = old.pop(0)
                terms.append(term)
                count *= size
            else:
                sizes.append(shape.pop(0))
        new += _split(product(terms), sizes, call)
    return new


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _split(term: Any, sizes: list[int], call: Call) -> Axes:
    if sum(size != 1 for size in sizes) <= 1:
        return [ONE if size == 1 else term for size in sizes]
    return factor(term, sizes, call.reason)


@rule("permute")
def permute(call: Call) -> Axes:
    """Reorder the axes."""
    axes = call.axes(call["self"])
    return [axes[dim] for dim in call["dims"]]


@rule("transpose", "swapaxes", "t")
def transpose(call: Call) -> Axes:
    """Swap two axes."""
    axes = list(call.axes(call["self"]))
    if axes[1:]:
        first, second = (
            (0, 1) if call.operator.startswith("t_") or call.operator == "t" else (call["dim0"], call["dim1"])
        )
        axes[first], axes[second] = axes[second], axes[first]
    return axes


@rule("unsqueeze")
def unsqueeze(call: Call) -> Axes:
    """Insert an axis of size one."""
    axes = list(call.axes(call["self"]))
    axes.insert(call["dim"] % (len(axes) + 1), ONE)
    return axes


@rule("squeeze")
def squeeze(call: Call) -> Axes:
    """Drop axes of size one."""
    tensor: Tensor = call["self"]
    dims = range(tensor.ndim) if call["dim"] is None else call["dim"]
    dropped = {dim % max(tensor.ndim, 1) for dim in ([dims] if isinstance(dims, int) else dims)}
    return [
        term
        for dim, (term, size) in enumerate(zip(call.axes(tensor), tensor.shape, strict=True))
        if not (dim in dropped and size == 1)
    ]


@rule("expand", "expand_copy")
def expand(call: Call) -> Axes:
    """Repeat axes of size one; the copies are equal, so any order of them is the same."""
    tensor: Tensor = call["self"]
    new = call.result.ndim - tensor.ndim
    kept = [
        term if size == wanted else constant_axes([wanted])[0]
        for term, size, wanted in zip(call.axes(tensor), tensor.shape, call.result.shape[new:], strict=True)
    ]
    return constant_axes(call.result.shape[:new]) + kept


@rule("cat", "concat")
def cat(call: Call) -> Axes:
    """Concatenate along one axis; the others agree."""
    tensors = [tensor for tensor in call["tensors"] if tensor.shape != (0,)]
    dim = (call["dim"] or 0) % tensors[0].ndim
    axes = list(call.axes(tensors[0]))
    for tensor in tensors[1:]:
        for at, (mine, other) in enumerate(zip(axes, call.axes(tensor), strict=True)):
            if at != dim:
                equate(mine, other, call.reason)
    axes[dim] = concatenation(call.axes(tensor)[dim] for tensor in tensors)
    return axes


@rule("stack")
def stack(call: Call) -> Axes:
    """Join along a new axis, which keeps its order."""
    tensors = call["tensors"]
    axes = list(call.axes(tensors[0]))
    for tensor in tensors[1:]:
        for mine, other in zip(axes, call.axes(tensor), strict=True):
            equate(mine, other, call.reason)
    axes.insert((call["dim"] or 0) % (len(axes) + 1), call.fixed(len(tensors)))
    return axes


@rule("split", "split_with_sizes", "chunk", "split_copy", "split_with_sizes_copy", "unsafe_split", "unsafe_chunk")
def split(call: Call) -> tuple[Axes, ...]:
    """Cut one axis into segments."""
    axes = call.axes(call["self"])
    dim = (call["dim"] or 0) % len(axes)
    segments = cut(axes[dim], [part.shape[dim] for part in call.result], call.reason)
    return tuple([*axes[:dim], segment, *axes[dim + 1 :]] for segment in segments)


@rule("unbind")
def unbind(call: Call) -> tuple[Axes, ...]:
    """Take an axis apart."""
    axes = call.axes(call["self"])
    dim = (call["dim"] or 0) % len(axes)
    call.pin(axes[dim])
    return tuple([*axes[:dim], *axes[dim + 1 :]] for _ in call.result)


@rule("slice", "slice_copy", "narrow")
def slice_(call: Call) -> Axes:
    """Take part of an axis: cut it where the part is contiguous, pin it where it is strided."""
    tensor: Tensor = call["self"]
    axes = list(call.axes(tensor))
    dim = (call["dim"] or 0) % tensor.ndim
    size, length = tensor.shape[dim], call.result.shape[dim]
    start = min(max((call["start"] or 0) + (size if (call["start"] or 0) < 0 else 0), 0), size)
    if length == size:
        return axes
    if (call["step"] or 1) == 1:
        axes[dim] = cut(axes[dim], [start, length, size - start - length], call.reason)[1]
    else:
        call.pin(axes[dim])
        axes[dim] = call.fixed(length)
    return axes


@rule("select", "select_copy")
def select(call: Call) -> Axes:
    """Take one position of an axis, which stays where it is; the rest of the axis is cut off."""
    axes = list(call.axes(call["self"]))
    dim = call["dim"] % len(axes)
    size = call["self"].shape[dim]
    index = call["index"] % size
    cut(axes[dim], [index, 1, size - index - 1], call.reason)
    return axes[:dim] + axes[dim + 1 :]


@rule("index_select")
def index_select(call: Call) -> Axes:
    """Pick positions of an axis by index."""
    axes = list(call.axes(call["self"]))
    dim = call["dim"] % len(axes)
    call.pin(axes[dim])
    axes[dim] = call.fixed(call.result.shape[dim])
    return axes


@rule("flip", "roll")
def reorder(call: Call) -> Axes:
    """Reverse or rotate axes, which therefore keep their order."""
    axes = call.axes(call["self"])
    for dim in call["dims"] or range(len(axes)):
        call.pin(axes[dim])
    return axes


@rule("constant_pad_nd")
def constant_pad(call: Call) -> Axes:
    """Put a constant before and after axes; the padding may be permuted within itself."""
    axes = list(call.axes(call["self"]))
    padding = list(call["pad"])
    for back, (before, after) in enumerate(zip(padding[::2], padding[1::2], strict=True)):
        dim = len(axes) - 1 - back
        if before < 0 or after < 0:
            call.pin(axes[dim])
            axes[dim] = call.fixed(call.result.shape[dim])
        elif before or after:
            ends = [Unknown(n) if n > 1 else (ONE if n else concatenation(())) for n in (before, after)]
            axes[dim] = concatenation([ends[0], axes[dim], ends[1]])
    return axes


@rule("copy")
def copy(call: Call) -> Axes:
    """Overwrite a tensor by another, broadcast to its shape."""
    target, source = call.axes(call["self"]), call.axes(call["src"])
    shape = call["src"].shape
    for mine, other, size in zip(reversed(target), reversed(source), reversed(shape), strict=False):
        if size != 1:
            equate(mine, other, call.reason)
    return target

"""Rules of the operators that move, join or cut axes and compute nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .deferred import Padded, Stack, copies, divide, rejoined, settled, shuffled, split_axis, uniform
from .terms import ONE, arranged, concatenation, leaves, product
from .trace import Axes, Call, NoRuleError, rule
from .unify import equate
from .unknown import normal


def constant_axes(shape: Sequence[int]) -> Axes:
    """Describe a tensor that holds one value everywhere: any order of it is the same."""
    return [copies(size) for size in shape]


@rule(
    "clone", "detach", "alias", "contiguous", "_to_copy", "lift_fresh", "lift_fresh_copy", "to", "positive", "conj",
    "_conj", "resolve_conj", "resolve_neg", "conj_physical", "real", "imag", entries="kept",
)  # fmt: skip
def same(call: Call) -> Axes:
    """Keep every axis."""
    return call.raw(call["self"])


@rule("as_strided", "as_strided_copy", entries="kept")
def as_strided(call: Call) -> Axes:
    """Lay the same axes out anew in memory; anything else is not followed."""
    tensor: Tensor = call["self"]
    wanted = [step for step, size in zip(call["stride"], call["size"], strict=True) if size != 1]
    kept = [step for step, size in zip(call.result.stride(), call.result.shape, strict=True) if size != 1]
    if list(call["size"]) != list(tensor.shape) or wanted != kept or call.operator != "as_strided_":
        raise NoRuleError
    return call.raw(tensor)


@rule("zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "empty_like")
def constant(call: Call) -> Axes:
    """Make a constant tensor."""
    return constant_axes(call.result.shape)


@rule("new_zeros", "new_ones", "new_full", "new_empty", "zero", "fill")
def constant_like(call: Call) -> Axes:
    """Make a constant tensor from another, or fill one."""
    return call.axes(call["self"]) if call.operator in ("zero_", "fill_") else constant_axes(call.result.shape)


@rule(
    "view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy", "flatten", "unflatten",
    entries="kept",
)  # fmt: skip
def view(call: Call) -> Axes:
    """Split and merge axes: the sizes are matched from the left, in runs of equal product."""
    if call["dtype"] is not None:
        raise NoRuleError  # the same bytes read as another type
    shape = list(call.result.shape)
    if 0 in shape:
        return [call.fixed(size) for size in shape]
    tensor: Tensor = call["self"]
    sized = [(axis, size) for axis, size in zip(call.raw(tensor), tensor.shape, strict=True) if size != 1]
    old = rejoined(sized)
    new: Axes = []
    while shape:
        sizes = [shape.pop(0)]
        run, count = [], 1
        while count != (wanted := math.prod(sizes)):
            if count < wanted:
                axis, size = old.pop(0)
                run.append(axis)
                count *= size
            else:
                sizes.append(shape.pop(0))
        new += _split(run, sizes, call)
    return new


def _split(run: Axes, sizes: list[int], call: Call) -> Axes:
    if run and all(map(uniform, run)):
        return [copies(size) for size in sizes]
    whole = run[0] if len(run) == 1 else shuffled(run) if run else ONE
    if whole is None:
        whole = product(settled(run))
    if sum(size != 1 for size in sizes) <= 1:
        return [ONE if size == 1 else whole for size in sizes]
    return split_axis(settled([whole])[0], sizes, call.reason)


@rule("permute", entries="kept")
def permute(call: Call) -> Axes:
    """Reorder the axes."""
    axes = call.raw(call["self"])
    return [axes[dim] for dim in call["dims"]]


@rule("transpose", "swapaxes", "t", entries="kept")
def transpose(call: Call) -> Axes:
    """Swap two axes."""
    axes = call.raw(call["self"])
    if axes[1:]:
        both = call.operator.removesuffix("_") == "t"
        first, second = (0, 1) if both else (call["dim0"], call["dim1"])
        axes[first], axes[second] = axes[second], axes[first]
    return axes


@rule("unsqueeze", entries="kept")
def unsqueeze(call: Call) -> Axes:
    """Insert an axis of size one."""
    axes = call.raw(call["self"])
    axes.insert(call["dim"] % (len(axes) + 1), ONE)
    return axes


@rule("squeeze", entries="kept")
def squeeze(call: Call) -> Axes:
    """Drop axes of size one."""
    axes = call.raw(call["self"])  # in place the tensor has its new shape by now
    dims = range(len(axes)) if call["dim"] is None else call["dim"]
    dropped = {dim % max(len(axes), 1) for dim in ([dims] if isinstance(dims, int) else dims)}
    return [axis for dim, axis in enumerate(axes) if not (dim in dropped and axis.size == 1)]


@rule("expand", "expand_copy", entries="kept")
def expand(call: Call) -> Axes:
    """Repeat axes of size one; the copies are equal, so any order of them is the same."""
    tensor: Tensor = call["self"]
    new = call.result.ndim - tensor.ndim
    kept = [
        axis if size == wanted else constant_axes([wanted])[0]
        for axis, size, wanted in zip(call.raw(tensor), tensor.shape, call.result.shape[new:], strict=True)
    ]
    return constant_axes(call.result.shape[:new]) + kept


@rule("repeat", entries="kept")
def repeat(call: Call) -> Axes:
    """Put copies of the tensor one after the other; any order of the copies is the same."""
    axes = call.axes(call["self"])
    repeats = list(call["repeats"])
    new = len(repeats) - len(axes)
    blocks = constant_axes(repeats)
    joined = [
        term if copy is ONE else product([*settled([copy]), term])
        for copy, term in zip(blocks[new:], axes, strict=True)
    ]
    return [*blocks[:new], *joined]


@rule("cat", "concat", along=True)
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


@rule("stack", along=True)
def stack(call: Call) -> Axes:
    """Join along a new axis, which keeps its order."""
    tensors = call["tensors"]
    found = Stack([call.raw(tensor) for tensor in tensors], call.reason, call.position)
    return found.axes((call["dim"] or 0) % (tensors[0].ndim + 1))


@rule(
    "split", "split_with_sizes", "chunk", "split_copy", "split_with_sizes_copy", "unsafe_split", "unsafe_chunk",
    "tensor_split", "hsplit", "vsplit", entries="kept",
)  # fmt: skip
def split(call: Call) -> tuple[Axes, ...]:
    """Cut one axis into segments."""
    axes = call.raw(call["self"])
    dim = (call["dim"] or 0) % len(axes)
    return tuple(divide(axes, dim, [part.shape[dim] for part in call.result], call.reason))


@rule("unbind", "unbind_copy", entries="kept")
def unbind(call: Call) -> tuple[Axes, ...]:
    """Take an axis apart."""
    axes = call.raw(call["self"])
    dim = (call["dim"] or 0) % len(axes)
    parts = divide(axes, dim, [1] * len(call.result), call.reason)
    return tuple([*part[:dim], *part[dim + 1 :]] for part in parts)


@rule("slice", "slice_copy", "narrow", entries="kept")
def slice_(call: Call) -> Axes:
    """Take part of an axis: a segment where it is contiguous, a factor where every n-th position is taken."""
    tensor: Tensor = call["self"]
    axes = call.raw(tensor)
    dim = (call["dim"] or 0) % tensor.ndim
    size, length, step = tensor.shape[dim], call.result.shape[dim], call["step"] or 1
    start = min(max((call["start"] or 0) + (size if (call["start"] or 0) < 0 else 0), 0), size)
    if length == size:
        return axes
    if step == 1:
        return divide(axes, dim, [start, length, size - start - length], call.reason)[1]
    term = settled(axes)[dim]
    if size % step or length != size // step:
        call.pin(term)
        return [*axes[:dim], call.fixed(length), *axes[dim + 1 :]]
    rows = split_axis(term, [length, step], call.reason)
    kept = divide([*axes[:dim], *rows, *axes[dim + 1 :]], dim + 1, [start, 1, step - start - 1], call.reason)[1]
    return [*kept[: dim + 1], *kept[dim + 2 :]]


@rule("select", "select_copy", entries="kept")
def select(call: Call) -> Axes:
    """Take one position of an axis, which stays where it is; the rest of the axis is cut off."""
    axes = call.raw(call["self"])
    dim = call["dim"] % len(axes)
    size = call["self"].shape[dim]
    index = call["index"] % size
    kept = divide(axes, dim, [index, 1, size - index - 1], call.reason)[1]
    return kept[:dim] + kept[dim + 1 :]


@rule("flip", "roll", entries="kept")
def reorder(call: Call) -> Axes:
    """Reverse or rotate axes."""
    axes = call.axes(call["self"])
    dims = [dim % len(axes) for dim in call["dims"]] if call["dims"] else range(len(axes))
    if not call["dims"] and len(axes) > 1 and call.operator.startswith("roll"):
        raise NoRuleError  # the flattened tensor is rotated
    for at, dim in enumerate(dims):
        order = list(range(axes[dim].size))
        if call.operator.startswith("flip"):
            order.reverse()
        else:
            shift = call["shifts"][at] % len(order)
            order = order[len(order) - shift :] + order[: len(order) - shift]
        axes[dim] = rearranged(axes[dim], order)
    return axes


def rearranged(term: Any, order: Sequence[int]) -> Any:
    """Put an axis in another order, which is the same axis where its positions stay anyway."""
    return term if all(leaf.pinned for leaf in leaves(normal(term))) else arranged(normal(term), order)


@rule("constant_pad_nd", along=True)
def constant_pad(call: Call) -> Axes:
    """Put a constant before and after axes; the padding may be permuted within itself."""
    axes = call.raw(call["self"])
    padding = list(call["pad"])
    for back, (before, after) in enumerate(zip(padding[::2], padding[1::2], strict=True)):
        dim = len(axes) - 1 - back
        if before < 0 or after < 0:
            call.pin(settled(axes)[dim])
            axes[dim] = call.fixed(call.result.shape[dim])
        elif before or after:
            axes[dim] = Padded(before, settled(axes)[dim], after)
    return axes


@rule("copy", along=True)
def copy(call: Call) -> Axes:
    """Overwrite a tensor by another, broadcast to its shape."""
    target, source = call.axes(call["self"]), call.axes(call["src"])
    shape = call["src"].shape
    for mine, other, size in zip(reversed(target), reversed(source), reversed(shape), strict=False):
        if size != 1:
            equate(mine, other, call.reason)
    return target

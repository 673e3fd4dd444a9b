"""Rules of the operators that compute: pointwise functions, reductions, products, convolutions, norms, pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .deferred import settled, uniform
from .depend import admit, mix
from .terms import ONE, product
from .trace import Axes, Call, rule
from .unify import blocks, equate, factor
from .unknown import Unknown

UNARY = """
relu gelu silu sigmoid tanh exp expm1 log log1p log2 sqrt rsqrt neg abs square reciprocal sign floor ceil round erf sin
cos hardtanh leaky_relu elu celu selu softplus hardswish hardsigmoid mish log_sigmoid_forward threshold clamp clamp_min
clamp_max relu6 softsign tanhshrink hardshrink softshrink logit isnan isinf nan_to_num trunc frac dropout
feature_dropout alpha_dropout native_dropout logical_not bitwise_not pow erfinv
erfc log10 sinh cosh tan asin acos atan asinh acosh atanh sinc i0 lgamma digamma signbit isfinite rrelu
absolute deg2rad rad2deg sgn angle
"""

POINTWISE = """
add sub rsub mul div true_divide floor_divide maximum minimum fmax fmin where addcmul addcdiv lerp lt le gt ge
logical_and logical_or logical_xor bitwise_and bitwise_or remainder fmod atan2 hypot masked_fill _prelu_kernel xlogy
copysign
"""

POOLS = """
max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices mkldnn_max_pool2d avg_pool1d
avg_pool2d avg_pool3d adaptive_max_pool2d adaptive_max_pool3d adaptive_avg_pool2d adaptive_avg_pool3d
_adaptive_avg_pool2d _adaptive_avg_pool3d
"""

RESIZES = """
upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
upsample_trilinear3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
_upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_lanczos2d_aa reflection_pad3d replication_pad3d
reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d
"""


def broadcast(call: Call, tensors: Sequence[Tensor]) -> Axes:
    """Equate the axes of tensors that are broadcast against each other; one of size one, or of copies, stretches."""
    ndim = max(tensor.ndim for tensor in tensors)
    axes: Axes = [ONE] * ndim
    for tensor in tensors:
        for dim, (axis, size) in enumerate(zip(call.raw(tensor), tensor.shape, strict=True), ndim - tensor.ndim):
            if size == 1 or (uniform(axis) and axes[dim] is not ONE):
                continue
            if axes[dim] is ONE or uniform(axes[dim]):
                axes[dim] = axis
            elif axes[dim] != axis:
                mine, term = settled([axes[dim], axis])
                equate(mine, term, call.reason)
                axes[dim] = telling(mine, term)
    return axes


def telling(a: Any, b: Any) -> Any:
    """Of two axes that are alike give the one that tells more: which units its positions stand for."""
    return b if isinstance(b, Unknown) and b.picks is not None else a


@rule(*UNARY.split(), *POINTWISE.split(), along=True)
def pointwise(call: Call) -> Axes | tuple[Axes, ...]:
    """Compute each entry from the entries at the same place."""
    axes = broadcast(call, [value for value in call.arguments.values() if isinstance(value, Tensor)])
    return (axes, axes) if call.operator == "native_dropout" else axes


@rule(
    "sum", "mean", "amax", "amin", "prod", "var", "std", "logsumexp", "linalg_vector_norm", "norm", "any", "all",
    "var_mean",
)  # fmt: skip
def reduce(call: Call) -> Axes | tuple[Axes, ...]:
    """Combine the entries along some axes, in any order."""
    tensor: Tensor = call["self"]
    dims = call["dim"]
    dims = range(tensor.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    reduced = {dim % max(tensor.ndim, 1) for dim in dims}
    axes = call.axes(tensor)
    if axes:
        mix(axes, reduced)
    kept = [ONE if dim in reduced else term for dim, term in enumerate(axes) if call["keepdim"] or dim not in reduced]
    return (kept, kept) if call.operator == "var_mean" else kept


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def softmax(call: Call) -> Axes:
    """Normalise along an axis, in any order."""
    axes = call.axes(call["self"])
    mix(axes, [call["dim"]])
    return axes


@rule("mm", "bmm", "mv", "dot", "vdot", "matmul")
def matmul(call: Call) -> Axes:
    """Contract the last axis of the first with the last but one of the second."""
    other = call["mat2"] if call["mat2"] is not None else call["vec"]
    other = other if other is not None else (call["tensor"] if call["tensor"] is not None else call["other"])
    return _contract(call, call["self"], other)


def _contract(call: Call, left: Tensor, right: Tensor) -> Axes:
    a, b = call.axes(left), call.axes(right)
    columns = [] if right.ndim == 1 else [b[-1]]
    rows = [] if left.ndim == 1 else [a[-2]]
    equate(a[-1], b[-1] if right.ndim == 1 else b[-2], call.reason)
    batch_a, batch_b = list(a[:-2]), list(b[:-2])
    shared = []
    for index in range(1, min(len(batch_a), len(batch_b)) + 1):
        sizes = left.shape[-2 - index], right.shape[-2 - index]
        if 1 not in sizes:
            equate(batch_a[-index], batch_b[-index], call.reason)
            batch_a[-index] = telling(batch_a[-index], batch_b[-index])
            shared.append(batch_a[-index])
            if not any(uniform(call.raw(t)[-2 - index]) or call.is_weight(t) for t in (left, right)):
                call.tracer.heads.append(batch_a[-index])
        elif sizes[0] == 1:
            batch_a[-index] = batch_b[-index]
    batch = [*batch_b[: max(len(batch_b) - len(batch_a), 0)], *batch_a]
    # every row meets every column, so that what is summed over has one order for all of them, and they for it
    admit([[*shared, a[-1]], [*batch, *rows], [*batch, *columns]])
    return [*batch, *rows, *columns]


@rule("_trilinear")
def trilinear(call: Call) -> Axes:
    """Multiply three tensors at equal places and sum along some axes, as `nn.Bilinear` does."""
    ndim = call["i1"].ndim + len(call["expand1"])
    axes: Axes = [ONE] * ndim
    for name in ("1", "2", "3"):
        stretched = {dim % ndim for dim in call[f"expand{name}"]}
        own = iter(call.axes(call[f"i{name}"]))
        for dim in range(ndim):
            term = ONE if dim in stretched else next(own)
            if term.size != 1 and axes[dim].size != 1:
                equate(axes[dim], term, call.reason)
            elif term.size != 1:
                axes[dim] = term
    mix(axes, call["sumdim"])
    summed = {dim % ndim for dim in call["sumdim"]}
    return [term for dim, term in enumerate(axes) if dim not in summed]


@rule("addmm", "baddbmm", "addmv")
def addmm(call: Call) -> Axes:
    """Add a product to a tensor that is broadcast against it."""
    left, right = (
        (call["mat1"], call["mat2"]) if call.operator.startswith("addmm") else (call["batch1"], call["batch2"])
    )
    if call.operator.startswith("addmv"):
        left, right = call["mat"], call["vec"]
    axes = _contract(call, left, right)
    equate_last(call, axes, call["self"])
    return axes


@rule("linear")
def linear(call: Call) -> Axes:
    """Contract the last axis of the input with the second of the weight."""
    weight = call.axes(call["weight"])
    axes = list(call.axes(call["input"]))
    equate(axes[-1], weight[1], call.reason)
    admit([[weight[1]], [weight[0]], axes[:-1]])  # as in `_contract`: every row meets every column
    axes[-1] = weight[0]
    if call["bias"] is not None:
        equate_last(call, axes, call["bias"])
    return axes


def equate_last(call: Call, axes: Axes, tensor: Tensor) -> None:
    """Equate the axes of a tensor that is broadcast against others, from the last on."""
    for mine, other, size in zip(reversed(axes), reversed(call.axes(tensor)), reversed(tensor.shape), strict=False):
        if size != 1:
            equate(mine, other, call.reason)


@rule("convolution", "conv1d", "conv2d", "conv3d", "_convolution")
def convolution(call: Call) -> Axes:
    """Contract channels over windows; groups of channels move as wholes."""
    tensor: Tensor = call["input"]
    weight: Tensor = call["weight"]
    groups: int = call["groups"] or 1
    x, w = call.axes(tensor), call.axes(weight)
    spatial = call.result.ndim - 2
    for term in (*w[2:], *x[2:]):
        call.pin(term)
    first, second = (w[1], w[0]) if call["transposed"] else (w[0], w[1])
    if groups == 1:
        equate(x[1], second, call.reason)
        out = first
    else:
        out = _grouped(call, x[1], w, groups)
    if call["bias"] is not None:
        equate(call.axes(call["bias"])[0], out, call.reason)
    return [x[0], out, *(call.fixed(size) for size in call.result.shape[2 : 2 + spatial])]


def _grouped(call: Call, channels: object, w: Axes, groups: int) -> object:
    # PyTorch's layout: (groups · outputs, inputs) or, transposed, (groups · inputs, outputs), per group.
    weight: Tensor = call["weight"]
    blocked = factor(w[0], (groups, weight.shape[0] // groups), call.reason)
    if call["transposed"]:
        equate(channels, product(blocked), call.reason)
        return product([blocked[0], w[1]])
    inside = factor(channels, (groups, weight.shape[1]), call.reason)
    equate(inside[0], blocked[0], call.reason)
    equate(inside[1], w[1], call.reason)
    return w[0]


@rule(
    "native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "cudnn_batch_norm",
    "miopen_batch_norm", "batch_norm", "_batch_norm_impl_index", "_batch_norm_no_update", "_batch_norm_with_update",
    along=True,
)  # fmt: skip
def batch_norm(call: Call) -> Axes:
    """Normalise each channel by its own statistics, running or of the batch."""
    axes = call.axes(call["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call[name] is not None:
            equate(axes[1], call.axes(call[name])[0], call.reason)
    mix(axes, [dim for dim in range(len(axes)) if dim != 1])
    return axes


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm(call: Call) -> Axes | tuple[Axes, Axes]:
    """Scale each slice of a weight to a length of its own."""
    weight, length = call.axes(call["v"]), call.axes(call["g"])
    dim = (call["dim"] or 0) % len(weight)
    if call["g"].ndim == len(weight):
        equate(weight[dim], length[dim], call.reason)
    mix(weight, [at for at in range(len(weight)) if at != dim])
    return (weight, list(length)) if isinstance(call.result, (tuple, list)) else weight


@rule("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> Axes:
    """Normalise over the last axes together, in any order."""
    axes = call.axes(call["input"])
    last = len(call["normalized_shape"])
    for name in ("weight", "bias"):
        if call[name] is not None:
            for mine, other in zip(axes[-last:], call.axes(call[name]), strict=True):
                equate(mine, other, call.reason)
    mix(axes, range(len(axes) - last, len(axes)))
    return axes


@rule("native_group_norm", "group_norm")
def group_norm(call: Call) -> Axes:
    """Normalise over blocks of channels: blocks move as wholes, channels move inside their block."""
    tensor: Tensor = call["input"]
    axes = call.axes(tensor)
    groups: int = call["group"] or call["num_groups"]
    if groups > 1:
        blocks(axes[1], tensor.shape[1] // groups, call.reason)
    for name in ("weight", "bias"):
        if call[name] is not None:
            equate(axes[1], call.axes(call[name])[0], call.reason)
    mix(axes, range(1, tensor.ndim))
    return axes


@rule(*POOLS.split(), *RESIZES.split(), along=True)
def window(call: Call) -> Axes | tuple[Axes, ...]:
    """Combine neighbouring positions of each channel; positions stay where they are."""
    tensor: Tensor = call["self"] if call["self"] is not None else call["input"]
    axes = call.axes(tensor)
    spatial = int(next(letter for letter in reversed(call.operator) if letter.isdigit()))
    for term in axes[-spatial:]:
        call.pin(term)
    several = isinstance(call.result, (tuple, list))
    shape = (call.result[0] if several else call.result).shape
    pooled = [*axes[:-spatial], *(call.fixed(size) for size in shape[-spatial:])]
    return (pooled, list(pooled)) if several else pooled

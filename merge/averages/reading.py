"""What goes into and comes out of the linear layers of networks, as rows of numbers, and what is solved from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...base.architecture import shared_parameters
from ...base.batches import Batch, Data, require_repeatable
from ...base.errors import ArchitectureError, DataError, NotFiniteError
from ...base.finite import all_finite
from ...base.running import evaluating
from ...metrics.capture import as_mask, masks
from ...metrics.reading import MASK, without_fast_path

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

_NUMBERS = 2**22
"""How many numbers of unfolded patches are held at once."""


@dataclass(frozen=True)
class LayerMerge:
    """Networks merged layer by layer.

    Attributes:
        state: Parameters and buffers of the merged network by name.
        solved: The layers whose weights were solved for.
        averaged: Other modules with weights, whose mean was taken, each with the reason.
    """

    state: dict[str, Tensor] = field(repr=False)
    solved: tuple[str, ...]
    averaged: Mapping[str, str]

    def report(self) -> dict[str, Any]:
        """Say what was solved, in plain values."""
        return {"solved": list(self.solved), "averaged": dict(self.averaged)}


def data_of_each(data: Data | None, own: Sequence[Data] | None, count: int, what: str) -> list[Data]:
    """Give the data of each network: its own, or the same for all.

    Raises:
        DataError: There is none, there are both, or their number is wrong.
    """
    if own is not None:
        if len(own) != count:
            raise DataError(f"own_data holds {len(own)} data sets for {count} networks; pass one each")
        return list(own)
    if data is None:
        raise DataError(f"{what} is measured on data; pass data, or own_data=[…] with a data set for each network")
    require_repeatable(data, f"{what} is measured on it")
    return [data] * count


def solvable(model: nn.Module) -> tuple[dict[str, Layer], dict[str, str]]:
    """Find the layers whose weights can be solved for, and say of other modules with weights why not.

    Solved for are linear layers and convolutions whose weight is theirs alone and is no function of other parameters.

    Raises:
        ArchitectureError: There is none.

    >>> layers, others = solvable(nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2)))
    >>> list(layers), others
    (['1'], {'0': 'a weight of Embedding is no matrix that acts on inputs'})
    """
    shared = shared_parameters(model)
    layers, others = {}, {}
    for name, module in model.named_modules():
        reason = None if "parametrizations" in name.split(".") else _reason(module, shared)
        if reason == "":
            layers[name] = module
        elif reason is not None:
            others[name] = reason
    if not layers:
        why = "".join(f"; {name or 'the network itself'}: {reason}" for name, reason in list(others.items())[:5])
        raise ArchitectureError(
            f"{type(model).__name__} has no linear layer or convolution that could be solved for{why}; merge by "
            "method='mean'"
        )
    return layers, others


def _reason(module: nn.Module, shared: set[int]) -> str | None:
    """Say why not; "" for a layer that can be solved for, None for a module without weights."""
    kind = type(module).__name__
    if not isinstance(module, _KINDS):
        wide = [p for p in module.parameters(recurse=False) if p.ndim > 1]
        return f"a weight of {kind} is no matrix that acts on inputs" if wide else None
    if "weight" not in module._parameters:
        return "its weight is computed from other parameters"
    published = next(known for known in _KINDS if isinstance(module, known))
    if any(
        getattr(type(module), method, None) is not getattr(published, method, None)
        for method in ("forward", "_conv_forward")
    ):
        return f"{kind} computes something of its own"
    if any(id(parameter) in shared for parameter in module.parameters(recurse=False)):
        return "it shares its weight with another module"
    return ""


def input_rows(layer: Layer, x: Tensor) -> Tensor:
    """Give what a layer multiplies by its weight: a view of (N, *positions, groups, numbers in a group).

    A convolution sees a patch at each position, its numbers in the order of `weight[0]`.

    >>> conv = nn.Conv2d(4, 6, 3, groups=2)
    >>> rows = input_rows(conv, torch.zeros(5, 4, 8, 8))
    >>> rows.shape
    torch.Size([5, 6, 6, 2, 2, 3, 3])
    """
    if isinstance(layer, nn.Linear):
        return (x if x.ndim > 1 else x[None])[..., None, :]
    axes = layer.weight.ndim - 2
    x = x if x.ndim == axes + 2 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, step, apart) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        x = x.unfold(2 + axis, apart * (size - 1) + 1, step)[..., ::apart]
    x = x.unflatten(1, (layer.groups, -1))
    return x.movedim((1, 2), (1 + axes, 2 + axes))


def output_rows(layer: Layer, y: Tensor) -> Tensor:
    """Give what a layer puts out, as a view of (N, *positions, groups, units of a group)."""
    if isinstance(layer, nn.Linear):
        return (y if y.ndim > 1 else y[None])[..., None, :]
    y = y if y.ndim == layer.weight.ndim else y[None]
    return y.movedim(1, -1).unflatten(-1, (layer.groups, -1))


def matrices(layer: Layer, weight: Tensor) -> Tensor:
    """Read a weight as (groups, numbers that go in, units that come out), in float64."""
    return weight.to(torch.float64).unflatten(0, (groups_of(layer), -1)).flatten(2).mT


def groups_of(layer: Layer) -> int:
    """Give the number of groups whose units see inputs of their own."""
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def row_pieces(
    layer: Layer, x: Tensor, y: Tensor | None, rows: int | None, generator: torch.Generator, name: str
) -> Iterator[dict[str, Tensor]]:
    """Give rows for `Moments`, some at a time: `x0`, `x1`, … by group of the inputs, `y0`, `y1`, … of the outputs.

    Args:
        layer: The layer.
        x: Its input.
        y: Its output, or None.
        rows: At most how many rows to draw, the same of inputs and outputs; None: all are taken.
        generator: Of the draw, on the CPU.
        name: What to call the layer in a message.

    Raises:
        NotFiniteError: NaN or infinity.
    """
    for what, tensor in (("input", x), ("output", y)):
        if tensor is not None and not all_finite(tensor):
            raise NotFiniteError(f"the {what} of {name}, of shape {tuple(tensor.shape)}, holds NaN or infinity")
    parts = {"x": input_rows(layer, x)} | ({} if y is None else {"y": output_rows(layer, y)})
    behind = {"x": layer.weight.ndim, "y": 2}  # axes that are not places: groups and what each holds
    for index in _places(parts["x"], behind["x"], rows, generator):
        taken = {key: part[index].flatten(0, -1 - behind[key]) for key, part in parts.items()}
        yield {
            f"{key}{group}": part[:, group].flatten(1) for key, part in taken.items() for group in range(part.shape[1])
        }


def _places(x: Tensor, behind: int, rows: int | None, generator: torch.Generator) -> Iterator[Any]:
    """Cut the places of rows into pieces that are small once their patches are unfolded."""
    shape, width = x.shape[:-behind], x.shape[-behind:].numel()
    total = shape.numel()
    if rows is None or rows >= total:
        step = max(1, _NUMBERS * shape[0] // (width * total))
        yield from (slice(start, start + step) for start in range(0, shape[0], step))
        return
    drawn = torch.randperm(total, generator=generator)[:rows].sort().values.to(x.device)
    for piece in drawn.split(max(1, _NUMBERS // width)):
        yield torch.unravel_index(piece, shape)


Note = Callable[[str, Layer, Tensor, Tensor], None]


class _EnoughError(Exception):
    """Raised inside a network to leave it."""


@contextmanager
def watching(
    model: nn.Module, layers: Mapping[str, Layer], note: Note, calls: int | None = None
) -> Iterator[Callable[[Batch], None]]:
    """Tell `note` what goes into and comes out of each layer (its name, itself, input, output) whenever it runs.

    Args:
        model: The network; in evaluation mode inside the context.
        layers: The layers by name.
        note: Is told.
        calls: After so many the rest of the network is not run.

    Yields:
        A function that runs the network on a batch, without gradients. Tokens that an attention mask of the batch, as
        by `reader`, marks as padding are left out.
    """
    mask: Tensor | None = None
    count = 0

    def hook(name: str) -> Callable[..., None]:
        def record(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            nonlocal count
            x, y = args[0] if args else next(iter(kwargs.values())), output
            if mask is not None and isinstance(layer, nn.Linear) and masks(mask, x, -1):
                x, y = (rows.reshape(*mask.shape, rows.shape[-1])[mask] for rows in (x, y))
            note(name, layer, x, y)
            count += 1
            if count == calls:
                raise _EnoughError

        return record

    def run(batch: Batch) -> None:
        nonlocal mask, count
        count = 0
        mask = as_mask(batch.kwargs[MASK], len(batch), f"the mask {MASK!r}") if MASK in batch.kwargs else None
        with suppress(_EnoughError):
            batch.call(model)

    with evaluating(model), without_fast_path(), ExitStack() as hooks, torch.no_grad():
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(hook(name), with_kwargs=True).remove)
        yield run


def solve(gram: Tensor, target: Tensor, ridge: float) -> Tensor:
    """Solve (gram + ridge · mean eigenvalue · 1) Z = target, for the smallest Z where it is singular.

    Args:
        gram: (…, d, d), float64, positive semidefinite.
        target: (…, d, k), each column in the range of `gram`.
        ridge: 0: eigenvalues below the rounding of the largest count as zero.

    Returns:
        (…, d, k).

    >>> solve(torch.diag(torch.tensor([2.0, 0.0])), torch.tensor([[4.0], [0.0]]), 0.0)
    tensor([[2.],
            [0.]])
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    gram = gram + torch.diag_embed((ridge * diagonal.mean(-1, keepdim=True)).expand_as(diagonal))
    if ridge:
        factor, failed = torch.linalg.cholesky_ex(gram)
        if not failed.any():
            return torch.cholesky_solve(target, factor)
    values, vectors = torch.linalg.eigh(gram)
    least = values[..., -1:] * gram.shape[-1] * torch.finfo(gram.dtype).eps
    inverse = torch.where(values > least.clamp(min=0), 1 / values, 0.0)
    return vectors @ (inverse[..., None] * (vectors.mT @ target))


def write(state: dict[str, Tensor], model: nn.Module, layer: Layer, weight: Tensor, bias: Tensor | None) -> None:
    """Put solved matrices (groups, in, out) and biases (groups, out) into a state, under each name of the layer."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is layer.weight:
            state[name] = weight.mT.reshape(parameter.shape).to(state[name])
        elif bias is not None and parameter is layer.bias:
            state[name] = bias.flatten().to(state[name])


def check_options(shrink: float | None, ridge: float, rows: int | None) -> None:
    """Refuse numbers that make no sense.

    Raises:
        DataError: One is out of range.
    """
    if shrink is not None and not 0 <= shrink <= 1:
        raise DataError(f"shrink is {shrink}; expected a number from 0 (diagonals only) to 1 (all of the matrix)")
    if not 0 <= ridge < float("inf"):
        raise DataError(f"ridge is {ridge}; expected a finite number, not negative")
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        raise DataError(f"rows is {rows!r}; expected a whole number from 1, or None for all rows")

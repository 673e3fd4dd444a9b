"""Points between sets of parameters: on the line through two, on the plane through three, the weighted mean of many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .architecture import State, check_finite, check_same_architecture, full_state
from .errors import ArchitectureError, DataError
from .running import copied


@dataclass(frozen=True)
class Span:
    """All affine combinations of networks, each of which one scratch network can become.

    Attributes:
        model: A copy of the first network; `move` rewrites its weights.
        values: For the name of each tensor that varies: its value in each network.
        places: For the same names: where they are in `model`.
    """

    model: nn.Module
    values: Mapping[str, tuple[Tensor, ...]]
    places: Mapping[str, Tensor]

    def move(self, coefficients: Sequence[float]) -> nn.Module:
        """Write the combination with these coefficients, which add up to one, into the scratch network."""
        for name, place in self.places.items():
            combine(self.values[name], coefficients, place)
        return self.model


def span(models: Sequence[nn.Module], device: torch.device | str | None = None) -> Span:
    """Open the affine hull of networks; none is ever written to.

    Args:
        models: Of one architecture, their units in the same order.
        device: Where the scratch network lives; that of the first by default.

    Raises:
        ArchitectureError: A name, a shape or a pair of tied tensors differs.
        NotFiniteError: A tensor holds NaN or infinity.
    """
    check_same_ties(models)
    states = [full_state(model) for model in models]
    names = varying(states, "abcdefgh"[: len(models)] if len(models) <= 8 else None)
    scratch = copied(models[0]).to(device)
    places = full_state(scratch)
    values = {name: tuple(state[name].to(places[name].device) for state in states) for name in names}
    return Span(scratch, values, {name: places[name] for name in names})


@dataclass(frozen=True)
class Segment:
    """The line between two networks, walked by one scratch network.

    Attributes:
        model: A copy of the first network; `move` rewrites its weights.
        ends: For each tensor that varies: its value at 0, its value at 1, and its place in `model`.
    """

    model: nn.Module
    ends: tuple[tuple[Tensor, Tensor, Tensor], ...]

    def move(self, alpha: float) -> nn.Module:
        """Write the weights at `alpha` into the scratch network, and give it back."""
        for a, b, place in self.ends:
            combine((a, b), (1 - alpha, alpha), place)
        return self.model


def segment(model_a: nn.Module, model_b: nn.Module, device: torch.device | str | None = None) -> Segment:
    """Open the line between two networks; neither is ever written to.

    Args:
        model_a: The network at 0.
        model_b: The network at 1, of the same architecture, its units in the same order.
        device: Where the scratch network lives; that of `model_a` by default.

    Raises:
        ArchitectureError: A name, a shape or a pair of tied tensors differs.
        NotFiniteError: A tensor holds NaN or infinity.
    """
    line = span((model_a, model_b), device)
    ends = tuple((*line.values[name], place) for name, place in line.places.items())
    return Segment(line.model, ends)  # pyright: ignore[reportArgumentType]


def combine(values: Sequence[Tensor], coefficients: Sequence[float], out: Tensor) -> Tensor:
    """Write an affine combination of tensors into another: Σ cᵢ vᵢ where Σ cᵢ = 1, in float32 or better.

    Entries that are equal in all stay exactly as they are, and a coefficient of one gives its tensor exactly: summed is
    what the others differ by from the one with the largest coefficient.

    Args:
        values: Tensors of one shape.
        coefficients: One for each, adding up to one; for two tensors (1 - alpha, alpha).
        out: Where to write, of the same shape; none of `values`.

    Returns:
        `out`.

    >>> a, b, c = torch.tensor([[0.0, 5.0], [1.0, 5.0], [8.0, 5.0]])
    >>> combine((a, b, c), (0.25, 1.0, -0.25), torch.empty(2))
    tensor([-1.,  5.])
    """
    if len(values) == 2:
        _lerp(values[0], values[1], float(coefficients[1]), out)
        return out
    wide = _accumulator(*values)
    base = max(range(len(values)), key=lambda index: abs(coefficients[index]))
    start = values[base].to(out.device, wide)
    total = start.clone()
    for index, coefficient in enumerate(coefficients):
        if index != base and coefficient:
            total.add_(values[index].to(out.device, wide) - start, alpha=float(coefficient))
    return out.copy_(total)


def interpolate(
    state_a: State, state_b: State, alpha: float, out: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Give the point (1 - alpha) a + alpha b on the line through two state dicts.

    Floating-point tensors are interpolated, in float32 or better whatever their own type; integers and flags, such as
    `num_batches_tracked`, are those of a. Entries that are equal in both stay exactly as they are, and so do
    the two ends. A mask that holds the same infinities in both is kept.

    Args:
        state_a: Tensors by name, reached at `alpha` = 0.
        state_b: Tensors of the same names and shapes, reached at `alpha` = 1.
        alpha: The place on the line; beyond [0, 1] it extrapolates.
        out: Tensors to write into, of the same names and shapes; new ones by default.

    Returns:
        Tensors by name, of the types and on the devices of `state_a`, or `out`.

    Raises:
        ArchitectureError: A name or a shape differs.
        NotFiniteError: A tensor holds NaN or infinity.
        DataError: `alpha` is not a finite number.

    >>> a, b = {"w": torch.tensor([0.0, 4.0])}, {"w": torch.tensor([1.0, 8.0])}
    >>> interpolate(a, b, 0.25)
    {'w': tensor([0.2500, 5.0000])}
    """
    if not math.isfinite(alpha):
        raise DataError(f"alpha is {alpha}; expected a finite number, 0 for the first state and 1 for the second")
    names = set(varying((state_a, state_b), "ab"))
    if out is None:
        out = {name: torch.empty_like(tensor) for name, tensor in state_a.items()}
    else:
        check_same_architecture(state_a, out, ("a", "out"))
    with torch.no_grad():
        for name, place in out.items():
            if name in names:
                _lerp(state_a[name], state_b[name].to(place.device), alpha, place)
            else:
                place.copy_(state_a[name])
    return out


def weighted_mean(states: Sequence[State], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Give the weighted mean of state dicts: Σ wᵢ sᵢ / Σ wᵢ.

    Integers and flags are those of the first. The mean is accumulated in float32 or better by the update
    m ← m + wᵢ/Wᵢ (sᵢ - m), which leaves entries that are equal in all of them exactly as they are.

    Args:
        states: At least one state dict; all of the same names and shapes.
        weights: One non-negative number each; equal by default.

    Returns:
        Tensors by name, of the types and on the devices of the first state.

    Raises:
        ArchitectureError: A name or a shape differs.
        NotFiniteError: A tensor holds NaN or infinity.
        DataError: The weights do not fit.

    >>> weighted_mean([{"w": torch.tensor(1.0)}, {"w": torch.tensor(4.0)}], [2, 1])
    {'w': tensor(2.)}
    """
    shares = normalised(weights, len(states))
    first = states[0]
    names = set(varying(states))
    with torch.no_grad():
        return {
            name: _mean([state[name] for state in states], shares) if name in names else tensor.clone()
            for name, tensor in first.items()
        }


def normalised(weights: Sequence[float] | None, count: int) -> list[float]:
    """Check the weights of `count` networks and divide them by their sum.

    Raises:
        DataError: Their number is wrong, one is negative, NaN or infinite, or all are zero.

    >>> normalised([1, 3], 2)
    [0.25, 0.75]
    """
    if count == 0:
        raise DataError("there is nothing to average; pass at least one network")
    values = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(values) != count:
        raise DataError(f"{len(values)} weights for {count} networks; pass one each")
    total = math.fsum(values)
    if not all(value >= 0 for value in values) or not 0 < total < math.inf:
        raise DataError(f"the weights are {values}; expected finite numbers, none negative, and not all zero")
    return [value / total for value in values]


def varying(states: Sequence[State], labels: str | None = None) -> list[str]:
    """Check that states fit, and name their floating-point tensors; a mask with the same infinities in all is left out.

    Raises:
        ArchitectureError: A name or a shape differs.
        NotFiniteError: A tensor holds NaN or infinity.
    """
    called = list(labels) if labels else [str(index) for index in range(len(states))]
    first = states[0]
    for state, label in zip(states[1:], called[1:], strict=True):
        check_same_architecture(first, state, (called[0], label))
    names = []
    for name, tensor in first.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        if all(bool(torch.isfinite(state[name]).all()) for state in states):
            names.append(name)
        elif not all(torch.equal(tensor, state[name].to(tensor.device)) for state in states[1:]):
            for state, label in zip(states, called, strict=True):
                check_finite({name: state[name]}, f"network {label}")
    return names


def check_same_ties(models: Sequence[nn.Module]) -> None:
    """Refuse networks of which one ties two tensors (an embedding and a decoder) that another keeps apart.

    Raises:
        ArchitectureError: With the name of such a tensor.
    """
    first = _ties(models[0])
    for model in models[1:]:
        ties = _ties(model)
        for name in first.keys() & ties.keys():
            if first[name] != ties[name]:
                raise ArchitectureError(
                    f"{name} is tied to {min(first[name], ties[name])} in one network and not in the other; "
                    "load both checkpoints into networks made by the same constructor"
                )


def _ties(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors}


def _lerp(a: Tensor, b: Tensor, alpha: float, out: Tensor) -> None:
    wide = _accumulator(a, b)
    if a.dtype == b.dtype == out.dtype == wide:
        torch.lerp(a, b, alpha, out=out)
    else:
        out.copy_(torch.lerp(a.to(out.device, wide), b.to(out.device, wide), alpha))


def _mean(tensors: list[Tensor], shares: list[float]) -> Tensor:
    wide = _accumulator(*tensors)
    mean, total = tensors[0].to(wide, copy=True), shares[0]
    for tensor, share in zip(tensors[1:], shares[1:], strict=True):
        if share:
            total += share
            mean.lerp_(tensor.to(mean.device, wide), share / total)
    return mean.to(tensors[0].dtype)


def _accumulator(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype

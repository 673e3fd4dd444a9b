"""The input that a unit answers to most strongly, by regularised gradient ascent from noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...base.errors import DataError, NotFiniteError
from ...base.finite import all_finite
from ...base.progress import progress as progress_bar
from .watching import Example, Watched, as_units, check_count, watching

Target = Literal["mean", "centre"]
Bounds = tuple[float | Sequence[float], float | Sequence[float]]

_NOISE = 0.01
_SMOOTH = 1e-6
_LEAK = 0.1
_RECTIFIERS = (nn.functional.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)


@dataclass(frozen=True, eq=False)
class Maximised:
    """Inputs found for some units; all tensors are on the CPU.

    Attributes:
        layer: Name of the layer, as captured.
        units: (m,) int64, the units.
        inputs: (m, …) the input found for each, such as (m, channels, height, width).
        values: (m,) in float64, the unit's activation of it: mean over the places, or at the middle one.
        start_values: (m,) in float64, the activation of the noise at the start.
        silent: Units whose activation had no gradient at any step: their input says nothing.
    """

    layer: str
    units: Tensor
    inputs: Tensor
    values: Tensor
    start_values: Tensor
    silent: tuple[int, ...]

    def __repr__(self) -> str:
        return f"Maximised({self.layer}: {len(self.units)} units, inputs of shape {tuple(self.inputs.shape[1:])})"


@dataclass(frozen=True)
class _Rule:
    """How a step goes; see `maximise`."""

    rate: float
    steps: int
    norm: float | None
    l2: float
    total_variation: float
    blur_every: int
    blur: float
    jitter: int
    bounds: tuple[Tensor, Tensor] | None


def maximise(
    model: nn.Module,
    layer: str,
    units: Any,
    example: Example,
    *,
    target: Target = "mean",
    steps: int = 256,
    rate: float = 0.05,
    seed: int = 0,
    norm: float | None = 1.0,
    l2: float = 0.0,
    total_variation: float = 0.1,
    blur_every: int = 0,
    blur: float = 0.5,
    jitter: int = 1,
    bounds: Bounds | None = None,
    unit_axis: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Maximised:
    """Find the input that drives each unit most (Erhan et al. 2009; regularised: Yosinski et al. 2015, section 3).

    Each step takes only the direction of the gradient g of the unit's activation, so that no setting depends on the
    scale of a unit or on the others in the batch: with D numbers in an input and r falling from `rate` to 0 along half
    a cosine,

        x ← (1 − r · l2) x + r · √D · (g / ‖g‖ − total_variation · ∇TV(x) / √D),   TV(x) = Σ √(Δ₁x² + Δ₂x²),

    then blurred every few steps, scaled back into the ball of root mean square `norm` and clamped to `bounds`. All
    units start from one weak noise. While a unit has no gradient, as behind an inactive ReLU, its step follows the
    gradient that leaky rectifiers would have, else a random direction (compare Olah et al. 2017, who redirect it).

    Total variation, blur and jitter act on images, (N, channels, height, width), and on nothing else.

    Args:
        model: The network; it runs in evaluation mode and comes back as it was, gradients of parameters included.
        layer: Name of the layer, as for `capture`.
        units: One unit number or several; each gets an input of its own, all in one batch.
        example: A batch of inputs, or the shape of one input, such as (3, 32, 32).
        target: The mean of the unit's activation over its places, or that at the middle place ("centre").
        steps: How many.
        rate: Length of the first step, as root mean square per pixel.
        seed: Seed of noise, jitter and random directions. Same seed, same device: same bits.
        norm: Largest root mean square of an input; that of normalised data is 1. None: unbounded.
        l2: Weight decay of the input, per unit of length.
        total_variation: Weight of total variation beside a gradient of length 1.
        blur_every: Blur after every so many steps; 0: never.
        blur: Standard deviation of the Gaussian blur in pixels.
        jitter: Shift the input at each step by up to so many pixels, around the border, before the network sees it.
        bounds: Least and greatest value of a pixel, for all or per channel: ((0 − mean) / std, (1 − mean) / std).
        unit_axis: The axis of the units. Default: as `unit_axes` tells it.
        device: Where to run; a network that is elsewhere is copied. Default: where it is.
        progress: Show a bar. Default: on a terminal.

    Raises:
        DataError: The example, layer, units or a setting cannot be used.
        LayerNotFoundError: There is no such layer, or it was not called.
        NotFiniteError: The activation, or its gradient, became NaN or infinite.

    >>> model = nn.Linear(4, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 2.0)
    >>> found = maximise(model, "", 0, (4,), norm=0.5)
    >>> found.inputs, found.values
    (tensor([[0.5000, 0.5000, 0.5000, 0.5000]]), tensor([4.0000], dtype=torch.float64))
    """
    check_count("steps", steps, 1)
    check_count("blur_every", blur_every, 0)
    check_count("jitter", jitter, 0)
    _check_numbers(rate=rate, norm=norm, l2=l2, total_variation=total_variation, blur=blur)
    if target not in ("mean", "centre"):
        raise DataError(f"target is {target!r}; expected 'mean' or 'centre'")
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        watching(model, layer, example, unit_axis=unit_axis, device=device) as watched,
    ):
        chosen = as_units(units, watched.units, watched.place.key).clone()
        if not watched.example.is_floating_point():
            raise DataError(f"inputs are {watched.example.dtype}; only floating-point inputs can follow a gradient")
        limits = _bounds(bounds, watched.example[0])
        rule = _Rule(rate, steps, norm, l2, total_variation, blur_every, blur, jitter, limits)
        return _Ascent(watched, chosen, target, rule, seed).run(progress)


class _Ascent:
    def __init__(self, watched: Watched, units: Tensor, target: Target, rule: _Rule, seed: int) -> None:
        self.watched, self.units, self.target, self.rule = watched, units, target, rule
        self.generator = torch.Generator().manual_seed(seed)
        self.image = watched.example.ndim == 4
        self.rows = torch.arange(len(units))
        start = self._noise() * _NOISE * (1.0 if rule.norm is None else rule.norm)
        self.x = self._held(start.expand(len(units), *start.shape).contiguous())
        self.awake = torch.zeros(len(units), dtype=torch.bool, device=self.x.device)

    def _noise(self) -> Tensor:
        like = self.watched.example[0]
        return torch.randn(like.shape, generator=self.generator).to(like)

    def run(self, progress: bool | None) -> Maximised:
        start = self._activation(self.x).detach()
        for step in progress_bar(range(self.rule.steps), f"maximising {self.watched.place.key}", show=progress):
            self._step(step)
        end = self._activation(self.x).detach()
        values, starts = (x.to("cpu", torch.float64) for x in (end, start))
        silent = self.units[~self.awake.cpu()].tolist()
        return Maximised(self.watched.place.key, self.units, self.x.cpu(), values, starts, tuple(silent))

    def _activation(self, x: Tensor) -> Tensor:
        """Give the activation of each unit for its own input, (m,)."""
        found = self.watched(x)
        own = found[self.rows.to(found.device), self.units.to(found.device)]
        if self.target == "mean":
            values = own.flatten(1).mean(1) if own.ndim > 1 else own
        else:
            values = own[(slice(None), *(size // 2 for size in own.shape[1:]))]
        self._check(values, "activation")
        return values

    def _check(self, values: Tensor, what: str) -> None:
        if not all_finite(values.detach()):
            place = (~values.detach().flatten(1 if values.ndim > 1 else 0).isfinite()).reshape(len(values), -1).any(1)
            unit = int(self.units[int(place.nonzero()[0])])
            raise NotFiniteError(
                f"the {what} of unit {unit} of layer {self.watched.place.key!r} became NaN or infinite; try a smaller "
                "rate or norm"
            )

    def _step(self, step: int) -> None:
        rule = self.rule
        rate = rule.rate * (1 + math.cos(math.pi * step / rule.steps)) / 2
        shifts = self._shifts()
        gradient = self._gradient(shifts)
        self.awake |= gradient.flatten(1).any(1)
        random = self._noise()  # drawn each time, so that no unit depends on whether another is awake
        if not gradient.flatten(1).any(1).all():
            with _LeakyRectifiers():
                leaky = self._gradient(shifts)
            gradient = _first_moving(gradient, _first_moving(leaky, random.expand_as(leaky)))
        direction = gradient / _as(gradient.flatten(1).norm(dim=1), gradient)
        size = math.sqrt(random.numel())
        with torch.no_grad():
            if self.image and rule.total_variation:
                direction = direction - (rule.total_variation / size) * _variation_gradient(self.x)
            x = (1 - rate * rule.l2) * self.x + rate * size * direction
            if self.image and rule.blur_every and (step + 1) % rule.blur_every == 0:
                x = _blurred(x, rule.blur)
            self.x = self._held(x)

    def _shifts(self) -> list[int]:
        reach = self.rule.jitter if self.image else 0
        return torch.randint(-reach, reach + 1, (2,), generator=self.generator).tolist()

    def _gradient(self, shifts: list[int]) -> Tensor:
        x = self.x.detach().requires_grad_()
        seen = x.roll(shifts, (2, 3)) if any(shifts) else x
        values = self._activation(seen)
        if not values.requires_grad:
            raise DataError(f"layer {self.watched.place.key!r} passes no gradient back to the inputs")
        (gradient,) = torch.autograd.grad(values.sum(), x, allow_unused=True)
        gradient = torch.zeros_like(x) if gradient is None else gradient
        self._check(gradient, "gradient")
        return gradient

    def _held(self, x: Tensor) -> Tensor:
        """Bring inputs back to where they may be."""
        if self.rule.norm is not None:
            length = x.flatten(1).square().mean(1).sqrt()
            x = x * _as((self.rule.norm / length).clamp(max=1), x)
        return x if self.rule.bounds is None else x.clamp(*self.rule.bounds)


class _LeakyRectifiers(TorchFunctionMode):
    """While it is active, rectifiers let a part of what is negative through, so that a gradient comes back."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a leaky rectifier in place of a rectifier, and anything else as it is."""
        del types
        if func in _RECTIFIERS:
            x = args[0] if args else (kwargs or {})["input"]
            return nn.functional.leaky_relu(x, _LEAK)
        return func(*args, **(kwargs or {}))


def _first_moving(gradient: Tensor, other: Tensor) -> Tensor:
    return torch.where(_as(gradient.flatten(1).any(1), gradient), gradient, other)


def _as(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _variation_gradient(x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        down = nn.functional.pad(x.diff(dim=2), (0, 0, 0, 1))
        right = nn.functional.pad(x.diff(dim=3), (0, 1))
        (gradient,) = torch.autograd.grad((down.square() + right.square() + _SMOOTH).sqrt().sum(), x)
    return gradient


def _blurred(x: Tensor, sigma: float) -> Tensor:
    """Blur images; the border counts as going on."""
    reach = max(1, math.ceil(3 * sigma))
    taps = torch.arange(-reach, reach + 1, dtype=torch.float64).div(sigma).square().mul(-0.5).exp()
    taps = (taps / taps.sum()).to(x)
    channels = x.shape[1]
    x = nn.functional.pad(x, (reach,) * 4, mode="replicate")
    for shape in ((-1, 1), (1, -1)):
        x = nn.functional.conv2d(x, taps.reshape(1, 1, *shape).expand(channels, 1, -1, -1), groups=channels)
    return x


def _check_numbers(**settings: float | None) -> None:
    for name, value in settings.items():
        if value is None and name == "norm":
            continue
        zero = name in ("l2", "total_variation")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (value == 0 and not zero):  # pyright: ignore[reportOptionalOperand]
            raise DataError(f"{name} is {value!r}; expected a number {'of at least' if zero else 'above'} 0")


def _bounds(bounds: Bounds | None, like: Tensor) -> tuple[Tensor, Tensor] | None:
    if bounds is None:
        return None
    try:
        low, high = (torch.as_tensor(end, dtype=like.dtype, device=like.device) for end in bounds)
        low, high = (end.reshape(-1, *[1] * (like.ndim - 1)) if end.ndim else end for end in (low, high))
        low, high = low.broadcast_to(like.shape), high.broadcast_to(like.shape)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"bounds is {bounds!r}; expected the least and greatest value, for all {len(like)} channels or one each"
        ) from error
    if not bool((low < high).all()):
        raise DataError(f"bounds is {bounds!r}; expected the least value below the greatest")
    return low, high

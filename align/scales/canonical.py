"""Canonical scales: of all rescalings of a network's units that leave its function unchanged, one that is unique."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import DataError, SymmetryError, nearest
from ..derive import as_example
from ..derive import symmetry as derive
from ..nets.problem import rows
from ..probe import Probe, as_given, noise
from ..symmetry import Symmetry
from ..verification import TOLERANCE
from ..verify import change
from .groups import Place, Scale, ScaleGroups, with_state
from .homogeneity import scale_groups

RULES = ("balanced", "unit")
# Logarithms of factors: converged; and as many sweeps as a network may take to get there.
_CONVERGED, _SWEEPS = 1e-10, 5000


@dataclass(frozen=True, eq=False)
class Canonical:
    """A network in canonical scales.

    Attributes:
        model: With the same function as the given one.
        factors: For each scale what its units were multiplied by; `apply_scales(given, factors, scales)` is `model`.
        left_out: Groups that keep their scale, each with the reason.
        scales: What was rescaled.
        error: Largest relative change of the outputs that was measured in float64.
    """

    model: nn.Module
    factors: Mapping[str, Tensor]
    left_out: Mapping[str, str]
    scales: ScaleGroups
    error: float


def canonical_scales(
    model: nn.Module,
    example_inputs: Any,
    *,
    symmetry: Symmetry | None = None,
    scales: ScaleGroups | None = None,
    rule: str = "balanced",
    seed: int = 0,
) -> Canonical:
    """Rescale every unit such that networks that differ by scales alone become equal; the function stays the same.

    "balanced" makes the norm of each unit's incoming weights, its bias included, that of its outgoing ones: of all
    rescalings that with the smallest L2 norm of all parameters, a convex problem in the logarithms of the factors, and
    so the only one. For the symmetry see Neyshabur et al. (2015, "Path-SGD"). "unit" makes the norm of the
    incoming weights 1. With either rule, what a batch norm divides by (the root of running variance + eps) becomes 1,
    and other weights whose scale a norm takes off again get norm 1. A unit that nothing reads, or that reads nothing,
    has norm 1 on its other side.

    Args:
        model: The network; not changed.
        example_inputs: As in `symmetry`, for finding the scales and measuring that the function is the same.
        symmetry: Of the network; None derives it.
        scales: From `scale_groups`; None finds them.
        rule: "balanced" or "unit".
        seed: Of the measurements.

    Raises:
        DataError: There is no such rule.
        SymmetryError: The rule does not converge, or the rescaled network has other outputs.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> found = canonical_scales(net, torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    >>> first, bias, second, _ = found.model.parameters()
    >>> incoming = (first.square().sum(1) + bias.square()).sqrt()
    >>> torch.allclose(incoming, second.norm(dim=0))
    True
    """
    if rule not in RULES:
        raise DataError(f"unknown rule {rule!r}{nearest(rule, RULES)}")
    example = as_example(example_inputs)
    if scales is None:
        scales = scale_groups(model, derive(model, example) if symmetry is None else symmetry, example, seed=seed)
    scales.symmetry.check_fits(model, "the model")
    probe = Probe(model, scales.symmetry.outputs)
    form = _Form(scales, probe.state, set(dict(model.named_parameters(remove_duplicate=False))), rule)
    form.run()
    error = _error(probe, form.state, noise(as_given(example, probe.device), torch.Generator().manual_seed(seed)))
    if not error <= TOLERANCE:
        raise SymmetryError(
            f"the outputs of the rescaled network differ by {error:.1e}: the scales do not hold for it, or a factor is "
            "beyond what float64 can carry. Find them on this network with scale_groups"
        )
    factors = {name: log.exp() for name, log in form.logs.items()}
    return Canonical(with_state(model, form.state), factors, scales.left_out, scales, error)


def _error(probe: Probe, state: Mapping[str, Tensor], batch: Any) -> float:
    return change(probe.run(probe.state, batch), probe.run(state, batch))


class _Form:
    """Scales in turn, until none moves."""

    def __init__(self, scales: ScaleGroups, state: Mapping[str, Tensor], parameters: set[str], rule: str) -> None:
        self.scales, self.state, self.parameters, self.rule = scales, dict(state), parameters, rule
        self.logs = {s.name: torch.zeros(scales.shape(s), dtype=torch.float64) for s in scales.scales}

    def run(self) -> None:
        """Rescale to convergence.

        Raises:
            SymmetryError: It does not converge.
        """
        largest = 0.0
        for _ in range(_SWEEPS):
            largest = 0.0
            for scale in self.scales.scales:
                step = self._step(scale).cpu().reshape(self.scales.shape(scale))
                self.logs[scale.name] += step
                self.state = self.scales.scaled(self.state, {scale.name: step.exp()})
                largest = max(largest, float(step.abs().max()))
            if largest <= _CONVERGED:
                return
        raise SymmetryError(
            f"the rule {self.rule!r} did not converge in {_SWEEPS} sweeps (factors still change by {largest:.0e}): "
            "units that read each other in a circle may have no such scales; use rule='balanced'"
        )

    def _step(self, scale: Scale) -> Tensor:
        incoming = [place for place in scale.places if place.name in self.parameters and place.exponent > 0]
        outgoing = [place for place in scale.places if place.name in self.parameters and place.exponent < 0]
        variance = [place for place in scale.places if place.shift]
        grown, shrunk = self._size(incoming), self._size(outgoing)
        if not (incoming and outgoing):
            if variance:
                value = self._rows(variance[0])[:, 0].cpu() + variance[0].shift
                return -value.log() / variance[0].exponent
            alone = incoming or outgoing
            return -_log(grown + shrunk) / (2 * _mean_exponent(alone))
        up, down = _mean_exponent(incoming), -_mean_exponent(outgoing)
        only_in, only_out = -_log(grown) / (2 * up), _log(shrunk) / (2 * down)
        both = only_in
        if self.rule == "balanced":
            # where d/dt of Σ n exp(2 e t) is zero: exact for exponents of one size on each side
            both = (_log(down * shrunk) - _log(up * grown)) / (2 * (up + down))
            if self._meets_itself(scale):
                both = both / 2
        step = torch.where(shrunk > 0, both, only_in)
        return torch.where(grown > 0, step, only_out)

    def _size(self, places: list[Place]) -> Tensor:
        """Sum the squares of each unit's weights over places."""
        nothing = torch.zeros((), dtype=torch.float64)
        return sum((self._rows(place).square().sum(1).cpu() for place in places), nothing)

    def _rows(self, place: Place) -> Tensor:
        piece, dims = self.scales.dims(place)
        return rows(piece.get(self.state[place.name]), dims)

    def _meets_itself(self, scale: Scale) -> bool:
        seen = [(place.name, place.part) for place in scale.places]
        return len(set(seen)) < len(seen)


def _mean_exponent(places: list[Place]) -> float:
    return sum(place.exponent for place in places) / len(places)


def _log(values: Tensor) -> Tensor:
    """Logarithms; 0 of 0."""
    return torch.where(values > 0, values, torch.ones_like(values)).log()

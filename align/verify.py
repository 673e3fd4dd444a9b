"""Proof by measurement: in float64, on a network that is sensitive, a random permutation changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..base.architecture import full_state
from ..base.batches import Batch, model_device
from ..base.errors import SymmetryError
from .terms import pieces

if TYPE_CHECKING:
    from .permutation import Permutation
    from .symmetry import Symmetry

TOLERANCE = 1e-8
# Of the perturbation, relative to the spread of each parameter.
_SPREADS = (0.3, *[1.0] * 4, *[3.0] * 8)


@dataclass(frozen=True)
class Verification:
    """What was measured.

    Attributes:
        error: Largest change of the outputs under a random permutation of all groups, relative to their size.
        sensitivity: Change of the outputs between two different inputs, relative to their size.
        insensitive: Groups whose units never reached the outputs, so that nothing is known about them.
        failing: Groups that change the outputs when they are permuted alone.
        tolerance: What counts as unchanged.
    """

    error: float
    sensitivity: float
    insensitive: tuple[str, ...]
    failing: tuple[str, ...]
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        """Whether the symmetry holds and the network was sensitive enough to show it."""
        return not self.failing and not self.insensitive and self.error <= self.tolerance and self.sensitive

    @property
    def sensitive(self) -> bool:
        """Whether different inputs gave clearly different outputs."""
        return self.sensitivity > 1e3 * self.tolerance

    def check(self) -> Verification:
        """Return itself if the symmetry holds.

        Raises:
            SymmetryError: It does not, or the network does not react to its input; the failing groups are named.
        """
        if self.passed:
            return self
        if not self.sensitive:
            why = (
                f"its outputs do not depend on its input (relative change {self.sensitivity:.1e}), so nothing is proved"
            )
        elif self.insensitive and self.error <= self.tolerance:
            why = f"the outputs do not depend on group {', '.join(self.insensitive)}, so nothing is proved about it"
        else:
            groups = f"group {', '.join(self.failing)}" if self.failing else "no single group, but all together"
            why = f"permuting {groups} changes the outputs by {self.error:.1e}"
        raise SymmetryError(f"the symmetry could not be verified in float64: {why}")


def verify(
    symmetry: Symmetry, model: nn.Module, example_inputs: Any, *, tolerance: float = TOLERANCE, seed: int = 0
) -> Verification:
    """Measure that random permutations leave a network's outputs unchanged, on a copy in float64.

    Every parameter of the copy is perturbed first, so that no layer is switched off by a zero at initialisation and no
    two units are alike; the running statistics of batch norms are spread out likewise. Then three things are measured:
    that two inputs give different outputs; that every group has units on which the outputs depend; and that a random
    permutation that moves every group leaves the outputs as they were. If it does not, each group is tried alone.
    Where nothing is disproved and some group does not reach the outputs, as a small layer of ReLUs that happen to be
    off, other weights and inputs are drawn, further and further from the given ones.

    Args:
        symmetry: The claim.
        model: The network, or one of the same architecture; not changed.
        example_inputs: As in `symmetry`.
        tolerance: Largest relative change that counts as none.
        seed: Seed of the perturbation, the inputs and the permutations.

    Returns:
        The measurements; `.check()` raises if they do not prove the claim.

    Raises:
        ArchitectureError: The symmetry belongs to another architecture.
    """
    from .derive import as_example

    symmetry.check_fits(model, "the model")
    generator = torch.Generator().manual_seed(seed)
    batch = as_example(example_inputs)
    report = _measure(symmetry, model, batch, tolerance, generator, _SPREADS[0])
    for spread in _SPREADS[1:]:
        if report.passed or report.error > tolerance:
            break
        report = _joined(report, _measure(symmetry, model, batch, tolerance, generator, spread))
    return report


def _joined(a: Verification, b: Verification) -> Verification:
    return Verification(
        max(a.error, b.error),
        max(a.sensitivity, b.sensitivity),
        tuple(name for name in a.insensitive if name in b.insensitive),
        b.failing,
        a.tolerance,
    )


@torch.inference_mode(False)
@torch.enable_grad()  # gradients show what reaches the outputs, whatever mode the caller is in
def _measure(
    symmetry: Symmetry, model: nn.Module, batch: Batch, tolerance: float, generator: torch.Generator, spread: float
) -> Verification:
    probe = copy.deepcopy(model).double().eval()
    device = model_device(model)
    _perturb(probe, generator, spread)
    first = _vary(batch, generator).to(device, torch.float64)
    second = _vary(first, generator).to(device, torch.float64)
    state = full_state(probe)
    before = _outputs(probe, state, first)
    sensitivity = _change(before, _outputs(probe, state, second))
    insensitive = _insensitive(symmetry, probe, first)
    permutation = _moving(symmetry, generator)
    error = _change(before, _outputs(probe, permutation.apply(state), first))
    failing = []
    if error > tolerance:
        for group in symmetry.groups:
            alone = symmetry.identity()
            indices = {**alone.indices, group.name: permutation.indices[group.name]}
            changed = type(alone)(symmetry, indices).apply(state)
            if _change(before, _outputs(probe, changed, first)) > tolerance:
                failing.append(group.name)
    return Verification(error, sensitivity, insensitive, tuple(failing), tolerance)


def _moving(symmetry: Symmetry, generator: torch.Generator) -> Permutation:
    """Draw a permutation that moves every group: one of two units would else stay in half of all draws."""
    drawn, still = symmetry.random(generator), symmetry.identity()
    moved = {
        name: index.roll(1, -1) if torch.equal(index, still.indices[name]) else index
        for name, index in drawn.indices.items()
    }
    return type(drawn)(symmetry, moved)


def _perturb(probe: nn.Module, generator: torch.Generator, relative: float) -> None:
    variances = {id(m.running_var) for m in probe.modules() if isinstance(getattr(m, "running_var", None), Tensor)}
    with torch.no_grad():
        for tensor in (*probe.parameters(), *probe.buffers()):
            if not tensor.is_floating_point() or tensor.numel() < 2:
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
            if id(tensor) in variances:
                tensor.mul_(1 + 0.1 * noise.abs())
            else:
                spread = tensor.std() if tensor.numel() > 1 else tensor.abs()
                scale = relative * spread if spread > 0 else torch.full_like(spread, 0.1)
                tensor.add_(noise * scale)


def _vary(batch: Batch, generator: torch.Generator) -> Batch:
    """Draw other inputs of the same kind: normal noise, or the given integers in another order."""

    def draw(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point():
            return torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        order = torch.randperm(value.numel(), generator=generator).to(value.device)
        return value.flatten()[order].reshape(value.shape)

    return Batch(tuple(map(draw, batch.args)), {name: draw(value) for name, value in batch.kwargs.items()})


def _outputs(probe: nn.Module, state: Mapping[str, Tensor], batch: Batch) -> list[Tensor]:
    with torch.no_grad():
        # each name has its own value: a claim may permute the two names of a tied tensor differently
        call = torch.func.functional_call(probe, dict(state), batch.args, dict(batch.kwargs), tie_weights=False)
        return _flatten(call)


def _flatten(output: Any) -> list[Tensor]:
    if isinstance(output, Mapping):
        output = list(output.values())
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _change(before: list[Tensor], after: list[Tensor]) -> float:
    changes = [
        float((a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(a.dtype).tiny))
        for a, b in zip(before, after, strict=True)
        if a.numel()
    ]
    return max(changes, default=0.0) if all(change == change for change in changes) else float("inf")


def _insensitive(symmetry: Symmetry, probe: nn.Module, batch: Batch) -> tuple[str, ...]:
    """Name the groups of which fewer than two units have any parameter with an influence on the outputs."""
    parameters = {name: p for name, p in probe.named_parameters(remove_duplicate=False) if p.is_floating_point()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    outputs = _flatten(batch.call(probe))
    generator = torch.Generator().manual_seed(0)
    score = sum((o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o)).sum() for o in outputs)
    if not isinstance(score, Tensor) or not score.requires_grad:
        return tuple(group.name for group in symmetry.groups)
    names = list(dict.fromkeys(parameters))
    gradients = torch.autograd.grad(score, [parameters[name] for name in names], allow_unused=True)
    alive: dict[str, Tensor] = {}
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is None:
            continue
        for piece in pieces(symmetry.layout[name]):
            part = piece.get(gradient)
            for at, dim in enumerate(piece.dims):
                if dim.group is not None:
                    live = part.movedim(at, 0).reshape(dim.size, -1).ne(0).any(1)
                    alive[dim.group] = alive.get(dim.group, torch.zeros_like(live)) | live
    return tuple(g.name for g in symmetry.groups if g.name not in alive or int(alive[g.name].sum()) < min(2, g.size))

"""Proof by measurement: in float64, on a network that is sensitive, a random permutation changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..base.batches import Batch, model_device
from ..base.errors import SymmetryError
from .probe import Probe, State, as_given, check_has_data, noise, others
from .terms import groups_of, pieces, take
from .verification import TOLERANCE, Verification

if TYPE_CHECKING:
    from .permutation import Permutation
    from .symmetry import Symmetry

# Of the perturbation, relative to the spread of each parameter: first near the given weights, then further away.
_SPREADS = (0.3, *[1.0] * 6, *[3.0] * 6)
# What is left of the perturbation where a network gives NaN under it.
_SMALLER = (1.0, 0.1, 0.01, 0.0)
# Up to so many groups are tried one by one; more are halved first.
_ONE_BY_ONE = 16
# A change of so many times that which rounding makes is laid to a permutation, and of so much in any case.
_ROUGH = 30.0
_COARSEST = 1e-4


def verify(
    symmetry: Symmetry,
    model: nn.Module,
    example_inputs: Any,
    *,
    also: Sequence[Any] = (),
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> Verification:
    """Measure that random permutations leave a network's outputs unchanged, on a copy in float64.

    Every parameter of the copy is perturbed first, so that no layer is switched off by a zero at initialisation and no
    two units are alike; the running statistics of batch norms are spread out likewise. Casts inside the network are
    raised to float64 (see `Precise`). Then three things are measured: that two inputs give different outputs; that
    every group, moved in some places only, would change the outputs; and that a random permutation that moves every
    group leaves them as they were. If it does not, groups are tried alone.
    Where nothing is disproved and some group does not reach the outputs, as a small layer of ReLUs that happen to be
    off, other weights and inputs are drawn, further and further from the given ones.

    Args:
        symmetry: The claim; of the outputs, only those that it keeps are compared (`symmetry.outputs`).
        model: The network, or one of the same architecture; not changed. It runs in evaluation mode.
        example_inputs: As in `symmetry`. Normal noise takes the place of their floating-point numbers, unless the
            network fails on it.
        also: Further example inputs, each like the first, as for a network with several ways through it. The claim
            must hold for all; a group must reach the outputs for one.
        tolerance: Largest relative change that counts as none; raised where rounding alone changes more.
        seed: Seed of the perturbation, the inputs and the permutations.

    Returns:
        The measurements; `.check()` raises if they do not prove the claim.

    Raises:
        ArchitectureError: The symmetry belongs to another architecture.
        SymmetryError: Nothing can be measured: the model is on the meta device, is random in evaluation mode, cannot
            be run in float64, or gives NaN.
    """
    from .derive import as_example

    symmetry.check_fits(model, "the model")
    check_has_data(model)
    generator = torch.Generator().manual_seed(seed)
    batches = [as_example(inputs) for inputs in (example_inputs, *also)]
    unseen = tuple(group.name for group in symmetry.groups if group.size > 1)
    report = Verification(0.0, 0.0, unseen, (), tolerance)
    device = model_device(model)
    temper = 1.0
    for spread in _SPREADS:
        # a random network moves on in the global generator, by which it is found out, and leaves it as it was
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            found = _measure(symmetry, model, batches, report, generator, (spread, temper))
        if found is None:
            temper *= 2**0.5
            continue
        error, sensitivity = max(report.error, found.error), max(report.sensitivity, found.sensitivity)
        coarse = max(report.tolerance, found.tolerance)
        report = Verification(error, sensitivity, found.insensitive, found.failing, coarse)
        if report.passed or report.error > coarse:
            break
    return report


@dataclass
class _Sample:
    """Inputs, the outputs that they give, and how much others change those."""

    batch: Batch
    outputs: list[Tensor]
    sensitivity: float


@torch.inference_mode(False)
def _measure(
    symmetry: Symmetry,
    model: nn.Module,
    examples: Sequence[Batch],
    before: Verification,
    generator: torch.Generator,
    strength: tuple[float, float],
) -> Verification | None:
    """Measure once; of the groups, only those that were insensitive before are looked at again.

    None: rounding alone changes the outputs so much that nothing is to be seen.
    """
    tolerance = before.tolerance
    probe, samples = _samples(symmetry, model, examples, tolerance, generator, strength)
    permutation = _moving(symmetry, generator)

    def error(groups: Sequence[str]) -> float:
        state = _only(permutation, groups).apply(probe.state)
        return max(change(sample.outputs, probe.run(state, sample.batch)) for sample in samples)

    names = [group.name for group in symmetry.groups]
    whole = error(names)
    if whole > tolerance:
        if (rough := _ROUGH * _rounding(probe, samples, generator)) > _COARSEST:
            return None
        tolerance = max(tolerance, rough)
    failing = _failing(lambda groups: error(groups) > tolerance, names) if whole > tolerance else []
    found = Verification(whole, min(sample.sensitivity for sample in samples), (), tuple(failing), tolerance)
    unseen = before.insensitive
    if found.passed:  # else there is nothing that these groups could prove
        unseen = _insensitive(permutation, probe, samples, tolerance, unseen, generator)
    return replace(found, insensitive=unseen)


def _rounding(probe: Probe, samples: Sequence[_Sample], generator: torch.Generator) -> float:
    """Measure how far rounding errors grow, by errors of their size in all parameters.

    Another order of summands brings errors of this size into every layer; a deep network may amplify them a
    billionfold. It amplifies a wrong permutation as much, so that a coarser comparison still tells the two apart.
    """
    eps = torch.finfo(torch.float64).eps

    def rounded(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)
        return tensor + eps * tensor * noise.sign()

    state = {name: rounded(tensor) for name, tensor in probe.state.items()}
    return max(change(sample.outputs, probe.run(state, sample.batch)) for sample in samples)


def _failing(breaks: Callable[[Sequence[str]], bool], names: Sequence[str]) -> list[str]:
    if len(names) <= _ONE_BY_ONE:
        return [name for name in names if breaks([name])]
    half = len(names) // 2
    return [name for part in (names[:half], names[half:]) if breaks(part) for name in _failing(breaks, part)]


def _samples(
    symmetry: Symmetry,
    model: nn.Module,
    examples: Sequence[Batch],
    tolerance: float,
    generator: torch.Generator,
    strength: tuple[float, float],
) -> tuple[Probe, list[_Sample]]:
    """Perturb the network as far as it bears it, and run it on every example."""
    spread, temper = strength
    moved = {name for name, terms in symmetry.layout.items() if groups_of(terms)}
    wake = spread != _SPREADS[0]
    for smaller in _SMALLER:
        probe = Probe(model, symmetry.outputs)
        if smaller:
            probe.perturb(moved.__contains__, generator, smaller * spread, wake)
        if wake:
            probe.calibrate(noise(as_given(examples[0], probe.device), generator), temper)
        found = []
        for example in examples:
            batch, outputs = _first(probe, as_given(example, probe.device), generator)
            if not _finite(outputs):
                break
            _check_repeats(probe, batch, outputs, tolerance)
            found.append(_Sample(batch, outputs, _sensitivity(probe, batch, outputs, tolerance, generator)))
        else:
            return probe, found
    raise SymmetryError(
        f"the symmetry cannot be verified: {type(model).__name__} gives NaN, on the example inputs and on noise, with "
        "its own weights and with perturbed ones. Pass inputs on which its outputs are finite"
    )


def _first(probe: Probe, given: Batch, generator: torch.Generator) -> tuple[Batch, list[Tensor]]:
    """Choose inputs: noise, so that nothing is lost where the example holds zeros; or those given."""
    drawn = noise(given, generator)
    try:
        outputs = probe.run(probe.state, drawn)
    except Exception:  # a network may refuse numbers that make no sense to it
        outputs = []
    if outputs and _finite(outputs):
        return drawn, outputs
    return given, probe.run(probe.state, given)


def _check_repeats(probe: Probe, batch: Batch, outputs: list[Tensor], tolerance: float) -> None:
    if (apart := change(outputs, probe.run(probe.state, batch))) > tolerance:
        raise SymmetryError(
            f"the symmetry cannot be verified: {probe.name} is random in evaluation mode; two runs on the same inputs "
            f"differ by {apart:.1e}. Make it deterministic, or pass verify=False"
        )


def _sensitivity(
    probe: Probe, batch: Batch, outputs: list[Tensor], tolerance: float, generator: torch.Generator
) -> float:
    """Measure the change of the outputs on other inputs; of several drawn, the first that changes them clearly."""
    largest, failure = -1.0, "NaN"
    for drawn in others(batch, generator):
        try:
            found = probe.run(probe.state, drawn)
        except Exception as error:  # as above
            failure = f"{type(error).__name__}: {error}"
            continue
        if _finite(found):
            largest = max(largest, change(*map(_numbers, (outputs, found))))
        if largest > 1e3 * tolerance:
            return largest
    if largest < 0 and batch.tensors():
        raise SymmetryError(
            f"the symmetry cannot be verified: {probe.name} runs on these inputs, but on no others of their shapes "
            f"({failure}), so that it cannot be seen to depend on its input. Pass other inputs, or verify=False"
        )
    return max(largest, 0.0)


def _numbers(outputs: list[Tensor]) -> list[Tensor]:
    """Leave integers out, if there is more: they may repeat the input."""
    return [tensor for tensor in outputs if tensor.is_floating_point() or tensor.is_complex()] or outputs


def _finite(outputs: list[Tensor]) -> bool:
    """Say whether there is no NaN, and some number that is not infinite; masked scores may be."""
    return not any(tensor.isnan().any() for tensor in outputs) and any(tensor.isfinite().any() for tensor in outputs)


def change(before: list[Tensor], after: list[Tensor]) -> float:
    """Give the largest change of any output, relative to its largest finite number; infinity for NaN.

    >>> change([torch.tensor([1.0, -4.0])], [torch.tensor([1.0, -4.5])])
    0.125
    """
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        return float("inf")
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        apart = a != b  # equal infinities are not
        if apart.any():
            a, b = (tensor if tensor.is_complex() else tensor.double() for tensor in (a, b))
            size = a[a.isfinite()].abs().max() if a.isfinite().any() else torch.ones(())
            relative = float((a - b)[apart].abs().max() / size.clamp_min(torch.finfo(torch.float64).tiny))
            worst = max(worst, relative if relative == relative else float("inf"))
    return worst


def _moving(symmetry: Symmetry, generator: torch.Generator) -> Permutation:
    """Draw a permutation that moves every group: one of two units would else stay in half of all draws."""
    drawn, still = symmetry.random(generator), symmetry.identity()
    moved = {
        name: index.roll(1, -1) if torch.equal(index, still.indices[name]) else index
        for name, index in drawn.indices.items()
    }
    return type(drawn)(symmetry, moved)


def _only(permutation: Permutation, groups: Sequence[str]) -> Permutation:
    """Keep of a permutation what it does to some groups."""
    still = permutation.symmetry.identity()
    chosen = {name: permutation.indices[name] for name in groups}
    return type(permutation)(permutation.symmetry, {**still.indices, **chosen})


def _insensitive(
    permutation: Permutation,
    probe: Probe,
    samples: Sequence[_Sample],
    tolerance: float,
    names: Sequence[str],
    generator: torch.Generator,
) -> tuple[str, ...]:
    """Name those groups of which a wrong claim would not be seen: moved in some places only, they change no output.

    Gradients tell the effect of moves in each single place at once, to first order. Where they show none, or the
    network cannot be differentiated, a group is moved in half of its places.
    """
    unseen = list(names)
    for sample in samples:
        effects = _effects(permutation, probe, sample)
        unseen = [name for name in unseen if effects.get(name, 0.0) <= tolerance]
    for name in list(unseen):
        state = _half_moved(permutation, probe.state, name, generator)
        if any(change(sample.outputs, probe.run(state, sample.batch)) > tolerance for sample in samples):
            unseen.remove(name)
    return tuple(unseen)


def _effects(permutation: Permutation, probe: Probe, sample: _Sample) -> dict[str, float]:
    """Estimate by how much a group, permuted in one place, changes the outputs, relative to them: its largest."""
    generator = torch.Generator().manual_seed(0)

    def score(outputs: list[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=probe.device)
        for output in _numbers(outputs):
            output = torch.view_as_real(output) if output.is_complex() else output
            finite = output.detach().isfinite()
            size = output.detach()[finite].abs().max() if finite.any() else torch.ones(())
            weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device)
            total = total + (output * weights)[finite].sum().to(total.device) / float(size or 1.0)
        return total

    largest: dict[str, float] = {}
    for name, gradient in probe.gradients(sample.batch, score).items():
        for piece in pieces(permutation.symmetry.layout[name]):
            values, slopes = piece.get(probe.state[name]), piece.get(gradient)
            for group in {dim.group for dim in piece.dims if dim.group is not None}:
                moved = take(values, piece, {group: permutation.indices[group]}, permutation.symmetry.within)
                effect = float(((moved - values) * slopes.conj()).sum().abs())
                largest[group] = max(largest.get(group, 0.0), effect)
    return largest


def _half_moved(permutation: Permutation, state: State, group: str, generator: torch.Generator) -> State:
    """Permute a group in half of the parameters that hold it, the others held."""
    alone = _only(permutation, [group])
    places = list(dict.fromkeys(name for name, _ in permutation.symmetry.by_name[group].axes))
    chosen = torch.randperm(len(places), generator=generator)[: max(1, len(places) // 2)].tolist()
    return {**state, **{places[at]: alone.permute(places[at], state[places[at]]) for at in chosen}}

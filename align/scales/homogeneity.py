"""Where a network is homogeneous: which weights of a unit may grow while others shrink, found by measurement.

ReLU, leaky ReLU and max pooling are positively homogeneous: f(s x) = s f(x) for s > 0. Which exponents a unit's factor
has in which weights is measured, not declared: scaling all weights w of a place by s^e leaves the outputs unchanged to
first order if Σ e <w, ∂f/∂w> = 0, summed over the places, so that exponents are null vectors of the matrix of these
products. What is found so is then tried with large factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...base.batches import Batch
from ...base.errors import SymmetryError
from ...base.running import copied
from ..derive import as_example
from ..nets.problem import rows
from ..outputs import chosen
from ..plain import sharing_copy
from ..precise import Precise
from ..probe import Probe, as_given, double_by_default, forgetting, noise
from ..symmetry import Group, Symmetry
from ..terms import groups_of, pieces
from ..verification import TOLERANCE
from ..verify import change
from .groups import Place, Scale, ScaleGroups, dims_of

# Singular values below so much of the largest are zero; exponents are whole numbers to this precision.
_ZERO, _WHOLE = 1e-7, 1e-4
# Logarithms of factors that are tried: a rectifier that saturates, as ReLU6 does, looks homogeneous to first order.
_LARGE = 6.0


def scale_groups(model: nn.Module, symmetry: Symmetry, example_inputs: Any, *, seed: int = 0) -> ScaleGroups:
    """Find, by measurement in float64, which groups of units can be rescaled without changing the network's function.

    The network is perturbed first, in a copy, so that nothing is zero at initialisation. For every group the exponents
    are computed from derivatives; each scale is then tried on other inputs with random factors, up to some thousands.

    A batch norm has two: after it, its weight and bias grow and what reads it shrinks; before it, the weights that it
    normalises grow with its running mean, and running variance + eps with their square. The second holds in evaluation
    mode, and in training mode up to eps.

    Args:
        model: The network, or one of the same architecture; not changed. It runs in evaluation mode.
        symmetry: Its groups.
        example_inputs: As in `symmetry`; normal noise takes the place of their floating-point numbers.
        seed: Of the perturbation, the inputs and the factors.

    Raises:
        ArchitectureError: The symmetry belongs to another architecture.
        SymmetryError: The network cannot be run in float64 or differentiated.

    >>> from isthmus import symmetry
    >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    >>> x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    >>> found = scale_groups(net, symmetry(net, x), x)
    >>> [(place.name, place.exponent) for place in found.scales[0].places], list(found.left_out)
    ([('0.weight', 1), ('0.bias', 1), ('2.weight', -1)], ['2'])
    """
    symmetry.check_fits(model, "the model")
    measure = _Measure(model, symmetry, as_example(example_inputs), seed)
    found: list[Scale] = []
    left_out: dict[str, str] = {}
    for group in sorted(symmetry.groups, key=lambda group: -len(group.within)):
        scales, reason = measure.scales(group)
        kept = [scale for scale in scales if measure.holds(scale)]
        if len(kept) < len(scales):
            reason = "large factors change the outputs: what follows is homogeneous near zero only, as ReLU6 is"
        kept = [scale for scale in kept if not _told_inside(scale, found, symmetry)]
        found += _named(group, kept, measure.parameters)
        if not kept and scales and not reason:
            reason = "its units are rescaled one by one, in the groups inside it"
        if not any(two_sided(scale, measure.parameters) for scale in kept):
            left_out[group.name] = reason or (
                "its weights can be rescaled only where a norm takes the factors off again: what follows that is not "
                "positively homogeneous"
            )
    order = list(symmetry.by_name)
    return ScaleGroups(symmetry, tuple(sorted(found, key=lambda scale: order.index(scale.group))), left_out)


def two_sided(scale: Scale, parameters: set[str]) -> bool:
    """Say whether some parameters grow with the factors while others shrink."""
    return len({place.exponent > 0 for place in scale.places if place.name in parameters}) == 2


def _told_inside(scale: Scale, found: list[Scale], symmetry: Symmetry) -> bool:
    """Say whether a scale of blocks is one of the units inside them, with one factor for all."""

    def enters(scale: Scale) -> set[tuple[str, int, int]]:
        return {(place.name, place.part, place.exponent) for place in scale.places}

    inside = [other for other in found if scale.group in symmetry.within[other.group]]
    return any(enters(other) == enters(scale) for other in inside)


def _named(group: Group, scales: list[Scale], parameters: set[str]) -> list[Scale]:
    plain = next((scale for scale in scales if two_sided(scale, parameters)), None)
    named: dict[str, Scale] = {}
    for scale in scales:
        name = group.name if scale is plain else f"{group.name} at {scale.places[0].name}"
        while name in named:
            name += "'"
        named[name] = replace(scale, name=name)
    return list(named.values())


class _Measure:
    """A perturbed copy of a network in float64, and what its outputs say of scaling."""

    def __init__(self, model: nn.Module, symmetry: Symmetry, example: Batch, seed: int) -> None:
        self.symmetry = symmetry
        self.generator = torch.Generator().manual_seed(seed)
        self.probe = Probe(model, symmetry.outputs)
        moved = [name for name, terms in symmetry.layout.items() if groups_of(terms)]
        self.probe.perturb(moved.__contains__, self.generator, 0.3)
        self.model = copied(model).to(self.probe.device).eval()
        self.given = as_given(example, self.probe.device)
        self.parameters = set(dict(model.named_parameters(remove_duplicate=False)))
        self.first = _first_names(self.probe.state)
        self.names = [name for name in moved if self.first[name] == name]
        self.outputs = self.probe.run(self.probe.state, self._draw())
        self.products: list[dict[str, Tensor]] = []

    def _draw(self) -> Batch:
        return noise(self.given, self.generator)

    def places(self, group: Group) -> list[tuple[Place, ...]]:
        """List where a group's units occur, in the order of the parameters; statistics of a norm together."""
        found = []
        for name in self.names:
            owner, _, last = name.rpartition(".")
            variance = f"{owner}.running_var".lstrip(".")
            if last == "running_var":
                continue
            for part, piece in enumerate(pieces(self.symmetry.layout[name])):
                for at, dim in enumerate(piece.dims):
                    if dim.group == group.name and all(piece.partner(at, outer) is not None for outer in group.within):
                        places = [Place(name, part, at, 1)]
                        if last == "running_mean" and variance in self.probe.state:
                            eps = float(getattr(self.model.get_submodule(owner), "eps", 0.0))
                            places.append(Place(variance, part, at, 2, eps))
                        found.append(tuple(places))
        return found

    def scales(self, group: Group) -> tuple[list[Scale], str]:
        """Solve for the exponents of a group's scales; else the reason why there are none."""
        places, columns, seen = self.places(group), [], []
        units = ScaleGroups(self.symmetry, (), {}).shape(Scale("", group.name, ()))
        needed = 3 + 2 * len(places) // max(int(torch.tensor(units).prod()), 1)
        while len(self.products) < needed:
            self.products.append(self._products())
        for together in places:
            column, size = map(sum, zip(*map(self._column, together), strict=True))
            if float(size) > 0:
                columns.append(column)
                seen.append(together)
        if not columns:
            return [], "the outputs do not depend on it"
        vectors, least = _null_vectors(torch.stack(columns, 1))
        if not vectors:
            return [], (
                f"no factors of its weights leave the outputs unchanged (to first order they change by {least:.0e} of "
                "what they could): what follows is not positively homogeneous, as GELU, tanh, sigmoid and softmax are "
                "not, or it normalises over these units"
            )
        return [
            Scale(
                group.name,
                group.name,
                tuple(
                    replace(place, exponent=e * place.exponent)
                    for together, e in zip(seen, vector, strict=True)
                    for place in together
                    if e
                ),
            )
            for vector in vectors
        ], ""

    def _column(self, place: Place) -> tuple[Tensor, Tensor]:
        piece, dims = dims_of(self.symmetry, place)
        value = piece.get(self.probe.state[place.name]) + place.shift
        parts = [rows(value * piece.get(slopes[place.name]), dims) for slopes in self.products]
        column = place.exponent * torch.cat([part.sum(1) for part in parts])
        size = torch.cat([part.abs().sum(1) for part in parts])
        # sums that rounding alone keeps from zero: such weights have a scale of their own, as under weight norm
        return torch.where(column.abs() > 1e-12 * size, column, 0.0).cpu(), size.sum()

    def _products(self) -> dict[str, Tensor]:
        """Differentiate a random projection of the outputs on new inputs, by batch statistics as well."""
        state = self.probe.state
        leaves = {n: state[n].clone().requires_grad_(state[n].is_floating_point()) for n in set(self.first.values())}
        whole = {name: leaves[first] for name, first in self.first.items()}
        batch, model = self._draw(), sharing_copy(self.model)
        with torch.enable_grad(), Precise(), double_by_default(), forgetting(model), _OpenNorms():
            output = torch.func.functional_call(model, whole, batch.args, dict(batch.kwargs), tie_weights=False)
            tensors = [t for t in chosen(output, self.symmetry.outputs) if t.requires_grad]
            if not tensors:
                raise SymmetryError(
                    f"the outputs of {self.probe.name} cannot be differentiated, so that its scales cannot be measured"
                )
            weights = [torch.randn(t.shape, generator=self.generator, dtype=torch.float64) for t in tensors]
            score = torch.stack([(t * w.to(t.device)).sum() for t, w in zip(tensors, weights, strict=True)]).sum()
            wanted = [name for name in self.names if leaves[name].requires_grad]
            slopes = torch.autograd.grad(score, [leaves[name] for name in wanted], allow_unused=True)
        found = dict(zip(wanted, slopes, strict=True))
        return {name: torch.zeros_like(state[name]) if (g := found.get(name)) is None else g for name in self.names}

    def holds(self, scale: Scale) -> bool:
        """Try large factors."""
        groups = ScaleGroups(self.symmetry, (scale,), {})
        shape = groups.shape(scale)
        tried = [
            *(torch.full(shape, sign * _LARGE, dtype=torch.float64) for sign in (1, -1)),
            _LARGE / 2 * torch.randn(shape, generator=self.generator, dtype=torch.float64),
        ]
        batch = self._draw()
        before = self.probe.run(self.probe.state, batch)
        states = [groups.scaled(self.probe.state, {scale.name: log.exp()}) for log in tried]
        return max(change(before, self.probe.run(state, batch)) for state in states) <= TOLERANCE


def _first_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Give for each name the first name of the same tensor."""
    first: dict[tuple[int, int], str] = {}
    return {name: first.setdefault((tensor.data_ptr(), tensor.numel()), name) for name, tensor in state.items()}


class _OpenNorms(TorchFunctionMode):
    """Batch norms in evaluation mode by their formula, which can be differentiated by the statistics."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm or kwargs.get("training"):
            return func(*args, **kwargs)
        x, mean, var, weight, bias = (*args, *(kwargs.get(name) for name in ("weight", "bias")))
        mean, var, weight, bias = (
            t if t is None else t.reshape(-1, *[1] * (x.ndim - 2)) for t in (mean, var, weight, bias)
        )
        x = (x - mean) / (var + kwargs["eps"]).sqrt()
        x = x if weight is None else x * weight
        return x if bias is None else x + bias


def _null_vectors(matrix: Tensor) -> tuple[list[list[int]], float]:
    """Find whole numbers that the columns of a tall matrix cancel with; and how near to that others come."""
    sizes = matrix.norm(dim=0)
    moving = sizes > 0
    # weights that change nothing by themselves, as under weight norm, each have a scale of their own
    alone = [[int(at == own) for at in range(len(sizes))] for own in (~moving).nonzero().flatten().tolist()]
    _, singular, right = torch.linalg.svd(matrix[:, moving] / sizes[moving], full_matrices=False)
    null = torch.zeros(len(right), len(sizes), dtype=torch.float64)
    null[:, moving] = right / sizes[moving]
    vectors = _whole(null[int((singular > _ZERO * singular[:1]).sum()) :])
    return vectors + alone, float(singular[-1] / singular[0]) if len(singular) else 0.0


def _whole(null: Tensor) -> list[list[int]]:
    """Give a basis of a space in whole numbers, as sparse as elimination makes it; what is not whole is left out."""
    matrix, done = null.clone(), 0
    for column in range(matrix.shape[1]):
        if done == len(matrix):
            break
        best = done + int(matrix[done:, column].abs().argmax())
        if matrix[best, column].abs() <= _WHOLE * matrix[done:].abs().max():
            continue
        matrix[[done, best]] = matrix[[best, done]]
        matrix[done] /= matrix[done, column].clone()
        for other in range(len(matrix)):
            if other != done:
                matrix[other] -= matrix[other, column].clone() * matrix[done]
        done += 1
    found = []
    for vector in matrix:
        multiple = next((m for m in (1, 2) if ((m * vector).round() - m * vector).abs().max() < _WHOLE), None)
        if multiple is not None:
            found.append([int(e) for e in (multiple * vector).round().tolist()])
    return found

"""The straight line from a network to a permuted other, as a function of the permuted parameters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...base.batches import Batch, Data, batches, model_device, require_repeatable
from ...base.errors import DataError, NotFiniteError
from ...base.evaluation import Measure, Totals, cross_entropy
from ...base.interpolation import check_same_ties, varying
from ...base.running import copied
from ..permutation import Permutation
from ..symmetry import Symmetry
from .problem import pairs
from .weights import Found

_WithStatistics = nn.modules.batchnorm._NormBase  # the one base of every batch and instance norm


@dataclass(frozen=True)
class Refined(Found):
    """Result of a search by gradients.

    Attributes:
        losses: The loss that was descended, after every step.
        candidates: Loss halfway between the networks on the held batches, for every permutation that was compared, the
            start first; empty where the search has no data.
    """

    losses: tuple[float, ...] = ()
    candidates: tuple[float, ...] = ()


class _Placed(nn.Module):
    """A network that runs with given tensors in place of its own."""

    def __init__(self, network: nn.Module, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.placed = (network, dict(state))  # a tuple, so that the network is no part of this module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(*self.placed, args, kwargs)


@dataclass(frozen=True, eq=False)
class Line:
    """The line between two networks of which the second is permuted, softly or not; neither is ever written to.

    Dropout is off. Batch norm takes the statistics of the batch: the running ones belong to the ends, and their mean is
    not that of the network between them, whose units vary less (Jordan et al. 2023). What is found is thus best for a
    merged network whose statistics are measured again.

    Attributes:
        symmetry: Of both networks.
        scratch: A copy of the first network, which runs.
        a: What varies along the line, by name, at the first network: parameters, and floating-point buffers.
        b: The same of the second.
        parameters: Names of the parameters among them.
        loss: Function (outputs, targets) → mean over the batch.
    """

    symmetry: Symmetry
    scratch: nn.Module
    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    parameters: tuple[str, ...]
    loss: Measure

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return model_device(self.scratch)

    def loss_at(self, alpha: float, permuted: Mapping[str, Tensor], batch: Batch, step: int) -> Tensor:
        """Measure a point of the line on a batch, with gradients.

        Args:
            alpha: The place: 0 is the first network, 1 the permuted second.
            permuted: The second network's tensors, by name.
            batch: On the device of the line.
            step: For the message of an error.

        Raises:
            DataError: The loss is no differentiable scalar.
            NotFiniteError: It is NaN or infinite.
        """
        value = self.loss(self._call(alpha, permuted, batch), batch.targets)
        if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
            raise DataError(
                "loss gave no differentiable scalar; expected a tensor with one entry, computed from the outputs"
            )
        if not value.isfinite().all():
            raise NotFiniteError(f"the loss is {float(value.detach())} in step {step}; lower lr, or pass other inputs")
        return value

    @torch.no_grad()
    def midpoint(self, permutation: Permutation, held: list[Batch]) -> float:
        """Measure the network halfway on batches: the mean loss."""
        model = _Placed(self.scratch, self._state(0.5, self.permuted(permutation)))
        totals = Totals.zeros(1, 1)
        for batch in held:
            with _two_samples():
                totals.add(0, model, batch, [self.loss])
        return float(totals.means()[0, 0])

    def permuted(self, permutation: Permutation) -> dict[str, Tensor]:
        """Permute the second network's tensors."""
        return {name: permutation.permute(name, tensor) for name, tensor in self.b.items()}

    def of(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Choose the parameters from a state, without the buffers."""
        return {name: state[name] for name in self.parameters}

    def objective(self, permutation: Permutation) -> float:
        """Compute <A, p(B)> over the parameters."""
        return inner_product(permutation, self.of(self.a), self.of(self.b))

    def _call(self, alpha: float, permuted: Mapping[str, Tensor], batch: Batch) -> Any:
        with _two_samples():
            return batch.call(_Placed(self.scratch, self._state(alpha, permuted)))

    def _state(self, alpha: float, permuted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.lerp(tensor, permuted[name], alpha) for name, tensor in self.a.items()}


def open_line(
    symmetry: Symmetry,
    model_a: nn.Module,
    model_b: nn.Module,
    loss: Measure | None,
    device: torch.device | str | None,
) -> Line:
    """Open the line between two networks.

    Args:
        symmetry: Of both.
        model_a: The network at 0.
        model_b: The network at 1, in its own order.
        loss: Function (outputs, targets) → mean over the batch; None: cross entropy.
        device: Where to compute; None: where `model_a` is.

    Raises:
        ArchitectureError: The networks do not belong to the symmetry, or only one ties two tensors.
        NotFiniteError: A parameter holds NaN or infinity.
    """
    symmetry.check_fits(model_a, "model a")
    symmetry.check_fits(model_b, "model b")
    check_same_ties((model_a, model_b))
    scratch = copied(model_a).to(device).eval().requires_grad_(False)
    measured = set()
    for prefix, module in scratch.named_modules():
        if isinstance(module, _WithStatistics):
            module.train()
            measured |= {f"{prefix}.{name}".lstrip(".") for name, _ in module.named_buffers(recurse=False)}
    states = [{**dict(model.named_parameters()), **dict(model.named_buffers())} for model in (model_a, model_b)]
    names = [name for name in varying(states, "ab") if name not in measured]
    home = model_device(scratch)
    a, b = ({name: state[name].detach().to(home) for name in names} for state in states)
    known = {name for name, _ in model_a.named_parameters()}
    return Line(symmetry, scratch, a, b, tuple(name for name in names if name in known), loss or cross_entropy)


def inner_product(permutation: Permutation, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Compute <A, p(B)> over the parameters that have a group, in float64: what weight matching maximises."""
    moved = {name: permutation.permute(name, tensor) for name, tensor in b.items()}
    found = pairs(permutation.symmetry, a, moved)
    return math.fsum(float(torch.dot(p.a.flatten().double(), p.b.flatten().double())) for p in found)


class Passes:
    """Batches without end: the first ones are held back, the others come again and again.

    Attributes:
        held: Batches by which candidates are compared. They are trained on only where there are no others.
    """

    def __init__(self, data: Data, device: torch.device, held: int) -> None:
        require_repeatable(data, "a search by gradients reads it many times")
        self.data, self.device = data, device
        self.held = list(itertools.islice(batches(data, device), held))

    def __iter__(self) -> Iterator[Batch]:
        while True:
            others = False
            for batch in itertools.islice(batches(self.data, self.device), len(self.held), None):
                others = True
                yield batch
            if not others:
                yield from self.held


class Best:
    """The best permutation so far, by the loss halfway on the held batches; a later one must be better, not equal."""

    def __init__(self, line: Line, held: list[Batch], start: Permutation) -> None:
        self.line, self.held = line, held
        self.permutation = self.last = start
        self.losses = [line.midpoint(start, held)]
        self.objectives = [line.objective(start)]
        self.loss = self.losses[0]

    def offer(self, permutation: Permutation) -> None:
        """Compare a candidate, unless it is the one offered last."""
        if permutation == self.last:
            return
        self.last = permutation
        self.losses.append(self.line.midpoint(permutation, self.held))
        self.objectives.append(self.line.objective(permutation))
        if self.losses[-1] < self.loss or (math.isnan(self.loss) and not math.isnan(self.losses[-1])):
            self.permutation, self.loss = permutation, self.losses[-1]

    def refined(self, losses: list[float]) -> Refined:
        """Give the result of a search that descended `losses`."""
        history, candidates = tuple(self.objectives), tuple(self.losses)
        objective = self.line.objective(self.permutation)
        return Refined(self.permutation, objective, (history,), losses=tuple(losses), candidates=candidates)


@contextmanager
def _two_samples() -> Iterator[None]:
    """Say in our words that a batch of one has no statistics."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise DataError(
            "a batch holds a single sample, of which a batch norm can take no statistics; use larger batches, "
            "or drop_last=True"
        ) from error


def check_search(steps: int, lr: float, **others: float) -> None:
    """Refuse numbers that are not positive.

    Raises:
        DataError: With the name and the value.
    """
    for name, value in {"steps": steps, "lr": lr, **others}.items():
        if not 0 < value < math.inf:
            raise DataError(f"{name} is {value}; expected a number above zero")

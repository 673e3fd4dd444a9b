"""`learned_alignment`: rotations and permutations by the gradient of the loss between two networks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...base.architecture import full_state
from ...base.batches import Batch, Data, batches, require_repeatable
from ...base.errors import DataError, NotFiniteError, SymmetryError, nearest
from ...base.evaluation import Measure
from ...base.progress import progress as bar
from ...base.running import on_device
from ..assignment import assign_each
from ..derive import as_example
from ..nets.functional import Line, Passes, check_search, open_line
from ..nets.preparation import check_networks
from ..nets.scores import weight_scores
from ..nets.sinkhorn_matching import Logits
from ..permutation import Permutation
from ..symmetry import Symmetry
from ..verify import change
from .alignment import Alignment
from .dual import find_dual
from .finding import TOLERANCE
from .matching import orthogonal_matching
from .probing import Bench
from .search import Search
from .streams import carried
from .turning import Turns

Points = Literal["midpoint", "uniform"]

_RANGES: dict[str, tuple[float, float]] = {"midpoint": (0.4, 0.6), "uniform": (0.0, 1.0)}

# Batches that the start is found from, where none is given: activations of some thousand tokens are enough.
_FIRST = 16

# Of soft permutations: the temperature in the first and in the last step, and the share of the start in the first
# matrices. Where the last is higher, a low loss is found that is lost when they are rounded; nearer the start, nothing.
_TEMPERATURE, _SHARPNESS = (0.3, 0.03), 0.5


@dataclass(frozen=True, eq=False)
class LearnedAlignment(Alignment):
    """An alignment that was found by gradients.

    Attributes:
        losses: The loss that was descended, after every step.
        candidates: Loss halfway between the networks on the held batches, for everything that was compared, the start
            first.
    """

    losses: tuple[float, ...] = field(default=(), repr=False)
    candidates: tuple[float, ...] = ()


def learned_alignment(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Data,
    *,
    start: Alignment | None = None,
    steps: int = 400,
    lr: float = 0.01,
    points: Points = "midpoint",
    dense: bool = True,
    soft: float = 0.0,
    soft_lr: float = 0.1,
    held: int = 8,
    every: int = 50,
    symmetry: Symmetry | None = None,
    example_inputs: Any = None,
    seed: int = 0,
    loss: Measure | None = None,
    precision: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    verify: bool = True,
    progress: bool | None = None,
) -> LearnedAlignment:
    """Align two networks by the loss between them: rotate streams and heads along its gradient.

    The start is turned further by Cayley's formula: each stream (under layer norm, in the complement of the vector of
    ones), and the units inside each head of attention where the start rotates them. In each step a place alpha is
    drawn, the network (1 - alpha) a + alpha T(b) meets one batch, and Adam follows the gradient of its loss to the
    rotations; in the second half the learning rate falls to zero. Every few steps the alignment is compared by the loss
    halfway on batches held back; the best one is returned, and the start is among them. The function of b stays exactly
    what it was.

    Args:
        model_a: The reference.
        model_b: The network to be aligned; of the same architecture. Neither is changed.
        data: Batches with labels, read many times.
        start: Where to begin; None: `orthogonal_matching` by both weights and activations, on the first 16 batches.
        steps: Steps of Adam, one batch each.
        lr: Its learning rate, in units of the rotation's generators (radians).
        points: Where alpha is drawn: "midpoint", from [0.4, 0.6], where the loss is highest; "uniform", from [0, 1].
        dense: Let units inside heads take any basis, not only a rotated one: queries M q meet keys M⁻ᵀ k. False, and
            where one module holds both sides, rotates them.
        soft: Share of the steps in which other groups, as the units of perceptrons, are permuted as well, by doubly
            stochastic matrices as in `learned`; then these are rounded, and rotations go on.
        soft_lr: Learning rate of their logits.
        held: Batches held back, the first ones of the data.
        every: Steps between two comparisons.
        symmetry: Of both networks, for the start; None derives it.
        example_inputs: For finding the start and verifying; None: the first batch.
        seed: Of all that is drawn; same seed, same result.
        loss: Function (outputs, targets) → mean over the batch, differentiable; None: cross entropy.
        precision: In which the networks run while learning: `torch.bfloat16` (by autocast) is faster where the
            processor has it. Comparisons are in their own.
        device: Where to compute; None: where the models are.
        verify: Measure in float64 that the outputs of b stay as they are.
        progress: Show bars; None: on a terminal.

    Returns:
        The alignment with its `losses` and `candidates`; as objective the inner product <A, T(B)> of the folded
        parameters, as history that of the start and of the result.

    Raises:
        ArchitectureError: The networks differ, or do not belong to the start.
        DataError: A number is out of its range, the data is an iterator or has no labels, or there are no such points.
        NotFiniteError: A parameter, an input or the loss is NaN or infinite.
        SymmetryError: No stream may be rotated; or the check fails.

    Reference:
        Theus, Cabodi, Anagnostidis, Orvieto, Singh, Boeva. Generalized Linear Mode Connectivity for Transformers.
        2025 (their learned matching). https://arxiv.org/abs/2506.22712

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.stem, self.norm, self.head = nn.Linear(9, 8), nn.RMSNorm(8), nn.Linear(8, 7)
    ...     def forward(self, x):
    ...         return self.head(self.norm(self.stem(x)))
    >>> model, other = Block(), Block()
    >>> x = torch.randn(32, 9, generator=torch.Generator().manual_seed(0))
    >>> found = learned_alignment(model, other, (x, model(x).argmax(1)), steps=20)
    >>> min(found.candidates) <= found.candidates[0], found.error < 1e-9
    (True, True)
    """
    _check(steps, lr, points, soft, soft_lr, held, every, precision)
    require_repeatable(data, "a search by gradients reads it many times")
    first = list(itertools.islice(batches(data), _FIRST))
    example = as_example(first[0] if example_inputs is None else example_inputs)
    if start is None:
        start = orthogonal_matching(
            model_a, model_b, first, by="both", symmetry=symmetry, example_inputs=example, seed=seed, device=device,
            verify=verify, progress=progress,
        )  # fmt: skip
    a, b = _checked(start, model_a, model_b, device)
    start = _with_dual(start, a, example, seed) if dense else start
    line = open_line(start.symmetry, start.fold(a), start.apply(b), loss, device)
    passes = Passes(data, line.device, held)
    descent = _Descent(start, line, steps, lr, {name for name, _ in start.recipe.dual if dense}, soft, soft_lr, seed)
    best = _Best(line, b, passes.held, start)
    low, high = _RANGES[points]
    generator = torch.Generator().manual_seed(seed)
    for step, batch in zip(bar(range(steps), "learning an alignment", show=progress), passes, strict=False):
        alpha = low + (high - low) * float(torch.rand((), generator=generator))
        descent.step(step, alpha, batch, precision)
        if (step + 1) % every == 0 or step + 1 == steps:
            best.offer(descent.found())
    return _result(best, descent, model_a, b, example, seed, verify)


def _check(
    steps: int, lr: float, points: str, soft: float, soft_lr: float, held: int, every: int, precision: torch.dtype
) -> None:
    check_search(steps, lr, soft_lr=soft_lr, held=held, every=every)
    if points not in _RANGES:
        raise DataError(f"there are no points {points!r} to draw{nearest(str(points), get_args(Points))}")
    if not 0 <= soft < 1:
        raise DataError(f"soft is {soft}; expected the share of the steps, at least zero and below one")
    if precision not in (torch.float32, torch.bfloat16):
        raise DataError(f"precision is {precision}; expected torch.float32 or torch.bfloat16")


def _checked(start: Alignment, model_a: nn.Module, model_b: nn.Module, device: Any) -> list[nn.Module]:
    check_networks((model_a, model_b), ("model a", "model b"))
    for model, name in ((model_a, "model a"), (model_b, "model b")):
        start.recipe.check_fits(model, name)
    return [on_device(model, device) for model in (model_a, model_b)]


def _with_dual(start: Alignment, model: nn.Module, example: Batch, seed: int) -> Alignment:
    """Find what is on which side of a product inside heads, where that is not known yet."""
    turning = [name for name in start.rotation if name not in start.streams]
    if start.recipe.dual or not turning:
        return start
    dual = find_dual(start.symmetry, Bench.open(model, start.symmetry, example, seed), turning, seed)
    return replace(start, recipe=replace(start.recipe, dual=dual))


class _Descent:
    """Adam on rotations and, for a share of the steps, on soft permutations of the other groups.

    Args:
        start: Where it begins.
        line: From the folded reference to the second network as the start lays it.
        steps: How many there will be.
        lr: Learning rate of the rotations.
        dense: Groups that may take any basis.
        soft: Share of the steps with soft permutations.
        soft_lr: Learning rate of their logits.
        seed: Of the noise on these.
    """

    def __init__(
        self,
        start: Alignment,
        line: Line,
        steps: int,
        lr: float,
        dense: set[str],
        soft: float,
        soft_lr: float,
        seed: int,
    ) -> None:
        self.start, self.line, self.steps, self.lr = start, line, steps, lr
        self.turns = Turns(start.recipe.streams, start.rotation, next(iter(line.b.values())), dense)
        gains = {gain for stream in start.recipe.streams for gain in stream.gains}
        self.moving = {name: tensor for name, tensor in line.b.items() if name not in gains}
        self.soft_steps = round(soft * steps) if _permuted(start) else 0
        self.logits: Logits | None = None
        parameters: list[dict[str, Any]] = [{"params": list(self.turns.free.values())}]
        if self.soft_steps:
            identity = start.symmetry.identity()
            self.logits = Logits(start.symmetry, identity, line.a, self.soft_steps, _TEMPERATURE, _SHARPNESS, seed)
            self.logits.tensors = {name: self.logits.tensors[name] for name in _permuted(start)}
            parameters.append({"params": list(self.logits.tensors.values()), "lr": soft_lr})
        self.adam = torch.optim.Adam(parameters, lr=lr)
        self.losses: list[float] = []

    def step(self, at: int, alpha: float, batch: Batch, precision: torch.dtype) -> None:
        """Descend once."""
        matrices = {**self.turns.matrices(), **self._orders(at)}
        moved = {**self.line.b, **self._carried(matrices, at)}
        with _running(self.line.device, precision):
            value = self.line.loss_at(alpha, moved, batch, at)
        self.adam.zero_grad()
        value.backward()
        self.adam.param_groups[0]["lr"] = self.lr * min(1.0, 2 * (1 - at / self.steps))
        self.adam.step()
        self.losses.append(float(value.detach()))

    def _carried(self, matrices: Mapping[str, Tensor], at: int) -> dict[str, Tensor]:
        recipe = self.start.recipe
        try:
            return carried(recipe.symmetry, self.moving, matrices, recipe.dual)
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise NotFiniteError(f"a basis inside heads is singular in step {at}; lower lr, or dense=False") from error

    def _orders(self, at: int) -> dict[str, Tensor]:
        if self.logits is None:
            return {}
        if at < self.soft_steps:
            return self.logits.matrices(at)
        return {
            name: F.one_hot(index, index.shape[-1]).to(self.logits.tensors[name])
            for name, index in self._rounded().items()
        }

    def _rounded(self) -> dict[str, Tensor]:
        return (
            {name: assign_each(tensor.detach()) for name, tensor in self.logits.tensors.items()} if self.logits else {}
        )

    def found(self) -> Alignment:
        """Give the alignment as it stands, soft permutations rounded."""
        symmetry = self.start.symmetry
        indices = {name: index.cpu() for name, index in self._rounded().items()}
        step = Permutation(symmetry, {**symmetry.identity().indices, **indices})
        permutation = step.compose(self.start.permutation)
        return replace(self.start, permutation=permutation, rotation=self.turns.exact())


def _permuted(start: Alignment) -> list[str]:
    """Name the groups that are permuted and hold nothing that is rotated."""
    around = {outer for name in start.rotation for outer in start.symmetry.within[name]}
    return [group.name for group in start.symmetry.groups if group.name not in around | set(start.rotation)]


def _running(device: torch.device, precision: torch.dtype) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)


class _Best:
    """The best alignment so far, by the loss halfway on the held batches."""

    def __init__(self, line: Line, model: nn.Module, batches: list[Batch], start: Alignment) -> None:
        self.line, self.state, self.batches = line, full_state(model), batches
        self.identity = start.symmetry.identity()
        self.start = self.alignment = start
        self.losses = [self._measured(start)]
        self.loss = self.losses[0]

    def offer(self, alignment: Alignment) -> None:
        """Compare a candidate; it must be better, not equal."""
        self.losses.append(self._measured(alignment))
        if self.losses[-1] < self.loss or (math.isnan(self.loss) and not math.isnan(self.losses[-1])):
            self.alignment, self.loss = alignment, self.losses[-1]

    def _measured(self, alignment: Alignment) -> float:
        moved = alignment.apply(self.state)
        placed = {name: moved[name].to(tensor) for name, tensor in self.line.b.items()}
        return replace(self.line, b=placed).midpoint(self.identity, self.batches)


def _result(
    best: _Best, descent: _Descent, model_a: nn.Module, model_b: nn.Module, example: Batch, seed: int, verify: bool
) -> LearnedAlignment:
    found = best.alignment
    reference = on_device(found.fold(model_a), next(model_a.parameters()).device)
    ends = [_compared(best, alignment) for alignment in (best.start, found)]
    fields = {key: value for key, value in vars(found).items() if key in Alignment.__dataclass_fields__}
    fields |= {
        "objective": ends[1].objective,
        "history": tuple(search.objective for search in ends),
        "scores": weight_scores(best.identity, ends[1].a, ends[1].b),
        "by": "learned",
        "seed": seed,
        "error": None,
        "reference": reference,
    }
    result = LearnedAlignment(**fields, losses=tuple(descent.losses), candidates=tuple(best.losses))
    if not verify:
        return result
    bench = Bench.open(model_b, found.symmetry, example, seed)
    error = change(bench.given, bench.probe.run(result.transform(bench.probe.state), bench.batch))
    if error > TOLERANCE:
        raise SymmetryError(f"the aligned network's outputs differ by {error:.1e} from those of model b in float64")
    return replace(result, error=error)


def _compared(best: _Best, alignment: Alignment) -> Search:
    """Lay two folded networks side by side, as `orthogonal_matching` compares them."""
    line = best.line
    moved = alignment.transform(best.state)
    b = {name: moved[name] for name in line.parameters}
    return Search.between(alignment.recipe, (), line.of(line.a), b)

"""The methods of `match` by name: what each needs, which options it takes, and what it gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...base.batches import Batch, Data, require_repeatable
from ...base.errors import DataError, nearest
from ...base.evaluation import Measure
from ..permutation import Permutation
from ..symmetry import Symmetry
from .activations import Correlated, activation_matching
from .auto import auto
from .frank_wolfe import frank_wolfe_matching
from .functional import inner_product
from .iterated import iterated_activation_matching
from .learned import learned
from .midpoint import midpoint_loss
from .result import Matching
from .scores import weight_scores
from .sinkhorn_matching import sinkhorn_matching
from .straight_through import straight_through
from .weights import weight_matching

# How weight matching chooses among its restarts.
CHOICES = ("objective", "midpoint")


@dataclass(frozen=True)
class Task:
    """Two networks, checked and on their device, and what is known of them.

    Attributes:
        symmetry: Of both.
        models: The reference, and the network to be permuted.
        parameters: Of each, by name.
        data: As the user gave it; None: none.
        stream: The batches of the data, once.
        start: The permutation to begin with; None: each method's own choice.
        restarts: Of weight matching.
        seed: Of all random choices.
        loss: Function (outputs, targets) → mean over the batch; cross entropy by default.
        device: Where to compute.
        progress: Show bars; None: on a terminal.
        options: Further arguments of the method.
    """

    symmetry: Symmetry
    models: tuple[nn.Module, nn.Module]
    parameters: tuple[dict[str, Tensor], dict[str, Tensor]]
    data: Data | None
    stream: Iterable[Batch]
    start: Permutation | None
    restarts: int
    seed: int
    loss: Measure | None
    device: torch.device | str | None
    progress: bool | None
    options: Mapping[str, Any]

    def midpoint(self, permutation: Permutation) -> float:
        """Measure the loss halfway between the first network and the permuted second."""
        if self.data is None:
            raise DataError("choosing by midpoint loss needs data: pass batches (inputs, labels)")
        require_repeatable(self.data, "the loss halfway is measured for every restart")
        a, b = self.models
        return midpoint_loss(a, permutation.apply(b), self.data, loss=self.loss, device=self.device).loss

    def measured(self, permutation: Permutation) -> dict[str, Tensor]:
        """Score the matched units by their weights."""
        return weight_scores(permutation, *self.parameters)


@dataclass(frozen=True)
class Method:
    """A method of matching.

    Attributes:
        run: Does it.
        function: Whose keyword arguments are the options.
        needs: "" (parameters only), "data" (read once), or "labels" (data with labels, read in several passes).
        starts: Whether it can begin at a given permutation.
        also: Further options, which are not keyword arguments of the function.
    """

    run: Callable[[Task], Matching]
    function: Callable[..., Any]
    needs: str = ""
    starts: bool = True
    also: tuple[str, ...] = ()

    @property
    def options(self) -> list[str]:
        """Names of the keyword arguments that belong to this method alone."""
        taken = {"symmetry", "start", "seed", "loss", "device", "progress", "restarts", "only", "cost"}
        parameters = inspect.signature(self.function).parameters.values()
        return [*self.also, *(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in taken)]


def _weights(task: Task) -> Matching:
    options = dict(task.options)
    choose = options.pop("choose", "objective")
    if choose not in CHOICES:
        raise DataError(f"choose is {choose!r}; expected one of {', '.join(map(repr, CHOICES))}")
    found = weight_matching(
        task.symmetry,
        *task.parameters,
        restarts=task.restarts,
        seed=task.seed,
        start=task.start,
        cost=task.midpoint if choose == "midpoint" else None,
        progress=task.progress,
        **options,
    )
    scores = task.measured(found.permutation)
    return Matching(found.permutation, found.objective, scores, found.history, "weights", task.seed, bound=found.bound)


def _frank_wolfe(task: Task) -> Matching:
    found = frank_wolfe_matching(
        task.symmetry, *task.parameters, start=task.start, progress=task.progress, **task.options
    )
    scores = task.measured(found.permutation)
    return Matching(found.permutation, found.objective, scores, found.history, "frank_wolfe", task.seed)


def _sinkhorn(task: Task) -> Matching:
    found = sinkhorn_matching(
        task.symmetry,
        *task.parameters,
        start=task.start,
        seed=task.seed,
        device=task.device,
        progress=task.progress,
        **task.options,
    )
    scores = task.measured(found.permutation)
    return Matching(found.permutation, found.objective, scores, found.history, "sinkhorn", task.seed)


def _descended(name: str, function: Callable[..., Any]) -> Callable[[Task], Matching]:
    """Run a method that follows the gradient of the loss; without a start it begins where weight matching ends."""

    def run(task: Task) -> Matching:
        start = task.start
        if start is None:
            start = weight_matching(
                task.symmetry, *task.parameters, restarts=task.restarts, seed=task.seed, progress=task.progress
            ).permutation
        settings = {"seed": task.seed, "loss": task.loss, "device": task.device, "progress": task.progress}
        found = function(task.symmetry, *task.models, task.data, start=start, **settings, **task.options)
        scores = task.measured(found.permutation)
        return Matching(found.permutation, found.objective, scores, found.history, name, task.seed)

    return run


def _activations(task: Task) -> Matching:
    found = activation_matching(task.symmetry, *task.models, task.stream, progress=task.progress, **task.options)
    return _with_unseen(task, "activations", found)


def _iterated(task: Task) -> Matching:
    assert task.data is not None
    found = iterated_activation_matching(
        task.symmetry,
        *task.models,
        task.data,
        loss=task.loss,
        seed=task.seed,
        progress=task.progress,
        **task.options,
    )
    return _with_unseen(task, "iterated", found)


def _with_unseen(task: Task, name: str, found: Correlated) -> Matching:
    """Match by weights what no activation shows, and score by weights what no activation scores."""
    permutation, scores = found.permutation, found.scores
    if found.unseen:
        permutation = weight_matching(
            task.symmetry,
            *task.parameters,
            restarts=1,
            seed=task.seed,
            only=found.unseen,
            start=permutation,
            progress=task.progress,
        ).permutation
    unscored = tuple(group for group in task.symmetry.by_name if group not in scores)
    if unscored:
        cosines = task.measured(permutation)
        scores = scores | {group: cosines[group] for group in unscored}
    return Matching(permutation, found.objective, scores, ((found.objective,),), name, task.seed, unscored)


def _auto(task: Task) -> Matching:
    options = dict(task.options)
    chosen = options.pop("candidates", ("weights", "activations", "iterated"))
    assert task.data is not None
    plain = replace(task, options={})
    run = {name: lambda method=METHODS[name]: method.run(plain) for name in METHODS if name != "auto"}
    if task.start is not None:
        start = Matching(task.start, float("nan"), {}, method="init")
        chosen, run = ("init", *chosen), {"init": lambda: start, **run}
    found = auto(chosen, run, task.symmetry, *task.models, task.data, loss=task.loss, device=task.device, **options)
    table = tuple(asdict(line) for line in found.table)
    won = found.result
    if won is None or won.method == "init":
        value = inner_product(found.permutation, *task.parameters)
        won = Matching(found.permutation, value, task.measured(found.permutation), seed=task.seed)
    return replace(won, method=f"auto: {found.winner}", candidates=table)


METHODS: dict[str, Method] = {
    "weights": Method(_weights, weight_matching, also=("choose",)),
    "activations": Method(_activations, activation_matching, "data", starts=False),
    "iterated": Method(_iterated, iterated_activation_matching, "data", starts=False),
    "frank_wolfe": Method(_frank_wolfe, frank_wolfe_matching),
    "sinkhorn": Method(_sinkhorn, sinkhorn_matching),
    "straight_through": Method(_descended("straight_through", straight_through), straight_through, "labels"),
    "learned": Method(_descended("learned", learned), learned, "labels"),
    "auto": Method(_auto, auto, "labels", also=("candidates",)),
}


def method_of(name: str, data: Data | None, options: Mapping[str, Any], init: object) -> Method:
    """Find a method, and refuse what it cannot do with what it was given.

    Raises:
        DataError: It is unknown, needs data, does not know an option, or cannot begin at a given permutation.
    """
    if name not in METHODS:
        raise DataError(f"unknown matching method {name!r}{nearest(name, METHODS)}; there are {', '.join(METHODS)}")
    method = METHODS[name]
    if data is None and method.needs:
        kind = "batches of inputs" if method.needs == "data" else "batches (inputs, labels)"
        raise DataError(f"matching by {name} needs data: pass {kind}; method='weights' needs none")
    for option in options:
        if option not in method.options:
            raise DataError(
                f"method {name!r} has no option {option!r}{nearest(option, method.options)}; "
                f"it takes {', '.join(method.options)}"
            )
    if init is not None and not method.starts:
        able = [other for other, entry in METHODS.items() if entry.starts]
        raise DataError(f"method {name!r} cannot begin at a given permutation; {', '.join(able)} can")
    return method

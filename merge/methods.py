"""The methods of `merge` by name: what each needs, which options it takes, and what it gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..base.architecture import State, full_state
from ..base.batches import Data
from ..base.errors import ArchitectureError, DataError, nearest
from ..base.evaluation import Measure
from .averages.fisher import fisher_merge
from .averages.least_squares import least_squares_merge
from .averages.mean import mean
from .averages.reading import LayerMerge
from .averages.regmean import regmean_merge
from .averages.soups import greedy_soup
from .states import rebuilt
from .task_vectors import dare, slerp, task_arithmetic, ties
from .zipping import zip_networks

if TYPE_CHECKING:
    from ..align import Symmetry

# What `merge` itself hands to a method, so that none of it is an option.
TAKEN = {"weights", "seed", "loss", "metric", "device", "progress", "data", "base", "statistics"}


@dataclass(frozen=True)
class Task:
    """Networks in one order of units, and what is known of them.

    Attributes:
        models: The networks, aligned; none is to be changed.
        shares: One for each, adding up to one.
        bases: The parent of each, or one common to all, in the same order of units; empty: none was given.
        data: What the method works on; None: none.
        loss: Function (outputs, targets) → mean over the batch; cross entropy by default.
        metric: A second one.
        seed: Of all random choices.
        device: Where to compute; that of each network by default.
        options: Further arguments of the method.
        repair: How the result is to be repaired; only for methods that do it themselves.
        symmetry: Of the networks; None: not known.
    """

    models: Sequence[nn.Module]
    shares: list[float]
    bases: Sequence[nn.Module] = ()
    data: Data | None = None
    loss: Measure | None = None
    metric: Measure | None = None
    seed: int = 0
    device: torch.device | str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    repair: str | None = None
    symmetry: Symmetry | None = None

    @property
    def states(self) -> list[dict[str, Tensor]]:
        """Parameters and buffers of each network by name."""
        return [full_state(model) for model in self.models]


@dataclass(frozen=True)
class Outcome:
    """What a method gives.

    Attributes:
        model: A new network.
        report: What is to be said of it.
        chosen: Which of the networks are in it; None: all.
    """

    model: nn.Module
    report: dict[str, Any] = field(default_factory=dict)
    chosen: Sequence[int] | None = None


@dataclass(frozen=True)
class Method:
    """A method of merging.

    Attributes:
        run: Does it.
        function: Whose keyword arguments are the options.
        needs: "" (parameters only), "data" (inputs), or "labels" (inputs and labels).
        base: Whether it needs the common parent.
        least: How many networks it needs.
        most: How many it can take; None: any number.
        aligned: Whether the networks must have their units in one order.
        on_states: Whether `function` merges state dicts, without modules.
        repairs: Whether it repairs the result itself, as the result is not in the order of its parents.
        without: Keyword arguments that are no options.
    """

    run: Callable[[Task], Outcome]
    function: Callable[..., Any]
    needs: str = ""
    base: bool = False
    least: int = 2
    most: int | None = None
    aligned: bool = True
    on_states: bool = False
    repairs: bool = False
    without: tuple[str, ...] = ()

    @property
    def options(self) -> list[str]:
        """Names of the keyword arguments that belong to this method alone."""
        parameters = inspect.signature(self.function).parameters.values()
        taken = TAKEN | set(self.without)
        return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in taken]

    @property
    def weighted(self) -> bool:
        """Whether some networks can weigh more than others."""
        return "weights" in inspect.signature(self.function).parameters


def combined(
    method: Method,
    states: Sequence[State],
    *,
    options: Mapping[str, Any],
    weights: Sequence[float] | None = None,
    base: Sequence[State] = (),
    seed: int = 0,
    statistics: set[str] | None = None,
) -> dict[str, Tensor]:
    """Merge state dicts by a method that needs nothing else."""
    given = {"weights": weights, "base": base, "seed": seed, "statistics": statistics}
    known = inspect.signature(method.function).parameters
    return method.function(states, **{name: value for name, value in given.items() if name in known}, **options)


def rehearse(method: Method, names: Sequence[str], count: int, options: Mapping[str, Any]) -> None:
    """Run a method on tensors of one entry, so that its options are refused before there is any work.

    Args:
        method: The method; one that needs more than state dicts is left alone.
        names: Of the tensors of a network.
        count: How many networks there are.
        options: Of the method.

    Raises:
        DataError: An option does not fit.
    """
    if method.on_states:
        blank = [{name: torch.zeros(1) for name in names} for _ in range(count)]
        combined(method, blank, options=options, base=blank[:1])


def _on_states(function: Callable[..., dict[str, Tensor]], base: bool = False, **facts: Any) -> Method:
    def run(task: Task) -> Outcome:
        first = task.models[0]
        # A buffer is no weight: what is true of the sum of two variances is not true of their differences.
        buffers = {name for name, _ in first.named_buffers(remove_duplicate=False)}
        bases = [full_state(parent) for parent in task.bases]
        settings = {"weights": task.shares, "base": bases, "seed": task.seed, "statistics": buffers}
        state = combined(method, task.states, options=task.options, **settings)
        return Outcome(rebuilt(first, state))

    method = Method(run, function, base=base, on_states=True, **facts)
    return method


def _greedy_soup(task: Task) -> Outcome:
    assert task.data is not None
    measures = {"loss": task.loss, "metric": task.metric}
    soup = greedy_soup(task.models, task.data, weights=task.shares, device=task.device, **measures, **task.options)
    return Outcome(soup.model, soup.report(), soup.chosen)


def _layer_by_layer(function: Callable[..., LayerMerge]) -> Method:
    def run(task: Task) -> Outcome:
        settings = {"weights": task.shares, "seed": task.seed, "device": task.device}
        found = function(task.models, task.data, **settings, **task.options)
        return Outcome(rebuilt(task.models[0], found.state), found.report())

    return Method(run, function, "data")


def _fisher(task: Task) -> Outcome:
    settings = {"weights": task.shares, "seed": task.seed, "device": task.device}
    return Outcome(rebuilt(task.models[0], fisher_merge(task.models, task.data, **settings, **task.options)))


def _zip(task: Task) -> Outcome:
    assert task.data is not None
    settings = {"repair": task.repair, "symmetry": task.symmetry, "device": task.device}
    zipped = zip_networks(task.models, task.data, **settings, **task.options)
    return Outcome(zipped.heads[0], {"groups": [asdict(group) for group in zipped.groups]})


METHODS: dict[str, Method] = {
    "mean": _on_states(mean),
    "greedy_soup": Method(_greedy_soup, greedy_soup, "labels"),
    "fisher": Method(_fisher, fisher_merge, "data"),
    "regmean": _layer_by_layer(regmean_merge),
    "least_squares": _layer_by_layer(least_squares_merge),
    "zip": Method(
        _zip,
        zip_networks,
        "data",
        aligned=False,
        repairs=True,
        without=("upto", "classes", "repair", "symmetry"),
    ),
    "task_arithmetic": _on_states(task_arithmetic, base=True, least=1),
    "ties": _on_states(ties, base=True, least=1),
    "dare": _on_states(dare, base=True, least=1),
    "slerp": _on_states(slerp, most=2),
}


def method_of(name: str, data: object, base: object, options: Mapping[str, Any], count: int = 2) -> Method:
    """Find a method, and refuse what it cannot do with what it was given.

    Args:
        name: Of the method.
        data: What it is to work on; None: nothing.
        base: The parent or parents; None: none.
        options: Further arguments of the method.
        count: The number of networks.

    Raises:
        ArchitectureError: There are too few networks.
        DataError: It is unknown, needs data or the common parent, takes fewer networks, or does not know an option.
    """
    if name not in METHODS:
        raise DataError(f"method {name!r} is unknown{nearest(name, METHODS)}; choose {', '.join(map(repr, METHODS))}")
    method = METHODS[name]
    if data is None and method.needs and "own_data" not in options:
        kind = "batches of inputs" if method.needs == "data" else "batches (inputs, labels)"
        raise DataError(f"method {name!r} needs data: pass {kind}")
    if base is None and method.base:
        raise DataError(f"method {name!r} works on what was added to a common parent; pass base=")
    if count < method.least:
        needed = "two networks" if method.least == 2 else "a network"
        raise ArchitectureError(f"merging needs {needed} or more, and there are {count}; pass a list of networks")
    if method.most is not None and count > method.most:
        raise DataError(f"method {name!r} takes {method.most} networks, and there are {count}; use method='mean'")
    for option in options:
        if option not in method.options:
            known = f"it takes {', '.join(method.options)}" if method.options else "it takes none"
            raise DataError(f"method {name!r} has no option {option!r}{nearest(option, method.options)}; {known}")
    return method

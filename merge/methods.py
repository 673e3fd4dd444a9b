"""The methods of `merge` by name: what each needs, which options it takes, and what it gives."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..base.architecture import State, full_state
from ..base.batches import Data
from ..base.errors import DataError, nearest
from ..base.evaluation import Measure
from ..base.interpolation import weighted_mean


@dataclass(frozen=True)
class Task:
    """Networks in one order of units, and what is known of them.

    Attributes:
        models: The networks, aligned; none is to be changed.
        shares: One for each, adding up to one.
        base: Their common parent; None: none was given.
        data: As the user gave it; None: none.
        loss: Function (outputs, targets) → mean over the batch; cross entropy by default.
        metric: A second one.
        seed: Of all random choices.
        device: Where to compute; that of each network by default.
        options: Further arguments of the method.
    """

    models: Sequence[nn.Module]
    shares: list[float]
    base: nn.Module | None = None
    data: Data | None = None
    loss: Measure | None = None
    metric: Measure | None = None
    seed: int = 0
    device: torch.device | str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def states(self) -> list[dict[str, torch.Tensor]]:
        """Parameters and buffers of each network by name."""
        return [full_state(model) for model in self.models]


@dataclass(frozen=True)
class Outcome:
    """What a method gives: a new network, and what is to be said of it in the report."""

    model: nn.Module
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A method of merging.

    Attributes:
        run: Does it.
        function: Whose keyword arguments are the options.
        needs: "" (parameters only), "data" (inputs), or "labels" (inputs and labels).
        base: Whether it needs the common parent.
        also: Further options, which are not keyword arguments of the function.
    """

    run: Callable[[Task], Outcome]
    function: Callable[..., Any]
    needs: str = ""
    base: bool = False
    also: tuple[str, ...] = ()

    @property
    def options(self) -> list[str]:
        """Names of the keyword arguments that belong to this method alone."""
        taken = {"weights", "seed", "loss", "metric", "device", "progress", "data", "base"}
        parameters = inspect.signature(self.function).parameters.values()
        return [*self.also, *(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in taken)]


def rebuilt(model: nn.Module, state: State) -> nn.Module:
    """Copy a network and fill the copy with other parameters and buffers."""
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for name, place in full_state(merged).items():
            place.copy_(state[name])
    return merged


def _mean(task: Task) -> Outcome:
    return Outcome(rebuilt(task.models[0], weighted_mean(task.states, task.shares)))


METHODS: dict[str, Method] = {"mean": Method(_mean, weighted_mean)}


def method_of(name: str, data: Data | None, base: object, options: Mapping[str, Any]) -> Method:
    """Find a method, and refuse what it cannot do with what it was given.

    Raises:
        DataError: It is unknown, needs data or the common parent, or does not know an option.
    """
    if name not in METHODS:
        raise DataError(f"method {name!r} is unknown{nearest(name, METHODS)}; choose {', '.join(map(repr, METHODS))}")
    method = METHODS[name]
    if data is None and method.needs:
        kind = "batches of inputs" if method.needs == "data" else "batches (inputs, labels)"
        raise DataError(f"method {name!r} needs data: pass {kind}")
    if base is None and method.base:
        raise DataError(f"method {name!r} works on what was added to a common parent; pass base=")
    for option in options:
        if option not in method.options:
            known = f"it takes {', '.join(method.options)}" if method.options else "it takes none"
            raise DataError(f"method {name!r} has no option {option!r}{nearest(option, method.options)}; {known}")
    return method

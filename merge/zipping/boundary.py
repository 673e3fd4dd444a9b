"""The boundary of partial zipping: which modules run before a layer has run, and which after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ...align import Symmetry
from ...align.terms import Term
from ...base.architecture import full_state
from ...base.batches import Batch
from ...base.errors import ArchitectureError, LayerNotFoundError, nearest
from ...base.running import evaluating


@dataclass(frozen=True)
class Boundary:
    """What of a network is merged, and what each task keeps.

    Attributes:
        upto: The last layer that is merged; None: all are.
        trunk: Names of the parameters and buffers that are merged.
        shared: Modules that hold nothing else: the largest such.
        called: Modules that have run when `upto` has: the largest such.
        output: What the axes of `upto`'s output are made of, by axis, as far as it is known.
    """

    upto: str | None
    trunk: frozenset[str]
    shared: tuple[str, ...]
    called: tuple[str, ...]
    output: Mapping[int, Term]


def boundary(model: nn.Module, upto: str | None, symmetry: Symmetry, batch: Batch) -> Boundary:
    """Run a network once and see what comes before the end of a layer.

    Args:
        model: The network.
        upto: Name of the last layer before the boundary; None: all is before it.
        symmetry: Of the network.
        batch: Inputs.

    Raises:
        LayerNotFoundError: There is no such layer, or it does not run.
        ArchitectureError: The layer runs twice, or a module or a parameter is used on both sides.
    """
    names = frozenset(full_state(model))
    if upto is None:
        return Boundary(None, names, ("",), (), {})
    modules = dict(model.named_modules(remove_duplicate=False))
    if upto not in modules or not upto:
        raise LayerNotFoundError(
            f"upto={upto!r} is no layer of {type(model).__name__}{nearest(upto, list(modules)[1:])}"
        )
    run = _Run.of(model, modules, upto, batch, symmetry)
    trunk = frozenset(name for name in names if run.before(name))
    _check_ties(model, trunk, upto)
    if not trunk:
        raise ArchitectureError(f"no parameter is used before the end of {upto}: there is nothing to merge")

    def holds(prefix: str) -> bool:
        if not prefix or upto.startswith(f"{prefix}."):
            return False  # what holds the last layer may put something behind it
        own = [name for name in names if name.startswith(f"{prefix}.")]
        return bool(own) and all(name in trunk for name in own)

    shared = tuple(_largest(model, holds))
    called = tuple(_largest(model, lambda name: run.sides.get(id(modules[name])) == "before"))
    return Boundary(upto, trunk, shared, called, run.output)


@dataclass
class _Run:
    """One forward pass, seen from the end of a layer.

    Attributes:
        sides: By a module's id whether it ran "before" the layer's end, "after" it, or "across".
        modules: By name.
        upto: The layer.
        output: What the axes of its output are made of.
    """

    sides: dict[int, str]
    modules: Mapping[str, nn.Module]
    upto: str
    output: dict[int, Term]

    @classmethod
    def of(
        cls, model: nn.Module, modules: Mapping[str, nn.Module], upto: str, batch: Batch, symmetry: Symmetry
    ) -> _Run:
        events: list[tuple[str, int]] = []
        entered: list[tuple[nn.Module, Tensor]] = []
        left: list[Any] = []

        def start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            events.append(("start", id(module)))
            entered.extend((module, value) for value in (*args, *kwargs.values())[:1] if isinstance(value, Tensor))

        def end(module: nn.Module, _args: Any, output: Any) -> None:
            events.append(("end", id(module)))
            if module is modules[upto]:
                left.append(output)

        with evaluating(model), torch.no_grad(), ExitStack() as hooks:
            for module in model.modules():
                hooks.callback(module.register_forward_pre_hook(start, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(end).remove)
            batch.call(model)
        if len(left) != 1:
            calls = f"runs {len(left)} times" if left else "does not run"
            error = ArchitectureError if left else LayerNotFoundError
            raise error(f"upto={upto!r} {calls} in a forward pass; name a layer that runs once")
        place = events.index(("end", id(modules[upto])))
        ran = {id(module): _side(events, id(module), place) for module in model.modules()}
        sides = {key: side for key, side in ran.items() if side}
        return cls(sides, modules, upto, _output(model, upto, left[0], entered, symmetry))

    def before(self, name: str) -> bool:
        """Tell on which side a tensor is used: that of its module, or of what holds it if that never runs itself."""
        owner = name.rpartition(".")[0]
        while owner and id(self.modules[owner]) not in self.sides:
            owner = owner.rpartition(".")[0]
        side = self.sides.get(id(self.modules[owner]))
        if side == "across":
            what = f"module {owner!r}" if owner else "the network itself"
            raise ArchitectureError(
                f"{name} belongs to {what}, which runs before and after the end of {self.upto}: name a layer "
                "after or before it"
            )
        return side == "before"


def _side(events: list[tuple[str, int]], module: int, place: int) -> str | None:
    places = [at for at, (_, other) in enumerate(events) if other == module]
    if not places:
        return None
    if places[-1] <= place:
        return "before"
    return "after" if places[0] > place else "across"


def _output(
    model: nn.Module, upto: str, output: Any, entered: list[tuple[nn.Module, Tensor]], symmetry: Symmetry
) -> dict[int, Term]:
    """Find the axes of a layer's output: as a later module reads that very tensor, or by the layer's own kind."""
    if not isinstance(output, Tensor):
        return {}
    readers = {id(module) for module, value in entered if value is output}
    for point in symmetry.points:
        if point.side == "input" and point.call == 1 and id(model.get_submodule(point.module)) in readers:
            return {point.axis % output.ndim: point.term}
    module = model.get_submodule(upto)
    weight = symmetry.layout.get(f"{upto}.weight")
    if isinstance(module, (nn.Linear, nn.Embedding)) and weight:
        return {output.ndim - 1: weight[0 if isinstance(module, nn.Linear) else 1]}
    if isinstance(module, (_ConvNd, _NormBase)) and weight:
        return {1: weight[1 if getattr(module, "transposed", False) else 0]}
    return {}


def _largest(model: nn.Module, wanted: Callable[[str], bool], prefix: str = "") -> Iterator[str]:
    if wanted(prefix):
        yield prefix
        return
    for name, _ in model.get_submodule(prefix).named_children():
        yield from _largest(model, wanted, f"{prefix}.{name}" if prefix else name)


def _check_ties(model: nn.Module, trunk: frozenset[str], upto: str) -> None:
    sides: dict[int, tuple[str, bool]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first, before = sides.setdefault(id(parameter), (name, name in trunk))
        if before != (name in trunk):
            raise ArchitectureError(
                f"{first} and {name} are one parameter, which is used before and after the end of {upto}: "
                "name a layer after or before both"
            )

"""Tracing: each ATen operator that a network runs is looked up in `RULES`, which says what it demands of the axes.

One without a rule pins every axis that it touches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ..base.errors import SymmetryError
from .constants import Constants
from .deferred import Copies, Padded, settled, standing
from .depend import admit
from .unknown import Reason, Unknown, fixed, pin, unknowns

Axes = list[Any]

RULES: dict[str, Callable[[Call], Any]] = {}
ENTRIES: dict[str, str] = {}
ALONG: set[str] = set()


class NoRuleError(Exception):
    """A rule does not cover this form of its operator; everything that it touches is then pinned."""


def rule(
    *operators: str, entries: str = "", along: bool = False
) -> Callable[[Callable[[Call], Any]], Callable[[Call], Any]]:
    """Register the rule of some ATen operators, by name without overload; `add` serves `add_` as well.

    Args:
        operators: Their names.
        entries: What becomes of integers that are positions on an axis, such as those of `topk`: "" the operator
            computes with them, so that the axis must keep its order; "kept" it moves them; "used" the rule looks at
            them itself, through `Call.positions`.
        along: Each unit of the result comes from the same unit of the inputs alone, so that nothing else depends on it.

    The rule receives a `Call`, equates, splits or pins the axes of its inputs, and returns the axes of the output:
    a list of terms, or a tuple of such lists for several outputs; outputs without one are pinned throughout. It may
    raise `NoRuleError` for a form that it does not cover.
    """

    def register(function: Callable[[Call], Any]) -> Callable[[Call], Any]:
        for operator in operators:
            assert operator not in RULES, f"two rules for {operator}"
            RULES[operator] = function
            ENTRIES[operator] = entries
            if along or entries == "kept":
                ALONG.add(operator)
        return function

    return register


@dataclass
class Call:
    """One dispatched operator: its arguments by the names of its schema, its result, and where it stands."""

    operator: str
    arguments: dict[str, Any]
    result: Any
    tracer: Tracer
    where: str
    reason: Reason

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def axes(self, tensor: Tensor) -> Axes:
        """Give the terms of a tensor's axes."""
        return self.tracer.axes(tensor)

    def raw(self, tensor: Tensor) -> Axes:
        """Give a tensor's axes with factors on trial as they are (see `deferred`), to be moved and handed on."""
        return list(self.tracer.raw(tensor))

    def positions(self, tensor: Tensor) -> Any:
        """Give the axis on which a tensor's entries are positions; None: its entries are numbers."""
        return self.tracer.positions.get(id(tensor), (None, None))[1]

    def point(self, tensor: Tensor, term: Any) -> None:
        """State that a result's entries are positions on an axis."""
        self.tracer.positions[id(tensor)] = (tensor, term)

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter or a buffer that has been moved at most."""
        return id(tensor) in self.tracer.weights

    def fixed(self, size: int) -> Any:
        """Make an axis of positions that mean something to this operator."""
        return fixed(size, self.position)

    def pin(self, term: Any) -> None:
        """Pin an axis whose positions mean something to this operator."""
        pin(term, self.position)

    @property
    def position(self) -> Reason:
        """Why an axis whose positions mean something to this operator keeps its order."""
        return Reason("position", self.operator, f"its positions have a meaning for {self.operator}{self.where}")


@dataclass
class Step:
    """One operator that ran.

    Attributes:
        read: Storages that it read.
        written: Storages that it wrote.
        sure: Terms that it computed with.
        rest: Terms that it computed with unless they are handed on to its results: outputs of weights, or any where a
            unit comes from the same unit alone.
        made: Its results.
    """

    read: set[int]
    written: set[int]
    sure: list[Any]
    rest: list[Any]
    made: list[Tensor]


def _stores(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors if not tensor.is_sparse}


class Tracer(TorchDispatchMode):
    """Follows the axes of tensors through the operators that are dispatched while it is active."""

    supports_higher_order_operators = True  # they are handed on, to be refused by name

    def __init__(self) -> None:
        super().__init__()
        self.terms: dict[int, tuple[Tensor, Axes]] = {}  # the tensor is kept, so that its id stays its own
        self.weights: set[int] = set()  # parameters and buffers, whole or moved
        self.positions: dict[int, tuple[Tensor, Any]] = {}
        self.heads: list[Any] = []
        self.constants = Constants()
        self.modules: list[str] = []
        self.unruled: dict[str, list[str]] = {}
        self.steps: list[Step] = []
        self.operator = ""  # the last that was dispatched

    @property
    def place(self) -> str:
        """Path of the module that is running."""
        return self.modules[-1] if self.modules else ""

    def axes(self, tensor: Tensor) -> Axes:
        """Give the terms of a tensor's axes; those of one never seen are fixed."""
        return settled(self.raw(tensor))

    def raw(self, tensor: Tensor) -> Axes:
        """Give a tensor's axes, factors on trial as they are."""
        if id(tensor) not in self.terms:
            reason = Reason("operator", "constant", f"a tensor in {self.place or 'forward'} that is no parameter")
            self.assign(tensor, [fixed(size, reason) for size in tensor.shape])
        return self.terms[id(tensor)][1]

    def assign(self, tensor: Tensor, axes: Axes) -> None:
        """Set the terms of a tensor's axes."""
        assert len(axes) == tensor.ndim, f"{len(axes)} terms for a tensor of shape {tuple(tensor.shape)}"
        self.terms[id(tensor)] = (tensor, axes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            raise SymmetryError(
                f"{func.name()} in {self.place or 'forward'} runs functions of its own, which cannot be followed here; "
                "tracer='export' takes some of them apart"
            )
        packet = self.operator = func._schema.name.removeprefix("aten::")
        if packet == "_local_scalar_dense" and (known := self.constants.value(args[0])) is not None:
            with _disable_current_modes():
                return known.item()
        result = func(*args, **kwargs)
        self.constants.follow(func, args, kwargs, result)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if outputs or func._schema.is_mutable:  # else it was a question about shape, type or device
            self._follow(func, packet, args, kwargs, result, outputs)
        return result

    def _follow(
        self, func: Any, packet: str, args: Sequence[Any], kwargs: dict[str, Any], result: Any, outputs: list[Tensor]
    ) -> None:
        """Let an operator's rule say what it demands."""
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        where = f" in {self.place or 'forward'}"
        name = packet if packet in RULES else packet.removesuffix("_")
        known = name in RULES and not any(tensor.is_sparse for tensor in inputs + outputs)
        self._note(func, args, inputs, outputs, name if known else "")
        if not known:
            self.pin_all(packet, where, inputs, outputs)
            return
        names = [argument.name for argument in func._schema.arguments]
        reason = Reason("operator", packet, f"{packet}{where} combines axes whose blocks do not fit")
        call = Call(packet, {**dict(zip(names, args, strict=False)), **kwargs}, result, self, where, reason)
        self._settle_positions(call, ENTRIES[name], inputs, outputs)
        try:
            self._assign_outputs(call, outputs, RULES[name](call))
        except NoRuleError:
            self.pin_all(packet, where, inputs, outputs)
        admit(standing(self.raw(tensor)) for tensor in itertools.chain(inputs, outputs))

    def _note(self, func: Any, args: Sequence[Any], inputs: list[Tensor], outputs: list[Tensor], name: str) -> None:
        """Remember a step, for `used`; what is written to is settled, as it will vary along every axis."""
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor)
        ]
        for tensor in written:
            for axis in self.raw(tensor):
                if isinstance(axis, (Copies, Padded)):
                    axis.settle()
        moved = ENTRIES.get(name) == "kept"
        if moved and all(id(tensor) in self.weights for tensor in inputs):
            self.weights.update(map(id, outputs))
        sure, rest = [], []
        for tensor in [] if moved else inputs:
            (rest if name in ALONG or id(tensor) in self.weights else sure).extend(standing(self.raw(tensor)))
        self.steps.append(Step(_stores(inputs), _stores([*outputs, *written]), sure, rest, outputs))

    def used(self, results: Sequence[Tensor]) -> set[Unknown]:
        """Collect the units on which the results depend; others are cut off before anything is made of them."""
        live = _stores(results)
        found = unknowns(itertools.chain.from_iterable(map(self.axes, results)))
        for step in reversed(self.steps):
            if step.written & live:
                live |= step.read
                found |= unknowns(step.sure)
                found |= unknowns(step.rest) - unknowns(term for t in step.made for term in standing(self.raw(t)))
        return found

    def _settle_positions(self, call: Call, entries: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if entries == "used":
            return
        for term in [call.positions(tensor) for tensor in inputs]:
            if term is not None and entries == "kept" and not any(t.is_floating_point() for t in outputs):
                for tensor in outputs:
                    call.point(tensor, term)
            elif term is not None:
                call.pin(term)

    def _assign_outputs(self, call: Call, outputs: list[Tensor], axes: Any) -> None:
        several = axes if isinstance(axes, tuple) else (axes,)
        for tensor, found in zip(outputs, several, strict=False):
            self.assign(tensor, list(found))
        for tensor in outputs[len(several) :]:
            self.assign(tensor, [call.fixed(size) for size in tensor.shape])

    def pin_tensor(self, tensor: Tensor, reason: Reason) -> None:
        """Pin every axis of a tensor, and the one on which its entries are positions."""
        for term in [*self.axes(tensor), *self.positions.get(id(tensor), ())[1:]]:
            pin(term, reason)

    def pin_all(self, operator: str, where: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Pin what an operator touches of which no rule says what it does."""
        reason = Reason("operator", operator, f"no rule for {operator}{where}")
        if inputs:
            self.unruled.setdefault(operator, []).append(self.place)
        for tensor in inputs:
            self.pin_tensor(tensor, reason)
        for tensor in outputs:
            self.assign(tensor, [fixed(size, reason) for size in tensor.shape])

"""Tracing: each ATen operator that a network runs is looked up in `RULES`, which says what it demands of the axes.

One without a rule pins every axis that it touches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .unify import Reason, admit, fixed, pin

Axes = list[Any]

RULES: dict[str, Callable[[Call], Any]] = {}


class NoRuleError(Exception):
    """A rule does not cover this form of its operator; everything that it touches is then pinned."""


def rule(*operators: str) -> Callable[[Callable[[Call], Any]], Callable[[Call], Any]]:
    """Register the rule of some ATen operators, by name without overload; `add` serves `add_` as well.

    The rule receives a `Call`, equates, splits or pins the axes of its inputs, and returns the axes of the output:
    a list of terms, or a tuple of such lists for several outputs; outputs without one are pinned throughout. It may
    raise `NoRuleError` for a form that it does not cover.
    """

    def register(function: Callable[[Call], Any]) -> Callable[[Call], Any]:
        for operator in operators:
            assert operator not in RULES, f"two rules for {operator}"
            RULES[operator] = function
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

    def fixed(self, size: int) -> Any:
        """Make an axis of positions that mean something to this operator."""
        return fixed(size, self._position)

    def pin(self, term: Any) -> None:
        """Pin an axis whose positions mean something to this operator."""
        pin(term, self._position)

    @property
    def _position(self) -> Reason:
        return Reason("position", self.operator, f"its positions have a meaning for {self.operator}{self.where}")


class Tracer(TorchDispatchMode):
    """Follows the axes of tensors through the operators that are dispatched while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.terms: dict[int, tuple[Tensor, Axes]] = {}  # the tensor is kept, so that its id stays its own
        self.modules: list[str] = []
        self.unruled: dict[str, list[str]] = {}
        self.touched: set[int] = set()
        self.operator = ""  # the last that was dispatched

    @property
    def place(self) -> str:
        """Path of the module that is running."""
        return self.modules[-1] if self.modules else ""

    def axes(self, tensor: Tensor) -> Axes:
        """Give the terms of a tensor's axes; those of one never seen are fixed."""
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
        packet = self.operator = func._schema.name.removeprefix("aten::")
        result = func(*args, **kwargs)
        where = f" in {self.place or 'forward'}"
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not outputs and not func._schema.is_mutable:  # a question about shape, type or device
            return result
        self.touched.update(map(id, inputs))
        found = RULES.get(packet) or RULES.get(packet.removesuffix("_"))
        if found is None or any(tensor.is_sparse for tensor in inputs + outputs):
            self._pin_all(packet, where, inputs, outputs)
            return result
        names = [argument.name for argument in func._schema.arguments]
        call = Call(
            packet,
            {**dict(zip(names, args, strict=False)), **kwargs},
            result,
            self,
            where,
            Reason("operator", packet, f"{packet}{where} combines axes whose blocks do not fit"),
        )
        try:
            self._assign_outputs(call, outputs, found(call))
        except NoRuleError:
            self._pin_all(packet, where, inputs, outputs)
        admit(self.axes(tensor) for tensor in itertools.chain(inputs, outputs))
        return result

    def _assign_outputs(self, call: Call, outputs: list[Tensor], axes: Any) -> None:
        several = axes if isinstance(axes, tuple) else (axes,)
        for tensor, found in zip(outputs, several, strict=False):
            self.assign(tensor, list(found))
        for tensor in outputs[len(several) :]:
            self.assign(tensor, [call.fixed(size) for size in tensor.shape])

    def _pin_all(self, operator: str, where: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        reason = Reason("operator", operator, f"no rule for {operator}{where}")
        if inputs:
            self.unruled.setdefault(operator, []).append(self.place)
        for tensor in inputs:
            for term in self.axes(tensor):
                pin(term, reason)
        for tensor in outputs:
            self.assign(tensor, [fixed(size, reason) for size in tensor.shape])

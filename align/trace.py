"""Tracing: one run of a network under fake tensors, in which every operator says what it demands of the axes.

The tensors carry shapes and no data, so that the run costs neither memory nor arithmetic. Each ATen operator that
is dispatched is looked up in `RULES`; one without a rule pins every axis that it touches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..base.batches import Batch
from ..base.errors import SymmetryError
from ..base.running import evaluating
from .unify import Reason, Unknown, admit, fixed, pin

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


@dataclass
class Recorded:
    """A tensor that entered or left a module, by the axes that it had."""

    module: str
    call: int
    side: str  # "input" or "output"
    axes: Axes


@dataclass
class Traced:
    """What a run has shown: the terms of every parameter's and buffer's axes, and of what passed the modules."""

    parameters: dict[str, Axes]
    recorded: list[Recorded]
    unruled: dict[str, list[str]] = field(default_factory=dict)


class Tracer(TorchDispatchMode):
    """Follows the axes of tensors through the operators that are dispatched while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.terms: dict[int, tuple[Tensor, Axes]] = {}  # the tensor is kept, so that its id stays its own
        self.modules: list[str] = []
        self.unruled: dict[str, list[str]] = {}
        self.touched: set[int] = set()

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
        result = func(*args, **kwargs)
        packet = func._schema.name.removeprefix("aten::")
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


@torch.inference_mode(False)  # in which composite operators would not be taken apart
def trace(model: nn.Module, batch: Batch) -> Traced:
    """Run a model once under fake tensors, in evaluation mode, and follow its axes.

    Args:
        model: Any module; it is not changed.
        batch: Example inputs; only shapes, types and devices matter.

    Raises:
        SymmetryError: The model's course depends on data, or it cannot run on these inputs.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    tracer = Tracer()
    recorded: list[Recorded] = []
    converted: dict[int, Tensor] = {}
    sources = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for tensor in sources.values():
        if id(tensor) not in converted:
            converted[id(tensor)] = fake.from_tensor(tensor.detach())
            tracer.assign(converted[id(tensor)], [Unknown(n) if n > 1 else fixed(1, _UNUSED) for n in tensor.shape])
    fakes = {name: converted[id(tensor)] for name, tensor in sources.items()}
    inputs = _fake_inputs(batch, fake, tracer)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(_recording(model, tracer, recorded))
        stack.enter_context(torch.no_grad())
        stack.enter_context(fake)
        stack.enter_context(tracer)
        output = _call(model, fakes, inputs, tracer)
    for tensor in tree_leaves(_plain(output)):
        if isinstance(tensor, Tensor):
            for term in tracer.axes(tensor):
                pin(term, Reason("output", "output", "the network's output keeps its order"))
    for tensor in converted.values():
        if id(tensor) not in tracer.touched:
            for term in tracer.axes(tensor):
                pin(term, _UNUSED)
    parameters = {name: tracer.axes(tensor) for name, tensor in fakes.items()}
    admit(parameters.values())
    return Traced(parameters, recorded, tracer.unruled)


_UNUSED = Reason("unused", "unused", "no operator of this forward pass uses it")
_INPUT = Reason("input", "input", "the network's input keeps its order")


def _fake_inputs(batch: Batch, fake: FakeTensorMode, tracer: Tracer) -> Batch:
    def convert(tensor: Tensor) -> Tensor:
        converted = fake.from_tensor(tensor.detach())
        tracer.assign(converted, [fixed(size, _INPUT) for size in tensor.shape])
        return converted

    args, kwargs = tree_map_only(Tensor, convert, (batch.args, dict(batch.kwargs)))
    return Batch(args, kwargs)


def _call(model: nn.Module, fakes: Mapping[str, Tensor], inputs: Batch, tracer: Tracer) -> Any:
    try:
        return torch.func.functional_call(model, dict(fakes), inputs.args, dict(inputs.kwargs))
    except Exception as error:
        place = f"module {tracer.place!r}" if tracer.place else "the model's forward"
        kind = type(error).__name__
        if "DataDependent" in kind or "item()" in str(error):
            why = "its course depends on the values of tensors (.item(), bool(tensor), nonzero)"
        else:
            why = f"{kind}: {str(error).splitlines()[0] if str(error) else ''}"
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs.tensors())
        raise SymmetryError(
            f"{type(model).__name__} could not be traced on inputs of shape {shapes}: in {place}, {why}. "
            "Check that model(*example_inputs) runs"
        ) from error


def _plain(output: Any) -> Any:
    """Open mappings that pytree does not know, such as the outputs of transformers."""
    if isinstance(output, Mapping):
        return {key: _plain(value) for key, value in output.items()}
    if isinstance(output, (tuple, list)):
        return [_plain(value) for value in output]
    return output


@contextmanager
def _recording(model: nn.Module, tracer: Tracer, recorded: list[Recorded]) -> Iterator[None]:
    calls: dict[str, int] = {}
    handles = []

    def before(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tracer.modules.append(name)
            calls[name] = calls.get(name, 0) + 1
            note(name, "input", [*args, *kwargs.values()])

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tracer.modules.pop()
            note(name, "output", [output])

        return hook

    def note(name: str, side: str, values: Sequence[Any]) -> None:
        tensor = next((value for value in values if isinstance(value, Tensor)), None)
        if tensor is not None:
            recorded.append(Recorded(name, calls[name], side, tracer.axes(tensor)))

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""One run of a network under fake tensors, in which every operator says what it demands of the axes.

The tensors carry shapes and no data, so that the run costs neither memory nor arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from ..base.batches import Batch
from ..base.errors import IsthmusError, SymmetryError
from ..base.running import evaluating
from .depend import admit
from .outputs import Outputs, chosen
from .plain import plain_forward, sharing_copy
from .trace import Axes, Tracer
from .unknown import Reason, Unknown, fixed, pin, unknowns


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
    heads: list[Any] = field(default_factory=list)  # axes of attention over which the heads are counted


Runner = Callable[[nn.Module, Mapping[str, Tensor], Batch, Tracer], Any]
"""Runs a model on the given parameters and inputs while the tracer is active, and returns its output."""


@torch.inference_mode(False)  # in which composite operators would not be taken apart
def follow(
    model: nn.Module, examples: Sequence[Batch], *, outputs: Outputs = None, runner: Runner | None = None
) -> Traced:
    """Run a model under fake tensors, in evaluation mode, once for each example, and follow its axes.

    Args:
        model: Any module; it is not changed, whatever its forward pass stores in it.
        examples: Example inputs; only shapes, types and devices matter. What each demands holds together.
        outputs: Which of the outputs must stay as they are; see `chosen`.
        runner: Runs the model; None calls it.

    Raises:
        SymmetryError: The model's course depends on data, or it cannot run on these inputs.
    """
    model = sharing_copy(model)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    tracer = Tracer()
    recorded: list[Recorded] = []
    results: list[Tensor] = []
    fakes = _fake_state(model, fake, tracer)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(plain_forward(model))
        stack.enter_context(torch.no_grad())
        for batch in examples:
            inputs = _fake_inputs(batch, fake, tracer)
            with _recording(model, tracer, recorded), fake, tracer:
                output = _call(runner or _forward, model, fakes, inputs, tracer)
            results += chosen(output, outputs)
    for tensor in results:
        tracer.pin_tensor(tensor, _OUTPUT)
    used = tracer.used(results)
    for tensor in fakes.values():  # what stands idle, serves other outputs only, or is cut off and left
        for leaf in unknowns(tracer.axes(tensor)) - used:
            pin(leaf, _UNUSED)
    parameters = {name: tracer.axes(tensor) for name, tensor in fakes.items()}
    admit(parameters.values())
    return Traced(parameters, recorded, tracer.unruled, tracer.heads)


def _fake_state(model: nn.Module, fake: FakeTensorMode, tracer: Tracer) -> dict[str, Tensor]:
    """Give every parameter and buffer a fake tensor of unknown axes; what is tied shares one."""
    sources = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    converted: dict[int, Tensor] = {}
    for tensor in sources.values():
        if id(tensor) in converted:
            continue
        converted[id(tensor)] = fake.from_tensor(tensor.detach())
        held = _held(tensor, id(tensor) in saved)
        axes = [fixed(n, held or _UNUSED) if held or n == 1 else Unknown(n) for n in tensor.shape]
        tracer.assign(converted[id(tensor)], axes)
        tracer.weights.add(id(converted[id(tensor)]))
    return {name: converted[id(tensor)] for name, tensor in sources.items()}


def _held(tensor: Tensor, saved: bool) -> Reason | None:
    """Say why a buffer cannot be permuted, whatever is done with it."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return Reason("position", "buffer", "an integer buffer: its entries stand for positions")
    if not saved:  # a permuted state dict would not carry it
        return Reason("position", "buffer", "a buffer that a state dict does not hold")
    return None


_UNUSED = Reason("unused", "unused", "the output of this forward pass does not depend on it")
_OUTPUT = Reason("output", "output", "the network's output keeps its order")
_INPUT = Reason("input", "input", "the network's input keeps its order")


def _fake_inputs(batch: Batch, fake: FakeTensorMode, tracer: Tracer) -> Batch:
    def convert(tensor: Tensor) -> Tensor:
        converted = fake.from_tensor(tensor.detach())
        tracer.assign(converted, [fixed(size, _INPUT) for size in tensor.shape])
        return converted

    args, kwargs = tree_map_only(Tensor, convert, (batch.args, dict(batch.kwargs)))
    return Batch(args, kwargs)


def _forward(model: nn.Module, fakes: Mapping[str, Tensor], inputs: Batch, tracer: Tracer) -> Any:
    del tracer
    return torch.func.functional_call(model, dict(fakes), inputs.args, dict(inputs.kwargs))


def _call(runner: Runner, model: nn.Module, fakes: Mapping[str, Tensor], inputs: Batch, tracer: Tracer) -> Any:
    try:
        return runner(model, fakes, inputs, tracer)
    except IsthmusError:
        raise
    except Exception as error:
        place = f"module {tracer.place!r}" if tracer.place else "the model's forward"
        kind = type(error).__name__
        remedy = "Check that model(*example_inputs) runs"
        if "DataDependent" in kind or "DynamicOutputShape" in kind or "item()" in str(error):
            why = "its course depends on the values of tensors (.item(), bool(tensor), nonzero, a mask as index)"
            remedy = "tracer='make_fx_real' follows the course that the example inputs take"
        else:
            why = f"{kind}: {str(error).splitlines()[0] if str(error) else ''}"
        if tracer.operator:
            why += f"; the last operator was {tracer.operator}"
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs.tensors())
        raise SymmetryError(
            f"{type(model).__name__} could not be traced on inputs of shape {shapes}: in {place}, {why}. {remedy}"
        ) from error


@contextmanager
def _recording(model: nn.Module, tracer: Tracer, recorded: list[Recorded]) -> Iterator[None]:
    calls: dict[str, int] = {}
    known = {(record.module, record.call, record.side) for record in recorded}  # from other examples
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
        if tensor is not None and (name, calls[name], side) not in known:
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

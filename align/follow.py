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
from torch.utils._pytree import tree_leaves, tree_map_only

from ..base.batches import Batch
from ..base.errors import SymmetryError
from ..base.running import evaluating
from .trace import Axes, Tracer
from .unify import Reason, Unknown, admit, fixed, pin


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


@torch.inference_mode(False)  # in which composite operators would not be taken apart
def follow(model: nn.Module, batch: Batch) -> Traced:
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

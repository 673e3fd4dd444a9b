"""Two networks run side by side: what their units do, and what comes back to them from the outputs, as moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...base.batches import Batch, model_device
from ...base.errors import DataError
from ...base.progress import progress as bar
from ...base.running import evaluating
from ...metrics import Moments, capture
from ...metrics.reading import without_fast_path
from ..outputs import Outputs, chosen
from .views import View


@dataclass(frozen=True)
class Signals:
    """Moments of the units of two networks; the layers are "a:" and "b:" followed by the key of a view.

    Attributes:
        forward: Of activations.
        backward: Of the gradients of a random projection of the outputs with respect to the same activations; None
            if they were not asked for.
    """

    forward: Moments
    backward: Moments | None = None


def record(
    looks: Sequence[View],
    model_a: nn.Module,
    model_b: nn.Module,
    data: Iterable[Batch],
    *,
    backward: bool = False,
    outputs: Outputs = None,
    seed: int = 0,
    product_dtype: torch.dtype = torch.float32,
    progress: bool | None = None,
) -> Signals:
    """Run two networks over the same data once, in evaluation mode, and keep the moments of the units in view.

    Args:
        looks: What to look at.
        model_a: The first network.
        model_b: The second, of the same architecture.
        data: Batches.
        backward: Also run backwards from the outputs. For each sample their weighted sum is differentiated, with
            normal weights that are the same for both networks and whose mean over the last axis is zero: what is added
            to all logits alike changes nothing.
        outputs: Which of the outputs count; see `align.outputs.chosen`.
        seed: Of the weights of the outputs.
        product_dtype: Precision of the products of centred signals; sums are in float64.
        progress: Show a bar; None: on a terminal.

    Raises:
        DataError: `backward`, and the outputs cannot be differentiated.
        NotFiniteError: An activation or a gradient holds NaN or infinity.
    """
    named = [(f"a:{view.key}", f"b:{view.key}") for view in looks]
    forward, back = (Moments(named, product_dtype=product_dtype) for _ in range(2))
    if not looks:
        return Signals(forward, back if backward else None)
    generator = torch.Generator().manual_seed(seed)
    device = model_device(model_a)
    with ExitStack() as stack:
        sides = [_Side(label, model, looks, stack, backward) for label, model in (("a", model_a), ("b", model_b))]
        for batch in bar(data, "matching activations", show=progress):
            draw = _draws(generator) if backward else None
            for side in sides:
                side.run(batch, draw, outputs)
            forward.update({key: found.to(device) for side in sides for key, found in side.forward()})
            if backward:
                back.update({key: found.to(device) for side in sides for key, found in side.backward()})
    return Signals(forward, back if backward else None)


class _Side:
    """One of the two networks while it is watched."""

    def __init__(self, label: str, model: nn.Module, looks: Sequence[View], stack: ExitStack, backward: bool) -> None:
        self.label, self.model, self.looks = label, model, looks
        self.device = model_device(model)
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        stack.enter_context(torch.set_grad_enabled(backward))
        stack.enter_context(evaluating(model))
        stack.enter_context(without_fast_path())
        wanted = {side: list(dict.fromkeys(v.layer for v in looks if v.side == side)) for side in ("input", "output")}
        self.activations = {
            side: stack.enter_context(capture(model, names, inputs=side == "input"))
            for side, names in wanted.items()
            if names
        }
        self.gradients: dict[tuple[str, str], Tensor] = {}
        if backward:
            stack.enter_context(_differentiable(model))
            for side, names in wanted.items():
                stack.enter_context(_gradients(model, side, names, self.gradients))

    def run(self, batch: Batch, draw: Callable[[int, Tensor], Tensor] | None, outputs: Outputs) -> None:
        self.gradients.clear()
        result = batch.to(self.device).call(self.model)
        if draw is None:
            return
        tensors = [t for t in chosen(result, outputs) if t.is_floating_point() and t.requires_grad]
        try:
            total = torch.stack([(t * draw(place, t)).sum() for place, t in enumerate(tensors)]).sum()
            torch.autograd.grad(total, [p for p in self.model.parameters() if p.requires_grad], allow_unused=True)
        except RuntimeError as error:
            why = str(error).split(";", 1)[0].split("\n", 1)[0] if tensors else "nothing leads back from its outputs"
            raise DataError(
                f"{type(self.model).__name__} cannot be differentiated, {why}: match without gradients (backward=0)"
            ) from error

    def forward(self) -> Iterator[tuple[str, Tensor]]:
        for view in self.looks:
            yield f"{self.label}:{view.key}", view.samples(self.activations[view.side][view.layer], self.parameters)

    def backward(self) -> Iterator[tuple[str, Tensor]]:
        for view in self.looks:
            activation = self.activations[view.side][view.layer]
            gradient = self.gradients.get((view.side, view.layer))
            # nothing comes back where an output does not depend on the units; and none does through a projection
            if gradient is None or view.weight is not None:
                gradient = torch.zeros_like(activation)
            yield f"{self.label}:{view.key}", view.samples(gradient, self.parameters)


def _draws(generator: torch.Generator) -> Callable[[int, Tensor], Tensor]:
    """Give weights for the outputs of a batch: drawn for the first network that asks, the same for the second."""
    drawn: dict[int, Tensor] = {}

    def draw(place: int, like: Tensor) -> Tensor:
        if place not in drawn:
            weights = torch.randn(like.shape, generator=generator)
            if weights.ndim and weights.shape[-1] > 1:
                weights -= weights.mean(-1, keepdim=True)
            drawn[place] = weights
        return drawn[place].to(like)

    return draw


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Let all parameters of a network be differentiated, frozen ones as well, for as long as the context lasts."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    try:
        for parameter in frozen:
            parameter.requires_grad_(parameter.is_floating_point())
        # cuDNN's recurrent layers run backwards in training mode only
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled and not recurrent):
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _gradients(
    model: nn.Module, side: str, layers: Sequence[str], store: dict[tuple[str, str], Tensor]
) -> Iterator[None]:
    """Note the gradient of what enters or leaves layers; a tensor's hook is immune to later changes in place."""
    modules = {layer.partition("#")[0] for layer in layers}
    calls: dict[str, int] = {}

    def watch(name: str, values: Iterable[Any]) -> None:
        calls[name] = calls.get(name, 0) + 1
        layer = name if calls[name] == 1 else f"{name}#{calls[name]}"
        tensor = next((value for value in values if isinstance(value, Tensor)), None)
        if layer in layers and tensor is not None and tensor.requires_grad:
            tensor.register_hook(lambda gradient: store.__setitem__((side, layer), gradient.detach()))

    def before(name: str) -> Callable[..., None]:
        return lambda _module, args, kwargs: watch(name, (*args, *kwargs.values()))

    def after(name: str) -> Callable[..., None]:
        return lambda _module, _args, _kwargs, output: watch(name, (output,))

    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(lambda *_: calls.clear(), prepend=True).remove)
        for name in modules:
            module = model.get_submodule(name)
            register = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
            hooks.callback(register((before if side == "input" else after)(name), with_kwargs=True).remove)
        yield


def similarity_of(moments: Moments, view: View, kind: str) -> Tensor:
    """Give the similarity of each unit of the first network with each of the second, in one view.

    Args:
        moments: Of either signal.
        view: What was looked at.
        kind: "correlation" (NaN for a unit that never varies), "covariance", or "product": the mean of the product,
            not centred.

    Returns:
        (units, units), float64.
    """
    a, b = f"a:{view.key}", f"b:{view.key}"
    if kind == "correlation":
        return moments.correlation(a, b)
    covariance = moments.covariance(a, b)
    return covariance if kind == "covariance" else covariance.addr_(moments.mean(a), moments.mean(b))

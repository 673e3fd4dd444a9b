"""A network in float64 that can be run on any values of its parameters, without a trace left in it or in the given one.

Networks keep things between runs: caches of what follows from their weights, flags, rescaled weights. Every run
therefore has a copy of the modules of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves, tree_map_only

from ..base.architecture import full_state
from ..base.batches import Batch, model_device
from ..base.errors import IsthmusError, SymmetryError
from .outputs import Outputs, chosen
from .plain import caches_beside, forget, plain_forward, sharing_copy
from .precise import Precise, raised

State = Mapping[str, Tensor]


class Probe:
    """A copy of a network in float64 and evaluation mode.

    Attributes:
        state: Every parameter and buffer by name, those of the copy.
        plain: Whether it runs in its plain form (see `plain_forward`); the first run chooses it where the usual one
            fails in float64.

    Args:
        model: The network; not changed.
        outputs: Which of its outputs a run gives; see `chosen`.

    Raises:
        SymmetryError: The network's tensors hold no data.
    """

    def __init__(self, model: nn.Module, outputs: Outputs = None) -> None:
        check_has_data(model)
        # there is no float64 on Apple's accelerator
        self.device = torch.device("cpu") if model_device(model).type == "mps" else model_device(model)
        self.outputs = outputs
        self.name = type(model).__name__
        self.plain = False
        self._writes: bool | None = None  # unknown before the first run
        # through training mode, where networks drop what they have cached from their weights
        self._model = _raised_copy(model, move=self.device.type == "cpu").train().eval()
        self.state = full_state(self._model)

    def perturb(
        self, varied: Callable[[str], bool], generator: torch.Generator, relative: float, wake: bool = False
    ) -> None:
        """Spread the parameters out, in place, so that nothing is zero at initialisation and no two units are alike.

        Args:
            varied: Says by name whether a buffer may be changed; others may have a meaning that noise destroys.
            generator: Source of the noise.
            relative: Its standard deviation, relative to that of each tensor.
            wake: Make the noise of a weight at least so large that the layer would keep the size of its inputs, lest
                activations vanish in a deep network that has not been trained.
        """
        buffers = {name for name, _ in self._model.named_buffers(remove_duplicate=False)}
        seen: set[int] = set()
        for name, tensor in self.state.items():
            numbers = tensor.is_floating_point() or tensor.is_complex()
            if not numbers or tensor.numel() < 2 or tensor.data_ptr() in seen or (name in buffers and not varied(name)):
                continue
            seen.add(tensor.data_ptr())
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)
            if name in buffers and not tensor.is_complex() and tensor.min() >= 0 and tensor.any():
                tensor.mul_(1 + min(relative, 0.1) * noise.abs())  # a variance stays positive
            else:
                scale = relative * float(tensor.std()) or min(relative / 3, 0.1)
                if wake and tensor.ndim > 1:
                    scale = max(scale, relative * (tensor.shape[0] / tensor.numel()) ** 0.5)
                tensor.add_(noise * scale)

    def calibrate(self, batch: Batch, temper: float = 1.0) -> None:
        """Set the statistics of batch norms to those of a batch, in place, so that activations keep their size.

        Args:
            batch: Inputs.
            temper: By how much variances are put too high, so that a network that amplifies all differences does so
                less.
        """
        model = sharing_copy(self._model)
        norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_var is not None]
        for norm in norms:
            norm.training, norm.momentum = True, 1.0
        if norms:
            with torch.no_grad(), suppress(Exception):  # one number per channel has no variance
                self._call(self.state, batch, model)
                for norm in norms:
                    if norm.running_var is not None:
                        norm.running_var.mul_(temper)

    def run(self, state: State, batch: Batch) -> list[Tensor]:
        """Run on some values of the parameters and list the chosen outputs.

        Raises:
            SymmetryError: It cannot be run, or its output holds no tensor.
        """
        if self._writes is None:
            state = {name: tensor.clone() for name, tensor in state.items()}
            found = self._first(state, batch)
            self._writes = any(tensor._version for tensor in state.values())
            return found
        with torch.no_grad():
            return self._call(self._own(state), batch)

    def gradients(self, batch: Batch, score: Callable[[list[Tensor]], Tensor]) -> dict[str, Tensor]:
        """Run with gradients.

        Args:
            batch: Inputs.
            score: Makes one number of the outputs.

        Returns:
            The gradient of the score by name, of those parameters that it reaches; none where the network cannot be
            differentiated.
        """
        parameters = self._model.named_parameters(remove_duplicate=False)
        numbers = [name for name, tensor in parameters if tensor.is_floating_point() or tensor.is_complex()]
        leaves = {name: tensor.detach() for name, tensor in self._own(self.state).items()}
        with torch.enable_grad(), Precise():
            for name in numbers:
                leaves[name].requires_grad_(True)
            try:
                reached = score(self._call(leaves, batch))
                found = torch.autograd.grad(reached, [leaves[name] for name in numbers], allow_unused=True)
            except Exception:  # it has run before, so that this is the derivative: detached, or written in place
                return {}
        return {name: gradient for name, gradient in zip(numbers, found, strict=True) if gradient is not None}

    def _own(self, state: State) -> State:
        return {name: tensor.clone() for name, tensor in state.items()} if self._writes else state

    def _first(self, state: State, batch: Batch) -> list[Tensor]:
        with torch.no_grad():
            try:
                return self._call(state, batch)
            except IsthmusError:
                raise
            except Exception:
                self.plain = not self.plain
            try:
                return self._call(state, batch)
            except IsthmusError:
                raise
            except Exception as error:
                self.plain = not self.plain
                said = str(error).splitlines()[0] if str(error) else ""
                raise SymmetryError(
                    f"{self.name} cannot be run in float64, so its symmetry cannot be verified: "
                    f"{type(error).__name__}: {said}. Pass verify=False to go without"
                ) from error

    def _call(self, state: State, batch: Batch, model: nn.Module | None = None) -> list[Tensor]:
        model = sharing_copy(self._model) if model is None else model
        args, kwargs = tree_map_only(Tensor, torch.clone, (batch.args, dict(batch.kwargs)))
        plain = plain_forward(model) if self.plain else nullcontext()
        with Precise(), double_by_default(), forgetting(model), plain:
            # each name has its own value: a claim may permute the two names of a tied tensor differently
            output = torch.func.functional_call(model, dict(state), args, kwargs, tie_weights=False)
            found = chosen(output, self.outputs)
        if not found:
            raise SymmetryError(
                f"the output of {self.name}, a {type(output).__name__}, holds no tensor: nothing can be compared. "
                "A network returns tensors, in tuples, lists or mappings"
            )
        return found


@contextmanager
def double_by_default() -> Iterator[None]:
    """Make float64 of numbers that a network turns into tensors: the least of float64 is none of float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def forgetting(model: nn.Module) -> Iterator[None]:
    """Let no function keep a tensor of float64 for the network's next run, nor one from its last."""
    caches = list(caches_beside(model))
    forget(caches)
    try:
        yield
    finally:
        forget(caches)


def check_has_data(model: nn.Module) -> None:
    """Refuse a network on the meta device, or of fake tensors.

    Raises:
        SymmetryError: With the first such tensor.
    """
    for name, tensor in full_state(model).items():
        if tensor.is_meta or isinstance(tensor, FakeTensor):
            raise SymmetryError(
                f"the symmetry cannot be verified: the model is on the meta device, and {name} of shape "
                f"{tuple(tensor.shape)} holds no numbers. Pass verify=False, or a model that has weights"
            )


def _raised_copy(model: nn.Module, move: bool) -> nn.Module:
    """Copy a network in full precision; what is tied stays tied."""
    memo: dict[int, Any] = {}

    def copied(tensor: Tensor) -> Tensor:
        target = torch.device("cpu") if move else tensor.device
        return tensor.detach().to(target, raised(tensor.dtype), copy=True)

    for tensor in model.parameters():
        memo[id(tensor)] = nn.Parameter(copied(tensor), requires_grad=False)
    held = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    # a tensor that a module holds besides may be the result of an operator, which deepcopy refuses
    for tensor in (*model.buffers(), *held):
        memo.setdefault(id(tensor), copied(tensor))
    return copy.deepcopy(model, memo)


def as_given(batch: Batch, device: torch.device) -> Batch:
    """Move inputs to a device, in full precision."""
    return _mapped(batch, lambda tensor: tensor.detach().to(device, raised(tensor.dtype)))


def noise(batch: Batch, generator: torch.Generator) -> Batch:
    """Draw normal numbers in place of those given; integers stay as they are, for they may be indices or lengths."""

    def draw(tensor: Tensor) -> Tensor:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)

    return _mapped(batch, draw)


def others(batch: Batch, generator: torch.Generator) -> Iterator[Batch]:
    """Draw other inputs of the same shapes, first those that differ most: a network may refuse them.

    Noise beside the integers in another order (if they are all alike: others up to the largest one), noise alone, all
    numbers in another order, and those given changed by a tenth.
    """

    def shuffled(tensor: Tensor) -> Tensor:
        order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
        return tensor.flatten()[order].reshape(tensor.shape)

    def mixed(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_floating_point() or tensor.is_complex() else shuffled(tensor)

    def redrawn(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() or tensor.is_complex() or not tensor.numel():
            return tensor
        top = max(1, int(tensor.max()))
        return torch.randint(top + 1, tensor.shape, generator=generator).to(tensor)

    def near(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor * (1 + 0.1 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device))

    ways: list[Callable[[], Batch]] = [
        lambda: _mapped(noise(batch, generator), mixed),
        lambda: noise(batch, generator),
        lambda: _mapped(batch, shuffled),
        lambda: _mapped(noise(batch, generator), redrawn),
        lambda: _mapped(batch, near),
    ]
    for way in ways:
        drawn = way()
        if not _same(drawn, batch):
            yield drawn


def _mapped(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    args, kwargs = tree_map_only(Tensor, change, (batch.args, dict(batch.kwargs)))
    return Batch(args, kwargs)


def _same(a: Batch, b: Batch) -> bool:
    pairs = zip(tree_leaves((a.args, dict(a.kwargs))), tree_leaves((b.args, dict(b.kwargs))), strict=True)
    return all(torch.equal(x, y) for x, y in pairs if isinstance(x, Tensor))

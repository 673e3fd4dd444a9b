"""A network in float64 that can be watched while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...base.batches import Batch
from ...base.errors import SymmetryError
from ..plain import sharing_copy
from ..probe import Probe, as_given
from ..symmetry import Symmetry

State = Mapping[str, Tensor]

# Of the spread of each parameter: enough to tell what a network computes from what its weights happen to be.
_SPREAD = 0.3


class Watched(Probe):
    """A copy of a network in float64, of which hooks and modes see every run; each name has a value of its own.

    Args:
        model: The network; not changed.
        symmetry: Whose outputs are compared.
    """

    def __init__(self, model: nn.Module, symmetry: Symmetry) -> None:
        super().__init__(model, symmetry.outputs)
        self.state = {name: tensor.clone() for name, tensor in self.state.items()}

    def watch(self, state: State, batch: Batch, around: Callable[[nn.Module], AbstractContextManager[Any]]) -> None:
        """Run while a context is open that is given the modules that run; a network may write to the given values."""
        model = sharing_copy(self._model)
        with torch.no_grad(), around(model):
            self._call(state, batch, model)

    def perturbed(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Give values that are spread out: gains that are not one, biases that are not zero, no two units alike."""
        learned = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        found = {}
        for name, tensor in self.state.items():
            if name not in learned or not tensor.is_floating_point():
                found[name] = tensor
                continue
            scale = _SPREAD * (float(tensor.std()) if tensor.numel() > 1 else 1.0) or _SPREAD / 3
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
            found[name] = tensor + scale * noise
        return found

    def module(self, name: str) -> nn.Module:
        """Give a copy of one module that shares nothing but tensors."""
        return sharing_copy(self._model).get_submodule(name)


@dataclass
class Bench:
    """A watched network with inputs, and what it makes of them.

    Attributes:
        probe: The network.
        batch: Its inputs, in float64.
        state: Spread-out values of its parameters (see `Watched.perturbed`).
        outputs: What it gives with them.
        given: What it gives with its own.
    """

    probe: Watched
    batch: Batch
    state: dict[str, Tensor]
    outputs: list[Tensor] = field(repr=False)
    given: list[Tensor] = field(repr=False)

    @classmethod
    def open(cls, model: nn.Module, symmetry: Symmetry, example: Batch, seed: int = 0) -> Bench:
        """Run a network on inputs, with its own values and with others.

        Raises:
            SymmetryError: It cannot be run in float64, or gives NaN.
        """
        probe = Watched(model, symmetry)
        batch = as_given(example, probe.device)
        given = probe.run(probe.state, batch)
        state = probe.perturbed(torch.Generator().manual_seed(seed))
        outputs = probe.run(state, batch)
        if not all(bool(x.isfinite().any()) and not bool(x.isnan().any()) for x in (*given, *outputs)):
            raise SymmetryError(
                f"{probe.name} gives NaN on the example inputs, so that nothing can be verified; pass others"
            )
        return cls(probe, batch, state, outputs, given)


@contextmanager
def hooked(
    model: nn.Module,
    after: Callable[[str, nn.Module, tuple[Any, ...], Any], None],
    before: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Call `after` with name, module, positional and keyword inputs in a tuple, and output, after each module's run."""
    with ExitStack() as stack:
        for name, module in model.named_modules():

            def left(m: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                after(name, m, (*args, *kwargs.values()), output)

            stack.callback(module.register_forward_hook(left, with_kwargs=True).remove)
            if before is not None:
                stack.callback(module.register_forward_pre_hook(lambda _, __, name=name: before(name)).remove)
        yield

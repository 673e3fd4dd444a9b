"""Who reads a norm's output: found by following it from operator to operator while the network runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..symmetry import Symmetry
from ..terms import groups_of
from .norms import Norm
from .probing import Bench, hooked

# Operators that hand a unit's values on as they are, or sum them over anything but units.
_MOVES = """
view _unsafe_view reshape transpose t permute slice select unsqueeze squeeze expand clone contiguous _to_copy to alias
detach cat stack split split_with_sizes chunk unbind index index_select gather flatten unflatten dropout native_dropout
lift_fresh constant_pad_nd roll flip repeat repeat_interleave mean sum as_strided lift narrow unsafe_split neg
unsafe_split_with_sizes tile movedim copy
"""
# Operators that sum over units with weights: where the tensors that are multiplied stand among the arguments.
_PRODUCTS = {
    "mm": (0, 1), "bmm": (0, 1), "matmul": (0, 1), "mv": (0, 1), "linear": (0, 1), "convolution": (0, 1),
    "addmm": (1, 2), "baddbmm": (1, 2), "addmv": (1, 2),
}  # fmt: skip
_BIASES = {"addmm": 0, "addmv": 0, "linear": 2, "convolution": 2}
_SCALES = {"mul", "div"}
_SUMS = {"add", "sub"}


@dataclass(frozen=True)
class Reader:
    """A weight that sums over the units of a norm's output.

    Attributes:
        name: The parameter.
        axis: Which of its axes holds the units.
        bias: What is added to the sum, by name; "" without one, and where the weight is that of a window.
    """

    name: str
    axis: int
    bias: str = ""


@dataclass
class Uses:
    """What becomes of a norm's output.

    Attributes:
        readers: Weights that read it.
        others: What else is done with it, in words: then the gain is no part of a weight.
    """

    readers: list[Reader] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def follow_norms(symmetry: Symmetry, bench: Bench, norms: Sequence[Norm]) -> dict[str, Uses]:
    """Follow what each norm gives to the weights that read it.

    Returns:
        The uses of each norm's output, by the norm's module.
    """
    # a value of its own for each name, so that a tied weight is known by the name under which it is used
    state = {name: tensor.clone() for name, tensor in bench.state.items()}
    follower = _Follower(symmetry, state, {norm.module: norm.group for norm in norms})

    @contextmanager
    def around(model: nn.Module) -> Iterator[None]:
        def after(name: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            follower.place = name.rpartition(".")[0]
            if name in follower.uses and isinstance(output, Tensor):
                follower.mark(output, name)

        with hooked(model, after, before=follower.enter), follower:
            yield

    bench.probe.watch(state, bench.batch, around)
    return follower.uses


class _Follower(TorchDispatchMode):
    """Marks what comes from norms and from parameters; the marked tensors are kept, so that ids stay their own."""

    def __init__(self, symmetry: Symmetry, state: Mapping[str, Tensor], norms: Mapping[str, str]) -> None:
        super().__init__()
        self.symmetry, self.groups = symmetry, dict(norms)
        self.uses = {module: Uses() for module in norms}
        self.place = ""
        self.moves = frozenset(_MOVES.split())
        self._marks: dict[int, tuple[Tensor, frozenset[str]]] = {}
        self._state = state
        self._names = {tensor.untyped_storage().data_ptr(): name for name, tensor in state.items() if tensor.numel()}
        self._moved: dict[int, tuple[Tensor, str]] = {}

    def enter(self, name: str) -> None:
        """Remember the module that runs."""
        self.place = name

    def mark(self, tensor: Tensor, *modules: str) -> None:
        """State that a tensor is the output of norms."""
        self._marks[id(tensor)] = (tensor, frozenset(modules))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        modules = frozenset[str]().union(*(self._marks.get(id(tensor), (None, frozenset()))[1] for tensor in inputs))
        if modules and outputs:
            self._follow(name.removesuffix("_"), args, inputs, outputs, modules)
        elif outputs and name in self.moves and len(inputs) == 1 and (source := self._parameter(inputs[0])):
            for tensor in outputs:
                self._moved[id(tensor)] = (tensor, source)
        return result

    def _parameter(self, value: Any) -> str:
        """Name the parameter that a tensor is, or is a part of; "" for another tensor."""
        if not isinstance(value, Tensor) or not value.numel():
            return ""
        if id(value) in self._moved:
            return self._moved[id(value)][1]
        return self._names.get(value.untyped_storage().data_ptr(), "")

    def _follow(
        self, name: str, args: Sequence[Any], inputs: list[Tensor], outputs: list[Tensor], modules: frozenset[str]
    ) -> None:
        others = [tensor for tensor in inputs if id(tensor) not in self._marks]
        if name in _PRODUCTS:
            reader = self._reader(name, args, modules)
            for module in modules:
                uses = self.uses[module]
                if reader is None:
                    uses.others.append(f"multiplied with something that is no weight ({name}{self._where})")
                elif reader not in uses.readers:
                    uses.readers.append(reader)
        elif self._kept(name, others, modules):
            for tensor in outputs:
                self.mark(tensor, *modules)
        else:
            for module in modules:
                self.uses[module].others.append(f"it goes through {name}{self._where}")

    def _kept(self, name: str, others: list[Tensor], modules: frozenset[str]) -> bool:
        """Tell whether a result is the norm's output still, unit by unit."""
        if name in self.moves:
            return len(modules) == 1 and not any(tensor.is_floating_point() for tensor in others)
        if name in _SUMS:
            return len(modules) == 1 and not others
        return name in _SCALES and all(tensor.ndim == 0 or tensor.shape[-1] == 1 for tensor in others)

    @property
    def _where(self) -> str:
        return f" in {self.place}" if self.place else ""

    def _reader(self, name: str, args: Sequence[Any], modules: frozenset[str]) -> Reader | None:
        """Find the weight in a product with a norm's output, and which of its axes is summed over."""
        first, second = _PRODUCTS[name]
        marked = [at for at in (first, second) if id(args[at]) in self._marks]
        if len(marked) != 1:
            return None
        weight = args[second if marked == [first] else first]
        source = self._parameter(weight)
        if not source:
            return None
        groups = {self.groups[module] for module in modules}
        axes = [axis for axis, term in enumerate(self.symmetry.layout[source]) if groups_of([term]) & groups]
        if not axes:
            return None
        if len(axes) > 1:  # it writes what it reads: the strides tell which axis the product runs over
            summed = 1 if name in ("linear", "convolution") else weight.ndim - (2 if marked == [first] else 1)
            base = self._state[source]
            axes = [axis for axis in axes if base.stride(axis) == weight.stride(summed)] or axes
        # over a window that is padded, what a norm adds is not the same everywhere, and no bias can take it
        at = _BIASES.get(name) if self._state[source].ndim == 2 else None
        bias = self._parameter(args[at]) if at is not None and len(args) > at else ""
        return Reader(source, axes[0], bias)

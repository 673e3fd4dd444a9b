"""Graphs of operators, run one by one on the tensors that a network's parameters and inputs are given as."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._C import _functorch  # type: ignore[attr-defined]
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import TreeSpec, tree_leaves, tree_map, tree_unflatten

from ..base.batches import Batch
from ..base.errors import SymmetryError
from .trace import Tracer
from .unknown import Reason, fixed, pin

# Higher-order operators that run a body as it stands, by the place of the body among their arguments.
_BODIES = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4, "tag_activation_checkpoint": 0}


@dataclass(frozen=True)
class Input:
    """One of the tensors that a network is called with, by its number."""

    number: int


@dataclass(frozen=True)
class Graph:
    """Operators in the order in which they run.

    Attributes:
        module: The operators; flat in what goes in and what comes out.
        sources: What each placeholder is: the name of a parameter or buffer, an `Input`, or the value of a constant.
        results: Which of the values that come out are the network's outputs, and no new contents of buffers.
        prefix: What the paths of modules begin with in addition.
        specs: Structure of an exported program's inputs and outputs.
    """

    module: GraphModule
    sources: tuple[Any, ...]
    results: tuple[int, ...]
    prefix: str = ""
    specs: tuple[TreeSpec, ...] = ()

    def __deepcopy__(self, memo: Any) -> Graph:
        return self  # nothing writes in it

    def run(self, state: Mapping[str, Tensor], inputs: Sequence[Any], tracer: Tracer | None = None) -> list[Any]:
        """Run the operators.

        Args:
            state: Parameters and buffers by name.
            inputs: The inputs, flat.
            tracer: Is told which module each operator belongs to; None where values are computed.

        Raises:
            SymmetryError: A higher-order operator cannot be followed.
        """

        def given(source: Any) -> Any:
            if isinstance(source, str):
                return state[source]
            return inputs[source.number] if isinstance(source, Input) else source

        steps = _Steps(self.module, tracer, self.prefix)
        depth = _functorch.get_dynamic_layer_stack_depth()
        try:
            values = steps.run(*map(given, self.sources), enable_io_processing=False)
        finally:  # a graph that breaks off inside vmap has entered it and not left it
            _functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
        return [values[at] for at in self.results]


def graph_of(program: ExportedProgram, prefix: str = "") -> Graph:
    """Read the graph of an exported program, whose inputs are numbered as they stand.

    Args:
        program: The program.
        prefix: Is taken off the names of parameters and buffers, and off the paths of modules.
    """
    sources: list[Any] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            sources.append(str(spec.target).removeprefix(prefix))
        elif spec.kind is InputKind.USER_INPUT:
            sources.append(Input(sum(isinstance(source, Input) for source in sources)))
        else:
            sources.append(program.constants.get(str(spec.target)))
    outputs = program.graph_signature.output_specs
    kept = tuple(at for at, spec in enumerate(outputs) if spec.kind is OutputKind.USER_OUTPUT)
    specs = tuple(spec for spec in (program.call_spec.in_spec, program.call_spec.out_spec) if spec is not None)
    return Graph(program.graph_module, tuple(sources), kept, prefix, specs)


class _Steps(Interpreter):
    """Runs a graph's operators, each in the name of the module that it came from."""

    def __init__(self, module: GraphModule, tracer: Tracer | None, prefix: str) -> None:
        super().__init__(module)
        self.tracer = tracer
        self.prefix = prefix
        self.node: Node | None = None

    def run_node(self, n: Node) -> Any:
        """Run one operator."""
        self.node = n
        if self.tracer is not None and (place := place_of(n, self.prefix)) is not None:
            self.tracer.modules[:] = [place] if place else []
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator; what it tells Python has been told when the graph was traced."""
        if isinstance(target, HigherOrderOperator):
            return self._higher(target, args, kwargs)
        if self.tracer is None:
            return super().call_function(target, args, kwargs)
        if torch.Tag.data_dependent_output in getattr(target, "tags", ()) and not self._users:
            self._pin(self.tracer, target, (args, kwargs))
            return None
        try:
            return super().call_function(target, args, kwargs)
        except DynamicOutputShapeException:
            return self._as_long_as_it_was(self.tracer, target, args, kwargs)

    @property
    def _users(self) -> bool:
        return self.node is not None and bool(self.node.users)

    def _pin(self, tracer: Tracer, target: Any, values: Any) -> Reason:
        """Hold the axes of tensors of which single values are looked at."""
        name = str(target).split(".")[1] if "." in str(target) else str(target)
        where = f" in {tracer.place or 'forward'}"
        reason = Reason("operator", name, f"the network's course depends on the values that {name} tells{where}")
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor):
                for term in [*tracer.axes(tensor), *tracer.positions.get(id(tensor), ())[1:]]:
                    pin(term, reason)
        return reason

    def _as_long_as_it_was(self, tracer: Tracer, target: Any, args: Any, kwargs: Any) -> Any:
        """Give an output, the size of which depends on values, the size that it had when the graph was traced."""
        known = self.node.meta.get("val") if self.node else None
        sizes = [size for leaf in tree_leaves(known) if isinstance(leaf, Tensor) for size in leaf.shape]
        if not isinstance(known, (Tensor, tuple, list)) or not all(type(size) is int for size in sizes):
            raise
        masks = [i for i in args[1] if i is not None] if "index.Tensor" in str(target) else []
        if len(masks) == 1 and isinstance(known, Tensor):  # picking by a mask is picking by the places where it is true
            reason = self._pin(tracer, target, masks)
            at = args[1].index(masks[0])
            places = [self._fixed(tracer, (known.shape[at],), torch.long, masks[0], reason)] * masks[0].ndim
            return target(args[0], [None] * at + places)
        reason = self._pin(tracer, target, (args, kwargs))
        source = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return tree_map(
            lambda leaf: (
                self._fixed(tracer, leaf.shape, leaf.dtype, source, reason) if isinstance(leaf, Tensor) else leaf
            ),
            known,
        )

    def _fixed(self, tracer: Tracer, shape: Sequence[int], dtype: torch.dtype, like: Tensor, reason: Reason) -> Tensor:
        made = torch.empty(*shape, dtype=dtype, device=like.device)
        tracer.assign(made, [fixed(size, reason) for size in shape])
        return made

    def _higher(self, target: HigherOrderOperator, args: Any, kwargs: Any) -> Any:
        name = target.name()
        if name == "cond":
            chooses, yes, no, operands = args
            branches = [tuple(self._body(body, operands)) for body in (yes, no)]
            return tree_map(lambda a, b: torch.where(torch.as_tensor(chooses), a, b), *branches)
        if name not in _BODIES:
            raise SymmetryError(
                f"the higher-order operator {name}, {self.node} in {self._place or 'forward'}, cannot be followed; "
                "write it with plain operators or, where the network runs without it, choose tracer='run'"
            )
        at = _BODIES[name]
        around = nullcontext()
        if name == "wrap_with_autocast":
            kind, dtype, enabled, cached = args[:at]
            around = torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cached)
        with around:
            return self._body(args[at], args[at + 1 :])

    @property
    def _place(self) -> str:
        return (place_of(self.node, self.prefix) if self.node else None) or ""

    def _body(self, body: GraphModule, operands: Sequence[Any]) -> Any:
        return _Steps(body, self.tracer, self.prefix).run(*operands, enable_io_processing=False)


def place_of(node: Node, prefix: str = "") -> str | None:
    """Name the module that a node came from; "" is the model itself, None unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = re.sub(r"@\d+", "", list(stack.values())[-1][0])
    return "" if path == prefix.removesuffix(".") else path.removeprefix(prefix)


class Program(nn.Module):
    """An exported program as a module that can be copied, moved and cast: its operators run one by one.

    Its parameters and buffers have the names that they had in the network.

    Args:
        program: What `torch.export.export` gave for a network in evaluation mode.

    Raises:
        SymmetryError: It was exported in training mode, and draws at random.
    """

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        _refuse_training(program)
        unsaved = program.graph_signature.non_persistent_buffers
        for name, tensor in program.state_dict.items():
            self._hold(name, tensor, persistent=True)
        for name in unsaved:
            self._hold(name, cast("Tensor", program.constants[name]), persistent=False)
        self.graph = graph_of(program)

    def _hold(self, name: str, tensor: Tensor, persistent: bool) -> None:
        path, _, leaf = name.rpartition(".")
        module: nn.Module = self
        for part in path.split(".") if path else ():
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(leaf, tensor)
        else:
            module.register_buffer(leaf, tensor, persistent)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program on inputs of the structure that it was exported with."""
        state = dict(self.named_parameters(remove_duplicate=False)) | dict(self.named_buffers(remove_duplicate=False))
        return self.run(state, Batch(args, kwargs))

    def run(self, state: Mapping[str, Tensor], inputs: Batch, tracer: Tracer | None = None) -> Any:
        """Run the program on given parameters and buffers; see `Graph.run`.

        Raises:
            SymmetryError: The inputs are not of the structure that it was exported with.
        """
        return tree_unflatten(self.graph.run(state, self._flat(inputs), tracer), self.graph.specs[1])

    def _flat(self, inputs: Batch) -> list[Any]:
        """List the inputs in the program's order; keywords may come in any."""
        spec = self.graph.specs[0]
        args, kwargs = tree_unflatten(list(range(spec.num_leaves)), spec)
        given = {name: inputs.kwargs.get(name) for name in kwargs}
        places, values = tree_leaves((args, kwargs)), tree_leaves((inputs.args, given))
        if len(places) != len(values) or set(kwargs) != set(inputs.kwargs) or len(args) != len(inputs.args):
            raise SymmetryError(
                f"the program was exported for {len(args)} positional inputs and the keywords {sorted(kwargs)}, "
                f"{len(places)} values in all; given are {len(inputs.args)} and {sorted(inputs.kwargs)}, {len(values)} "
                "in all. Pass the inputs that torch.export.export was called with, or others of their structure"
            )
        at = dict(zip(places, values, strict=True))
        return [at[place] for place in sorted(at)]


def _refuse_training(program: ExportedProgram) -> None:
    for node in program.graph.nodes:
        if "dropout" in str(node.target) and len(node.args) == 3 and node.args[2] is True:
            raise SymmetryError(
                f"the program was exported in training mode: {node} in {place_of(node) or 'forward'} draws at random. "
                "Call model.eval() before torch.export.export"
            )

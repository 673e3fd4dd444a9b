"""Other ways to see what a network runs, for one that cannot be called on tensors without data."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from functools import partial
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..base.batches import Batch
from ..base.errors import IsthmusError, SymmetryError, nearest
from ..base.running import evaluating
from .follow import Recorded, Runner
from .graphs import Graph, Input, Program, graph_of
from .plain import plain_forward, sharing_copy
from .trace import RULES, Tracer

TRACERS = ("run", "export", "make_fx", "make_fx_real")

_PREFIX = "model."  # of names in `_Flat`


def runner_of(model: nn.Module, examples: Sequence[Batch], tracer: str) -> Runner | None:
    """Choose how a model is run to be followed; None calls it.

    Args:
        model: Any module; a `Program` is a graph already.
        examples: Example inputs; a graph is traced from each.
        tracer: One of `TRACERS`; see `symmetry`.

    Raises:
        SymmetryError: There is no such tracer, or the model cannot be traced by it.
    """
    if tracer not in TRACERS:
        raise SymmetryError(f"there is no tracer {tracer!r}{nearest(str(tracer), TRACERS)}; there are: {TRACERS}")
    if isinstance(model, Program) and tracer in ("run", "export"):
        return _run_program
    return None if tracer == "run" else GraphRunner(model, examples, tracer)


def _run_program(model: nn.Module, fakes: Mapping[str, Tensor], inputs: Batch, tracer: Tracer) -> Any:
    assert isinstance(model, Program)
    return model.run(fakes, inputs, tracer)


class GraphRunner:
    """Runs, in place of a model, the graphs that were traced from it, one for each example.

    Attributes:
        recorded: What passed the modules, once the graphs have run.
    """

    def __init__(self, model: nn.Module, examples: Sequence[Batch], tracer: str) -> None:
        self.recorded: list[Recorded] = []
        self._traced = iter([_trace(model, batch, tracer) for batch in examples])
        self._seen: set[tuple[str, int, str]] = set()

    def __call__(self, model: nn.Module, fakes: Mapping[str, Tensor], inputs: Batch, tracer: Tracer) -> Any:
        """Run the next graph on tensors without data; see `follow`."""
        del model
        graph, watch = next(self._traced)
        results = graph.run(fakes, _tensors(inputs), tracer)
        count = len(results) - len(watch.seen)
        for key, tensor in zip(watch.seen, results[count:], strict=True):
            if key not in self._seen:
                self.recorded.append(Recorded(*key, tracer.axes(tensor)))
        self._seen.update(watch.seen)
        return watch.rebuild(results[:count])


def _tensors(batch: Batch) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((batch.args, dict(batch.kwargs))) if isinstance(leaf, Tensor)]


@torch.inference_mode(False)  # in which composite operators would not be taken apart
def _trace(model: nn.Module, batch: Batch, tracer: str) -> tuple[Graph, _Watch]:
    real = tracer == "make_fx_real"
    if real and any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers(), *_tensors(batch))):
        raise SymmetryError("tracer='make_fx_real' needs values, which tensors on the meta device do not have")
    network = copy.deepcopy(model) if real else sharing_copy(model)  # a forward pass may write in buffers
    trace = _exported if tracer == "export" else partial(_made, real=real)
    watch, blind = _Watch(), _Watch()
    with ExitStack() as stack:
        stack.enter_context(evaluating(network))
        stack.enter_context(plain_forward(network))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # the forward pass stores things in the copy alone
        tensors = [tensor.detach() for tensor in _tensors(batch)]
        try:
            with watch.watching(network):
                return trace(_Flat(network, batch, watch), tensors), watch
        except IsthmusError:
            raise
        except Exception as error:
            if type(error).__module__.startswith("torch._dynamo"):
                torch._dynamo.reset()  # it remembers what it has given up
            # what runs inside vmap or torch.cond must not be seen from without
            with suppress(Exception):
                return trace(_Flat(network, batch, blind), tensors), blind
            raise _refusal(type(model).__name__, tracer, watch.place, error) from error


def _refusal(model: str, tracer: str, place: str, error: Exception) -> SymmetryError:
    where = f"in module {place!r}" if place else "in the model's forward"
    why = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}".rstrip(".")
    remedy = "Check that model(*example_inputs) runs, or choose another tracer: "
    if "DataDependent" in type(error).__name__:
        why = f"its course depends on the values of tensors (.item(), bool(tensor), nonzero): {why}"
        remedy = "'make_fx_real' follows the values of the example; all tracers: "
    return SymmetryError(
        f"{model} could not be traced with tracer={tracer!r}: {where}, {why}. {remedy}{', '.join(map(repr, TRACERS))}"
    )


def _exported(network: _Flat, tensors: list[Tensor]) -> Graph:
    with redirect_stderr(StringIO()):  # where a graph that cannot be finished would be printed
        return graph_of(torch.export.export(network, (tensors,), strict=False), _PREFIX)


def _made(network: _Flat, tensors: list[Tensor], real: bool) -> Graph:
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.traceback import preserve_node_meta

    state = dict(network.model.named_parameters()) | dict(network.model.named_buffers())

    def call(*values: Tensor) -> list[Tensor]:
        named = {_PREFIX + name: value for name, value in zip(state, values, strict=False)}
        with _OneByOne():
            return torch.func.functional_call(network, named, (list(values[len(state) :]),))

    trace = make_fx(
        call,
        decomposition_table=_decompositions(),
        tracing_mode="real" if real else "fake",
        _allow_non_fake_inputs=True,
        _error_on_data_dependent_ops=not real,
    )
    with preserve_node_meta():
        module = trace(*(t.detach() for t in state.values()), *(t.clone() if real else t for t in tensors))
    count = len(module.graph.find_nodes(op="output")[0].args[0])
    return Graph(module, (*state, *map(Input, range(len(tensors)))), tuple(range(count)), _PREFIX)


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Choose the operators to be taken apart: those without a rule."""
    from torch._decomp import core_aten_decompositions

    def ruled(operator: Any) -> bool:
        name = operator._schema.name.removeprefix("aten::")
        return name in RULES or name.removesuffix("_") in RULES

    return {operator: how for operator, how in core_aten_decompositions().items() if not ruled(operator)}


class _OneByOne(TorchFunctionMode):
    """Has values read one by one, as operators that a graph holds; `tolist` would read memory without a trace."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            return _listed(args[0])
        if func in (Tensor.numpy, Tensor.__array__):
            raise SymmetryError(
                f"a tensor of shape {tuple(args[0].shape)} leaves torch as an array; nothing can be said of what "
                "becomes of its values. Stay within torch in the model's forward"
            )
        return func(*args, **(kwargs or {}))


def _listed(tensor: Tensor) -> Any:
    return [_listed(row) for row in tensor.unbind()] if tensor.ndim else tensor.item()


class _Watch:
    """What passes the modules of a network while it is traced, and of which structure its output is.

    Attributes:
        seen: Module, call and side ("input" or "output") of every tensor that was seen.
        tensors: Those tensors, while the network runs.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, str]] = []
        self.tensors: list[Tensor] = []
        self._modules: list[str] = []
        self._calls: dict[str, int] = {}
        self._output: tuple[list[Any], Any] = ([], None)

    @property
    def place(self) -> str:
        """Path of the module that is running."""
        return self._modules[-1] if self._modules else ""

    def begin(self) -> None:
        """Forget an earlier run: a tracer may run the network twice."""
        self.seen.clear()
        self._modules.clear()
        self._calls.clear()

    def flatten(self, output: Any) -> list[Tensor]:
        """List the tensors of an output, remembering its structure, and then those that were seen."""
        leaves, spec = tree_flatten(_opened(output))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._output = ([... if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        seen, self.tensors = self.tensors, []
        return [*tensors, *seen]

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        """Put tensors in the places of those of the output."""
        leaves, spec = self._output
        given = iter(tensors)
        return tree_unflatten([next(given) if leaf is ... else leaf for leaf in leaves], spec)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Note what passes the modules of a model."""
        with ExitStack() as stack:
            for name, module in model.named_modules():
                if name:
                    before = module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
                    stack.callback(before.remove)
                    stack.callback(module.register_forward_hook(partial(self._leave, name)).remove)
            yield

    def _enter(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._modules.append(name)
        self._calls[name] = self._calls.get(name, 0) + 1
        self._tell()
        self._note(name, "input", [*args, *kwargs.values()])

    def _leave(self, name: str, _: nn.Module, __: Any, output: Any) -> None:
        self._modules.pop()
        self._tell()
        self._note(name, "output", [output])

    def _note(self, name: str, side: str, values: Sequence[Any]) -> None:
        tensor = next((value for value in values if isinstance(value, Tensor)), None)
        if tensor is not None:
            self.seen.append((name, self._calls[name], side))
            self.tensors.append(tensor)

    def _tell(self) -> None:
        """Leave the module's name where `make_fx` finds it; `export` keeps count itself."""
        from torch.fx.traceback import get_current_meta, has_preserved_node_meta

        if has_preserved_node_meta():
            get_current_meta()["nn_module_stack"] = {"": (_PREFIX + self.place, "")}


def _opened(output: Any) -> Any:
    """Turn mappings that pytree does not know into dictionaries."""
    if isinstance(output, Mapping):
        return {key: _opened(value) for key, value in output.items()}
    if type(output) in (tuple, list):
        return type(output)(map(_opened, output))
    return output


class _Flat(nn.Module):
    """A network from a list of tensors to a list of tensors: its outputs, and what passed its modules."""

    def __init__(self, model: nn.Module, batch: Batch, watch: _Watch) -> None:
        super().__init__()
        self.model = model
        leaves, spec = tree_flatten((batch.args, dict(batch.kwargs)))
        self._inputs = ([... if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        self._watch = watch

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run the network."""
        self._watch.begin()
        leaves, spec = self._inputs
        given = iter(tensors)
        args, kwargs = tree_unflatten([next(given) if leaf is ... else leaf for leaf in leaves], spec)
        return self._watch.flatten(self.model(*args, **kwargs))

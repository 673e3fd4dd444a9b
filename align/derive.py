"""`symmetry`: find the permutation symmetry of a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from ..base.batches import Batch
from ..base.errors import SymmetryError
from . import rules_attention, rules_compute, rules_index, rules_positions, rules_shape  # noqa: F401  (the registry)
from .assemble import assemble
from .follow import follow
from .graphs import Program
from .outputs import Outputs
from .overrides import Axis, overridden
from .symmetry import Symmetry
from .tracers import GraphRunner, runner_of


def symmetry(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    *,
    verify: bool = True,
    also: Sequence[Any] = (),
    outputs: Outputs = None,
    tracer: str = "run",
    add: Mapping[str, Iterable[Axis]] | None = None,
    hold: str | Axis | Iterable[str | Axis] = (),
) -> Symmetry:
    """Find which axes of a network's parameters can be permuted together without changing its function.

    The model runs once for each example, in evaluation mode, on tensors without data; each operator states what it
    demands of the axes (see `follow`). The permutation symmetries of weight space are those of Hecht-Nielsen (1990).

    Args:
        model: Any module, or what `torch.export.export` gave for one. It is not changed.
        example_inputs: A tensor, a tuple of positional inputs, or a mapping of keyword inputs. Shapes and types matter;
            the values do not, unless `tracer` says so.
        verify: Measure afterwards that a random permutation leaves the outputs unchanged.
        also: Further example inputs, for a model that does something else with other kinds of input. What is found
            holds for all of them.
        outputs: Which outputs must stay as they are: keys of a mapping or places in a tuple. None takes all; of a
            mapping with logits or a loss only those.
        tracer: How the model's operators are seen.

            "run" calls the model. The quickest, and enough for nearly every model.

            "export" takes the graph of `torch.export`. For a model that has control flow of its kind (`torch.cond`), or
            that is going to be exported, so that the very graph is looked at.

            "make_fx" takes the graph of `make_fx`, in which operators that have no rule are taken apart where PyTorch
            knows how. For a model of which `Symmetry.unruled` lists much.

            "make_fx_real" runs the model on the example's values. For a course that depends on values (`if x.sum() >
            0`, `.item()`, `.tolist()`, picking by masks), which the others refuse. What is found holds wherever the
            network takes the same course as on these examples, and only there: give one for each course with `also`.
            `verify` draws other values and so may try other courses.
        add: Groups that are known to be there beside those that are found: by name the axes, (parameter or buffer,
            axis), that are permuted together. Checked like all others; see `add_group`.
        hold: Groups that are to keep their order, by name or by one of their axes; see `hold_groups`. Comes before
            `add`, so that a group can be held and stated anew.

    Returns:
        The symmetry; `.groups`, `.pinned` and `.graph` show it.

    Raises:
        SymmetryError: The model cannot be traced, an argument names what there is not, or the check fails.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> found = symmetry(net, torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    >>> [(group.name, group.size, group.axes) for group in found.groups]
    [('0', 8, (('0.weight', 0), ('0.bias', 0), ('2.weight', 1)))]
    """
    if isinstance(also, (Tensor, Mapping)):
        raise SymmetryError(f"also is a {type(also).__name__}; expected a list of example inputs, if only of one")
    examples = [as_example(example_inputs), *map(as_example, also)]
    network = Program(model) if isinstance(model, ExportedProgram) else model
    runner = runner_of(network, examples, tracer)
    traced = follow(network, examples, outputs=outputs, runner=runner)
    if isinstance(runner, GraphRunner):
        traced.recorded.extend(runner.recorded)
    kept = (outputs,) if isinstance(outputs, (str, int)) else None if outputs is None else tuple(outputs)
    found = dataclasses.replace(assemble(network, traced), outputs=kept)
    found = overridden(found, add, hold, _aliases(network))
    return found.verified(network, examples[0], also=examples[1:]) if verify else found


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Give all names of each tensor, for each of its names."""
    names: dict[int, list[str]] = {}
    for find in (model.named_parameters, model.named_buffers):
        for name, tensor in find(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    return {name: several for several in names.values() for name in several}


def as_example(example_inputs: Any) -> Batch:
    """Read example inputs: a tensor, positional inputs in a tuple or list, keyword inputs in a mapping, or a batch."""
    match example_inputs:
        case Batch():
            return Batch(example_inputs.args, example_inputs.kwargs)
        case Tensor():
            return Batch((example_inputs,))
        case Mapping():
            return Batch((), dict(example_inputs))
        case tuple() | list():
            return Batch(tuple(example_inputs))
        case _:
            raise SymmetryError(
                f"example_inputs is a {type(example_inputs).__name__}; expected a tensor, a tuple of positional inputs "
                "or a mapping of keyword inputs"
            )

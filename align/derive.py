"""`symmetry`: find the permutation symmetry of a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..base.batches import Batch
from ..base.errors import SymmetryError
from . import rules_compute, rules_shape  # noqa: F401  (they fill the registry)
from .assemble import assemble
from .follow import follow
from .symmetry import Symmetry


def symmetry(model: nn.Module, example_inputs: Any, *, verify: bool = True) -> Symmetry:
    """Find which axes of a network's parameters can be permuted together without changing its function.

    The model runs once, in evaluation mode, on tensors without data; each operator states what it demands of the
    axes (see `follow`). The permutation symmetries of weight space are those of Hecht-Nielsen (1990).

    Args:
        model: Any module. It is not changed.
        example_inputs: A tensor, a tuple of positional inputs, or a mapping of keyword inputs. Shapes and types matter;
            the values do not.
        verify: Measure afterwards that a random permutation leaves the outputs unchanged.

    Returns:
        The symmetry; `.groups`, `.pinned` and `.graph` show it.

    Raises:
        SymmetryError: The model cannot be traced, or the check fails.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> found = symmetry(net, torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    >>> [(group.name, group.size, group.axes) for group in found.groups]
    [('0', 8, (('0.weight', 0), ('0.bias', 0), ('2.weight', 1)))]
    """
    batch = as_example(example_inputs)
    found = assemble(model, follow(model, [batch]))
    if verify:
        found.verify(model, batch).check()
    return found


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

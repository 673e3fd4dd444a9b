"""Checks on the parameters of networks, before anything is computed from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .errors import ArchitectureError, NotFiniteError, nearest

State = Mapping[str, Tensor]


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Map every parameter and buffer of a model by name: tied ones under each name, unsaved buffers included."""
    state: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    state.update(model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in state.items()}


def shared_parameters(model: nn.Module) -> set[int]:
    """Give the `id` of each parameter that more than one module of a model holds as its own.

    >>> embedding, decoder = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
    >>> decoder.weight = embedding.weight
    >>> shared_parameters(nn.Sequential(embedding, decoder)) == {id(embedding.weight)}
    True
    """
    owned = [id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False)]
    return {each for each, count in Counter(owned).items() if count > 1}


def check_same_architecture(a: State, b: State, names: tuple[str, str] = ("a", "b")) -> None:
    """Refuse two sets of parameters that differ in a name or a shape.

    Args:
        a: Tensors by name.
        b: Tensors by name.
        names: What to call the two in the message.

    Raises:
        ArchitectureError: With the names that only one has, and the shapes that differ.
    """
    faults = []
    for mine, other, label in ((a, b, names[0]), (b, a, names[1])):
        only = [key for key in mine if key not in other]
        if only:
            faults.append(f"only {label} has {_some(only)}{nearest(only[0], other) if len(only) == 1 else ''}")
    shapes = [
        f"{key}: {tuple(a[key].shape)} in {names[0]}, {tuple(b[key].shape)} in {names[1]}"
        for key in a
        if key in b and a[key].shape != b[key].shape
    ]
    if shapes:
        faults.append(f"shapes differ: {_some(shapes, '; ')}")
    if faults:
        raise ArchitectureError(
            f"{names[0]} and {names[1]} are not the same architecture: {'; '.join(faults)}. "
            "Pass two networks made by the same constructor with the same arguments"
        )


def check_finite(state: State, what: str) -> None:
    """Refuse parameters that hold NaN or infinity.

    Raises:
        NotFiniteError: With the name of the first such tensor, its shape and the number of such entries.
    """
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise NotFiniteError(
                f"{what}: {name} of shape {tuple(tensor.shape)} holds {bad} entries that are NaN or infinite; "
                "a training that diverged? Use an earlier checkpoint"
            )


def _some(items: list[str], separator: str = ", ", most: int = 5) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + more

"""What every matching of networks begins with: checks, an example of the inputs, the symmetry, the parameters."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...base.architecture import check_finite, check_same_architecture, full_state
from ...base.batches import Batch, Data, batches
from ...base.errors import DataError
from ..derive import as_example
from ..derive import symmetry as derive
from ..symmetry import Symmetry


def check_networks(models: Sequence[nn.Module], names: Sequence[str]) -> None:
    """Refuse networks of different architectures, and parameters or buffers that hold what they may not.

    Args:
        models: At least one.
        names: What to call each in a message.

    Raises:
        ArchitectureError: Two differ, with the parameters and both shapes.
        NotFiniteError: A parameter holds NaN or infinity, or a buffer NaN.
    """
    first = full_state(models[0])
    for model, name in zip(models[1:], names[1:], strict=True):
        check_same_architecture(first, full_state(model), (names[0], name))
    for model, name in zip(models, names, strict=True):
        # a buffer may hold infinity on purpose, as an attention mask does; NaN nothing may
        buffers = {key: buffer for key, buffer in model.named_buffers() if buffer.isnan().any()}
        check_finite({**dict(model.named_parameters()), **buffers}, name)


def first_batch(data: Data | None) -> tuple[Batch | None, Iterable[Batch]]:
    """Read the first batch of data, and give the whole stream nevertheless."""
    if data is None:
        return None, ()
    stream = batches(data)
    first = next(stream)
    return first, itertools.chain([first], stream)


def known_symmetry(
    given: Symmetry | None, model: nn.Module, example_inputs: Any, first: Batch | None, verify: bool
) -> Symmetry:
    """Give the symmetry of a network: the given one or a derived one, verified unless it is taken on trust.

    Args:
        given: A symmetry made before.
        model: The network.
        example_inputs: For deriving and verifying; None takes the first batch.
        first: Of the data.
        verify: Refuse a symmetry that does not hold.

    Raises:
        DataError: There is nothing to derive it with.
        ArchitectureError: The given one belongs to another architecture.
        SymmetryError: It cannot be derived, or does not hold.
    """
    inputs = first if example_inputs is None else example_inputs
    if given is None and inputs is None:
        raise DataError("deriving the symmetry needs inputs: pass data, example_inputs, or a symmetry made before")
    if given is not None:
        given.check_fits(model, "model a")
        if given.is_verified or not verify:
            return given
        if inputs is None:
            warnings.warn(
                "the symmetry was never verified, and without inputs it is taken on trust: pass data or example_inputs "
                "to verify it, or verify=False",
                stacklevel=4,
            )
            return given
    example = as_example(inputs)
    claim = derive(model, example, verify=False) if given is None else given
    return claim.verified(model, example) if verify else claim


def parameters_of(model: nn.Module, device: torch.device | str | None) -> dict[str, Tensor]:
    """Map parameters by name, on a device."""
    return {name: parameter.detach().to(device) for name, parameter in model.named_parameters()}

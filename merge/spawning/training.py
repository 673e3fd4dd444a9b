"""The training function that a user brings: what it is given, what it returns, and what is checked of that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...base.architecture import check_finite, check_same_architecture
from ...base.errors import ArchitectureError, CheckpointError
from ...base.running import copied

Checkpoint = Mapping[str, Any]
"""The state dict of a network under "model", and what else its training needs to go on; tensors, numbers and text."""


class Train(Protocol):
    """Trains a network from one step to another.

    It is given a checkpoint that it returned earlier (None at the beginning), the step at which that stands (0 at the
    beginning), the step at which to stop, and the seed of the noise: the order of the data, their augmentation,
    dropout. It makes the network, always with the same initial weights, whatever the seed; loads the checkpoint into
    network and optimizer; takes `stop - start` steps, none where the two are equal; and returns a checkpoint.

    The noise of a step should depend on the seed and the number of the step alone. Then a training that was split is
    the same as one that was not, bit for bit, and what is in a folder does not depend on how it came there. With a
    checkpoint of one seed and another seed as argument, the training goes on from there with other noise.
    """

    def __call__(self, checkpoint: Checkpoint | None, start: int, stop: int, seed: int, /) -> Checkpoint: ...  # noqa: D102


def run(
    train: Train, checkpoint: Checkpoint | None, span: tuple[int, int], seed: int, network: nn.Module
) -> dict[str, Any]:
    """Train, and check what came back.

    Args:
        train: The user's function.
        checkpoint: Where to begin; the function gets a copy, for optimizers train on what they load.
        span: First step and last.
        seed: Of the noise.
        network: What the weights must fit.

    Raises:
        ArchitectureError: The weights are of another network.
        CheckpointError: What came back is no checkpoint.
        NotFiniteError: A weight is NaN or infinite.
    """
    start, stop = span
    found = train(None if checkpoint is None else detached(checkpoint, "checkpoint"), start, stop, seed)
    what = f"the checkpoint of train(…, {start}, {stop}, {seed})"
    if not isinstance(found, Mapping) or not isinstance(found.get("model"), Mapping):
        kind = f"a mapping with {', '.join(map(repr, found))}" if isinstance(found, Mapping) else type(found).__name__
        raise CheckpointError(f"{what} is {kind}; return a mapping with the state dict of the network under 'model'")
    kept = detached(found, what)
    check_weights(kept, network, what)
    return kept


def detached(value: Any, what: str) -> Any:
    """Copy tensors to the CPU, with all that holds them; refuse what a file that runs no code cannot hold.

    Raises:
        CheckpointError: A value is neither a tensor, a number, text, None, nor made of these.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {key: detached(part, f"{what}, {key!r}") for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [detached(part, f"{what}, [{place}]") for place, part in enumerate(value)]
        return parts if isinstance(value, list) else tuple(parts)
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise CheckpointError(
        f"{what}: a {type(value).__name__}, which cannot be kept; expected tensors, numbers and text "
        "(torch.from_numpy for arrays, .state_dict() for objects of torch)"
    )


def check_weights(checkpoint: Checkpoint, network: nn.Module, what: str) -> None:
    """Hold the weights of a checkpoint against a network.

    Raises:
        ArchitectureError: A name or a shape differs.
        NotFiniteError: A weight is NaN or infinite.
    """
    weights, expected = tensors(checkpoint["model"]), tensors(network.state_dict())
    try:
        check_same_architecture(expected, weights, ("the network", what))
    except ArchitectureError as error:
        raise ArchitectureError(f"{error}; does train make the network that spawn was given?") from error
    check_finite(weights, what)


def tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Leave out what a module keeps in its state dict beside tensors."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def loaded(network: nn.Module, checkpoint: Checkpoint, device: torch.device | str | None) -> nn.Module:
    """Give a copy of a network with the weights of a checkpoint."""
    copy = copied(network)
    copy.load_state_dict(checkpoint["model"])
    return copy if device is None else copy.to(device)

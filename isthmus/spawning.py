"""Stability to the noise of training, for the networks, data sets and recipes of the zoo."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.base.architecture import full_state
from isthmus.base.files import PathLike
from isthmus.base.running import copied
from isthmus.merge.spawning import Checkpoint, Spawning, spawn
from isthmus.zoo import Dataset, Recipe, Text, loader
from isthmus.zoo.resuming import steps_in, train_until


@dataclasses.dataclass(frozen=True, eq=False)
class RecipeTraining:
    """Training by a recipe, as `isthmus.merge.spawning.spawn` wants it: from a checkpoint to a step.

    The schedule of the rate, momentum and moments go on through a fork. The order of the images, their augmentation
    and dropout are those of the seed; after a fork within an epoch the rest of that epoch is drawn anew.

    Attributes:
        model: Holds the initial weights; never changed.
        train_set: What is learned.
        recipe: How; its seed is not read.
        device: Where to train; None for where the model is.

    >>> from isthmus.zoo import load_data, mlp
    >>> training = RecipeTraining(mlp(64, (16,), seed=0), load_data("digits"), Recipe(epochs=2))
    >>> training.total, training(None, 0, 5, seed=1)["step"]
    (24, 5)
    """

    model: nn.Module
    train_set: Dataset | Text
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    device: torch.device | str | None = None

    @property
    def total(self) -> int:
        """Steps of the whole training."""
        return steps_in(self.train_set, self.recipe)

    @property
    def facts(self) -> dict[str, Any]:
        """What determines the training but the seeds of its noise: recipe, data and initial weights."""
        recipe = {name: value for name, value in dataclasses.asdict(self.recipe).items() if name != "seed"}
        data = {"data": self.train_set.name, "split": self.train_set.split, "samples": len(self.train_set)}
        held = {name: value for name, value in vars(self.train_set).items() if isinstance(value, Tensor)}
        return {
            **recipe,
            **data,
            "SHA-256 of the data": _digest(held),
            "SHA-256 of the initial weights": _digest(full_state(self.model)),
        }

    def __call__(self, checkpoint: Checkpoint | None, start: int, stop: int, seed: int) -> Checkpoint:
        """Train a copy of the model; `start` is where the checkpoint stands, which says so itself."""
        recipe = dataclasses.replace(self.recipe, seed=seed)
        return train_until(
            copied(self.model), self.train_set, recipe, stop=stop, checkpoint=checkpoint, device=self.device
        )


def spawn_recipe(
    model: nn.Module,
    train_set: Dataset | Text,
    test_set: Dataset | Text,
    recipe: Recipe | None = None,
    *,
    at: Sequence[int] | None = None,
    children: int | Sequence[int] = 2,
    folder: PathLike | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> Spawning:
    """Measure from which step on a training by a recipe is stable to its noise (Frankle et al. 2020).

    Args:
        model: Holds the initial weights; not changed.
        train_set: What is learned.
        test_set: What the paths between the children are measured on.
        recipe: How to train; None for `Recipe()`. Its seed is that of the trunk's noise, and the children's are those
            that follow.
        at: Steps at which to fork; see `spawn`.
        children: How many at each step, or their seeds.
        folder: Where to keep trunks and children, for the next call to go on from.
        device: Where to train and to measure; None for where the model is.
        **options: Further arguments of `spawn`: `points`, `repair`, `repair_data`, `progress`.

    Returns:
        The barriers by step.

    Raises:
        ArchitectureError: The network does not take these images, or has too few outputs.
        CheckpointError: A file in the folder is damaged or of another training.
        DataError: A step or a number of children cannot be.
        DivergedError: The training diverged.
        OutputError: The folder cannot be written.

    >>> from isthmus.zoo import load_data, mlp
    >>> network, data = mlp(64, (16,), seed=0), load_data("digits", limit=300)
    >>> found = spawn_recipe(network, data, load_data("digits", "test"), Recipe(epochs=2), at=(0, 3), points=3)
    >>> found.steps, found.total, found.seeds
    ((0, 3), 6, (1, 2))
    """
    recipe = recipe or Recipe()
    training = RecipeTraining(model, train_set, recipe, device)
    facts = None if folder is None else training.facts
    return spawn(
        training,
        model,
        loader(test_set, 32 if isinstance(test_set, Text) else 512),
        total=training.total,
        at=at,
        children=children,
        seed=recipe.seed,
        folder=folder,
        recipe=facts,
        device=device,
        **options,
    )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

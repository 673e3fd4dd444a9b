"""How to train: the recipe, and one for each reference network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..base.errors import IsthmusError


class RecipeError(IsthmusError, ValueError):
    """A training recipe has a value that cannot work."""


@dataclass(frozen=True)
class Recipe:
    """How to train.

    The rate rises in a straight line over the first `warmup_epochs`, then follows the schedule: `"cosine"` falls to
    zero at the end (Loshchilov & Hutter 2017), `"step"` falls to a tenth at half and again at three quarters of the
    epochs (He et al. 2016), `"constant"` stays.

    Attributes:
        epochs: Passes over the training set.
        batch_size: Images, or windows of a text, in a step.
        optimizer: `"sgd"`, `"adam"` or `"adamw"`.
        lr: Highest learning rate. About 0.1 for SGD on networks with norms, 0.01 to 0.05 without; 0.001 for Adam.
        momentum: Of SGD; the others do not read it.
        weight_decay: On all parameters.
        schedule: `"cosine"`, `"step"` or `"constant"`.
        warmup_epochs: Length of the rise, may be a fraction.
        augment: Random crops and mirrored images, see `loader`.
        label_smoothing: Share of the target spread over all classes, in [0, 1).
        clip: Longest gradient, all parameters together; longer ones are shortened to it (Pascanu et al. 2013).
        precision: Of the forward and backward pass: `"float32"`, or `"bfloat16"` (autocast, images with channels last:
            two to three times as fast where the processor multiplies it). Weights are float32 in both.
        seed: Of the order of the images, their augmentation, and dropout; not of the initial weights.

    Raises:
        RecipeError: A value cannot work.

    >>> Recipe(optimizer="adam", lr=1e-3).epochs
    20
    """

    epochs: int = 20
    batch_size: int = 128
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    warmup_epochs: float = 1.0
    augment: bool = False
    label_smoothing: float = 0.0
    clip: float = math.inf
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        positive_integer = "a positive integer"
        for name, good, wanted in (
            ("epochs", isinstance(self.epochs, int) and self.epochs > 0, positive_integer),
            ("batch_size", isinstance(self.batch_size, int) and self.batch_size > 0, positive_integer),
            ("optimizer", self.optimizer in ("sgd", "adam", "adamw"), "'sgd', 'adam' or 'adamw'"),
            ("lr", 0 < self.lr < math.inf, "a number above zero"),
            ("momentum", 0 <= self.momentum < 1, "a number in [0, 1)"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "zero or a number above it"),
            ("schedule", self.schedule in ("cosine", "constant", "step"), "'cosine', 'constant' or 'step'"),
            ("warmup_epochs", 0 <= self.warmup_epochs <= self.epochs, f"from 0 to epochs ({self.epochs})"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "a number in [0, 1)"),
            ("clip", self.clip > 0, "a number above zero, infinity for none"),
            ("precision", self.precision in ("float32", "bfloat16"), "'float32' or 'bfloat16'"),
        ):
            if not good:
                raise RecipeError(f"recipe: {name} is {getattr(self, name)!r}; expected {wanted}")

    def learning_rate(self, epoch: float) -> float:
        """Give the learning rate after a number of epochs, which may be a fraction.

        >>> recipe = Recipe(epochs=20, lr=0.1, warmup_epochs=2)
        >>> [round(recipe.learning_rate(epoch), 3) for epoch in (1, 2, 11, 20)]
        [0.05, 0.1, 0.05, 0.0]
        """
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        if self.schedule == "cosine":
            done = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-12)
            return self.lr * (1 + math.cos(math.pi * done)) / 2
        if self.schedule == "step":
            return self.lr * 0.1 ** ((epoch >= self.epochs / 2) + (epoch >= self.epochs * 3 / 4))
        return self.lr


RECIPES: dict[str, Recipe] = {
    "mlp": Recipe(epochs=20, optimizer="adam", lr=1e-3, weight_decay=0.0, warmup_epochs=0.0),
    "all_cnn": Recipe(epochs=30, lr=0.02, warmup_epochs=2.0, augment=True),
    "vgg": Recipe(epochs=30, lr=0.02, warmup_epochs=2.0, augment=True),
    "resnet": Recipe(epochs=30, lr=0.1, augment=True),
    "transformer": Recipe(epochs=10, batch_size=32, optimizer="adamw", lr=1e-3, weight_decay=0.1, clip=1.0),
}

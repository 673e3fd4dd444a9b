"""One step of training, what it needs, and what is checked around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.errors import ArchitectureError, DivergedError
from .data import Dataset, Loader, loader
from .distillation import SoftTargets, Taught, TaughtLoader, taught_batches
from .recipe import Recipe, RecipeError
from .text import Text, TextLoader

Loss = Callable[..., Tensor]
"""Function (outputs, labels) → mean over the batch, a scalar; batches with more than images and labels pass that on."""

BATCHES_BETWEEN_CHECKS = 20
"""Reading the loss of every batch would make an accelerator wait for it."""


def shuffled(dataset: Dataset | Text, recipe: Recipe, generator: torch.Generator) -> Loader | TextLoader | TaughtLoader:
    """Give the batches of an epoch, in another order each time they are read.

    Raises:
        RecipeError: A text, or images with a teacher's targets, shall be augmented.
    """
    if isinstance(dataset, Taught):
        return taught_batches(dataset, recipe.batch_size, generator, recipe.augment)
    if isinstance(dataset, Text):
        if recipe.augment:
            raise RecipeError(f"recipe: augment is for images, but {dataset.name} is a text")
        return dataset.batches(recipe.batch_size, shuffle=True, generator=generator)
    return loader(dataset, recipe.batch_size, shuffle=True, generator=generator, augment=recipe.augment)


def choose_loss(loss: Loss | None, dataset: Dataset | Text, recipe: Recipe) -> Loss | None:
    """Give the loss that a training lowers; None for cross-entropy on the labels.

    Raises:
        RecipeError: Labels are to be smoothed, but the loss is another one.
    """
    if loss is None and isinstance(dataset, Taught):
        loss = SoftTargets(dataset.of_class)
    if loss is not None and recipe.label_smoothing:
        raise RecipeError(
            f"recipe: label_smoothing ({recipe.label_smoothing}) is part of the cross-entropy on labels, but this "
            "training has another loss; set it to 0, and smooth in the loss"
        )
    return loss


def class_scores(loss: Loss | None, scores: Tensor) -> Tensor:
    """Give scores of classes, which a loss may know to read off other outputs (`loss.class_scores`)."""
    return getattr(loss, "class_scores", lambda scores: scores)(scores)


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    rate: float,
    loss: Loss | None = None,
    more: tuple[Any, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Change a network in training mode by one step on a loss.

    Args:
        model: The network.
        optimizer: Of its parameters.
        x: A batch of inputs.
        y: Their labels: (n,), or (n, context) for a text.
        recipe: Label smoothing, clipping and precision.
        rate: Learning rate of the step.
        loss: None for cross-entropy.
        more: What the batch has beside inputs and labels, for the loss.

    Returns:
        The mean loss before the step, and how many of the labels were found.

    Raises:
        RecipeError: The loss gave no scalar.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    outputs = _scores(model, x, recipe)
    scores, labels = class_scores(loss, outputs).flatten(0, -2), y.flatten()
    if loss is None:
        value = F.cross_entropy(scores, labels, label_smoothing=recipe.label_smoothing)
    else:
        value = _scalar(loss(outputs, y, *more))
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    if recipe.clip < math.inf:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    return value.detach(), (scores.detach().argmax(1) == labels).sum()


def _scalar(value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise RecipeError(f"the loss gave {found}; expected a scalar that depends on the outputs, the batch's mean")
    return value


def _scores(model: nn.Module, x: Tensor, recipe: Recipe) -> Tensor:
    if recipe.precision == "float32":
        return model(x)
    with torch.autocast(x.device.type, torch.bfloat16):
        return model(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x).float()


def check_loss(total: Tensor, epoch: int, recipe: Recipe) -> None:
    """Refuse to go on from a loss that is no number.

    Raises:
        DivergedError: With the epoch, and what to change.
    """
    if not torch.isfinite(total):
        raise DivergedError(
            f"the loss became {float(total)} in epoch {epoch}: the training diverged. "
            f"Lower lr ({recipe.lr}) or raise warmup_epochs ({recipe.warmup_epochs}); earlier checkpoints stay"
        )


def check_fit(model: nn.Module, dataset: Dataset | Text) -> None:
    """Run a network, which is left in evaluation mode, on two inputs of a data set.

    Raises:
        ArchitectureError: It does not take them, or has too few outputs.
    """
    model.eval()
    text = isinstance(dataset, Text)
    x = dataset.inputs()[:2] if text else dataset.normalise(dataset.images[:2])
    things = "windows" if text else "images"
    try:
        with torch.no_grad():
            scores = model(x)
    except (RuntimeError, IndexError) as error:
        raise ArchitectureError(
            f"the network does not take {dataset.name} {things} of shape {tuple(x.shape)}: {error}; "
            + (f"its characters are 0 to {len(dataset.classes) - 1}" if text else "make it with build(name, dataset)")
        ) from error
    wanted = (*x.shape, "characters") if text else (len(x), "classes")
    if not isinstance(scores, Tensor) or scores.shape[:-1] != wanted[:-1]:
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ArchitectureError(
            f"the network gives {shape} for {len(x)} {things}; expected class scores ({', '.join(map(str, wanted))})"
        )
    if isinstance(dataset, Taught) and scores.shape[-1] != len(dataset.of_class):
        raise ArchitectureError(
            f"the network has {scores.shape[-1]} outputs but the targets of {dataset.name} {len(dataset.of_class)}; "
            f"make it with classes={len(dataset.of_class)}"
        )
    if scores.shape[-1] < len(dataset.classes):
        raise ArchitectureError(
            f"the network has {scores.shape[-1]} outputs but {dataset.name} has {len(dataset.classes)} classes; "
            f"make it with {'vocabulary' if text else 'classes'}={len(dataset.classes)}"
        )


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Make the optimizer of a recipe for the parameters that need a gradient.

    Raises:
        ArchitectureError: There is none.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ArchitectureError("the network has no parameter that needs a gradient; nothing to train")
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True
        )
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)


@contextmanager
def training_left_alone(model: nn.Module) -> Iterator[None]:
    """Restore each module's mode at the end, and drop the gradients, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        model.zero_grad(set_to_none=True)

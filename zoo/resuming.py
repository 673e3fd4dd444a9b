"""Training from step to step, with all that it needs to go on kept between: for forks of one training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..base.architecture import check_finite, full_state
from ..base.batches import model_device
from ..base.errors import CheckpointError
from ..base.progress import progress as progress_bar
from .data import Dataset
from .recipe import Recipe, RecipeError
from .seeding import seeded
from .steps import (
    BATCHES_BETWEEN_CHECKS,
    check_fit,
    check_loss,
    choose_loss,
    make_optimizer,
    shuffled,
    take_step,
    training_left_alone,
)
from .text import Text

_PARTS = ("model", "optimizer", "step", "noise", "recipe")


def steps_in(train_set: Dataset | Text, recipe: Recipe) -> int:
    """Count the steps of a whole training, a last batch of one image, which is passed over, included.

    >>> from isthmus.zoo import load_data
    >>> steps_in(load_data("digits"), Recipe(epochs=3, batch_size=100))
    45
    """
    return recipe.epochs * len(shuffled(train_set, recipe, torch.Generator()))


def train_until(
    model: nn.Module,
    train_set: Dataset | Text,
    recipe: Recipe | None = None,
    *,
    stop: int,
    checkpoint: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Train a network in place up to a step, from its own weights or from a checkpoint.

    Split in any way, a training comes out the same bit for bit on one CPU, and the same as that of `train`: weights,
    buffers, the optimizer's moments, the place in the schedule and the state of all random numbers go on. A checkpoint
    of another seed than the recipe's is a fork: from there on the order of the images, their augmentation and dropout
    are those of the new seed. In the middle of an epoch a fork draws a new order of all images and takes as many
    batches from its end as the epoch has left, so that some images come twice in that epoch and others not at all.

    Args:
        model: Maps a batch of images to class scores, or of windows of a text to scores of each next character.
        train_set: What it learns.
        recipe: None for `Recipe()`.
        stop: Steps from the beginning of the training, at most `steps_in(train_set, recipe)`.
        checkpoint: What an earlier call returned; None to begin with the weights of `model`.
        device: Where to train; the model is moved and stays there. None for where it is.
        progress: Show a bar always (True), never (False), or on a terminal only (None).

    Returns:
        Tensors on the CPU, numbers and text only, as `torch.load(weights_only=True)` reads them: `"model"` (its state
        dict), `"optimizer"`, `"step"`, `"noise"` (the seed, and the states of the generators) and `"recipe"`.

    Raises:
        ArchitectureError: The network does not take these images, has too few outputs, or nothing to train.
        CheckpointError: The checkpoint is not one of this function, or not of this network or recipe.
        DivergedError: The loss became NaN or infinite.
        NotFiniteError: A weight is NaN or infinite.
        RecipeError: `stop` is before the checkpoint or after the end.

    >>> from isthmus.zoo import load_data, mlp
    >>> data, recipe = load_data("digits", limit=200), Recipe(epochs=2, batch_size=50)
    >>> whole, first, second = (mlp(64, (16,), seed=0) for _ in range(3))
    >>> _ = train_until(whole, data, recipe, stop=8)
    >>> checkpoint = train_until(first, data, recipe, stop=3)
    >>> _ = train_until(second, data, recipe, stop=8, checkpoint=checkpoint)
    >>> torch.equal(whole.fc1.weight, second.fc1.weight)
    True
    """
    recipe = recipe or Recipe()
    start = 0 if checkpoint is None else _check_parts(checkpoint, recipe)
    total = steps_in(train_set, recipe)
    if isinstance(stop, bool) or not isinstance(stop, int) or not start <= stop <= total:
        raise RecipeError(
            f"stop is {stop!r}; expected a step from {start}, where this training stands, to {total}, its end "
            f"({recipe.epochs} epochs)"
        )
    device = model_device(model) if device is None else torch.device(device)
    train_set = train_set.to(device)
    with seeded(recipe.seed, device), training_left_alone(model):
        model.to(device)
        check_fit(model, train_set)
        optimizer = make_optimizer(model, recipe)
        noise = _Noise(recipe.seed, device)
        if checkpoint is not None:
            _load(checkpoint, model, optimizer)
            noise.load(checkpoint["noise"])
        _train_steps(model, train_set, optimizer, recipe, noise, (start, stop), progress)
        check_finite(full_state(model), f"after step {stop} at lr {recipe.lr}")
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": stop}
        return {**_kept(parts), "noise": noise.state(), "recipe": dataclasses.asdict(recipe)}


@dataclasses.dataclass
class _Noise:
    """The random numbers of a training: one generator for the images, torch's own for dropout."""

    seed: int
    device: torch.device

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.epoch_start = self.generator.get_state()

    def begin_epoch(self) -> None:
        self.epoch_start = self.generator.get_state()

    def state(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        # The order within an epoch cannot be entered halfway: it is drawn again from where the epoch began.
        return {"seed": self.seed, "images": self.epoch_start, "torch": torch.get_rng_state(), "cuda": cuda}

    def load(self, state: Mapping[str, Any]) -> None:
        if state["seed"] != self.seed:
            return  # a fork
        self.generator.set_state(state["images"].cpu())
        self.begin_epoch()
        torch.set_rng_state(state["torch"].cpu())
        if self.device.type == "cuda" and state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"].cpu(), self.device)


def _train_steps(
    model: nn.Module,
    train_set: Dataset | Text,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    noise: _Noise,
    span: tuple[int, int],
    show: bool | None,
) -> None:
    model.train()
    batches, chosen = shuffled(train_set, recipe, noise.generator), choose_loss(None, train_set, recipe)
    each, (done, stop) = len(batches), span
    with progress_bar((), "training", total=stop - done, show=show) as bar:
        while done < stop:
            epoch, passed = divmod(done, each)
            for batch, (x, y, *more) in enumerate(batches, 1):
                if batch <= passed:
                    continue
                if len(y) > 1 or each == 1:  # as in `train`
                    rate = recipe.learning_rate(epoch + batch / each)
                    loss, _ = take_step(model, optimizer, x, y, recipe, rate, chosen, tuple(more))
                    if done % BATCHES_BETWEEN_CHECKS == 0:
                        check_loss(loss, epoch + 1, recipe)
                done += 1
                bar.update()
                if done == stop:
                    break
            if done % each == 0:
                noise.begin_epoch()


def _check_parts(checkpoint: Mapping[str, Any], recipe: Recipe) -> int:
    missing = [part for part in _PARTS if part not in checkpoint]
    if missing:
        raise CheckpointError(
            f"the checkpoint has no entry {missing[0]!r}; pass what train_until returned, with {', '.join(_PARTS)}"
        )
    for name, value in dataclasses.asdict(recipe).items():
        if name != "seed" and checkpoint["recipe"].get(name) != value:
            raise CheckpointError(
                f"the checkpoint was made with {name}={checkpoint['recipe'].get(name)!r}, but the recipe says "
                f"{value!r}; only the seed may change on the way"
            )
    return int(checkpoint["step"])


def _load(checkpoint: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(_kept(checkpoint["optimizer"]))  # it would train the caller's moments
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"the checkpoint is of another network: {error}") from error


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {key: _kept(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_kept, value))
    return value

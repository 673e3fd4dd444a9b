"""One training recipe for every reference network."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.architecture import check_finite, full_state
from ..base.batches import model_device
from ..base.errors import NotFiniteError
from ..base.evaluation import evaluate as measure
from ..base.files import PathLike, make_folder, save_state_dict, write_atomic
from ..base.progress import progress as progress_bar
from .data import Dataset, Loader, loader
from .distillation import TaughtLoader
from .recipe import Recipe, RecipeError
from .seeding import seeded
from .steps import (
    BATCHES_BETWEEN_CHECKS,
    Loss,
    check_fit,
    check_loss,
    choose_loss,
    class_scores,
    make_optimizer,
    shuffled,
    take_step,
    training_left_alone,
)
from .text import Text, TextLoader


@dataclass(frozen=True)
class History:
    """What a training measured, one entry per epoch.

    Attributes:
        train_loss: Mean loss over the epoch's batches while the network changed, label smoothing included.
        train_accuracy: Likewise, in [0, 1].
        test_loss: Cross-entropy on the test set after the epoch; empty without a test set.
        test_accuracy: Likewise, in [0, 1].
        lr: Learning rate of the epoch's last step.
        seconds: Wall-clock time of the epoch, tests and checkpoint excluded.
        checkpoints: File names, one per epoch that was kept.
    """

    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Give plain lists, ready for JSON."""
        return asdict(self)


def train(
    model: nn.Module,
    train_set: Dataset | Text,
    recipe: Recipe | None = None,
    *,
    test_set: Dataset | Text | None = None,
    device: torch.device | str | None = None,
    checkpoint_dir: PathLike | None = None,
    checkpoint_every: int = 1,
    loss: Loss | None = None,
    progress: bool | None = None,
) -> History:
    """Train a network in place, on cross-entropy or another loss.

    With one recipe and one start the weights come out the same bit for bit on one CPU. Each module keeps the mode
    (training or evaluation) that it came with; parameters that need no gradient stay as they are.

    Args:
        model: Maps a batch of images to class scores, or of windows of a text to scores of each next character.
        train_set: What it learns; of images with a teacher's targets (`taught`) these.
        recipe: None for `Recipe()`; `RECIPES` has one for each network here.
        test_set: What it is tested on after each epoch.
        device: Where to train; the model is moved and stays there. None for where it is.
        checkpoint_dir: Folder for `epoch-001.safetensors` and so on, and `history.json`.
        checkpoint_every: Keep each so-many-th epoch, and the last.
        loss: Function (outputs, labels) → mean over the batch, a scalar; (outputs, labels, targets) if the images have
            a teacher's targets. Its method `class_scores`, if it has one, turns outputs into the class scores that
            accuracies and `test_set` are measured by. None for cross-entropy on the labels, or `SoftTargets`.
        progress: Show a bar always (True), never (False), or on a terminal only (None).

    Returns:
        Losses, accuracies, rates and times by epoch.

    Raises:
        ArchitectureError: The network does not take these images, has too few outputs, or nothing to train.
        DivergedError: The loss became NaN or infinite; checkpoints of earlier epochs stay.
        NotFiniteError: A weight is NaN or infinite.
        OutputError: The folder cannot be written.
        RecipeError: `checkpoint_every` is below 1, the loss gives no scalar, or the recipe does not go with it or with
            the data.

    >>> from isthmus.zoo import load_data, mlp
    >>> network = mlp(64, (16,), seed=0)
    >>> history = train(network, load_data("digits"), Recipe(epochs=3, seed=0))
    >>> history.train_loss[0] > history.train_loss[-1]
    True
    """
    recipe = recipe or Recipe()
    if checkpoint_every < 1:
        raise RecipeError(f"checkpoint_every is {checkpoint_every}; keep every epoch with 1, every second with 2")
    loss = choose_loss(loss, train_set, recipe)
    folder = None if checkpoint_dir is None else make_folder(checkpoint_dir)
    device = model_device(model) if device is None else torch.device(device)
    train_set, test_set = train_set.to(device), None if test_set is None else test_set.to(device)
    history = History()
    with seeded(recipe.seed, device), training_left_alone(model):
        model.to(device)
        check_fit(model, train_set)
        optimizer = make_optimizer(model, recipe)
        generator = torch.Generator().manual_seed(recipe.seed)
        batches = shuffled(train_set, recipe, generator)
        with progress_bar(range(1, recipe.epochs + 1), "training", show=progress) as bar:
            for epoch in bar:
                _train_epoch(model, batches, optimizer, recipe, epoch, history, bar, loss)
                if test_set is not None:
                    test_loss, accuracy = evaluate(_Classifying(model, loss), test_set)
                    history.test_loss.append(test_loss)
                    history.test_accuracy.append(accuracy)
                if folder is not None and (epoch % checkpoint_every == 0 or epoch == recipe.epochs):
                    _write_checkpoint(model, folder, epoch, recipe, history)
    return history


def evaluate(model: nn.Module, dataset: Dataset | Text, *, batch_size: int = 512) -> tuple[float, float]:
    """Test a network, in evaluation mode.

    Args:
        model: Maps a batch of images to class scores, or of windows of a text to scores of each next character; each
            module keeps the mode that it came with.
        dataset: What it is tested on; moved to the device of the model.
        batch_size: Images in a batch, at most; a sixteenth as many windows of a text.

    Returns:
        Mean cross-entropy in nats, and accuracy in [0, 1]; over all characters of a text.

    Raises:
        NotFiniteError: An output is NaN or infinite.

    >>> from isthmus.zoo import load_data, mlp
    >>> loss, accuracy = evaluate(mlp(64, (16,), seed=0), load_data("digits", "test"))
    >>> abs(loss - math.log(10)) < 0.3
    True
    """
    dataset = dataset.to(model_device(model))
    found = measure(model, loader(dataset, -(-batch_size // 16) if isinstance(dataset, Text) else batch_size))
    if not math.isfinite(found.loss):
        raise NotFiniteError(f"the loss on {dataset.name} ({dataset.split}) is {found.loss}; a training that diverged?")
    assert found.metric is not None
    return found.loss, found.metric


class _Classifying(nn.Module):
    """A network with the class scores that a loss reads off its outputs."""

    def __init__(self, model: nn.Module, loss: Loss | None) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x: Tensor) -> Tensor:
        return class_scores(self.loss, self.model(x))


def _train_epoch(
    model: nn.Module,
    batches: Loader | TextLoader | TaughtLoader,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    epoch: int,
    history: History,
    bar: Any,
    loss: Loss | None,
) -> None:
    start = time.perf_counter()
    model.train()
    total, correct, seen = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64), 0
    rate = 0.0
    for step, (x, y, *more) in enumerate(batches, 1):
        if len(y) == 1 and len(batches) > 1:
            continue  # batch normalisation cannot train on a single vector
        rate = recipe.learning_rate(epoch - 1 + step / len(batches))
        value, found = take_step(model, optimizer, x, y, recipe, rate, loss, tuple(more))
        total = total.to(value.device) + value.double() * y.numel()
        correct = correct.to(value.device) + found
        seen += y.numel()
        if step % BATCHES_BETWEEN_CHECKS == 0:
            check_loss(total, epoch, recipe)
            bar.set_postfix(batch=f"{step}/{len(batches)}", loss=f"{float(total) / seen:.4f}")
    check_loss(total, epoch, recipe)
    bar.set_postfix(batch=f"{len(batches)}/{len(batches)}", loss=f"{float(total) / seen:.4f}")
    check_finite(full_state(model), f"after epoch {epoch} at lr {recipe.lr}")
    history.train_loss.append(float(total) / seen)
    history.train_accuracy.append(int(correct) / seen)
    history.lr.append(rate)
    history.seconds.append(time.perf_counter() - start)


def _write_checkpoint(model: nn.Module, folder: Path, epoch: int, recipe: Recipe, history: History) -> None:
    name = f"epoch-{epoch:03d}.safetensors"
    save_state_dict(
        model.state_dict(), folder / name, metadata={"epoch": str(epoch), "recipe": json.dumps(asdict(recipe))}
    )
    history.checkpoints.append(name)
    text = json.dumps({"recipe": asdict(recipe), **history.to_dict()}, indent=2)
    write_atomic(folder / "history.json", lambda temporary: temporary.write_text(text, encoding="utf-8"))

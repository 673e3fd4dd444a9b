"""One training recipe for every reference network."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.architecture import check_finite, full_state
from ..base.batches import model_device
from ..base.errors import ArchitectureError, DivergedError, IsthmusError, NotFiniteError
from ..base.evaluation import evaluate as measure
from ..base.files import PathLike, make_folder, save_state_dict, write_atomic
from ..base.progress import progress as progress_bar
from .data import Dataset, Loader, loader
from .seeding import seeded
from .text import Text, TextLoader

# Reading the loss of every batch would make an accelerator wait for it.
_BATCHES_BETWEEN_CHECKS = 20


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
    progress: bool | None = None,
) -> History:
    """Train a network in place, on cross-entropy.

    With one recipe and one start the weights come out the same bit for bit on one CPU. Each module keeps the mode
    (training or evaluation) that it came with; parameters that need no gradient stay as they are.

    Args:
        model: Maps a batch of images to class scores, or of windows of a text to scores of each next character.
        train_set: What it learns.
        recipe: None for `Recipe()`; `RECIPES` has one for each network here.
        test_set: What it is tested on after each epoch.
        device: Where to train; the model is moved and stays there. None for where it is.
        checkpoint_dir: Folder for `epoch-001.safetensors` and so on, and `history.json`.
        checkpoint_every: Keep each so-many-th epoch, and the last.
        progress: Show a bar always (True), never (False), or on a terminal only (None).

    Returns:
        Losses, accuracies, rates and times by epoch.

    Raises:
        ArchitectureError: The network does not take these images, has too few outputs, or nothing to train.
        DivergedError: The loss became NaN or infinite; checkpoints of earlier epochs stay.
        NotFiniteError: A weight is NaN or infinite.
        OutputError: The folder cannot be written.
        RecipeError: `checkpoint_every` is below 1.

    >>> from isthmus.zoo import load_data, mlp
    >>> network = mlp(64, (16,), seed=0)
    >>> history = train(network, load_data("digits"), Recipe(epochs=3, seed=0))
    >>> history.train_loss[0] > history.train_loss[-1]
    True
    """
    recipe = recipe or Recipe()
    if checkpoint_every < 1:
        raise RecipeError(f"checkpoint_every is {checkpoint_every}; keep every epoch with 1, every second with 2")
    folder = None if checkpoint_dir is None else make_folder(checkpoint_dir)
    device = model_device(model) if device is None else torch.device(device)
    train_set, test_set = train_set.to(device), None if test_set is None else test_set.to(device)
    history = History()
    with seeded(recipe.seed, device), _modes_restored(model):
        model.to(device)
        _check_fit(model, train_set)
        optimizer = _optimizer(model, recipe)
        generator = torch.Generator().manual_seed(recipe.seed)
        batches = _shuffled(train_set, recipe, generator)
        try:
            with progress_bar(range(1, recipe.epochs + 1), "training", show=progress) as bar:
                for epoch in bar:
                    _train_epoch(model, batches, optimizer, recipe, epoch, history, bar)
                    if test_set is not None:
                        loss, accuracy = evaluate(model, test_set)
                        history.test_loss.append(loss)
                        history.test_accuracy.append(accuracy)
                    if folder is not None and (epoch % checkpoint_every == 0 or epoch == recipe.epochs):
                        _write_checkpoint(model, folder, epoch, recipe, history)
        finally:
            model.zero_grad(set_to_none=True)
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


def _train_epoch(
    model: nn.Module,
    batches: Loader | TextLoader,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    epoch: int,
    history: History,
    bar: Any,
) -> None:
    start = time.perf_counter()
    model.train()
    total, correct, seen = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64), 0
    rate = 0.0
    for step, (x, y) in enumerate(batches, 1):
        if len(y) == 1 and len(batches) > 1:
            continue  # batch normalisation cannot train on a single vector
        rate = recipe.learning_rate(epoch - 1 + step / len(batches))
        for group in optimizer.param_groups:
            group["lr"] = rate
        scores, y = _scores(model, x, recipe).flatten(0, -2), y.flatten()
        loss = F.cross_entropy(scores, y, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if recipe.clip < math.inf:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        total = total.to(loss.device) + loss.detach().double() * len(y)
        correct = correct.to(loss.device) + (scores.detach().argmax(1) == y).sum()
        seen += len(y)
        if step % _BATCHES_BETWEEN_CHECKS == 0:
            _check_loss(total, epoch, recipe)
            bar.set_postfix(batch=f"{step}/{len(batches)}", loss=f"{float(total) / seen:.4f}")
    _check_loss(total, epoch, recipe)
    bar.set_postfix(batch=f"{len(batches)}/{len(batches)}", loss=f"{float(total) / seen:.4f}")
    check_finite(full_state(model), f"after epoch {epoch} at lr {recipe.lr}")
    history.train_loss.append(float(total) / seen)
    history.train_accuracy.append(int(correct) / seen)
    history.lr.append(rate)
    history.seconds.append(time.perf_counter() - start)


def _shuffled(dataset: Dataset | Text, recipe: Recipe, generator: torch.Generator) -> Loader | TextLoader:
    if isinstance(dataset, Text):
        if recipe.augment:
            raise RecipeError(f"recipe: augment is for images, but {dataset.name} is a text")
        return dataset.batches(recipe.batch_size, shuffle=True, generator=generator)
    return loader(dataset, recipe.batch_size, shuffle=True, generator=generator, augment=recipe.augment)


def _scores(model: nn.Module, x: Tensor, recipe: Recipe) -> Tensor:
    if recipe.precision == "float32":
        return model(x)
    with torch.autocast(x.device.type, torch.bfloat16):
        return model(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x).float()


def _check_loss(total: Tensor, epoch: int, recipe: Recipe) -> None:
    if not torch.isfinite(total):
        raise DivergedError(
            f"the loss became {float(total)} in epoch {epoch}: the training diverged. "
            f"Lower lr ({recipe.lr}) or raise warmup_epochs ({recipe.warmup_epochs}); earlier checkpoints stay"
        )


def _check_fit(model: nn.Module, dataset: Dataset | Text) -> None:
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
    if scores.shape[-1] < len(dataset.classes):
        raise ArchitectureError(
            f"the network has {scores.shape[-1]} outputs but {dataset.name} has {len(dataset.classes)} classes; "
            f"make it with {'vocabulary' if text else 'classes'}={len(dataset.classes)}"
        )


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
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
def _modes_restored(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _write_checkpoint(model: nn.Module, folder: Path, epoch: int, recipe: Recipe, history: History) -> None:
    name = f"epoch-{epoch:03d}.safetensors"
    save_state_dict(
        model.state_dict(), folder / name, metadata={"epoch": str(epoch), "recipe": json.dumps(asdict(recipe))}
    )
    history.checkpoints.append(name)
    text = json.dumps({"recipe": asdict(recipe), **history.to_dict()}, indent=2)
    write_atomic(folder / "history.json", lambda temporary: temporary.write_text(text, encoding="utf-8"))

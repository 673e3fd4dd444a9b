"""Stability to the noise of training: fork one training at several steps, and walk between the children."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...base.batches import Data, require_repeatable
from ...base.errors import DataError
from ...base.evaluation import Measure
from ...base.files import PathLike
from ...base.progress import progress as progress_bar
from ..paths import Path, connect
from .spawning import Spawning
from .store import Folder, Memory, Store
from .training import Checkpoint, Train, check_weights, loaded, run, tensors


def spawn(
    train: Train,
    network: nn.Module,
    data: Data,
    *,
    total: int,
    at: Sequence[int] | None = None,
    children: int | Sequence[int] = 2,
    seed: int = 0,
    points: int = 25,
    folder: PathLike | None = None,
    recipe: Mapping[str, Any] | None = None,
    metric: Measure | None = None,
    loss: Measure | None = None,
    repair: str | None = None,
    repair_data: Data | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Spawning:
    """Measure from which step on a training is stable to its noise (Frankle et al. 2020, Algorithm 1).

    One network, the trunk, is trained to each step k. There it is forked: children go on from its weights to the end
    of training, each with noise of its own (the order of the data, augmentation, dropout). Where the straight path
    between children has no barrier, step k had decided where in the landscape they would end. k = 0 forks the initial
    weights. The trunk is trained once, from each k to the next.

    With a folder every trunk and child is one file, written whole or not at all: what is there is not trained again, so
    that after an interruption, or with more steps or children, the same call goes on from what there is.
    A child's file is a checkpoint like any other; a trunk's holds its optimizer as well.

    Args:
        train: Function (checkpoint or None, start, stop, seed) → checkpoint; see `Train` and the example below.
        network: A network of the architecture that `train` trains; its weights are of no account and stay.
        data: Batches with labels, to measure the paths on; read again for each.
        total: Steps of the whole training, at which the children are finished.
        at: The steps k at which to fork, from 0 to `total`; by default 0, 10, 30, 100, 300, … below half of `total`.
        children: How many children at each k, at least two, with the seeds that follow `seed`; or their seeds.
        seed: Of the noise of the trunk.
        points: Points on each path, both ends included, at least 3.
        folder: Where to keep trunks and children; None keeps one trunk and the children of one step, in memory.
        recipe: What else determines the training (rate, batch size, data, seed of the initial weights, …), as names and
            plain values; kept in each file of the folder, where files of another recipe are refused. Needed with a
            folder.
        metric: As in `connect`: accuracy beside the default loss.
        loss: As in `connect`: cross entropy by default.
        repair: As in `connect`: None, or how the points between the ends are repaired.
        repair_data: Batches to repair on; `data` by default.
        device: Where to measure; `train` chooses for itself where to train.
        progress: Show a bar always (True), never (False), or on a terminal (None).

    Returns:
        The barriers by step, as numbers and as a figure.

    Raises:
        ArchitectureError: What `train` gives has other weights than `network`.
        CheckpointError: What `train` gives is no checkpoint, or a file is damaged or of another recipe.
        DataError: A step, a number of children or of points cannot be, or the data cannot be read again.
        NotFiniteError: A weight is NaN or infinite.
        OutputError: The folder cannot be written.

    Warns:
        UserWarning: Two children are equal although their seeds differ: does `train` use its seed?

    A complete training function, whose noise depends on the seed and the step alone:

    >>> x = torch.linspace(-2, 2, 64)[:, None]
    >>> y = (x.squeeze().abs() > 1).long()
    >>> def network():
    ...     with torch.random.fork_rng():
    ...         _ = torch.manual_seed(0)  # always the same initial weights
    ...         return nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> def train(checkpoint, start, stop, seed):
    ...     model = network()
    ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    ...     if checkpoint is not None:
    ...         model.load_state_dict(checkpoint["model"])
    ...         optimizer.load_state_dict(checkpoint["optimizer"])
    ...     for step in range(start, stop):
    ...         noise = torch.Generator().manual_seed(1_000_003 * seed + step)
    ...         rows = torch.randint(64, (8,), generator=noise)
    ...         optimizer.zero_grad()
    ...         nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
    ...         optimizer.step()
    ...     return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    >>> found = spawn(train, network(), [(x, y)], total=60, at=(0, 20, 60), points=5)
    >>> found.steps, found.barriers.shape, float(found.barriers[-1])
    ((0, 20, 60), (3,), 0.0)
    """
    steps = _checked_steps(at, total)
    seeds = _checked_seeds(children, seed)
    if isinstance(points, bool) or not isinstance(points, int) or points < 3:
        raise DataError(f"points is {points!r}; expected a whole number of at least 3: both ends and one between them")
    for batches in (data, repair_data):
        if batches is not None:
            require_repeatable(batches, "each pair of children is measured in a pass of its own")
    family = _Family(train, network, total, seed, _store(folder, recipe, seed, total))
    walk = {"points": points, "metric": metric, "loss": loss, "repair": repair, "repair_data": repair_data}
    paths: dict[int, tuple[Path, ...]] = {}
    with progress_bar((), "spawning", total=len(steps) * len(seeds), show=progress) as bar:
        for step in steps:
            bar.set_postfix(step=step)
            checkpoints = []
            for each in seeds:
                checkpoints.append(family.child(step, each))
                bar.update()
            _warn_of_equal(checkpoints, seeds, step, total)
            networks = [loaded(network, checkpoint, device) for checkpoint in checkpoints]
            paths[step] = tuple(
                connect(a, b, data, **walk, progress=False) for a, b in itertools.combinations(networks, 2)
            )
    return Spawning(steps, total, seed, seeds, paths)


@dataclass(frozen=True)
class _Family:
    """The trunk and its children, made when they are asked for."""

    train: Train
    network: nn.Module
    total: int
    seed: int
    store: Store

    def trunk(self, step: int) -> Checkpoint:
        start = self.store.last_trunk(step)
        before = None if start is None else self.store.trunk(start)
        if before is not None:
            check_weights(before, self.network, f"the trunk kept at step {start}")
        if before is not None and start == step:
            return before
        made = run(self.train, before, (start or 0, step), self.seed, self.network)
        self.store.keep_trunk(step, made)
        return made

    def child(self, step: int, seed: int) -> Checkpoint:
        kept = self.store.child(step, seed)
        if kept is not None:
            check_weights(kept, self.network, f"the child kept of step {step} and seed {seed}")
            return kept
        made = run(self.train, self.trunk(step), (step, self.total), seed, self.network)
        self.store.keep_child(step, seed, made)
        return made


def default_steps(total: int) -> tuple[int, ...]:
    """Give steps at which to fork a training: none, then 10, 30, 100, 300, … as long as half of it lies ahead.

    >>> default_steps(2000)
    (0, 10, 30, 100, 300, 1000)
    >>> default_steps(15)
    (0, 7)
    """
    ladder = [step * 10**power for power in range(1, 19) for step in (1, 3) if step * 10**power <= total / 2]
    return (0, *(ladder or ([total // 2] if total > 1 else [])))


def _checked_steps(at: Sequence[int] | None, total: int) -> tuple[int, ...]:
    if not _whole(total) or total < 1:
        raise DataError(f"total is {total!r}; expected the number of steps of the whole training, at least 1")
    steps = default_steps(total) if at is None else tuple(at)
    wrong = [step for step in steps if not _whole(step) or not 0 <= step <= total]
    if wrong or not steps:
        what = f"at holds {wrong[0]!r}" if wrong else "at is empty"
        raise DataError(f"{what}; expected steps from 0, the initial weights, to total ({total}), the end of training")
    return tuple(sorted({int(step) for step in steps}))


def _checked_seeds(children: int | Sequence[int], seed: int) -> tuple[int, ...]:
    if not _whole(seed):
        raise DataError(f"seed is {seed!r}; expected a whole number")
    wanted = "expected at least two children, or their seeds, all different whole numbers"
    seeds = tuple(range(seed + 1, seed + 1 + children) if isinstance(children, int) else children)
    if isinstance(children, bool) or len(seeds) < 2 or len(set(seeds)) < len(seeds) or not all(map(_whole, seeds)):
        raise DataError(f"children is {children!r}; {wanted}")
    return seeds


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _store(folder: PathLike | None, recipe: Mapping[str, Any] | None, seed: int, total: int) -> Store:
    if folder is None:
        return Memory()
    if recipe is None:
        raise DataError(
            "a folder needs recipe=, which says what else determines this training, such as "
            "{'lr': 0.1, 'batch': 128, 'initial seed': 0}: files of another recipe are then refused"
        )
    return Folder(folder, seed, {**recipe, "total": total})


def _warn_of_equal(checkpoints: Sequence[Checkpoint], seeds: Sequence[int], step: int, total: int) -> None:
    if step == total:
        return
    weights = [tensors(checkpoint["model"]) for checkpoint in checkpoints]
    for (a, one), (b, other) in itertools.combinations(zip(weights, seeds, strict=True), 2):
        if all(torch.equal(tensor, b[name]) for name, tensor in a.items()):
            warnings.warn(
                f"the children of step {step} with seeds {one} and {other} are equal, so that a barrier of 0 says "
                "nothing; does train draw its noise from its seed?",
                UserWarning,
                stacklevel=3,
            )

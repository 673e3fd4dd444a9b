"""Train the networks of the notebooks and keep them: `python notebooks/train_networks.py`.

Each network is a file in a cache folder (`ISTHMUS_CACHE`, else `~/.cache/isthmus`); what is there already is not
trained again, so an interrupted run goes on where it stopped. The full set takes about two hours on one core with
bfloat16 units, of which `convergent_learning.ipynb` needs a third (`wide-0` to `wide-3`). With `ISTHMUS_QUICK=1` it
is a small set on the embedded digits, half a minute: enough to run every
cell, not to show what the notebook shows.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from isthmus import zoo
from isthmus.base.files import load_state_dict, save_state_dict

QUICK = os.environ.get("ISTHMUS_QUICK") == "1"
FOLDER = Path(os.environ.get("ISTHMUS_CACHE", Path.home() / ".cache" / "isthmus")) / (
    "layer_similarity_quick" if QUICK else "layer_similarity"
)

MAIN = "digits" if QUICK else "cifar10"
OTHER = "digits" if QUICK else "fashion_mnist"
WIDTH = 4 if QUICK else 16
WIDTHS = (2, 4) if QUICK else (4, 8, 16, 32)
REPEATS = (1, 2) if QUICK else (1, 2, 4, 8)
SEEDS = range(3 if QUICK else 10)
MEMORISED = 200 if QUICK else 2500


@dataclass(frozen=True)
class Plan:
    """One network: its data, its shape and how it is trained; `every` keeps checkpoints of so many epochs apart."""

    name: str
    data: str
    seed: int
    recipe: zoo.Recipe
    width: int = WIDTH
    repeat: int = 1
    every: int = 0

    def network(self) -> nn.Sequential:
        """Make it, untrained."""
        return zoo.all_cnn(
            dataset(self.data).images.shape[1], width=self.width, norm="batch", repeat=self.repeat, seed=self.seed
        )


@cache
def dataset(name: str, split: zoo.data.Split = "train") -> zoo.Dataset:
    """Load the data of a plan: `main`, `other` in the shape of main, `few` of main, or these with `random` labels."""
    if name in ("few", "random"):
        few = zoo.load_data(MAIN, split, limit=MEMORISED)
        if name == "few":
            return few
        labels = torch.randint(len(few.classes), few.labels.shape, generator=torch.Generator().manual_seed(0))
        return dataclasses.replace(few, labels=labels, source=f"{few.source}; labels drawn at random")
    main = zoo.load_data(MAIN, split)
    if name == "main":
        return main
    other = zoo.load_data(OTHER, split)
    channels, size = main.images.shape[1], main.images.shape[-1]
    pad = (size - other.images.shape[-1]) // 2
    images = F.pad(other.images, (pad, pad, pad, pad)).expand(-1, channels, -1, -1)
    return dataclasses.replace(other, images=images, mean=other.mean * channels, std=other.std * channels)


def plans() -> Iterator[Plan]:
    """List every network of the study, in the order of training."""
    recipe = zoo.Recipe(epochs=2 if QUICK else 12, lr=0.1, augment=not QUICK, precision="bfloat16")
    for seed in SEEDS:
        yield Plan(f"ten-{seed}", "main", seed, _seeded(recipe, seed), every=1 if seed == 0 else 0)
    by_heart = dataclasses.replace(
        recipe, epochs=2 if QUICK else 60, lr=0.05, weight_decay=0.0, augment=False, schedule="constant"
    )
    for seed in SEEDS[:3]:
        for labels in ("random", "few"):
            yield Plan(f"{labels}-{seed}", labels, seed, _seeded(by_heart, seed), width=2 * WIDTH)
    for seed in SEEDS[:2]:
        yield Plan(f"other-{seed}", "other", 100 + seed, dataclasses.replace(recipe, epochs=2 if QUICK else 5))
    for width in WIDTHS:
        for seed in SEEDS[:2] if width != WIDTH else ():
            yield Plan(f"width{width}-{seed}", "main", seed, _seeded(recipe, seed), width=width)
    for seed in SEEDS[:4]:
        brief = dataclasses.replace(recipe, epochs=2 if QUICK else 6)
        yield Plan(f"wide-{seed}", "main", seed, _seeded(brief, seed), width=3 * WIDTH)
    for repeat in REPEATS[1:]:
        shorter = dataclasses.replace(recipe, epochs=2 if QUICK else 6)
        yield Plan(f"repeat{repeat}-0", "main", 0, shorter, repeat=repeat)


def _seeded(recipe: zoo.Recipe, seed: int) -> zoo.Recipe:
    return dataclasses.replace(recipe, seed=seed)


def load(plan: Plan, epoch: int | None = None) -> nn.Sequential:
    """Give a trained network, in evaluation mode; trains and keeps it where it is missing."""
    file = FOLDER / (f"{plan.name}.safetensors" if epoch is None else f"{plan.name}/epoch-{epoch:03d}.safetensors")
    network = plan.network()
    if not file.exists():
        _train(plan)
    network.load_state_dict(load_state_dict(file))
    return network.eval()


def _train(plan: Plan) -> None:
    network = plan.network()
    folder = FOLDER / plan.name if plan.every else None
    history = zoo.train(
        network, dataset(plan.data), plan.recipe, checkpoint_dir=folder, checkpoint_every=max(plan.every, 1)
    )
    split = "train" if plan.data in ("few", "random") else "test"
    accuracy = zoo.evaluate(network, dataset(plan.data, split))[1]
    print(f"{plan.name}: {split} accuracy {accuracy:.1%}, {sum(history.seconds):.0f} s", flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    save_state_dict(network.state_dict(), FOLDER / f"{plan.name}.safetensors")


if __name__ == "__main__":
    wanted = sys.argv[1:]
    for each in plans():
        if not (FOLDER / f"{each.name}.safetensors").exists() and (not wanted or each.name in wanted):
            _train(each)

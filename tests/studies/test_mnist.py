"""Numeric claims on MNIST: minutes of training, run by `make studies`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import isthmus
from isthmus import zoo

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
DATA_DIR = os.environ.get("ISTHMUS_DATA") or (SHARED if SHARED.exists() else None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DATA_DIR is None, reason="MNIST is not here: set ISTHMUS_DATA or put it in ../shared/data"),
]

Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def train_set() -> zoo.Dataset:
    return zoo.load_data("mnist", "train", data_dir=DATA_DIR)


@pytest.fixture(scope="module")
def test_batches() -> Batches:
    data = zoo.load_data("mnist", "test", data_dir=DATA_DIR)
    return list(zip(data.inputs().split(1000), data.labels.split(1000), strict=True))


def trained(
    train_set: zoo.Dataset,
    widths: Sequence[int],
    recipe: zoo.Recipe,
    seeds: Sequence[int],
    init: Literal["torch", "he"] = "torch",
) -> list[nn.Module]:
    models: list[nn.Module] = [zoo.mlp(784, widths, 10, init, seed=seed) for seed in seeds]
    for seed, model in zip(seeds, models, strict=True):
        zoo.train(model, train_set, zoo.Recipe(**{**vars(recipe), "seed": seed}))
    return models


@pytest.fixture(scope="module")
def pairs(train_set: zoo.Dataset) -> list[tuple[nn.Module, nn.Module]]:
    models = trained(train_set, (512, 512, 512), zoo.Recipe(epochs=8), range(6))
    return list(zip(models[::2], models[1::2], strict=True))


def test_straight_averages_of_independent_networks_fail(
    pairs: list[tuple[nn.Module, nn.Module]], test_batches: Batches
) -> None:
    barriers = [isthmus.connect(a, b, test_batches).barrier for a, b in pairs]
    print(barriers)
    assert mean(barriers) >= 0.5


@pytest.mark.parametrize(("method", "barrier"), [("weights", 0.01), ("activations", 0.015)])
def test_matching_opens_the_path(
    pairs: list[tuple[nn.Module, nn.Module]],
    train_set: zoo.Dataset,
    test_batches: Batches,
    method: str,
    barrier: float,
) -> None:
    samples = list(train_set.inputs()[:10_000].split(1000))
    paths = []
    for a, b in pairs:
        matching = isthmus.match(a, b, samples, method=method)
        paths.append(isthmus.connect(a, matching.apply(b), test_batches))
    print([path.barrier for path in paths])
    assert mean(path.barrier for path in paths) <= barrier


def test_merged_networks_keep_the_accuracy_of_their_parents(
    pairs: list[tuple[nn.Module, nn.Module]], test_batches: Batches
) -> None:
    lost = []
    for pair in pairs:
        report = isthmus.merge(pair, test_batches).report
        lost.append(mean(parent["metric"] for parent in report["parents"]) - report["merged"]["metric"])
    print(lost)
    assert mean(lost) <= 0.003


def test_repair_opens_the_path_between_deep_narrow_networks(train_set: zoo.Dataset, test_batches: Batches) -> None:
    """REPAIR, table of depth: width 128 and 11 hidden layers, 81.2 % without repair and 95.3 % with it."""
    recipe = zoo.Recipe(epochs=50, batch_size=1000, lr=0.05, momentum=0.9, weight_decay=5e-3)
    a, b = trained(train_set, (128,) * 11, recipe, (0, 1), init="he")
    samples = list(train_set.inputs()[:10_000].split(5000))
    aligned = isthmus.match(a, b, samples, method="activations").apply(b)
    plain = isthmus.connect(a, aligned, test_batches, points=3)
    repaired = isthmus.connect(a, aligned, test_batches, points=3, repair="rescale", repair_data=samples)
    print(plain.midpoint_accuracy, repaired.midpoint_accuracy)
    assert repaired.midpoint_accuracy is not None
    assert repaired.midpoint_accuracy >= 0.95
    assert plain.midpoint_accuracy is not None
    assert plain.midpoint_accuracy < repaired.midpoint_accuracy


def test_planted_permutation_of_a_trained_vgg_is_recovered(train_set: zoo.Dataset) -> None:
    small = zoo.load_data("mnist", "train", data_dir=DATA_DIR, limit=4000)
    model = zoo.build("vgg", small, seed=0, width_multiplier=0.25)
    zoo.train(model, small, zoo.Recipe(epochs=2, lr=0.02))
    samples = list(small.inputs()[:500].split(250))
    planted = isthmus.symmetry(model, samples[0][:2]).random(torch.Generator().manual_seed(1))
    for method in ("weights", "activations"):
        found = isthmus.match(model, planted.apply(model), samples, method=method)
        assert found.permutation == planted.inverse(), method

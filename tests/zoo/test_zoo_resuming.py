"""Training from step to step: whatever way it is split, it is the one training; with another seed, it is a fork."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from isthmus.base.errors import ArchitectureError, CheckpointError, NotFiniteError
from isthmus.zoo import Dataset, Recipe, RecipeError, Text, load_data, mlp, train, transformer
from isthmus.zoo.resuming import steps_in, train_until

# 257 images in batches of 64: five steps in an epoch, of which the last sees one image and is passed over.
RECIPE = Recipe(3, 64, lr=0.1, augment=True, seed=4)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data("digits", limit=257)


def small(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 10)
        )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def split(digits: Dataset, recipe: Recipe, places: list[int]) -> tuple[nn.Module, dict[str, Any]]:
    """Train in pieces, each with a new network and a checkpoint that went through a file."""
    checkpoint, model = None, small()
    for stop in places:
        model = small(0 if checkpoint is None else 99)
        checkpoint = train_until(model, digits, recipe, stop=stop, checkpoint=checkpoint)
        file = io.BytesIO()
        torch.save(checkpoint, file)
        file.seek(0)
        checkpoint = torch.load(file, weights_only=True)
    assert checkpoint is not None
    return model, checkpoint


@given(
    places=st.lists(st.integers(0, 15), max_size=3).map(lambda places: [*sorted(places), 15]),
    optimizer=st.sampled_from(["sgd", "adam", "adamw"]),
    schedule=st.sampled_from(["cosine", "step"]),
)
@settings(max_examples=10, deadline=None)
def test_split_anywhere_it_is_the_training_in_one_go(places: list[int], optimizer: Any, schedule: Any):
    digits = load_data("digits", limit=257)
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer, schedule=schedule, lr=0.01)
    expected = small()
    train(expected, digits, recipe)
    found, checkpoint = split(digits, recipe, places)
    assert same(expected.state_dict(), found.state_dict())
    assert same(checkpoint, train_until(small(), digits, recipe, stop=15))


def test_a_text_split_is_the_training_in_one_go():
    text = Text("mine", "train", torch.arange(200) ** 2 % 7, 8, tuple("abcdefg"), "made up")
    recipe = Recipe(2, 4, "adamw", lr=1e-3, clip=1.0)
    nets = [transformer(vocabulary=7, context=8, width=8, heads=2, layers=1, dropout=0.1, seed=0) for _ in range(3)]
    train(nets[0], text, recipe)
    middle = train_until(nets[1], text, recipe, stop=8)
    train_until(nets[2], text, recipe, stop=steps_in(text, recipe), checkpoint=middle)
    assert same(nets[0].state_dict(), nets[2].state_dict())


def test_steps_and_rates(digits: Dataset):
    assert steps_in(digits, RECIPE) == 3 * 5
    rates = []
    model = small()
    model.register_forward_hook(lambda *_: rates.append(model.training))
    checkpoint = train_until(model, digits, RECIPE, stop=7)
    # a run in evaluation mode to see that the network fits, and six steps, for the fifth batch holds one image
    assert rates.count(True) == 6
    assert checkpoint["step"] == 7
    assert checkpoint["optimizer"]["param_groups"][0]["lr"] == RECIPE.learning_rate(1 + 2 / 5)


def test_at_step_zero_the_network_is_as_it_came(digits: Dataset):
    model = small()
    checkpoint = train_until(model, digits, RECIPE, stop=0)
    assert same(dict(small().state_dict()), checkpoint["model"])
    fork = small(5)
    train_until(fork, digits, dataclasses.replace(RECIPE, seed=8), stop=15, checkpoint=checkpoint)
    expected = small()
    train(expected, digits, dataclasses.replace(RECIPE, seed=8))
    assert same(expected.state_dict(), fork.state_dict())


def test_forks_of_one_seed_are_equal_and_of_two_seeds_are_not(digits: Dataset):
    middle = train_until(small(), digits, RECIPE, stop=7)

    def fork(seed: int, stop: int = 15) -> dict[str, Tensor]:
        model = small(3)
        train_until(model, digits, dataclasses.replace(RECIPE, seed=seed), stop=stop, checkpoint=middle)
        return model.state_dict()

    assert same(fork(5), fork(5))
    assert not torch.equal(fork(5)["1.weight"], fork(6)["1.weight"])
    assert same(fork(5, 7), middle["model"])
    # nothing that a fork does is seen in the checkpoint that it came from
    assert same(middle, train_until(small(), digits, RECIPE, stop=7))


def test_a_fork_in_the_middle_of_an_epoch_draws_a_new_order(digits: Dataset):
    # a network whose gradient says which images it saw: the bias of a linear layer fed with the rows' numbers
    recipe = Recipe(1, 64, lr=1.0, momentum=0, weight_decay=0, schedule="constant", warmup_epochs=0)
    seen: list[Tensor] = []
    model = mlp(64, (), seed=0)
    model.register_forward_pre_hook(lambda module, x: seen.append(x[0].clone()) if module.training else None)
    middle = train_until(model, digits, recipe, stop=2)
    before = len(seen)
    train_until(model, digits, dataclasses.replace(recipe, seed=1), stop=5, checkpoint=middle)
    order = torch.randperm(257, generator=torch.Generator().manual_seed(1))
    expected = [digits.inputs()[rows] for rows in order[128:256].split(64)]
    assert [torch.equal(a, b) for a, b in zip(expected, seen[before:], strict=True)] == [True, True]


def test_randomness_modes_and_gradients_are_as_before(digits: Dataset):
    torch.manual_seed(9)
    state = torch.get_rng_state()
    model = small().eval()
    train_until(model, digits, RECIPE, stop=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bar(digits: Dataset, capsys: pytest.CaptureFixture):
    train_until(small(), digits, RECIPE, stop=2)
    assert capsys.readouterr().err == ""
    train_until(small(), digits, RECIPE, stop=2, progress=True)
    assert "training" in capsys.readouterr().err


@pytest.mark.parametrize("stop", [-1, 16, 2.0, True])
def test_a_stop_that_there_is_not(digits: Dataset, stop: Any):
    with pytest.raises(RecipeError, match=r"expected a step from 0, .* to 15"):
        train_until(small(), digits, RECIPE, stop=stop)


def test_checkpoints_that_do_not_fit(digits: Dataset):
    middle = train_until(small(), digits, RECIPE, stop=3)

    def go_on(model: nn.Module, checkpoint: dict[str, Any], recipe: Recipe = RECIPE, stop: int = 4) -> None:
        train_until(model, digits, recipe, stop=stop, checkpoint=checkpoint)

    with pytest.raises(RecipeError, match="expected a step from 3"):
        go_on(small(), middle, stop=2)
    with pytest.raises(CheckpointError, match="no entry 'noise'"):
        go_on(small(), {key: value for key, value in middle.items() if key != "noise"})
    with pytest.raises(CheckpointError, match=r"made with lr=0\.1, but the recipe says 0\.2"):
        go_on(small(), middle, dataclasses.replace(RECIPE, lr=0.2))
    with pytest.raises(CheckpointError, match="of another network"):
        go_on(mlp(64, (16,), seed=0), middle)
    with pytest.raises(ArchitectureError, match="does not take digits"):
        go_on(mlp(784, (16,), seed=0), middle)


def test_divergence(digits: Dataset):
    with pytest.raises(NotFiniteError):
        train_until(
            mlp(64, (16, 16), seed=0), digits, Recipe(40, 32, lr=1e20, warmup_epochs=0), stop=steps_in(digits, RECIPE)
        )
    recipe = Recipe(1, 1000, lr=1e39, warmup_epochs=0, schedule="constant")
    with pytest.raises(NotFiniteError, match=r"after step 1 .* fc1\.weight"):
        train_until(mlp(64, (), seed=0), digits, recipe, stop=1)


def test_the_device_is_as_asked_for(digits: Dataset):
    model = small()
    train_until(model, digits, RECIPE, stop=1, device="cpu")
    assert model.get_parameter("1.weight").device == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_split_on_a_gpu(digits: Dataset):
    middle = train_until(small(), digits, RECIPE, stop=7, device="cuda")
    whole, parts = small(), small(1)
    train_until(whole, digits, RECIPE, stop=15, device="cuda")
    train_until(parts, digits, RECIPE, stop=15, checkpoint=middle, device="cuda")
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert parts.get_parameter("1.weight").is_cuda


def test_a_checkpoint_is_plain(digits: Dataset, tmp_path: Path):
    checkpoint = train_until(small(), digits, RECIPE, stop=3)
    assert set(checkpoint) == {"model", "optimizer", "step", "noise", "recipe"}
    assert json.loads(json.dumps(checkpoint["recipe"])) == dataclasses.asdict(RECIPE)
    assert np.isinf(checkpoint["recipe"]["clip"])

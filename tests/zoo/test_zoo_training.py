"""Training: the steps by hand, the same bits again, and what is left when it breaks off."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isthmus.base.errors import ArchitectureError, NotFiniteError, OutputError
from isthmus.base.files import load_state_dict
from isthmus.zoo import RECIPES, Dataset, Recipe, RecipeError, build, evaluate, load_data, mlp, resnet, train

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data("digits", limit=257)


def small(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 10)
        )


def softmax_loss(
    weight: np.ndarray, bias: np.ndarray, x: np.ndarray, y: np.ndarray, smoothing: float = 0.0
) -> tuple[float, np.ndarray, np.ndarray]:
    """Give loss and gradients of softmax regression, in float64."""
    scores = x @ weight.T + bias
    scores -= scores.max(1, keepdims=True)
    log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    target = np.eye(10)[y] * (1 - smoothing) + smoothing / 10
    difference = (np.exp(log_p) - target) / len(y)
    return -(target * log_p).sum() / len(y), difference.T @ x, difference.sum(0)


def linear(digits: Dataset) -> tuple[nn.Module, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    model = mlp(64, (), seed=3)
    weight, bias = (value.numpy().astype(np.float64) for value in model.state_dict().values())
    return model, weight, bias, digits.inputs().flatten(1).numpy().astype(np.float64), digits.labels.numpy()


def test_two_steps_of_sgd_by_hand(digits: Dataset):
    model, weight, bias, x, y = linear(digits)
    recipe = Recipe(
        2, 1000, lr=0.3, momentum=0.8, weight_decay=0.01, schedule="constant", warmup_epochs=0, label_smoothing=0.1
    )
    history = train(model, digits, recipe)
    velocity = [np.zeros_like(weight), np.zeros_like(bias)]
    losses = []
    for _ in range(2):
        loss, *gradients = softmax_loss(weight, bias, x, y, 0.1)
        losses.append(loss)
        velocity = [0.8 * v + g + 0.01 * w for v, g, w in zip(velocity, gradients, (weight, bias), strict=True)]
        weight, bias = weight - 0.3 * velocity[0], bias - 0.3 * velocity[1]
    np.testing.assert_allclose(history.train_loss, losses, rtol=1e-5)
    np.testing.assert_allclose(model.get_parameter("fc1.weight").detach(), weight, atol=1e-5)
    np.testing.assert_allclose(model.get_parameter("fc1.bias").detach(), bias, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_first_step_of_adam_by_hand(digits: Dataset, optimizer: str):
    model, weight, bias, x, y = linear(digits)
    recipe = Recipe(1, 1000, optimizer, lr=0.01, weight_decay=0.1, schedule="constant", warmup_epochs=0)  # pyright: ignore[reportArgumentType]
    train(model, digits, recipe)
    _, gradient, _ = softmax_loss(weight, bias, x, y)
    if optimizer == "adam":
        gradient = gradient + 0.1 * weight
    else:
        weight = weight * (1 - 0.01 * 0.1)
    # after one step both moments are those of one gradient
    expected = weight - 0.01 * gradient / (np.abs(gradient) + 1e-8)
    np.testing.assert_allclose(model.get_parameter("fc1.weight").detach(), expected, atol=1e-5)


def test_evaluate_by_hand(digits: Dataset):
    model, weight, bias, x, y = linear(digits)
    loss, accuracy = evaluate(model, digits, batch_size=100)
    assert loss == pytest.approx(softmax_loss(weight, bias, x, y)[0], rel=1e-5)
    assert accuracy == ((x @ weight.T + bias).argmax(1) == y).mean()


def test_measures_of_training_by_hand(digits: Dataset):
    # with a rate of next to nothing the network stays, so the running figures are those of evaluation
    model, *_ = linear(digits)
    history = train(model, digits, Recipe(1, 100, lr=1e-30, warmup_epochs=0), test_set=digits)
    loss, accuracy = evaluate(model, digits)
    assert history.train_loss == pytest.approx([loss], rel=1e-5)
    assert history.train_accuracy == history.test_accuracy == [accuracy]
    assert history.test_loss == [loss]


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Recipe(8, lr=0.2, schedule="constant", warmup_epochs=2), {0.5: 0.05, 1: 0.1, 2: 0.2, 8: 0.2}),
        (
            Recipe(8, lr=0.2, schedule="step", warmup_epochs=0),
            {0: 0.2, 3.9: 0.2, 4: 0.02, 5.9: 0.02, 6: 0.002},
        ),
        (Recipe(8, lr=0.2, warmup_epochs=0), {0: 0.2, 4: 0.1, 8: 0, 2: 0.1 + 0.1 * 2**-0.5}),
        (Recipe(8, lr=0.2, warmup_epochs=8), {4: 0.1, 8: 0.2}),
    ],
)
def test_learning_rate(recipe: Recipe, expected: dict[float, float]):
    for epoch, rate in expected.items():
        assert recipe.learning_rate(epoch) == pytest.approx(rate, abs=1e-12)


def test_rates_that_were_used(digits: Dataset):
    rates = []
    model = small()
    handle = model.register_forward_hook(lambda *_: rates.append(model.training))
    recipe = Recipe(3, 100, lr=0.1, schedule="step", warmup_epochs=0)
    history = train(model, digits, recipe)
    handle.remove()
    np.testing.assert_allclose(history.lr, [0.1, 0.01, 0.001])
    assert rates.count(True) == 9


def test_same_seed_same_bits(digits: Dataset):
    recipe = Recipe(3, 64, augment=True, seed=4)

    def run(recipe: Recipe) -> tuple[dict[str, Tensor], list[float]]:
        model = small()
        history = train(model, digits, recipe)
        return model.state_dict(), history.train_loss

    torch.manual_seed(9)
    state = torch.get_rng_state()
    first, first_loss = run(recipe)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(10)
    second, second_loss = run(recipe)
    other, _ = run(dataclasses.replace(recipe, seed=5))
    assert first_loss == second_loss
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["1.weight"], other["1.weight"])


def test_bar_and_checkpoints_do_not_change_the_result(digits: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture):
    plain, watched = small(), small()
    train(plain, digits, Recipe(2, 86))
    assert capsys.readouterr().err == ""
    train(watched, digits, Recipe(2, 86), test_set=digits, checkpoint_dir=tmp_path, progress=True)
    shown = capsys.readouterr().err
    assert "training" in shown
    assert "batch=3/3" in shown
    assert "loss=" in shown
    assert torch.equal(plain.get_parameter("1.weight"), watched.get_parameter("1.weight"))


def test_checkpoints(digits: Dataset, tmp_path: Path):
    model = small()
    recipe = Recipe(5, 64)
    history = train(model, digits, recipe, test_set=digits, checkpoint_dir=tmp_path / "new" / "run", checkpoint_every=2)
    folder = tmp_path / "new" / "run"
    names = ["epoch-002.safetensors", "epoch-004.safetensors", "epoch-005.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "history.json"]
    assert history.checkpoints == names
    last = load_state_dict(folder / names[-1])
    assert last.keys() == model.state_dict().keys()
    assert all(torch.equal(last[key], value) for key, value in model.state_dict().items())
    # an earlier one is the network as it was: it scores what the history says
    earlier = small(1)
    earlier.load_state_dict(load_state_dict(folder / names[0]))
    assert evaluate(earlier, digits) == (history.test_loss[1], history.test_accuracy[1])
    content = json.loads((folder / "history.json").read_text())
    assert content.pop("recipe") == dataclasses.asdict(recipe)
    assert content == history.to_dict()
    assert len(history.seconds) == 5


def test_modes_and_gradients_are_as_before(digits: Dataset):
    model = small().eval()
    model[3].train()  # pyright: ignore[reportIndexIssue]
    before = [module.training for module in model.modules()]
    train(model, digits, Recipe(1))
    evaluate(model, digits)
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_parameters_stay(digits: Dataset):
    model = small()
    model.get_parameter("1.weight").requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, digits, Recipe(1))
    assert torch.equal(model.state_dict()["1.weight"], before["1.weight"])
    assert not torch.equal(model.state_dict()["5.weight"], before["5.weight"])


def test_a_last_batch_of_one_image(digits: Dataset):
    assert len(digits) % 64 == 1
    history = train(small(), digits, Recipe(1, 64))
    assert np.isfinite(history.train_loss).all()
    steps = round(history.train_accuracy[0] * 256, 9)
    assert steps == int(steps)


def break_in_epoch(model: nn.Module, epoch: int, batches: int, action: Callable[[Tensor], Tensor]) -> None:
    calls = 0

    def hook(module: nn.Module, _inputs: object, out: Tensor) -> Tensor:
        nonlocal calls
        calls += module.training
        return action(out) if calls > (epoch - 1) * batches + 1 else out

    model.register_forward_hook(hook)


def interrupt(_: Tensor) -> Tensor:
    raise KeyboardInterrupt


def test_interrupt_leaves_whole_files(digits: Dataset, tmp_path: Path):
    model = small().eval()
    break_in_epoch(model, 3, 3, interrupt)
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        train(model, digits, Recipe(5, 86), checkpoint_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "epoch-001.safetensors",
        "epoch-002.safetensors",
        "history.json",
    ]
    small().load_state_dict(load_state_dict(tmp_path / "epoch-002.safetensors"))
    assert len(json.loads((tmp_path / "history.json").read_text())["train_loss"]) == 2
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_divergence_names_the_epoch(digits: Dataset, tmp_path: Path, value: float):
    model = small()
    break_in_epoch(model, 2, 3, lambda out: out * value)
    with pytest.raises(NotFiniteError, match=r"in epoch 2: .*Lower lr \(0\.05\)"):
        train(model, digits, Recipe(5, 86), checkpoint_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-001.safetensors", "history.json"]


def test_divergence_of_the_rate(digits: Dataset):
    with pytest.raises(NotFiniteError, match="epoch"):
        train(mlp(64, (16, 16), seed=0), digits, Recipe(20, 32, lr=1e20, warmup_epochs=0))


def test_weights_that_diverge_in_the_last_step(digits: Dataset, tmp_path: Path):
    model = mlp(64, (), seed=0)
    with pytest.raises(NotFiniteError, match=r"after epoch 1 .* fc1\.weight"):
        train(model, digits, Recipe(1, 1000, lr=1e39, warmup_epochs=0, schedule="constant"), checkpoint_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_evaluate_refuses_a_broken_network(digits: Dataset):
    model = small()
    nn.init.constant_(model.get_parameter("5.bias"), float("nan"))
    with pytest.raises(NotFiniteError, match=r"loss on digits \(train\) is nan"):
        evaluate(model, digits)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mlp(784, (4,), seed=0), r"does not take digits images of shape \(2, 1, 8, 8\)"),
        (lambda: mlp(64, (4,), 9, seed=0), "9 outputs but digits has 10 classes"),
        (lambda: nn.Conv2d(1, 2, 1), r"gives \(2, 2, 8, 8\) for 2 images"),
        (Pair, "gives tuple for 2 images"),
        (lambda: mlp(64, (4,), seed=0).requires_grad_(False), "nothing to train"),
    ],
)
def test_networks_that_do_not_fit(digits: Dataset, make: Callable[[], nn.Module], message: str):
    with pytest.raises(ArchitectureError, match=message):
        train(make(), digits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs is 0; expected a positive integer"),
        ({"epochs": 2.5}, "epochs is 2.5"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"optimizer": "lion"}, "'sgd', 'adam' or 'adamw'"),
        ({"lr": 0}, "lr is 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"schedule": "linear"}, "'cosine', 'constant' or 'step'"),
        ({"warmup_epochs": 21}, r"from 0 to epochs \(20\)"),
        ({"precision": "float16"}, "precision is 'float16'"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
    ],
)
def test_recipes_that_cannot_work(change: dict[str, object], message: str):
    with pytest.raises(RecipeError, match=message):
        dataclasses.replace(Recipe(), **change)  # pyright: ignore[reportArgumentType]


def test_refused_before_any_work(digits: Dataset, tmp_path: Path):
    model = small()
    model.register_forward_hook(lambda *_: pytest.fail("the network was run"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another one"):
        train(model, digits, checkpoint_dir=tmp_path / "file")
    with pytest.raises(RecipeError, match="checkpoint_every is 0"):
        train(model, digits, checkpoint_every=0)


def test_bfloat16_trains_float32_weights_close_to_those_of_float32(digits: Dataset):
    kinds, found = [], {}
    for precision in ("float32", "bfloat16"):
        network = build("all_cnn", digits, seed=0, width=8, norm="batch")
        handle = network.get_submodule("conv2").register_forward_hook(lambda _m, _x, y: kinds.append(y.dtype))
        recipe = Recipe(epochs=2, lr=0.02, precision=precision)
        history = train(network, digits, recipe)
        handle.remove()
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
        found[precision] = history.train_loss[-1]
        assert history.train_loss[-1] < history.train_loss[0]
    assert set(kinds) == {torch.float32, torch.bfloat16}
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.2)


def test_mlp_learns_the_digits():
    train_set, test_set = load_data("digits"), load_data("digits", "test")
    history = train(build("mlp", train_set, seed=0), train_set, RECIPES["mlp"], test_set=test_set)
    assert history.test_accuracy[-1] >= 0.96
    assert history.train_loss[-1] < 0.05 < history.train_loss[0]


def test_resnet_learns_the_digits():
    train_set, test_set = load_data("digits"), load_data("digits", "test")
    history = train(resnet(8, in_channels=1, seed=0), train_set, Recipe(4, lr=0.1), test_set=test_set)
    assert history.test_accuracy[-1] >= 0.93


@pytest.mark.skipif(not (SHARED / "mnist").is_dir(), reason=f"no mnist in {SHARED}")
def test_mlp_learns_mnist():
    train_set = load_data("mnist", data_dir=SHARED, limit=6000)
    test_set = load_data("mnist", "test", data_dir=SHARED, limit=2000)
    recipe = dataclasses.replace(RECIPES["mlp"], epochs=4, batch_size=32)
    model = build("mlp", train_set, seed=0, widths=(256,))
    assert train(model, train_set, recipe, test_set=test_set).test_accuracy[-1] >= 0.92

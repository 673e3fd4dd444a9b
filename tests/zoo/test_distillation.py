"""Training on a teacher's targets: the loss by its definition, the same training by hand, errors."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from isthmus.base.errors import ArchitectureError, DataError, NotFiniteError
from isthmus.zoo import Dataset, Recipe, RecipeError, evaluate, load_data, mlp, train, train_until
from isthmus.zoo.distillation import SoftTargets, Subclassed, Taught, sum_subclasses, taught

UNEVEN = torch.tensor([1, 0, 2, 1, 1, 0])


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data("digits", limit=130)


def probabilities(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).softmax(1)


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 300))
def test_the_probability_of_a_class_is_the_sum_of_those_of_its_subclasses(seed: int, scale: float):
    scores = scale * torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = np.zeros((4, 3))
    for column, name in enumerate(UNEVEN.tolist()):
        expected[:, name] += softmax(scores.numpy())[:, column]
    found = sum_subclasses(scores, UNEVEN)
    assert bool(found.isfinite().all())
    np.testing.assert_allclose(found.softmax(1), expected, atol=1e-12)


def test_outputs_that_are_the_classes_are_left_as_they_are():
    scores = torch.randn(3, 4)
    assert sum_subclasses(scores, torch.arange(4)) is scores
    assert torch.equal(sum_subclasses(scores, torch.tensor([1, 0, 2, 3])), scores[:, [1, 0, 2, 3]])


@pytest.mark.parametrize("hard", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_by_its_definition(hard: float, temperature: float):
    scores = 3 * torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    targets, y = probabilities(5, 6), torch.tensor([0, 2, 1, 1, 0])
    z = scores.numpy().astype(np.float64)
    soft = -(targets.numpy() * np.log(softmax(z / temperature))).sum(1).mean()
    p = softmax(z)
    labelled = -np.mean([np.log(p[row, UNEVEN.numpy() == name].sum()) for row, name in enumerate(y.tolist())])
    expected = (1 - hard) * temperature**2 * soft + hard * labelled
    loss = SoftTargets(UNEVEN, temperature, hard)
    np.testing.assert_allclose(float(loss(scores, y, targets)), expected, rtol=1e-5)
    class_scores = loss.class_scores(scores).numpy()
    at_temperature = np.stack([softmax(z / temperature)[:, UNEVEN.numpy() == k].sum(1) for k in range(3)], 1)
    np.testing.assert_allclose(softmax(class_scores / temperature), at_temperature, atol=1e-6)


def test_the_gradient_of_soft_targets_scales_like_that_of_labels():
    """Hinton et al. 2015, section 2.1: at a high temperature the gradient goes to the difference of logits over N."""
    student, teacher = torch.randn(1, 4, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    student, teacher = student - student.mean(), teacher - teacher.mean()
    student.requires_grad_()
    high = 1e4
    SoftTargets(torch.arange(4), high)(student, torch.tensor([0]), (teacher / high).softmax(1)).backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 4, atol=1e-3, rtol=0)


def test_two_steps_by_hand(digits: Dataset):
    of_class = torch.arange(10).repeat_interleave(2)
    lesson = taught(digits, probabilities(130, 20), of_class)
    model = mlp(64, (), classes=20, seed=1)
    weight, bias = (value.numpy().astype(np.float64) for value in model.state_dict().values())
    recipe = Recipe(2, 1000, lr=0.3, momentum=0.0, weight_decay=0.0, schedule="constant", warmup_epochs=0)
    history = train(model, lesson, recipe, loss=SoftTargets(of_class, 2.0))
    x, q = lesson.inputs().flatten(1).numpy().astype(np.float64), lesson.targets.numpy()
    for step in range(2):
        z = x @ weight.T + bias
        summed = np.exp(z / 2).reshape(130, 10, 2).sum(2)
        assert history.train_accuracy[step] == pytest.approx((summed.argmax(1) == lesson.labels.numpy()).mean())
        p = softmax(z / 2)
        assert history.train_loss[step] == pytest.approx(-4 * (q * np.log(p)).sum() / 130, rel=1e-5)
        difference = 2 * (p - q) / 130
        weight, bias = weight - 0.3 * difference.T @ x, bias - 0.3 * difference.sum(0)
    np.testing.assert_allclose(model.get_parameter("fc1.weight").detach(), weight, atol=1e-5)
    np.testing.assert_allclose(model.get_parameter("fc1.bias").detach(), bias, atol=1e-5)


def test_one_hot_targets_are_the_labels(digits: Dataset):
    """The same orders of images and the same loss, so the same network as by cross-entropy, but for rounding."""
    recipe = Recipe(epochs=2, batch_size=32)
    one, other, resumed = (mlp(64, (8,), seed=0) for _ in range(3))
    lesson = taught(digits, torch.eye(10)[digits.labels])
    plain, soft = train(one, digits, recipe), train(other, lesson, recipe)
    np.testing.assert_allclose(soft.train_loss, plain.train_loss, rtol=1e-5)
    assert soft.train_accuracy == plain.train_accuracy
    train_until(resumed, lesson, recipe, stop=10)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, one.state_dict()[name], atol=1e-5, rtol=1e-4)
        assert torch.equal(value, resumed.state_dict()[name])


def test_testing_sums_subclasses(digits: Dataset):
    of_class = torch.arange(10).repeat_interleave(2)
    model, loss = mlp(64, (8,), classes=20, seed=0), SoftTargets(of_class, 3.0)
    model.eval()
    history = train(
        model, taught(digits, probabilities(130, 20), of_class), Recipe(epochs=1), test_set=digits, loss=loss
    )
    assert (history.test_loss[0], history.test_accuracy[0]) == evaluate(Subclassed(model, of_class, 3.0), digits)
    assert not model.training


def test_a_loss_of_ones_own(digits: Dataset):
    class Centred(nn.Module):
        def forward(self, scores: Tensor, y: Tensor) -> Tensor:
            return (scores - torch.eye(10)[y]).square().sum(1).mean()

    model = mlp(64, (), seed=0)
    x, y = digits.inputs().flatten(1), torch.eye(10)[digits.labels]
    history = train(
        model, digits, Recipe(30, 130, lr=0.01, weight_decay=0.0, schedule="constant"), loss=Centred(), test_set=digits
    )
    assert history.train_loss[-1] < history.train_loss[0] / 2
    inputs = np.concatenate([x.numpy(), np.ones((130, 1))], 1)
    best = np.linalg.lstsq(inputs, y.numpy(), rcond=1e-6)[0]
    assert history.train_loss[-1] > np.square(inputs @ best - y.numpy()).sum(1).mean()
    assert history.test_accuracy[-1] > 0.8


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda scores, y: (scores - 1).square().sum(1), r"a tensor of shape \(64,\); expected a scalar"),
        (lambda scores, y: torch.tensor(1.0), "expected a scalar that depends on the outputs"),
        (lambda scores, y: 1.0, "the loss gave float"),
    ],
)
def test_a_loss_that_is_no_scalar(digits: Dataset, loss, message: str):
    model = mlp(64, (), seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RecipeError, match=message):
        train(model, digits, Recipe(batch_size=64), loss=loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_smoothing_is_of_labels_only(digits: Dataset):
    smooth = Recipe(epochs=1, label_smoothing=0.1)
    with pytest.raises(RecipeError, match=r"label_smoothing \(0.1\) is part of the cross-entropy"):
        train(mlp(64, ()), digits, smooth, loss=lambda scores, y: scores.mean())
    with pytest.raises(RecipeError, match="label_smoothing"):
        train(mlp(64, ()), taught(digits, probabilities(130, 10)), smooth)


def test_a_taught_data_set_stays_one(digits: Dataset):
    lesson = taught(digits, probabilities(130, 12).double(), [*range(10), 0, 1])
    moved = lesson.to("cpu")
    assert isinstance(moved, Taught)
    assert moved.targets.dtype == torch.float32
    assert torch.equal(moved.targets, lesson.targets)
    assert torch.equal(moved.labels, digits.labels)


def test_what_cannot_be_taught(digits: Dataset):
    good = probabilities(130, 10)
    with pytest.raises(DataError, match=r"targets of shape \(129, 10\).*expected floating point of shape \(130, 10\)"):
        taught(digits, good[1:])
    with pytest.raises(DataError, match="do not sum to 1"):
        taught(digits, good * 2)
    with pytest.raises(DataError, match="negative"):
        taught(digits, good - torch.eye(10)[digits.labels] + torch.eye(10)[(digits.labels + 1) % 10])
    with pytest.raises(NotFiniteError, match=r"targets of shape \(130, 10\) hold NaN"):
        taught(digits, torch.where(good == good[3, 3], torch.nan, good))
    with pytest.raises(DataError, match=r"of_class is \[0, 1, 2\].*expected one int64 class for each output, 0 to 9"):
        taught(digits, good[:, :3], [0, 1, 2])
    with pytest.raises(DataError, match="of_class is of shape"):
        taught(digits, good, torch.zeros(5, 5))
    with pytest.raises(DataError, match="expected floating point"):
        dataclasses.replace(taught(digits, good), targets=torch.eye(10, dtype=torch.int64)[digits.labels])


def test_a_taught_training_that_does_not_fit(digits: Dataset):
    lesson = taught(digits, probabilities(130, 20), torch.arange(10).repeat_interleave(2))
    with pytest.raises(ArchitectureError, match=r"10 outputs but the targets of digits 20; make it with classes=20"):
        train(mlp(64, (), seed=0), lesson)
    with pytest.raises(RecipeError, match="augment changes the images"):
        train(mlp(64, (), classes=20), lesson, Recipe(augment=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"hard": 1.5}, "hard is 1.5"),
        ({"of_class": torch.tensor([0, 2])}, r"of_class is \[0, 2\]"),
        ({"of_class": torch.zeros(0, dtype=torch.int64)}, r"of_class is \[\]"),
    ],
)
def test_losses_that_cannot_be(values: dict, message: str):
    with pytest.raises(DataError, match=message):
        SoftTargets(**{"of_class": torch.arange(3), **values})


def test_a_subclassed_network_keeps_its_classes_with_its_weights():
    network = Subclassed(nn.Linear(4, 6), UNEVEN)
    assert torch.equal(network.state_dict()["of_class"], UNEVEN)
    x = torch.randn(5, 4)
    torch.testing.assert_close(network(x), sum_subclasses(network.network(x), UNEVEN))

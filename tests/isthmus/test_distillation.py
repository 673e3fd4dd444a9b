"""Distillation: what each method teaches, against numpy; pairs of students; statistics against scipy; errors."""

import json
from collections.abc import Callable
from typing import Any, cast

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from isthmus.base.errors import ArchitectureError, DataError, LayerNotFoundError
from isthmus.distillation import Difference, Distillation, compare_distillation, distil
from isthmus.lessons import METHODS, Method, Seen, Teaching, ask, lesson
from isthmus.zoo import Coarse, Recipe, all_cnn, coarsen, load_data, mlp, train
from isthmus.zoo.distillation import Taught

mpl.use("Agg")

GROUPS = [[0, 3, 5, 8], [1, 2, 4, 6, 7, 9]]
QUICK = Recipe(epochs=2, batch_size=64, lr=0.1)


@pytest.fixture(scope="module")
def data() -> Coarse:
    return coarsen(load_data("digits", limit=240), GROUPS)


@pytest.fixture(scope="module")
def test_set(data: Coarse):
    return coarsen(load_data("digits", "test"), data.groups).dataset


@pytest.fixture(scope="module")
def teacher(data: Coarse) -> nn.Module:
    model = mlp(64, (24,), classes=2, seed=0)
    train(model, data.dataset, Recipe(epochs=12, batch_size=32, lr=0.1))
    return model


@pytest.fixture(scope="module")
def seen(teacher: nn.Module, data: Coarse) -> Seen:
    return ask(teacher, data.dataset)


def student(outputs: int) -> nn.Module:
    return mlp(64, (8,), classes=outputs)


def test_a_teacher_is_asked_for_what_its_classifier_reads(teacher: nn.Module, data: Coarse):
    teacher.train()
    found = ask(teacher, data.dataset)
    assert teacher.training
    x = data.dataset.inputs().flatten(1).numpy()
    state = {name: value.numpy() for name, value in teacher.state_dict().items()}
    features = np.maximum(x @ state["fc1.weight"].T + state["fc1.bias"], 0)
    np.testing.assert_allclose(found.features, features, atol=1e-4)
    np.testing.assert_allclose(found.logits, features @ state["fc2.weight"].T + state["fc2.bias"], atol=1e-4)
    assert torch.equal(found.weight, teacher.get_parameter("fc2.weight").detach())


def test_a_convolutional_classifier_reads_averages(data: Coarse):
    model = all_cnn(1, classes=2, width=4, norm="batch", seed=0).eval()
    found = ask(model, data.dataset)
    assert found.features.shape == (240, 8)
    bias = model.get_parameter("classifier.bias").detach()
    torch.testing.assert_close(found.features @ found.weight.T + bias, found.logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "labels"])
def test_targets_sum_back_to_the_teachers_softened_probabilities(method: Method, seen: Seen, data: Coarse):
    teaching = Teaching(count=3, temperature=5.0)
    found = lesson(method, seen, data, teaching, seed=1)
    assert isinstance(found, Taught)
    logits = seen.logits.numpy().astype(np.float64) / 5
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    summed = np.zeros((240, 2))
    np.add.at(summed.T, found.of_class.numpy(), found.targets.numpy().T.astype(np.float64))
    np.testing.assert_allclose(summed, p, atol=1e-6)
    wanted = {"logits": 2, "oracle": 10}.get(method, 6)
    assert found.targets.shape == (240, wanted)
    again = lesson(method, seen, data, teaching, seed=1)
    assert isinstance(again, Taught)
    assert torch.equal(found.targets, again.targets)


def test_labels_are_the_data_set_itself(data: Coarse):
    assert lesson("labels", None, data) is data.dataset


def test_the_oracle_knows_fine_labels(seen: Seen, data: Coarse):
    found = lesson("oracle", seen, data)
    assert isinstance(found, Taught)
    order = [fine for group in GROUPS for fine in group]
    p = (seen.logits.double() / Teaching().temperature).softmax(1)
    for row in (0, 7, 100):
        own, fine = int(data.dataset.labels[row]), int(data.fine[row])
        expected = np.zeros(10)
        expected[order.index(fine)] = p[row, own]
        for place, name in enumerate(order):
            if name not in GROUPS[own]:
                expected[place] = p[row, 1 - own] / len(GROUPS[1 - own])
        np.testing.assert_allclose(found.targets[row], expected, atol=1e-6)


def test_a_deal_keeps_the_shares_of_a_class_but_not_whose_they_are(seen: Seen, data: Coarse):
    kept, dealt = (lesson(name, seen, data, Teaching(count=4), seed=2) for name in ("projection", "dealt"))
    assert isinstance(kept, Taught)
    assert isinstance(dealt, Taught)
    for name in (0, 1):
        rows = data.dataset.labels == name
        shares: list[Tensor] = []
        for each in (kept, dealt):
            joint = each.targets[rows].reshape(-1, 2, 4).double()
            shares.append(joint[:, name] / joint[:, name].sum(1, keepdim=True))
        torch.testing.assert_close(shares[0].sort(0).values, shares[1].sort(0).values, atol=1e-5, rtol=1e-4)
        assert float((shares[0] - shares[1]).abs().mean()) > 0.02


def test_students_of_one_seed_start_alike_and_training_follows_the_lesson(seen: Seen, data: Coarse):
    starts: dict[int, dict[str, Tensor]] = {}

    def remembered(outputs: int) -> nn.Module:
        model = student(outputs)
        starts[outputs] = {name: value.clone() for name, value in model.state_dict().items()}
        return model

    teaching = Teaching(count=3, temperature=2.0, hard=0.25)
    for method in ("logits", "projection"):
        distil(seen, remembered, data, QUICK, method=method, teaching=teaching, seed=3)
    assert set(starts) == {2, 6}
    assert torch.equal(starts[2]["fc1.weight"], starts[6]["fc1.weight"])
    first, again, other = (distil(seen, student, data, QUICK, teaching=teaching, seed=seed) for seed in (3, 3, 4))
    for name, value in first.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name])
    assert not torch.equal(*(each.network.state_dict()["fc1.weight"] for each in (first, other)))
    x = data.dataset.inputs()
    summed = (first.network(x) / 2).softmax(1).reshape(-1, 2, 4 - 1).sum(2)
    torch.testing.assert_close((first.model(x) / 2).softmax(1), summed)


def test_a_distilled_student_follows_its_teacher(teacher: nn.Module, data: Coarse):
    """With enough training the student agrees with what it was taught, not only with the labels."""
    wrong = mlp(64, (24,), classes=2, seed=0)
    wrong.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        wrong.get_parameter("fc2.weight").neg_()
        wrong.get_parameter("fc2.bias").neg_()
    recipe, teaching = Recipe(epochs=12, batch_size=32, lr=0.1), Teaching(count=2, temperature=1.0)
    assert distil(wrong, student, data, recipe, teaching=teaching).train_accuracy < 0.2
    assert distil(teacher, student, data, recipe, teaching=teaching).train_accuracy > 0.8


@pytest.fixture(scope="module")
def compared(teacher: nn.Module, data: Coarse, test_set) -> Distillation:
    other = mlp(64, (24,), classes=2, seed=5)
    methods: tuple[Method, ...] = ("labels", "logits", "projection")
    return compare_distillation(
        [teacher, other], student, data, test_set, QUICK, methods=methods, teaching=Teaching(count=2), seeds=(0, 1, 2)
    )


def test_comparison_is_of_single_students(compared: Distillation, teacher: nn.Module, data: Coarse, test_set):
    assert compared.accuracies.shape == (3, 3)
    assert compared.teachers[0] == compared.teachers[2] > compared.teachers[1]
    one = distil(teacher, student, data, QUICK, teaching=Teaching(count=2), seed=2)
    right = (one.model(test_set.inputs()).argmax(1) == test_set.labels).double().mean()
    assert float(compared.accuracies[2, 2]) == pytest.approx(float(right))
    plain = distil(None, student, data.dataset, QUICK, method="labels", seed=1)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(plain.network(test_set.inputs()), test_set.labels)
    assert float(compared.losses[0, 1]) == pytest.approx(float(loss), rel=1e-5)


def result(
    accuracies: list[list[float]], methods: tuple[str, ...] = ("labels", "logits", "projection")
) -> Distillation:
    values = torch.tensor(accuracies, dtype=torch.float64)
    seeds = tuple(range(values.shape[1]))
    return Distillation(methods, seeds, values, values, values[0], {"images": 10, "classes": ("a", "b")})


def test_differences_by_scipy():
    values = np.random.default_rng(0).uniform(0.8, 0.9, (3, 5))
    found = result(values.tolist()).difference("projection", "labels", level=0.9)
    test = stats.ttest_rel(values[2], values[0])
    low, high = test.confidence_interval(0.9)
    assert found.p_value == pytest.approx(float(test.pvalue))  # pyright: ignore[reportAttributeAccessIssue]
    assert (found.low, found.high) == pytest.approx((float(low), float(high)))
    assert found.mean == pytest.approx((values[2] - values[0]).mean())
    assert found.differences == pytest.approx(tuple(values[2] - values[0]))


@pytest.mark.parametrize(
    ("shift", "beyond", "p"),
    [([0.01, 0.011, 0.012], True, None), ([0.01, -0.01, 0.0], False, 1.0), ([0.0] * 3, False, 1.0)],
)
def test_noise_is_told_from_a_gain(shift: list[float], beyond: bool, p: float | None):
    base = [0.5, 0.625, 0.75]
    found = result([base, base, [x + y for x, y in zip(base, shift, strict=True)]]).difference("projection")
    assert found.beyond_noise is beyond
    if p is not None:
        assert found.p_value == pytest.approx(p)
    assert Difference("a", "b", (0.0,), -0.1, -0.2, -0.05, 0.01, 0.95).beyond_noise


def test_equal_gains_leave_no_doubt():
    found = result([[0.5, 0.25], [0.5, 0.25], [0.75, 0.5]]).difference("projection")
    assert (found.mean, found.low, found.high, found.p_value) == (0.25, 0.25, 0.25, 0.0)


def test_the_table_and_the_dictionary_say_the_same():
    found = result([[0.5, 0.6], [0.55, 0.66], [0.7, 0.82]])
    assert repr(found) == "Distillation(3 methods, 2 seeds)"
    lines = found.table.splitlines()
    assert lines[0].split() == ["method", "accuracy", "%", "sd", "less", "labels", "less", "logits"]
    assert lines[3].split()[:4] == ["projection", "76.00", "8.49", "+21.00"]
    assert "*" in lines[3]
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["accuracies"] == [[0.5, 0.6], [0.55, 0.66], [0.7, 0.82]]
    pairs = [(each["method"], each["against"]) for each in plain["differences"]]
    assert pairs == [("logits", "labels"), ("projection", "labels"), ("labels", "logits"), ("projection", "logits")]
    assert plain["differences"][1]["mean"] == pytest.approx(0.21)


def test_one_seed_has_no_interval():
    found = result([[0.5], [0.6]], ("projection", "oracle"))
    assert found.baselines == ("projection",)
    assert found.to_dict()["differences"] == []
    assert found.table.splitlines()[1].split() == ["projection", "50.00", "–", "–"]
    with pytest.raises(DataError, match=r"an interval of level 0\.95 from 1 seeds"):
        found.difference("oracle", "projection")


def test_the_picture_shows_each_seed_and_the_interval():
    found = result([[0.5, 0.6], [0.55, 0.66], [0.7, 0.82]])
    ax = found.plot()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["labels", "projection"]
    assert "logits" in ax.get_xlabel()
    np.testing.assert_allclose(np.asarray(ax.lines[0].get_xdata()), [-5, -6])
    again = found.plot(ax, against="labels")
    assert again is ax
    with pytest.raises(DataError, match="no method 'logit' was measured; did you mean logits"):
        found.plot(against="logit")
    plt.close("all")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t, d, e: lesson(cast(Any, "projections"), ask(t, d.dataset), d), "did you mean projection"),
        (lambda t, d, e: lesson("logits", None, d), "no teacher for 240 images of 2 classes; pass what ask"),
        (lambda t, d, e: lesson("logits", ask(t, e), d), r"logits of shape \(359, 2\) for 240 images"),
        (lambda t, d, e: lesson("oracle", ask(t, d.dataset), d.dataset), "'oracle' needs fine labels"),
        (lambda t, d, e: lesson("logits", ask(t, d.dataset), d, Teaching(temperature=0)), "temperature is 0"),
        (lambda t, d, e: ask(t, load_data("digits", limit=50)), "the teacher has 2 outputs, but digits 10 classes"),
        (lambda t, d, e: compare_distillation(t, student, d, e, methods=()), r"methods are \[\]"),
        (lambda t, d, e: compare_distillation(t, student, d, e, methods=("labels",) * 2), "each once"),
        (lambda t, d, e: compare_distillation(t, student, d, e, seeds=()), "0 seeds, 1 teachers"),
        (lambda t, d, e: compare_distillation([], student, d, e), "5 seeds, 0 teachers"),
        (lambda t, d, e: compare_distillation(t, student, d, load_data("digits", "test")), "10 classes to test 2"),
    ],
)
def test_bad_input_is_named(call: Callable, message: str, teacher: nn.Module, data: Coarse, test_set):
    with pytest.raises(DataError, match=message):
        call(teacher, data, test_set)


def test_networks_that_cannot_be(teacher: nn.Module, data: Coarse):
    with pytest.raises(LayerNotFoundError, match="no linear layer gives the network's outputs"):
        ask(nn.Sequential(nn.Flatten(), nn.Linear(64, 2), nn.Sigmoid()), data.dataset)
    with pytest.raises(ArchitectureError, match="make it with classes=4"):
        distil(teacher, lambda outputs: mlp(64, (4,), classes=3), data, QUICK)

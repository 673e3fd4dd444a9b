"""Candidates compared by midpoint loss: who wins, by how much, and what did not apply."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus.align import symmetry
from isthmus.align.nets.auto import auto
from isthmus.align.nets.midpoint import midpoint_loss
from isthmus.align.permutation import Permutation
from isthmus.base.errors import DataError


@dataclass(frozen=True)
class Result:
    permutation: Permutation
    objective: float = 0.0


@dataclass(frozen=True)
class Setting:
    a: nn.Module
    b: nn.Module
    found: Any
    planted: Permutation
    data: tuple[Tensor, Tensor]

    def draw(self, seed: int) -> Permutation:
        return self.found.random(torch.Generator().manual_seed(seed))

    def run(self, candidates: list[str], methods: dict[str, Any], **options: Any) -> Any:
        return auto(candidates, methods, self.found, self.a, self.b, options.pop("data", self.data), **options)


@pytest.fixture(scope="module")
def setting() -> Setting:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        a = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3))
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a.get_parameter("2.weight").mul_(20)  # so that its own answers have a low loss
        y = a(x).argmax(1)
    found = symmetry(a, x)
    planted = found.random(torch.Generator().manual_seed(1))
    return Setting(a, planted.apply(a), found, planted, (x, y))


def refuse() -> Result:
    raise DataError("it takes labels")


def test_the_lowest_midpoint_loss_wins(setting: Setting) -> None:
    right, wrong = setting.planted.inverse(), setting.draw(7)
    methods = {"wrong": lambda: Result(wrong, 5.0), "right": lambda: Result(right, 3.0), "unused": refuse}
    found = setting.run(["wrong", "right"], methods)
    assert found.winner == "right"
    assert found.permutation == right
    assert found.result.objective == 3.0
    losses = {line.method: line.loss for line in found.table}
    assert list(losses) == ["identity", "wrong", "right"]
    for name, permutation in (("identity", setting.found.identity()), ("wrong", wrong), ("right", right)):
        measured = midpoint_loss(setting.a, permutation.apply(setting.b), setting.data)
        line = next(line for line in found.table if line.method == name)
        assert (line.loss, line.accuracy) == pytest.approx((measured.loss, measured.metric))
        expected = measured.loss - losses["right"] if name != "right" else -found.margin
        assert line.margin == pytest.approx(expected)
    others = sorted((losses[name], name) for name in ("identity", "wrong"))
    assert found.runner_up == others[0][1]
    assert found.margin == pytest.approx(others[0][0] - losses["right"])
    assert found.margin > 0
    assert found.samples == 40


def test_a_method_that_makes_it_worse_does_not_win(setting: Setting) -> None:
    found = auto(
        ["wrong"], {"wrong": lambda: Result(setting.draw(3))}, setting.found, setting.a, setting.a, setting.data
    )
    assert found.winner == "identity"
    assert found.permutation.is_identity
    assert found.result is None
    assert found.runner_up == "wrong"


def test_of_equals_the_first_wins_and_is_measured_once(setting: Setting) -> None:
    right = setting.planted.inverse()
    runs = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        runs.append(1)
        return nn.functional.cross_entropy(outputs, targets)

    methods = {"one": lambda: Result(right), "two": lambda: Result(right), "none": lambda: Result(right.inverse())}
    found = setting.run(["two", "one"], methods, loss=loss)
    assert found.winner == "two"
    assert found.runner_up == "one"
    assert found.margin == 0
    assert [line.same_as for line in found.table] == [None, None, "two"]
    assert len(runs) == 2  # the identity and one more
    assert "as two" in str(found)
    assert found.table[1].accuracy is None


def test_what_does_not_apply_is_listed_with_its_reason(setting: Setting) -> None:
    methods = {"picky": refuse, "right": lambda: Result(setting.planted.inverse())}
    found = setting.run(["picky", "right"], methods)
    assert found.winner == "right"
    picky = found.table[1]
    assert (picky.method, picky.loss, picky.margin, picky.reason) == ("picky", None, None, "it takes labels")
    assert "it takes labels" in str(found)
    assert "<- lowest" in str(found)
    read = json.loads(json.dumps(found.to_dict()))
    assert read["winner"] == "right"
    assert [line["method"] for line in read["table"]] == ["identity", "picky", "right"]


def test_none_that_applies_is_an_error(setting: Setting) -> None:
    with pytest.raises(DataError, match="none of the methods applies: picky: it takes labels"):
        setting.run(["picky"], {"picky": refuse})


def test_the_identity_may_be_the_only_one(setting: Setting) -> None:
    found = setting.run(["identity"], {})
    assert (found.winner, found.runner_up, found.margin) == ("identity", None, None)
    assert found.table[0].margin is None


def test_a_loss_that_is_not_a_number_never_wins(setting: Setting) -> None:
    def loss(outputs: Tensor, _: Any) -> float:
        return float("nan") if outputs.shape[1] and not seen.append(1) and len(seen) == 1 else 2.0

    seen: list[int] = []
    found = setting.run(["right"], {"right": lambda: Result(setting.planted.inverse())}, loss=loss)
    assert found.winner == "right"


def test_faults_in_a_method_are_not_hidden(setting: Setting) -> None:
    def broken() -> Result:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        setting.run(["broken"], {"broken": broken})


def test_wrong_input_is_refused_before_any_method_runs(setting: Setting) -> None:
    def never() -> Result:
        raise AssertionError("it ran")

    methods = {"weights": never}
    x, _ = setting.data
    for candidates, options, message in (
        ([], {}, "expected a list of methods"),
        ("weights", {}, "expected a list of methods"),
        (["wieghts"], {}, "unknown matching method 'wieghts'; did you mean weights"),
        (["weights", "weights"], {}, "named twice"),
        (["weights"], {"data": iter([setting.data])}, "which can be read once"),
        (["weights"], {"data": x}, "no labels"),
    ):
        with pytest.raises(DataError, match=message):
            setting.run(candidates, methods, **options)  # pyright: ignore[reportArgumentType]

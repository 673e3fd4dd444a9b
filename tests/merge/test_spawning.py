"""Forks of one training: a landscape whose valleys are known, a convex one, folders that were left halfway."""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isthmus.base.errors import ArchitectureError, CheckpointError, DataError, NotFiniteError, OutputError
from isthmus.base.files import load_state_dict
from isthmus.merge import Path as Line
from isthmus.merge.spawning import Spawning, Train, spawn
from isthmus.merge.spawning.forking import default_steps

mpl.use("Agg")

# Valleys: one weight w, loss (w² − 1)², begun at the ridge between its two minima

POINT = [(torch.ones(1, 1), torch.zeros(1, 1))]


def ridge() -> nn.Module:
    layer = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    return layer.float()


def quartic(outputs: Tensor, _: Any) -> Tensor:
    return ((outputs**2 - 1) ** 2).mean()


def descend(checkpoint: Any, start: int, stop: int, seed: int) -> dict[str, Any]:
    """The first step goes to the left with an odd seed, to the right with an even one; the others go downhill."""
    w = 0.0 if checkpoint is None else float(checkpoint["model"]["weight"])
    for step in range(start, stop):
        noise = np.random.default_rng([seed, step]).normal() * 1e-4
        w += (0.5 if seed % 2 == 0 else -0.5) if step == 0 else noise - 0.05 * 4 * w * (w**2 - 1)
    return {"model": {"weight": torch.tensor([[w]])}}


def valleys(**options: Any) -> Spawning:
    given = {"total": 60, "at": (5, 0, 1, 5), "points": 5, "loss": quartic}
    return spawn(descend, ridge(), POINT, **{**given, **options})


def test_the_step_that_chooses_the_valley_is_found():
    found = valleys(children=3)
    assert found.steps == (0, 1, 5)
    assert found.seeds == (1, 2, 3)
    assert found.pairs == ((1, 2), (1, 3), (2, 3))
    # from −1 over the ridge at 0 to 1, where the loss is 1
    np.testing.assert_allclose(found.pair_barriers, [[1, 0, 1], [0, 0, 0], [0, 0, 0]], atol=1e-3)
    np.testing.assert_allclose(found.barriers, [2 / 3, 0, 0], atol=1e-3)
    assert found.stable_from(0.02, "loss") == 1
    assert found.error_barriers is found.instability is found.pair_error_barriers is None


def test_a_metric_has_error_barriers():
    def inside(outputs: Tensor, _: Any) -> Tensor:
        return 1 - quartic(outputs, None)

    found = valleys(metric=inside, points=3)
    for values in (found.error_barriers, found.instability):
        assert values is not None
        np.testing.assert_allclose(values, [1, 0, 0], atol=1e-3)
    assert found.stable_from() == found.stable_from(0.02, "error") == 1


# Two layers, for which momentum matters, against barriers computed here in float64

X = torch.linspace(-2, 2, 48)[:, None]
Y = (X.squeeze().abs() > 1).long()
DATA = [(X[:20], Y[:20]), (X[20:], Y[20:])]


def network(seed: int = 0, width: int = 6) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, 2))


def learn(checkpoint: Any, start: int, stop: int, seed: int) -> dict[str, Any]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])  # and trains on these very tensors
    for step in range(start, stop):
        rows = torch.randint(48, (4,), generator=torch.Generator().manual_seed(1_000_003 * seed + step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X[rows]), Y[rows]).backward()
        optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "note": ("a", 1, None)}


def walked(a: dict[str, Any], b: dict[str, Any], points: int) -> tuple[float, float, float]:
    """Loss barrier, error barrier and instability of two children, in numpy."""
    losses, errors = [], []
    for alpha in np.linspace(0, 1, points):
        w = {k: (1 - alpha) * a["model"][k].numpy() + alpha * b["model"][k].numpy() for k in a["model"]}
        hidden = np.maximum(X.numpy().astype(float) @ w["0.weight"].T + w["0.bias"], 0)
        scores = hidden @ w["2.weight"].T + w["2.bias"]
        log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        losses.append(-log_p[np.arange(48), Y.numpy()].mean())
        errors.append((scores.argmax(1) != Y.numpy()).mean())
    chord = np.linspace(0, 1, points)
    above = [max(v - (1 - chord) * v[0] - chord * v[-1]) for v in (np.array(losses), np.array(errors))]
    return above[0], above[1], max(errors) - (errors[0] + errors[-1]) / 2


def learned(**options: Any) -> Spawning:
    return spawn(
        options.pop("train", learn), network(9), DATA, **{"total": 30, "at": (0, 7, 30), "points": 5, **options}
    )


def test_barriers_are_those_of_children_trained_by_hand():
    found = learned(children=3)
    assert found.error_barriers is not None
    assert found.instability is not None
    for place, step in enumerate(found.steps):
        trunk = learn(None, 0, step, 0)
        children = [learn(copy.deepcopy(trunk), step, 30, seed) for seed in (1, 2, 3)]
        expected = np.array([walked(a, b, 5) for a, b in itertools.combinations(children, 2)]).mean(0)
        row = [found.barriers[place], found.error_barriers[place], found.instability[place]]
        np.testing.assert_allclose(row, expected, atol=1e-5)
    assert found.barriers[0] > 0.01
    # forks at the end are the trunk itself
    assert found.barriers[-1] == found.error_barriers[-1] == found.instability[-1] == 0


def test_the_same_again_bit_for_bit_and_without_a_trace():
    model = network(9).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first = spawn(learn, model, DATA, total=30, at=(0, 7), points=5)
    assert first.to_dict() == learned(at=(0, 7)).to_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert learned(at=(0, 7), seed=5).to_dict() != first.to_dict()
    # the trunk is of no account at step 0
    at_zero = learned(at=(0,), seed=5, children=(1, 2))
    np.testing.assert_array_equal(at_zero.barriers, first.barriers[:1])


def test_a_convex_problem_has_no_barrier():
    x, y = torch.linspace(-1, 1, 10)[:, None].double(), torch.linspace(0, 3, 10)[:, None].double()

    def regress(checkpoint: Any, start: int, stop: int, seed: int) -> dict[str, Any]:
        w, b = (0.0, 0.0) if checkpoint is None else (float(checkpoint["model"][k]) for k in ("weight", "bias"))
        for step in range(start, stop):
            i = np.random.default_rng([seed, step]).integers(10)
            residual = w * float(x[i]) + b - float(y[i])
            w, b = w - 0.2 * residual * float(x[i]), b - 0.2 * residual
        return {"model": {"weight": torch.tensor([[w]]).double(), "bias": torch.tensor([b]).double()}}

    model = nn.Linear(1, 1, dtype=torch.float64)
    found = spawn(regress, model, [(x, y)], total=40, at=range(0, 41, 10), points=5, loss=nn.functional.mse_loss)
    np.testing.assert_allclose(found.barriers, 0, atol=1e-12)
    assert all(path.loss.max() > 0 for path in found.paths[0])


def test_repair_is_that_of_connect():
    def with_norm() -> nn.Module:
        return nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))

    def train(checkpoint: Any, start: int, stop: int, seed: int) -> dict[str, Any]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return {"model": with_norm().state_dict()}

    found = spawn(train, with_norm(), DATA, total=3, at=(0,), points=3, repair="reset", repair_data=DATA[:1])
    assert found.paths[0][0].repair == "reset"


# What is trained, and what is not trained again


class Counting:
    """Notes what it is asked to train; breaks off at a call, if told to."""

    def __init__(self, breaks_at: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.calls: list[tuple[int, int, int]] = []
        self.breaks_at, self.error = breaks_at, error

    def __call__(self, checkpoint: Any, start: int, stop: int, seed: int) -> dict[str, Any]:
        if len(self.calls) == self.breaks_at:
            raise self.error
        assert (checkpoint is None) == (start == 0 and not self.calls)
        self.calls.append((start, stop, seed))
        return learn(checkpoint, start, stop, seed)


class Resumed(Counting):
    """As a first call in a folder that holds a trunk: no checkpoint is None."""

    def __call__(self, checkpoint: Any, start: int, stop: int, seed: int) -> dict[str, Any]:
        self.calls.append((start, stop, seed))
        return learn(checkpoint, start, stop, seed)


WHOLE = [(0, 0, 0), (0, 30, 1), (0, 30, 2), (0, 7, 0), (7, 30, 1), (7, 30, 2), (7, 12, 0), (12, 30, 1), (12, 30, 2)]


@pytest.mark.parametrize("kept", [False, True])
def test_the_trunk_is_trained_once(kept: bool, tmp_path: Path):
    train = Counting()
    folder = {"folder": tmp_path, "recipe": {}} if kept else {}
    learned(train=train, at=(7, 0, 12), **folder)
    assert train.calls == WHOLE


def test_what_is_in_the_folder_is_not_trained_again(tmp_path: Path):
    folder = {"folder": tmp_path / "new" / "runs", "recipe": {"lr": 0.3, "data": [1, 2]}}
    first = learned(**folder)
    names = [f"trunk-0-step-{step:06d}{end}.pt" for step in (0, 7, 30) for end in ("-child-1", "-child-2", "")]
    assert sorted(path.name for path in (tmp_path / "new" / "runs").iterdir()) == sorted(names)
    again = Resumed()
    assert learned(train=again, **folder).to_dict() == first.to_dict() == learned().to_dict()
    assert again.calls == []
    # further steps and children begin at what there is, whatever comes after it
    more = Resumed()
    found = learned(train=more, at=(0, 12), children=3, **folder)
    assert more.calls == [(0, 30, 3), (7, 12, 0), (12, 30, 1), (12, 30, 2), (12, 30, 3)]
    assert found.to_dict() == learned(at=(0, 12), children=3).to_dict()
    # another trunk has files of its own
    other = Resumed()
    learned(train=other, at=(7,), seed=1, **folder)
    assert other.calls == [(0, 7, 1), (7, 30, 2), (7, 30, 3)]


def test_a_child_is_a_checkpoint_for_every_command(tmp_path: Path):
    learned(folder=tmp_path, recipe={})
    state = load_state_dict(tmp_path / "trunk-0-step-000007-child-2.pt")
    expected = learn(learn(None, 0, 7, 0), 7, 30, 2)["model"]
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    trunk = torch.load(tmp_path / "trunk-0-step-000007.pt", weights_only=True)
    assert trunk["note"] == ("a", 1, None)
    assert trunk["spawning"]["total"] == 30


@pytest.mark.parametrize(("calls", "error"), [*((n, KeyboardInterrupt) for n in range(9)), (4, RuntimeError)])
def test_after_an_interruption_the_next_call_goes_on(calls: int, error: type[BaseException], tmp_path: Path):
    options = {"at": (0, 7, 12), "folder": tmp_path, "recipe": {"lr": 0.3}}
    with pytest.raises(error):
        learned(train=Counting(calls, error), **options)
    files = list(tmp_path.iterdir())
    assert len(files) == calls
    assert all("model" in torch.load(file, weights_only=True) for file in files)
    rest = Resumed()
    assert learned(train=rest, **options).to_dict() == learned(at=(0, 7, 12)).to_dict()
    assert rest.calls == WHOLE[calls:]


def test_an_interruption_while_writing_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            learned(folder=tmp_path, recipe={})
    assert list(tmp_path.iterdir()) == []


# Files that are refused


def refused(tmp_path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        learned(train=Resumed(), **{"at": (7,), "folder": tmp_path, "recipe": {"lr": 0.3, "data": (1, 2)}, **options})
    return str(caught.value)


def test_files_of_another_training_are_refused(tmp_path: Path):
    recipe = {"lr": 0.3, "data": (1, 2)}
    learned(at=(7,), folder=tmp_path, recipe=recipe)
    learned(at=(7,), folder=tmp_path, recipe={**recipe, "data": [1, 2]})  # which says the same
    assert "its lr is 0.3, that of this one 0.1" in refused(tmp_path, recipe={**recipe, "lr": 0.1})
    assert "its decay is 'absent', that of this one 0" in refused(tmp_path, recipe={**recipe, "decay": 0})
    assert "its data is [1, 2], that of this one 'absent'" in refused(tmp_path, recipe={"lr": 0.3})
    assert "its total is 30, that of this one 31" in refused(tmp_path, total=31)
    with pytest.raises(ArchitectureError, match=r"child kept of step 7 and seed 1.*\(6, 1\)"):
        spawn(learn, network(width=7), DATA, total=30, at=(7,), folder=tmp_path, recipe=recipe)
    for child in tmp_path.glob("*child*"):
        child.unlink()
    with pytest.raises(ArchitectureError, match="trunk kept at step 7"):
        spawn(learn, network(width=7), DATA, total=30, at=(7,), folder=tmp_path, recipe=recipe)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path):
    file = tmp_path / "trunk-0-step-000007-child-1.pt"
    learned(at=(7,), folder=tmp_path, recipe={"lr": 0.3, "data": (1, 2)})
    whole = file.read_bytes()
    for content in (whole[:1000], b"", b"text"):
        file.write_bytes(content)
        assert "cannot be read" in refused(tmp_path)
    torch.save(network().state_dict(), file)
    assert "was not written here" in refused(tmp_path)
    torch.save([1], file)
    assert "was not written here" in refused(tmp_path)


def test_a_folder_that_cannot_be(tmp_path: Path):
    (tmp_path / "file").write_text("")
    train = Counting()
    with pytest.raises(OutputError, match="choose another one"):
        learned(train=train, folder=tmp_path / "file", recipe={})
    with pytest.raises(DataError, match="a folder needs recipe="):
        learned(train=train, folder=tmp_path)
    assert train.calls == []


# What is refused, before any training


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"at": ()}, "at is empty"),
        ({"at": (0, 31)}, r"at holds 31; expected steps from 0, .* to total \(30\)"),
        ({"at": (-1,)}, "at holds -1"),
        ({"at": (1.5,)}, r"at holds 1\.5"),
        ({"at": (True,)}, "at holds True"),
        ({"total": 0}, "total is 0"),
        ({"total": 3.0}, r"total is 3\.0"),
        ({"children": 1}, "children is 1; expected at least two"),
        ({"children": True}, "children is True"),
        ({"children": (1, 1)}, r"children is \(1, 1\); .* all different"),
        ({"children": (1, 2.5)}, r"children is \(1, 2\.5\)"),
        ({"seed": 0.5}, r"seed is 0\.5"),
        ({"points": 2}, "points is 2"),
        ({"repair_data": iter(DATA)}, "an iterator"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], said: str):
    train = Counting()
    with pytest.raises(DataError, match=said):
        learned(train=train, **options)
    assert train.calls == []


def test_data_that_can_be_read_once_is_refused():
    with pytest.raises(DataError, match="an iterator"):
        spawn(learn, network(), iter(DATA), total=3)


def spoiled(change: Callable[[dict[str, Any]], Any]) -> Train:
    return lambda checkpoint, start, stop, seed: change(learn(checkpoint, start, stop, seed))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda _: None, CheckpointError, r"of train\(…, 0, 0, 0\) is NoneType; return a mapping"),
        (lambda c: c["model"], CheckpointError, r"is a mapping with '0\.weight'"),
        (lambda c: {**c, "model": network()}, CheckpointError, "state dict of the network under 'model'"),
        (lambda c: {"model": network(width=5).state_dict()}, ArchitectureError, r"\(6, 1\) in the network, \(5, 1\)"),
        (lambda c: {"model": {}}, ArchitectureError, "does train make the network"),
        (lambda c: {**c, "rng": np.zeros(2)}, CheckpointError, r"'rng': a ndarray, .*torch\.from_numpy"),
        (lambda c: {**c, "list": [1, [{2}]]}, CheckpointError, r"'list', \[1\], \[0\]: a set"),
        (
            lambda c: {"model": {k: v * float("nan") for k, v in c["model"].items()}},
            NotFiniteError,
            r"train\(…, 0, 0, 0\): 0\.weight",
        ),
    ],
)
def test_what_a_training_function_must_not_return(change: Any, error: type[Exception], said: str):
    with pytest.raises(error, match=said):
        learned(train=spoiled(change))


def test_a_training_without_noise_is_pointed_out():
    with pytest.warns(UserWarning, match="step 7 with seeds 1 and 2 are equal"):
        learned(train=lambda checkpoint, start, stop, _: learn(checkpoint, start, stop, 0), at=(7, 30))


@pytest.mark.parametrize("total", [1, 2, 15, 19, 20, 60, 2000, 10**6])
def test_default_steps(total: int):
    steps = default_steps(total)
    assert steps[0] == 0
    assert list(steps) == sorted(set(steps))
    assert steps[-1] <= total / 2
    assert len(steps) > 1 or total == 1
    found = valleys(total=60, at=None)
    assert found.steps == (0, 10, 30)


# The result, made by hand


def made(
    accuracies: list[list[list[float]]] | None, losses: list[list[list[float]]], steps: tuple[int, ...]
) -> Spawning:
    """By step and pair the curves of three points."""
    alphas = np.linspace(0, 1, 3)
    metrics = [[None] * len(row) for row in losses] if accuracies is None else accuracies
    paths = {
        step: tuple(
            Line(alphas, np.array(a), None if b is None else np.array(b), None if b is None else "accuracy", 9, None)
            for a, b in zip(*rows, strict=True)
        )
        for step, *rows in zip(steps, losses, metrics, strict=True)
    }
    return Spawning(steps, 100, 0, tuple(range(1, 4 if len(losses[0]) == 3 else 3)), paths)


def test_figures_by_hand():
    found = made([[[0.9, 0.5, 0.7]], [[0.9, 0.9, 0.9]]], [[[1.0, 4.0, 2.0]], [[1.0, 0.5, 1.0]]], (0, 10))
    assert found.barriers.tolist() == [2.5, 0]
    assert found.error_barriers is not None
    assert found.instability is not None
    np.testing.assert_allclose(found.error_barriers, [0.3, 0])
    np.testing.assert_allclose(found.instability, [0.3, 0])
    # where one end is the worst of the path, only the level chord sees it
    tilted = made([[[0.9, 0.8, 0.7]]], [[[1.0, 1.0, 1.0]]], (0,))
    assert tilted.error_barriers is not None
    assert tilted.instability is not None
    np.testing.assert_allclose([tilted.error_barriers[0], tilted.instability[0]], [0, 0.1], atol=1e-15)
    content = json.loads(json.dumps(found.to_dict()))
    assert content["barriers"] == [2.5, 0]
    assert content["stable_from"] == 10
    assert content["pairs"] == [[1, 2]]
    assert len(content["paths"]) == 2
    assert "loss barrier 0: 2.5, 10: 0)" in repr(found)


@pytest.mark.parametrize("barriers", itertools.product([0.0, 0.02, float("nan")], repeat=3))
def test_stable_from_is_the_first_step_after_which_all_is_below(barriers: tuple[float, ...]):
    paths = {
        step: (type("Flat", (), {"barrier": value, "accuracy": None, "accuracy_barrier": None})(),)
        for step, value in enumerate(barriers)
    }
    found = Spawning(tuple(range(len(barriers))), 100, 0, (1, 2), paths)  # pyright: ignore[reportArgumentType]
    expected = None
    for step in reversed(range(len(barriers))):
        if not barriers[step] < 0.02:
            break
        expected = step
    assert found.stable_from(0.02, "loss") == expected


def test_plot():
    found = made(
        [[[0.9, 0.5, 0.7]] * 3, [[0.9, 0.9, 0.9]] * 3],
        [[[1.0, 4.0, 1.0], [1.0, 2.0, 1.0], [0.0, 0.0, 0.0]], [[1.0, 0.5, 1.0]] * 3],
        (0, 10),
    )
    ax = found.plot(label="mine", threshold=0.1)
    lines = ax.lines
    np.testing.assert_array_equal(lines[0].get_ydata(), [4 / 3, 0])
    np.testing.assert_array_equal([line.get_ydata() for line in lines[1:4]], [[3, 0], [1, 0], [0, 0]])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "10"]
    assert ax.get_xlabel() == "step at which the children parted, of 100"
    assert ax.get_ylabel() == "loss barrier between children"
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["mine"]
    assert found.plot(ax, "instability") is ax
    assert ax.get_ylabel() == "instability (error) between children"
    only_zero = made(None, [[[1.0, 4.0, 1.0]]], (0,)).plot()
    only_zero.figure.canvas.draw()
    plt.close("all")


def test_quantities_that_there_are_not():
    found = made(None, [[[1.0, 4.0, 1.0]]], (0,))
    assert found.to_dict()["stable_from"] is None
    with pytest.raises(DataError, match="'los'; choose from 'loss', 'error', 'instability'"):
        found.plot(quantity="los")
    with pytest.raises(DataError, match=r"error is of a metric, .* pass metric="):
        found.plot(quantity="error")
    with pytest.raises(DataError, match="instability is of a metric"):
        found.stable_from()


def test_bar(capsys: pytest.CaptureFixture):
    learned(at=(30,))
    assert capsys.readouterr().err == ""
    learned(at=(30,), progress=True)
    assert "spawning" in capsys.readouterr().err

"""Three processes on one machine: this file is the test, and the script that each of the processes runs."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from isthmus.base.errors import DataError, IsthmusError, OutputError
from isthmus.metrics import Moments, cka_from_moments, compare
from isthmus.metrics.distributed import _device, all_reduce_gram
from isthmus.metrics.gram import Gram
from isthmus.metrics.minibatch import MinibatchHSIC

WORLD = 3
UNITS = {"x": 6, "y": 4}
# Batch sizes of each process; the last process has one short batch.
SHARDS = {"first": [[20, 17], [], [9, 5, 2]], "late": [[], [11, 30], [8]], "none": [[], [], []]}
PAIRS = [("x", "y"), ("x", "x"), ("y", "y")]


def draw(n: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(n)
    common = rng.standard_normal((n, 3))
    arrays = {name: common @ rng.standard_normal((3, p)) + rng.standard_normal((n, p)) for name, p in UNITS.items()}
    arrays["x"] += 1000 + np.arange(n)[:, None] / 10  # another mean in each process
    arrays["x"][:, 2] = 0.1
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def batches(case: str, rank: int | None = None) -> list[tuple[dict[str, torch.Tensor], list[int]]]:
    """Give the batches of one process, or of all in order of rank, each with the identities of its samples."""
    shards = SHARDS[case]
    data, start, mine = draw(sum(map(sum, shards))), 0, []
    for owner, sizes in enumerate(shards):
        for size in sizes:
            if rank in (None, owner):
                mine.append(
                    (
                        {name: array[start : start + size] for name, array in data.items()},
                        list(range(start, start + size)),
                    )
                )
            start += size
    return mine


def filled(kind: str, case: str, rank: int | None = None) -> Moments | MinibatchHSIC | Gram:
    # Another order of the layers in the last process: the first one that has seen a batch leads.
    names = ["y", "x"] if rank == WORLD - 1 else ["x", "y"]
    made = {
        "moments": lambda: Moments([(b, a) if rank == WORLD - 1 else (a, b) for a, b in PAIRS]),
        "every": Moments,
        "hsic": MinibatchHSIC,
        "rbf": lambda: MinibatchHSIC("rbf", 0.8, layers=(["x"], ["y"])),
        "gram": lambda: Gram(dtype=torch.float64),
        "bare": Gram,
        "spilled": lambda: Gram(max_bytes=0 if rank == 1 else 300),
    }[kind]()
    for batch, samples in batches(case, rank):
        values = {name: batch[name] for name in names}
        if isinstance(made, Gram):
            made.update(values, samples=None if kind == "bare" else samples)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the short batch is skipped, and said so
                made.update(values)
    return made


KINDS = ["moments", "every", "hsic", "rbf", "gram", "bare", "spilled"]


def reduce(made: Moments | MinibatchHSIC | Gram, group: Any = None) -> object:
    return all_reduce_gram(made, group) if isinstance(made, Gram) else made.all_reduce(group)


INDICES = ["cka", "svcca", "rsa", "minibatch_cka"]


def networks() -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    layers = [(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 4)) for _ in range(2)]
    return torch.nn.Sequential(*layers[0]).double(), torch.nn.Sequential(*layers[1]).double()


def inputs(rank: int | None = None) -> list[torch.Tensor]:
    parts = [
        torch.randn(size, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
        for size in (30, 24, 19, 41)
    ]
    return parts if rank is None else parts[rank : rank + 1 + (rank == 2)]


class Lost(Gram):
    """A store whose rows cannot be read back."""

    def _blocks(self, name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        raise OutputError("the disk is gone")
        yield  # pyright: ignore[reportUnreachable]


def refusals(rank: int) -> dict[str, Moments | MinibatchHSIC | Gram]:
    """Accumulators that do not fit those of other processes."""
    last = rank == WORLD - 1
    units = Moments()
    if rank != 1:
        units.update({"x": torch.ones(3, 4 if last else 5), "z": torch.ones(3, 2)})
    prints = Gram()
    if rank != 1:
        prints.update({"x": torch.eye(3)}, samples=None if last else [1, 2, 3])
    precise = Gram(dtype=torch.float64 if last else torch.float32)
    precise.update({"x": torch.eye(3)})
    full = Gram(max_bytes=0, folder="missing") if rank == 1 else filled("gram", "first", rank)
    lost = Lost(dtype=torch.float64)
    lost.update({name: torch.ones(3, units) for name, units in UNITS.items()}, samples=[1, 2, 3])
    return {
        "units": units,
        "pairs": Moments([("x", "x")] if last else [("x", "y")]),
        "kernel": MinibatchHSIC("rbf" if last else "linear"),
        "layers": MinibatchHSIC(layers=(["x"], ["x" if last else "y"])),
        "prints": prints,
        "dtype": precise,
        "kind": Moments() if last else MinibatchHSIC(),
        "disk": full,
        "read": filled("gram", "first", rank) if not last else lost,
    }


def work(folder: Path) -> None:
    """Do what one process does."""
    dist.init_process_group("gloo")
    warnings.simplefilter("error")
    rank, said = dist.get_rank(), {}
    for case in SHARDS:
        for kind in KINDS:
            made = filled(kind, case, rank)
            assert reduce(made) is made
            made.save(folder / f"{case}.{kind}.{rank}")
    for name, made in refusals(rank).items():
        before = repr(made)
        try:
            reduce(made)
        except IsthmusError as error:
            said[name] = f"{type(error).__name__}: {error}"
        assert repr(made) == before
    for index in INDICES:
        found = compare(*networks(), inputs(rank), index=index, precision="float64", distributed=True)
        (folder / f"{index}.{rank}.json").write_text(json.dumps(found.to_dict()))
    try:
        compare(*networks(), inputs(rank) if rank else [], distributed=True)
    except DataError as error:
        said["empty"] = str(error)
    pair = dist.new_group([0, 2])
    for kind in ("moments", "gram"):
        made = filled(kind, "first", rank)
        try:
            reduce(made, pair)
            made.save(folder / f"group.{kind}.{rank}")
        except DataError as error:
            said["group"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    done = subprocess.run(
        [*command, __file__, str(folder)], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", SHARDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_process_ends_with_the_same_bits(folder, case, kind):
    first, *others = ((folder / f"{case}.{kind}.{rank}").read_bytes() for rank in range(WORLD))
    if kind == "moments" and case == "none":  # nothing was exchanged: each keeps its own order of pairs
        assert [load_file(folder / f"none.moments.{rank}") for rank in range(WORLD)] == [{}] * WORLD
    else:
        assert all(other == first for other in others)


@pytest.mark.parametrize("index", INDICES)
def test_networks_compared_over_processes_are_as_in_one(folder: Path, index: str) -> None:
    whole = compare(*networks(), inputs(), index=index, precision="float64").to_dict()
    for rank in range(WORLD):
        found = json.loads((folder / f"{index}.{rank}.json").read_text())
        np.testing.assert_allclose(found["values"], whole["values"], atol=1e-10)
        assert found["convention"]["samples"] == 114
        assert found["layers_a"] == ["0", "1", "2"]


def test_a_process_without_data_stops_all(folder: Path) -> None:
    said = [json.loads((folder / f"{rank}.json").read_text())["empty"] for rank in range(WORLD)]
    assert said[0].startswith("the data holds no batch")
    assert all(message.startswith("process 0 could not go on: the data holds no batch") for message in said[1:])


@pytest.mark.parametrize("case", ["first", "late"])
@pytest.mark.parametrize("kind", ["moments", "every"])
def test_moments_are_those_of_one_process(folder, case, kind):
    joined, whole = Moments.load(folder / f"{case}.{kind}.1"), filled(kind, case)
    assert isinstance(whole, Moments)
    assert set(joined.names) == set(UNITS)
    for a in UNITS:
        assert joined.count(a) == whole.count(a)
        np.testing.assert_allclose(joined.mean(a), whole.mean(a), rtol=1e-12)
        np.testing.assert_allclose(joined.variance(a), whole.variance(a), rtol=1e-12)
        for b in UNITS:
            scale = whole.variance(a).max().sqrt() * whole.variance(b).max().sqrt()
            np.testing.assert_allclose(
                joined.covariance(a, b), whole.covariance(a, b), rtol=1e-12, atol=1e-12 * scale.item()
            )
    assert joined.variance("x")[2] == 0
    np.testing.assert_allclose(cka_from_moments(joined, "xy", "xy"), cka_from_moments(whole, "xy", "xy"), rtol=1e-10)


@pytest.mark.parametrize("case", ["first", "late"])
@pytest.mark.parametrize("kind", ["hsic", "rbf"])
def test_minibatch_averages_are_those_of_one_process(folder, case, kind):
    joined, whole = MinibatchHSIC.load(folder / f"{case}.{kind}.0"), filled(kind, case)
    assert isinstance(whole, MinibatchHSIC)
    assert (joined.batches, joined.samples) == (whole.batches, whole.samples)
    assert joined.skipped == whole.skipped == (case == "first")
    assert joined.layers == (whole.layers if kind == "rbf" else joined.layers)
    np.testing.assert_allclose(joined.cka(["x"], ["y", "x"]), whole.cka(["x"], ["y", "x"]), rtol=1e-10)
    assert joined.hsic("y", "x") == pytest.approx(whole.hsic("y", "x"), rel=1e-10)


@pytest.mark.parametrize("case", ["first", "late"])
@pytest.mark.parametrize("kind", ["gram", "bare", "spilled"])
def test_samples_are_those_of_one_process_in_order(folder, case, kind):
    joined, whole = Gram.load(folder / f"{case}.{kind}.2"), filled(kind, case)
    assert isinstance(whole, Gram)
    samples = None if joined.samples is None else joined.samples.tolist()
    assert samples == (None if kind == "bare" else list(range(whole.count("x"))))
    rows, truth = ({name: gram.rows(name, dtype=torch.float64).numpy() for name in UNITS} for gram in (joined, whole))
    for name in UNITS:
        scale = np.abs(truth[name]).max()
        np.testing.assert_allclose(rows[name], truth[name], rtol=0, atol=scale * (1e-13 if kind == "gram" else 1e-6))
    for kernel in ("debiased", "rbf"):
        tolerance = 1e-10 if kind == "gram" else 1e-6
        assert cka(rows["x"], rows["y"], kernel) == pytest.approx(cka(truth["x"], truth["y"], kernel), rel=tolerance)


def cka(x: np.ndarray, y: np.ndarray, kernel: str) -> float:
    """Compute debiased linear CKA (with zero diagonals in the kernels) or biased RBF CKA, all samples at once."""
    kernels = []
    for z in (x, y):
        squares = np.square(z[:, None] - z[None]).sum(-1)
        kernels.append(z @ z.T if kernel == "debiased" else np.exp(-squares / (2 * np.median(squares))))
    n, one, pairs = len(x), np.ones(len(x)), {}
    for i in (0, 1):
        for j in (0, 1):
            k, l = kernels[i], kernels[j]  # noqa: E741
            if kernel == "debiased":
                k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
                pairs[i, j] = (
                    (k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
                )
            else:
                centre = np.eye(n) - 1 / n
                pairs[i, j] = (centre @ k @ centre * l).sum()
    return pairs[0, 1] / np.sqrt(pairs[0, 0] * pairs[1, 1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("units", "DataError: cannot join moments of other units: {'x': 5} and {'x': 4} (process 0 and process 2)"),
        ("pairs", "DataError: cannot join moments of other pairs: [('x', 'y')] and [('x', 'x')] (process 0 and"),
        ("kernel", "DataError: cannot join HSIC of other kernel: linear and rbf of bandwidth 1 (process 0 and"),
        ("layers", "DataError: cannot join HSIC of other columns: ['y'] and ['x'] (process 0 and process 2)"),
        ("prints", "DataError: cannot join samples of other fingerprints: True and False (process 0 and process 2)"),
        ("dtype", "DataError: cannot join samples of other dtypes: {'x': 'float32'} and {'x': 'float64'} (process"),
        ("kind", "DataError: cannot join HSIC of other kind: HSIC and moments (process 0 and process 2)"),
        ("disk", "OutputError: process 1 could not keep the samples of all: cannot keep activations"),
        ("read", "OutputError: process 2 could not keep the samples of all: the disk is gone"),
    ],
)
def test_what_does_not_fit_is_refused_in_every_process(folder, name, message):
    for rank in range(WORLD):
        said = json.loads((folder / f"{rank}.json").read_text())[name]
        if name == "disk" and rank == 1:
            assert said.startswith("OutputError: cannot keep activations")
        elif name == "read" and rank == 2:
            assert said == "OutputError: the disk is gone"
        elif name == "kind" and rank == 2:
            assert said.startswith("DataError: cannot join moments of other kind: HSIC and moments")
        else:
            assert said.startswith(message)


@pytest.mark.parametrize("kind", ["moments", "gram"])
def test_a_group_of_some_processes(folder, kind):
    for rank in (0, 2):
        assert (folder / f"group.{kind}.{rank}").read_bytes() == (folder / f"first.{kind}.{rank}").read_bytes()
    assert "not in the group" in json.loads((folder / "1.json").read_text())["group"]


@pytest.mark.parametrize("make", [Moments, MinibatchHSIC, Gram])
def test_processes_that_have_not_met(make: Callable[[], Moments | MinibatchHSIC | Gram]):
    with pytest.raises(DataError, match=r"call torch\.distributed\.init_process_group first"):
        reduce(make())


def test_tensors_travel_where_the_group_can_take_them(monkeypatch):
    assert _device("cpu", torch.device("cuda", 1)) == _device("cpu", None) == torch.device("cpu")
    assert _device("cuda", torch.device("cuda", 1)) == torch.device("cuda", 1)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: SimpleNamespace(current_device=lambda: 2))
    assert _device("cuda", torch.device("cpu")) == _device("cuda", None) == torch.device("cuda", 2)


if __name__ == "__main__":
    work(Path(sys.argv[1]))

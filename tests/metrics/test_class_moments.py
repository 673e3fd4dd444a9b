"""Class moments against sums over classes one by one, whole, in pieces, in files and in two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.base.errors import CheckpointError, DataError, IsthmusError, NotFiniteError
from isthmus.metrics.collapse import ClassMoments, class_moments

WORLD = 2
K, P = 5, 7


def draw(n: int = 60, k: int = K, p: int = P, seed: int = 0, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.concatenate([np.arange(2 * k) % k, rng.integers(0, k, n - 2 * k) ** 2 % k]))
    centres = rng.standard_normal((k, p)) * 3
    features = centres[labels] + rng.standard_normal((n, p)) @ rng.standard_normal((p, p)) + offset
    return torch.from_numpy(features), torch.from_numpy(labels)


def direct(x: torch.Tensor, y: torch.Tensor, k: int = K) -> dict[str, Any]:
    """Compute everything class by class in numpy."""
    features, labels = x.double().numpy(), y.numpy()
    groups = [features[labels == label] for label in range(k)]
    means = np.stack([group.mean(0) for group in groups])
    scatter = [(group - group.mean(0)).T @ (group - group.mean(0)) for group in groups]
    shares = np.array([len(group) for group in groups]) / len(features)
    plain, own = means - means.mean(0), means - features.mean(0)
    return {
        "counts": np.array([len(group) for group in groups]),
        "means": means,
        "within": sum(scatter) / len(features),
        "variances": np.array([np.trace(s) / len(g) for s, g in zip(scatter, groups, strict=True)]),
        "plain": plain.T @ plain / k,
        "weighted": (own * shares[:, None]).T @ own,
        "total": np.cov(features.T, bias=True),
    }


def check(moments: ClassMoments, truth: dict[str, Any], rtol: float = 1e-10) -> None:
    np.testing.assert_array_equal(moments.counts, truth["counts"])
    np.testing.assert_allclose(moments.means, truth["means"], rtol=rtol, atol=rtol)
    np.testing.assert_allclose(moments.variances, truth["variances"], rtol=rtol)
    np.testing.assert_allclose(moments.within_trace(), np.trace(truth["within"]), rtol=rtol)
    for found, key in (
        (moments.within(), "within"),
        (moments.between(), "plain"),
        (moments.between(weighted=True), "weighted"),
        (moments.total(), "total"),
    ):
        np.testing.assert_allclose(found, truth[key], rtol=rtol, atol=rtol * np.abs(truth[key]).max(), err_msg=key)
    np.testing.assert_allclose(moments.mean(), truth["means"].mean(0), rtol=rtol, atol=rtol)
    everything = truth["counts"] @ truth["means"] / truth["counts"].sum()
    np.testing.assert_allclose(moments.mean(weighted=True), everything, rtol=rtol, atol=rtol)


def filled(x: torch.Tensor, y: torch.Tensor, sizes: list[int], k: int = K, **options: object) -> ClassMoments:
    moments = ClassMoments(k, **options)  # pyright: ignore[reportArgumentType]
    for features, labels in zip(x.split(sizes), y.split(sizes), strict=True):
        moments.update(features, labels)
    return moments


@pytest.mark.parametrize("sizes", [[60], [1, 2, 57], [3] * 20, [1] * 60])
def test_batches_of_any_size_give_what_one_class_after_another_gives(sizes: list[int]) -> None:
    x, y = draw()
    check(filled(x, y, sizes), direct(x, y))


def test_pieces_inside_a_batch_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = draw(300)
    monkeypatch.setattr(class_moments, "_PIECE", 1)  # pieces of 4 rows for each class
    check(filled(x, y, [300]), direct(x, y))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(1, 59), max_size=4, unique=True), k=st.integers(2, 9))
def test_merging_is_like_seeing_all(seed: int, cuts: list[int], k: int) -> None:
    x, y = draw(60, k=k, seed=seed)
    whole, joined = filled(x, y, [60], k), ClassMoments(k)
    edges = [0, *sorted(cuts), 60]
    for start, stop in pairwise(edges):
        part = filled(x[start:stop], y[start:stop], [stop - start], k)
        assert joined.merge(part) is joined
    check(whole, direct(x, y, k))
    check(joined, direct(x, y, k))


def test_merging_with_itself_and_with_nothing() -> None:
    x, y = draw()
    moments = filled(x, y, [60])
    check(moments.merge(ClassMoments(K)).merge(moments), direct(torch.cat([x, x]), torch.cat([y, y])))


def test_a_large_offset_costs_no_digits() -> None:
    x, y = draw()
    moved, truth = filled(x + 1e9, y, [20, 40]), direct(x, y)
    # The sums of x + 1e9 itself keep seven digits of what x adds.
    rounded = direct((x + 1e9) - 1e9, y)
    np.testing.assert_allclose(moved.within(), rounded["within"], rtol=1e-9, atol=1e-9 * np.abs(truth["within"]).max())
    np.testing.assert_allclose(moved.between(), rounded["plain"], rtol=1e-9, atol=1e-9 * np.abs(truth["plain"]).max())


def test_products_of_lower_precision_are_of_centred_features() -> None:
    x, y = draw(offset=1e4)
    truth = direct(x, y)["within"]
    for dtype, error in ((torch.float32, 1e-6), (torch.bfloat16, 3e-2)):
        found = filled(x, y, [25, 35], product_dtype=dtype).within()
        np.testing.assert_allclose(found, truth, atol=error * np.abs(truth).max())


def test_traces_alone_need_no_products() -> None:
    x, y = draw()
    truth, moments = direct(x, y), filled(x, y, [7] * 8 + [4], covariance=False)
    np.testing.assert_allclose(moments.variances, truth["variances"], rtol=1e-12)
    np.testing.assert_allclose(moments.within_trace(), np.trace(truth["within"]), rtol=1e-12)
    for made in (moments.merge(moments), filled(x, y, [60], covariance=False)):
        np.testing.assert_allclose(made.variances, truth["variances"], rtol=1e-12)
    with pytest.raises(DataError, match=r"covariance was not kept: make ClassMoments\(covariance=True\)"):
        moments.within()


def test_same_data_same_bits() -> None:
    x, y = draw(500, k=9, p=30)
    first, second = (filled(x, y, [100] * 5, 9) for _ in range(2))
    assert torch.equal(first.within(), second.within())
    assert torch.equal(first.means, second.means)


def test_moments_born_in_inference_mode_go_on_outside_it() -> None:
    x, y = draw()
    moments = ClassMoments(K)
    with torch.inference_mode():
        moments.update(x[:30], y[:30])
    moments.update(x[30:], y[30:])
    check(moments, direct(x, y))


def test_classes_without_samples() -> None:
    moments = ClassMoments(4)
    moments.update(torch.ones(3, 2), torch.tensor([0, 0, 2]))
    assert moments.means[[1, 3]].isnan().all()
    with pytest.raises(DataError, match=r"3 of 4 classes have fewer than 2 samples: class 1 \(0\), 2 \(1\), 3 \(0\);"):
        moments.check_classes()
    with pytest.raises(DataError, match=r"2 of 4 classes have fewer than 1 samples: class 1 \(0\), 3 \(0\)"):
        moments.centred_means()
    many = ClassMoments(20)
    many.update(torch.ones(3, 2), torch.tensor([0, 0, 0]))
    with pytest.raises(DataError, match=r"19 of 20 classes .* 8 \(0\), …; pass more data"):
        many.between()


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.ones(3), torch.zeros(3, dtype=torch.int64), r"shape \(3,\); expected samples x units"),
        (torch.ones(0, 7), torch.zeros(0, dtype=torch.int64), r"shape \(0, 7\); expected samples x units"),
        (torch.ones(3, 7, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), "is torch.int64; expected floating"),
        (torch.ones(3, 6).double(), torch.zeros(3, dtype=torch.int64), "has 6 units .* earlier batches had 7"),
        (torch.ones(3, 7), torch.zeros(2, dtype=torch.int64), r"labels have shape \(2,\) .* integers of shape \(3,\)"),
        (torch.ones(3, 7), torch.zeros(3), "type torch.float32; expected integers"),
        (torch.ones(3, 7), torch.zeros(3, dtype=torch.bool), "type torch.bool; expected integers"),
        (torch.ones(3, 7), torch.tensor([0, 5, 1]), "label 5 does not fit 5 classes: labels must be 0 to 4"),
        (torch.ones(3, 7), torch.tensor([0, -100, 1]), "label -100 does not fit 5 classes"),
        (torch.full((3, 7), torch.nan), torch.tensor([0, 0, 1]), r"shape \(3, 7\) hold NaN or infinity"),
        (torch.full((3, 7), torch.inf), torch.tensor([0, 0, 1]), r"shape \(3, 7\) hold NaN or infinity"),
        (
            torch.full((3, 7), 1e200, dtype=torch.float64),
            torch.tensor([0, 0, 1]),
            "squares overflow torch.float64; scale",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(features, labels, message) -> None:
    x, y = draw()
    moments = filled(x, y, [60])
    with pytest.raises((DataError, NotFiniteError), match=message):
        moments.update(features, labels)
    check(moments, direct(x, y))


@pytest.mark.parametrize("classes", [1, 0, -3, 2.0, True])
def test_a_wrong_number_of_classes(classes: int) -> None:
    with pytest.raises(DataError, match="expected their number, at least 2"):
        ClassMoments(classes)


def test_other_wrong_use() -> None:
    with pytest.raises(DataError, match=r"product_dtype is torch\.int8"):
        ClassMoments(2, product_dtype=torch.int8)
    with pytest.raises(DataError, match="hold no sample: call update first"):
        _ = ClassMoments(2).means
    for other, message in (
        (ClassMoments(6), "other classes: 5 and 6"),
        (ClassMoments(5, covariance=False), "other covariance: True and False"),
        (filled(*draw(p=3), [60]), "other units: 7 and 3"),
    ):
        with pytest.raises(DataError, match=f"cannot join class moments of {message}"):
            filled(*draw(), [60]).merge(other)
    with pytest.raises(DataError, match=r"call torch\.distributed\.init_process_group first"):
        ClassMoments(2).all_reduce()


@pytest.mark.parametrize("covariance", [True, False])
def test_a_file_holds_all_of_it(tmp_path: Path, covariance: bool) -> None:
    x, y = draw()
    first = filled(x[:40], y[:40], [40], covariance=covariance, product_dtype=torch.float32)
    read = ClassMoments.load(first.save(tmp_path / "moments.safetensors"))
    assert repr(read) == repr(first) == "ClassMoments(5 classes; 40 samples x 7 units)"
    assert (read.product_dtype, read.covariance) == (torch.float32, covariance)
    for moments in (read, first):
        moments.update(x[40:], y[40:])
    assert torch.equal(read.means, first.means)
    assert torch.equal(read.variances, first.variances)
    assert not covariance or torch.equal(read.within(), first.within())
    assert read.to("cpu") is read


def test_files_that_hold_something_else(tmp_path: Path) -> None:
    path = ClassMoments(3).save(tmp_path / "empty.safetensors")
    assert ClassMoments.load(path).samples == 0
    path.write_bytes(path.read_bytes()[:-3])
    for wrong in (path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match="not a whole file of class moments"):
            ClassMoments.load(wrong)


SHARDS = {"even": [[20, 5], [35]], "first without": [[], [45, 15]], "none": [[], []]}
MIXED = {"classes": (5, 6), "covariance": (True, False)}


def part(case: str, rank: int, covariance: bool = True) -> ClassMoments:
    """Give what one process has seen; in the last one some classes are missing."""
    x, y = draw(offset=50.0)
    order = y.argsort(stable=True)
    x, y = x[order], y[order]
    start = sum(map(sum, SHARDS[case][:rank]))
    count = sum(SHARDS[case][rank])
    if not count:
        return ClassMoments(K)
    return filled(x[start : start + count], y[start : start + count], SHARDS[case][rank], covariance=covariance)


def work(folder: Path) -> None:
    """Do what one process does."""
    dist.init_process_group("gloo")
    rank, said = dist.get_rank(), {}
    for case in SHARDS:
        part(case, rank).all_reduce().save(folder / f"{case}.{rank}")
    part("even", rank, covariance=False).all_reduce().save(folder / f"traces.{rank}")
    for name, (first, other) in MIXED.items():
        value = other if rank == WORLD - 1 else first
        made = ClassMoments(value) if name == "classes" else ClassMoments(K, covariance=bool(value))
        try:
            made.all_reduce()
        except IsthmusError as error:
            said[name] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("class_moments")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    done = subprocess.run(
        [*command, __file__, str(folder)], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", SHARDS)
def test_processes_end_with_what_one_would_have(folder: Path, case: str) -> None:
    first, *others = ((folder / f"{case}.{rank}").read_bytes() for rank in range(WORLD))
    assert all(other == first for other in others)
    joined = ClassMoments.load(folder / f"{case}.1")
    assert joined.samples == sum(map(sum, SHARDS[case]))
    if joined.samples:
        check(joined, direct(*draw(offset=50.0)), rtol=1e-9)


def test_processes_join_traces(folder: Path) -> None:
    joined = ClassMoments.load(folder / "traces.0")
    np.testing.assert_allclose(joined.variances, direct(*draw(offset=50.0))["variances"], rtol=1e-9)


@pytest.mark.parametrize("name", MIXED)
def test_processes_that_differ_are_all_refused(folder: Path, name: str) -> None:
    said = [json.loads((folder / f"{rank}.json").read_text())[name] for rank in range(WORLD)]
    values = " and ".join(map(str, MIXED[name]))
    assert set(said) == {f"cannot join class moments of other {name}: {values} (process 0 and process 1)"}


if __name__ == "__main__":
    work(Path(sys.argv[1]))

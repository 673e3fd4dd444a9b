"""The benchmarks run as a user runs them, at sizes that take seconds; no figure is held to anything here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

Report = dict[str, Any]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """What `similarity.py --quick` writes, its table under "shown"."""
    file = tmp_path_factory.mktemp("benchmark") / "similarity.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "similarity.py", "--quick", "--ours-only", "--json", file],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(file.read_text()), "shown": done.stdout}


def rows(report: Report, wanted: Callable[[Report], bool]) -> list[Report]:
    return [row for row in report["rows"] if wanted(row)]


def test_every_table_has_ours_measured_and_right(report: Report) -> None:
    ours = rows(report, lambda row: row["tool"].startswith("isthmus"))
    assert {row["section"] for row in ours} == set("ABCDdEF")
    for row in ours:
        assert row["status"] == "ok", row
        assert row["cpu_seconds"] > 0
        assert row["wall_seconds"] > 0
        assert 0 <= row["error"] < (1e-2 if "bf16" in row["tool"] else 1e-5), row
        assert row["estimator"]


def test_tools_that_did_not_run_are_listed_with_the_reason(report: Report) -> None:
    others = rows(report, lambda row: row["status"] != "ok")
    assert {row["tool"] for row in others} == {
        *("rsatoolbox", "pytorch-cka", "torch_cka", "ckatorch"),
        *("netrep-style loop", "notebook-style loop"),
    }
    assert {row["status"] for row in others} <= {"not installed", "left out"}
    assert all(row["status"] in report["shown"] for row in others)


def test_a_process_of_its_own_measures_its_memory(report: Report) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak resident set is read from /proc, which this system lacks")
    (row,) = rows(report, lambda row: row["section"] == "E" and row["tool"] == "isthmus float32")
    assert row["peak_megabytes"] >= row["loaded_megabytes"] > 0
    (goal,) = report["goals"]
    assert goal == {**goal, "least": 1.0, "met": True}
    assert goal["value"] == pytest.approx(4000 / row["peak_megabytes"])


def test_offsets_are_shown_one_by_one(report: Report) -> None:
    (row,) = rows(report, lambda row: row["section"] == "F" and row["tool"] == "isthmus float32")
    assert len(row["errors"]) == 4
    assert max(row["errors"]) == row["error"]


def test_it_says_where_and_how_it_ran(report: Report) -> None:
    assert report["facts"]["quick"] is True
    assert report["facts"]["threads"] == 1
    assert set(report["facts"]) == {"machine", "threads", "python", "torch", "quick"}


def test_units_are_measured_and_right(tmp_path: Path) -> None:
    file = tmp_path / "units.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "units.py", "--quick", "--rounds", "1", "--json", file],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    for letter in "ABCDE":
        found = [row for row in report["rows"] if row["section"] == letter]
        assert {row["status"] for row in found} == {"ok"}
        assert found[0]["tool"].startswith("isthmus")
        # Every tool solves the same problem: objectives, total similarities and agreement with what was planted.
        for row in found:
            assert row["value"] == pytest.approx(found[0]["value"], rel=1e-5)
            assert row["tool"] in done.stdout
    assert {goal["goal"][0] for goal in report["goals"]} == set("ABCDE")


def quick(script: str, folder: Path, *arguments: str) -> Report:
    """What a benchmark writes that trains small networks into a folder."""
    file = folder / "found.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / script, "--networks", folder, "--quick", "--json", file, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


def test_matching_runs_small(tmp_path: Path) -> None:
    content = quick("matching.py", tmp_path)
    rows = [row for case in content["cases"] for row in case["rows"]]
    assert {case["section"] for case in content["cases"]} >= set("ABD")
    assert not [row for row in rows if "failed" in row]


def test_paths_beside_a_plain_script_have_the_same_barriers(tmp_path: Path) -> None:
    barriers: dict[str, list[float]] = {}
    for row in quick("connectivity.py", tmp_path, "--repeats", "1")["rows"]:
        if "barrier" in row:
            barriers.setdefault(row["what"], []).append(row["barrier"])
    assert any(len(found) > 1 for found in barriers.values())
    for found in barriers.values():
        assert found == pytest.approx([found[0]] * len(found), rel=1e-4)


def test_features_are_told_of_independent_matched_and_spawned_pairs(tmp_path: Path) -> None:
    rows = quick("feature_connectivity.py", tmp_path)["rows"]
    assert {row["way"] for row in rows} == {"independent", "weights", "spawned"}
    assert all(row["found"]["layers"] for row in rows)


def test_collapse_runs_small(tmp_path: Path) -> None:
    file = tmp_path / "collapse.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "collapse.py", "--quick", "--json", file],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text())


@pytest.mark.parametrize(
    ("script", "key"), [("repairing.py", "rows"), ("averaging.py", "cases"), ("zipping.py", "rows")]
)
def test_merging_runs_small(script: str, key: str, tmp_path: Path) -> None:
    assert quick(script, tmp_path)[key]

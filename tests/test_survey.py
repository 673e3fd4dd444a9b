"""The quick part of the survey, run as a user runs it, and what the script makes of models that go wrong."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def coverage(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `symmetry_coverage`, imported as its neighbours in the folder import each other."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("symmetry_coverage")


def library(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module(f"survey_{name}")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """The rows of `symmetry_coverage.py --quick`, and what it printed."""
    pytest.importorskip("transformers")
    file = tmp_path_factory.mktemp("survey") / "rows.jsonl"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "symmetry_coverage.py", "--quick", "--json", file],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in file.read_text().splitlines()], done.stdout


def test_every_quick_model_is_traced_proved_and_ruled(quick: tuple[list[dict[str, Any]], str]) -> None:
    rows, _ = quick
    assert len(rows) >= 12
    for row in rows:
        assert row["status"] == "traced", row
        assert row["passed"], row
        assert row["error"] <= row["tolerance"] == 1e-8, row
        assert row["unruled"] == {}, row
        assert row["groups"] > 1, row
        assert 0.9 < row["share"] <= 1, row
        assert row["seconds"] > 0, row


def test_the_tables_show_every_model(quick: tuple[list[dict[str, Any]], str], coverage: Any) -> None:
    rows, shown = quick
    for row in rows:
        assert f"\n{row['name']} " in shown
    counted = coverage.summary([row for row in rows if row["library"] == "transformers"])
    assert counted["models"] == counted["traced"] == counted["verified"]
    assert counted["failed"] == counted["unruled"] == 0


def test_all_families_that_people_ask_for_are_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    models = " ".join(case.model for case in library(monkeypatch, "transformers").ARCHITECTURES.values())
    decoders = "Llama Mistral Qwen Gemma GPT2 GPTNeoX Phi Mixtral Mamba"
    encoders = "Bert Roberta Deberta ViT Dinov2 Swin ConvNext Segformer"
    for family in f"{decoders} {encoders} T5 Bart Whisper CLIP".split():
        assert family in models
    assert len(library(monkeypatch, "transformers").names()) >= 55
    assert len(library(monkeypatch, "timm").names()) == 98


def test_quick_names_are_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("timm", "transformers"):
        module = library(monkeypatch, name)
        assert set(module.QUICK) <= set(module.names())


@pytest.mark.parametrize(
    ("code", "limit", "why"),
    [
        ("import os; os._exit(3)", 60.0, "the process died"),
        ("import time; time.sleep(60)", 0.2, "not done after 0.2 s"),
    ],
)
def test_a_crash_or_a_hang_costs_one_model(coverage: Any, code: str, limit: float, why: str) -> None:
    worker = coverage.Worker(verify=False, limit=limit)
    sound, worker.command = worker.command, [sys.executable, "-c", code]
    row = worker.measure("transformers", "llama")
    assert (row["status"], row["message"]) == ("error", why)
    worker.command, worker.limit = sound, 300.0
    row = worker.measure("transformers", "nothing")
    worker.close()
    assert row["stage"] == "build"


def test_a_model_that_cannot_be_built_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    row = library(monkeypatch, "worker").measure("transformers", "nothing")
    assert (row["status"], row["stage"]) == ("error", "build")
    assert "nothing" in row["message"]


def test_a_failed_check_fails_the_run(coverage: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = {"library": "transformers", "name": "llama", "status": "traced", "parameters": 10, "groups": 1}
    measured |= {"share": 0.5, "unruled": {"cumsum": 3}, "held": {}, "seconds": 1.0}
    wrong = {**measured, "passed": False, "error": 0.5, "message": "permuting group a changes the outputs"}
    monkeypatch.setattr(coverage.Worker, "measure", lambda *_: wrong)
    monkeypatch.setattr(coverage, "listed", lambda *_, **__: [("transformers", "llama")])
    assert coverage.main(["--json", str(tmp_path / "rows")]) == 1
    assert json.loads((tmp_path / "rows").read_text()) == wrong
    assert coverage.main(["--show", str(tmp_path / "rows")]) == 1
    monkeypatch.setattr(coverage.Worker, "measure", lambda *_: {**wrong, "passed": True})
    assert coverage.main([]) == 0


def test_a_check_at_a_coarser_tolerance_is_shown_as_such(coverage: Any) -> None:
    row = {"library": "timm", "name": "a", "status": "traced", "parameters": 10, "groups": 1, "share": 0.5}
    row |= {"unruled": {}, "held": {}, "seconds": 1.0, "passed": True, "error": 1e-6, "tolerance": 1e-5}
    fine = {**row, "error": 1e-15, "tolerance": 1e-8}
    assert coverage.summary([row, fine])["coarse"] == 1
    assert "1e-06 (tolerance 1e-05)" in coverage.cells(row)
    assert "tolerance" not in coverage.outcome(fine)
    assert "tolerance of 1e-05" in coverage.outcome(row)


def test_names_that_are_in_no_table_are_refused(coverage: Any) -> None:
    with pytest.raises(SystemExit, match="no such model: lama"):
        coverage.listed(["transformers"], only=["lama"])


def test_growth_is_the_exponent_of_a_power_law(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"depth": depth, "seconds": 0.3 * depth**1.5} for depth in (10, 20, 80)]
    assert math.isclose(library(monkeypatch, "timing").exponent(rows), 1.5)

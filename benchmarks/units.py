"""Units across networks beside what users would pick instead: sparse prediction, matching, clusters.

    python benchmarks/units.py [--quick] [--sections ABCDE] [--rounds 3] [--threads 2] [--json FILE]

Every tool runs in a process of its own, tools in turn, so that its peak memory is its own and a drift of the machine
meets all of them. Times are on the clock; the process' CPU seconds are shown beside them. What a tool found (objective,
total similarity, agreement with planted clusters) stands beside its time: a fast wrong answer is none.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import units_lasso  # noqa: F401  # enters its tasks
from similarity import goal, plain
from units_tasks import TASKS, run

Row = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """One table: every tool of one kind of task, the first of which is ours, on data of one size."""

    letter: str
    title: str
    kind: str
    size: dict[str, Any]
    seconds: float | None = None
    """What ours may take."""
    ratio: float | None = None
    """What the fastest of the others must take, at least, in multiples of ours."""


def sections(quick: bool) -> list[Section]:
    """List what is measured; in a quick look sizes are small and nothing is claimed."""
    if quick:
        lasso = {"predictors": 12, "targets": 9, "samples": 200, "penalty": 0.1}
        few = {"units": 24, "samples": 200, "clusters": 3, "noise": 0.1}
        return [
            Section("A", "LASSO, small", "lasso", lasso, None, 1.0),
            Section("B", "path of 5 penalties, small", "path", lasso | {"penalties": 5}, None, 20.0),
            Section("C", "ill-conditioned, small", "hard", lasso | {"condition": 300.0}, 10.0),
            Section("D", "matching, small", "matching", {"units": 24, "samples": 100}, 5.0),
            Section("E", "clusters, small", "clusters", few, 30.0),
        ]
    lasso = {"predictors": 256, "targets": 256, "samples": 10_000, "penalty": 0.1}
    hard = {"predictors": 1024, "targets": 1024, "samples": 10_000, "penalty": 0.01, "condition": 300.0}
    wide = {"units": 4096, "samples": 8192}
    many = {"units": 2048, "samples": 10_000, "clusters": 64, "noise": 1.0}
    return [
        Section("A", "LASSO 256 to 256 units, 10,000 samples, one penalty, Gram included", "lasso", lasso, None, 1.0),
        Section("B", "the same, a path of 50 penalties", "path", lasso | {"penalties": 50}, None, 20.0),
        Section("C", "LASSO 1024 to 1024 units, condition number 300", "hard", hard, 10.0),
        Section("D", "matching 4096 to 4096 units, from correlations", "matching", wide, 5.0),
        Section("E", "spectral clusters of 2 x 2048 units, from moments", "clusters", many, 30.0),
    ]


class Runner:
    """Runs a tool once, in a process of its own or, for a quick look, in this one."""

    def __init__(self, threads: int, isolated: bool) -> None:
        self.isolated = isolated
        self._environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))}

    def __call__(self, spec: dict[str, Any]) -> Row:
        """Measure; a tool that fails is a line of the table."""
        if not self.isolated:
            try:
                return run(spec)
            except Exception as error:
                return {"failed": f"{type(error).__name__}: {error}"}
        print(f"… {spec['tool']}", file=sys.stderr)
        command = [sys.executable, __file__, "--child", json.dumps(spec)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=self._environment)
        if done.returncode:
            return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
        return json.loads(done.stdout.splitlines()[-1])


def measure(section: Section, runner: Runner, rounds: int) -> list[Row]:
    """Give a line for each tool: medians over the rounds."""
    runs: dict[str, list[Row]] = {tool: [] for tool in TASKS[section.kind]}
    for _ in range(rounds):
        for tool, done in runs.items():
            done.append(runner({"kind": section.kind, "tool": tool, "size": section.size}))
    rows: list[Row] = [{"section": section.letter, "tool": tool, **summary(done)} for tool, done in runs.items()]
    for row in rows:
        if "seconds" in row and "seconds" in rows[0]:
            row["times_ours"] = row["seconds"] / rows[0]["seconds"]
    return rows


def summary(runs: Sequence[Row]) -> Row:
    failed = [run["failed"] for run in runs if "failed" in run]
    if failed:
        return {"status": f"failed: {failed[0]}"}
    row: Row = {"status": "ok", "rounds": len(runs), "value": runs[0]["value"], "note": runs[0].get("note", "")}
    row["seconds"] = statistics.median(run["wall"] for run in runs)
    row["cpu_seconds"] = statistics.median(run["cpu"] for run in runs)
    row["peak_megabytes"] = max(run["peak"] or 0 for run in runs) / 1e6 or None
    return row


def goals(section: Section, rows: Sequence[Row]) -> list[Row]:
    """Hold ours against what was aimed at."""
    if "seconds" not in rows[0]:
        return []
    found = []
    if section.seconds is not None:
        found.append(
            goal(f"{section.letter}: {section.seconds:g} s over ours", section.seconds / rows[0]["seconds"], 1)
        )
    others = [row for row in rows if "seconds" in row and not row["tool"].startswith("isthmus")]
    if section.ratio is not None and others:
        fastest = min(others, key=lambda row: row["seconds"])
        found.append(
            goal(f"{section.letter}: time of {fastest['tool']} over ours", fastest["times_ours"], section.ratio)
        )
    return found


def show(section: Section, rows: Sequence[Row]) -> None:
    print(f"\n{section.letter}. {section.title}")
    print(f"{'':40}{'seconds':>9}{'CPU s':>9}{'x ours':>8}{'peak MB':>9}{'value':>14}  note")
    for row in rows:
        if row["status"] != "ok":
            print(f"{row['tool']:40}{row['status']}")
            continue
        peak = "-" if row["peak_megabytes"] is None else f"{row['peak_megabytes']:.0f}"
        print(
            f"{row['tool']:40}{row['seconds']:9.3f}{row['cpu_seconds']:9.3f}{row['times_ours']:8.2f}{peak:>9}"
            f"{row['value']:14.8g}  {row['note']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes in one process: seconds, no claims")
    parser.add_argument("--sections", default="ABCDE", help="which tables, by letter")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(run(arguments.child)))
        return
    runner = Runner(arguments.threads, isolated=not arguments.quick)
    rows, met = [], []
    for section in sections(arguments.quick):
        if section.letter in arguments.sections:
            found = measure(section, runner, arguments.rounds)
            show(section, found)
            rows += found
            met += goals(section, found)
    print()
    for each in met:
        verdict = "met" if each["met"] else "missed"
        print(f"{verdict:7} {each['goal']}: {each['value']:.2f}, aimed at {each['least']:g} or more")
    content = {"rows": rows, "goals": met, "threads": arguments.threads, "quick": arguments.quick}
    arguments.json.write_text(json.dumps(plain(content), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Matching of networks beside the published algorithms: planted permutations, trained pairs, speed, many networks.

    python benchmarks/matching.py --networks FOLDER [--quick] [--sections ABCDE] [--only TEXT] [--json FILE]

A. A permutation is planted, without noise and with noise as large as the weights; how often is exactly it found?
B. Two networks trained from different seeds: objective, and loss in the middle of the line between them.
C. Seconds for networks of the size that is used in practice.
D. Five networks in one order, and their mean.
E. Two transformers: the test-loss barrier.

Every tool runs in a process of its own, so that its peak memory is its own. CPU seconds are those of matching alone, of
one draw; the symmetry is derived before, but for E. Trained networks are taken from the folder, and trained where it
lacks them, which takes hours for all of them (`matching_pairs.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matching_pairs import KINDS, QUICK
from matching_tasks import ALIGNMENTS, PLAIN, PLANTED, run
from matching_tasks import OURS as WAYS
from similarity import goal, plain

Row = dict[str, Any]
OURS = "isthmus weights"

# How many times as fast as these ours should be.
_FASTER = {"coordinate descent, best of 5 orders": 1, "Frank-Wolfe, best of 2 starts": 10}


@dataclass(frozen=True)
class Case:
    """One table: several tools on one task."""

    letter: str
    title: str
    kind: str
    tools: tuple[str, ...]
    size: Row
    seconds: float | None = None
    """What ours may take."""
    rows: list[Row] = field(default_factory=list)


def cases(networks: Path, quick: bool) -> list[Case]:
    """List what is measured; in a quick look only what takes seconds."""
    return [
        *_planted(quick),
        *_pairs(networks, quick),
        *_speed(quick),
        *_many(networks, quick),
        *_transformers(networks, quick),
    ]


def _planted(quick: bool) -> list[Case]:
    big = ("ResNet50", "ViT-B/16")
    names = [name for name in PLANTED if name not in big]
    found = []
    for name in names[:2] if quick else names:
        by_hand = PLANTED[name].specification is not None
        large = "1024" in name
        tools = (OURS, *(["coordinate descent"] if by_hand else []))
        tools += ("Frank-Wolfe, best of 2 starts",) if by_hand and not large else ()
        draws = 2 if quick else 3 if large else 20
        for noise in (0.0, 1.0):
            what = "as large as the weights" if noise else "none"
            size = {"network": name, "draws": draws, "noise": noise}
            found.append(Case("A", f"planted, {name}; noise: {what}; {draws} draws", "planted", tools, size))
    return found


def _pairs(networks: Path, quick: bool) -> list[Case]:
    tools = ("none", *WAYS, *(name for name in PLAIN if name != "coordinate descent"))
    names = (QUICK,) if quick else tuple(name for name in KINDS if name != QUICK and "charformer" not in name)
    size = {"networks": str(networks), "samples": 500 if quick else 10_000}
    return [Case("B", f"trained pair, {name}", "pair", tools, {**size, "network": name}) for name in names]


def _speed(quick: bool) -> list[Case]:
    limits = {} if quick else {"ResNet50": 60.0, "ViT-B/16": 90.0}
    tools = (OURS, "coordinate descent")
    return [
        Case("C", f"{name}, random weights, planted", "speed", tools, {"network": name}, seconds)
        for name, seconds in limits.items()
    ]


def _many(networks: Path, quick: bool) -> list[Case]:
    name, count = (QUICK, 3) if quick else ("mnist-3x512", 5)
    size = {"networks": str(networks), "network": name, "count": count}
    return [Case("D", f"mean of {count} x {name}", "many", ("none", "isthmus merge_many", "isthmus frank_wolfe"), size)]


def _transformers(networks: Path, quick: bool) -> list[Case]:
    size = {"networks": str(networks), "samples": 30_000, "points": 11}
    names = () if quick else ("charformer-small", "charformer")
    return [
        Case("E", f"trained pair, {name}", "transformer", tuple(ALIGNMENTS), {**size, "network": name})
        for name in names
    ]


class Runner:
    """Runs a tool once, in a process of its own or, for a quick look, in this one."""

    def __init__(self, threads: int, isolated: bool) -> None:
        self.isolated = isolated
        self._environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))}

    def __call__(self, case: Case, tool: str) -> Row:
        """Measure; a tool that fails is a line of the table."""
        spec = {"kind": case.kind, "tool": tool, "size": case.size}
        if not self.isolated:
            try:
                return {"tool": tool, **run(spec)}
            except Exception as error:
                return {"tool": tool, "failed": f"{type(error).__name__}: {error}"}
        print(f"… {tool}", file=sys.stderr)
        command = [sys.executable, __file__, "--child", json.dumps(spec)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=self._environment)
        if done.returncode:
            return {
                "tool": tool,
                "failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1],
            }
        return {"tool": tool, **json.loads(done.stdout.splitlines()[-1])}


# Goals


def goals(case: Case) -> list[Row]:
    """Hold ours against what was aimed at."""
    ran = {row["tool"]: row for row in case.rows if "failed" not in row}
    ours = ran.get(OURS)
    if case.kind == "many":
        return [
            goal(f"D: accuracy of {tool} over the parents', in points", 100 * (row["accuracy"] - row["parents"]), -0.5)
            for tool, row in ran.items()
            if tool.startswith("isthmus")
        ]
    if ours is None:
        return []
    if case.kind in ("planted", "speed"):
        found = [goal(f"{case.letter}: {case.title}: recovered", ours["recovered"], ours["draws"])]
        if case.seconds is not None:
            found.append(
                goal(f"{case.letter}: {case.title}: {case.seconds:g} s over ours", case.seconds / ours["cpu"], 1)
            )
        return found
    others = [row for tool, row in ran.items() if tool in PLAIN]
    if case.kind == "pair" and others:
        best = max(others, key=lambda row: row["objective"])
        lowest = min(others, key=lambda row: row["test_loss"])
        name = f"B: {case.size['network']}"
        found = [
            goal(f"{name}: objective over that of {best['tool']}", ours["objective"] / best["objective"], 1),
            *(
                goal(f"{name}: time of {row['tool']} over ours", row["cpu"] / ours["cpu"], least)
                for row in others
                if (least := _FASTER.get(row["tool"]))
            ),
        ]
        # tools that look at data are compared by what they look at
        mine = [row for tool, row in ran.items() if tool in WAYS]
        won = min(mine, key=lambda row: row["test_loss"])
        title = f"{name}: test loss halfway of {lowest['tool']} over that of {won['tool']}"
        return [*found, goal(title, lowest["test_loss"] / won["test_loss"], 1)]
    return []


# Showing


def show(case: Case) -> None:
    print(f"\n{case.letter}. {case.title}")
    columns = {
        "planted": ("recovered", "as_good"),
        "speed": ("recovered",),
        "pair": ("objective", "train_loss", "test_loss", "test_barrier", "test_accuracy", "test_loss_repaired"),
        "many": ("accuracy", "parents"),
        "transformer": ("test_barrier", "test_loss"),
    }[case.kind]
    print(f"{'':40}{'CPU s':>9}{'seconds':>9}{'peak MB':>9}" + "".join(f"{column:>20}" for column in columns))
    for row in case.rows:
        if "failed" in row:
            print(f"{row['tool']:40}failed: {row['failed']}")
            continue
        peak = "-" if row["peak"] is None else f"{row['peak'] / 1e6:.0f}"
        cells = "".join(f"{_cell(row, column):>20}" for column in columns)
        print(f"{row['tool']:40}{row['cpu']:9.3f}{row['wall']:9.3f}{peak:>9}{cells}", flush=True)


def _cell(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        return "-"
    return f"{value} of {row['draws']}" if column in ("recovered", "as_good") else f"{value:.5g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=Path, help="folder of trained networks; None for a temporary one")
    parser.add_argument("--quick", action="store_true", help="small sizes in one process: no claims")
    parser.add_argument("--sections", default="ABCDE", help="which tables, by letter")
    parser.add_argument("--only", default="", help="tables whose title has this in it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        print(json.dumps(plain(run(chosen.child))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        runner = Runner(chosen.threads, isolated=not chosen.quick)
        found, met = [], []
        for case in cases((chosen.networks or Path(temporary)).absolute(), chosen.quick):
            if case.letter in chosen.sections and chosen.only in case.title:
                case.rows.extend(runner(case, tool) for tool in case.tools)
                show(case)
                found.append({"section": case.letter, "title": case.title, "size": case.size, "rows": case.rows})
                met += goals(case)
                content = {"cases": found, "goals": met, "threads": chosen.threads, "quick": chosen.quick}
                chosen.json.write_text(json.dumps(plain(content), indent=1), encoding="utf-8")
    print()
    for each in met:
        verdict = "met" if each["met"] else "missed"
        print(f"{verdict:7} {each['goal']}: {each['value']:.4g}, aimed at {each['least']:g} or more")


if __name__ == "__main__":
    main()

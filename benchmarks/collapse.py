"""Collapse of many classes beside what users would write instead: time, memory, and whether the answers agree.

    python benchmarks/collapse.py [--quick] [--sections ABCD] [--rounds 3] [--threads 2] [--json FILE]

A: features of many classes in memory, all at once. B: the same in batches, as a loader gives them. C: many classes of
wide features in batches that are never together in memory, for the peak. D: few of A's samples, for the published
procedure, which is slow. Every tool runs in a process of its own, in turn. The value is NC1: a fast wrong answer is
none. The peak is what comes on top of the data that is there at the start. "loop over classes" takes out one class
after another and multiplies it with itself; "loop over batches and classes" is the published procedure, two passes over
batches of 128 in which the outer product of every sample is made.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from similarity import goal, plain
from similarity_tasks import Meter, forget_peak, resident
from torch import Tensor

from isthmus.metrics.collapse import ClassMoments, collapse_of, collapse_values

Row = dict[str, Any]
Size = dict[str, int]


@dataclass
class Watch(Meter):
    """A meter that knows how much memory was taken at the start."""

    base: int = 0

    def start(self) -> None:
        """Begin to watch the peak."""
        forget_peak()
        self.base = resident("VmRSS") or 0


Tool = Callable[[Size, Watch], float]


def batches(size: Size) -> Iterator[tuple[Tensor, Tensor]]:
    """Make the batches of a data set, the same each time: means of classes that are apart, and noise."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(size["classes"], size["units"], generator=generator)
    for start in range(0, size["samples"], size["batch"]):
        count = min(size["batch"], size["samples"] - start)
        labels = (torch.arange(start, start + count) * 7919) % size["classes"]
        yield centres[labels] + torch.randn(count, size["units"], generator=generator), labels


def whole(size: Size) -> tuple[Tensor, Tensor]:
    parts = list(batches(size))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def nc1(means: Tensor, within: Tensor) -> float:
    """Give NC1 by the pseudoinverse of the between-class covariance."""
    centred = (means - means.mean(0)).double()
    between = centred.T @ centred / len(means)
    return float((within.double() * torch.linalg.pinv(between, hermitian=True, rtol=1e-12)).sum()) / len(means)


def projected(size: Size, meter: Watch) -> float:
    x, y = whole(size)
    meter.start()
    with meter():
        found = collapse_values(x, y, classes=size["classes"], margin=False).nc1
    return found or 0.0


def moments(size: Size, meter: Watch, dtype: torch.dtype = torch.float64) -> float:
    x, y = whole(size)
    meter.start()
    with meter():
        made = ClassMoments(size["classes"], product_dtype=dtype)
        made.update(x, y)
        found = collapse_of(made, margin=False).nc1
    return found or 0.0


def single(size: Size, meter: Watch) -> float:
    return moments(size, meter, torch.float32)


def per_class(size: Size, meter: Watch, dtype: torch.dtype = torch.float64) -> float:
    x, y = whole(size)
    meter.start()
    with meter():
        within, means = torch.zeros(size["units"], size["units"], dtype=dtype), []
        for label in range(size["classes"]):
            rows = x[y == label].to(dtype)
            means.append(rows.mean(0))
            rows = rows - means[-1]
            within += rows.T @ rows
        found = nc1(torch.stack(means), within / len(x))
    return float(found)


def published(size: Size, meter: Watch) -> float:
    parts = [(x, y) for x, y in zip(*(z.split(128) for z in whole(size)), strict=True)]
    meter.start()
    with meter():
        means = torch.zeros(size["classes"], size["units"])
        counts, within = torch.zeros(size["classes"]), torch.zeros(size["units"], size["units"])
        for x, y in parts:
            for label in range(size["classes"]):
                chosen = x[y == label]
                means[label] += chosen.sum(0)
                counts[label] += len(chosen)
        means /= counts[:, None]
        for x, y in parts:
            for label in range(size["classes"]):
                rows = x[y == label] - means[label]
                within += (rows[:, :, None] * rows[:, None, :]).sum(0)
        found = nc1(means, within / counts.sum())
    return float(found)


def streamed(size: Size, meter: Watch) -> float:
    made = ClassMoments(size["classes"])
    meter.start()
    for x, y in batches(size):
        with meter():
            made.update(x, y)
    with meter():
        found = collapse_of(made, margin=False).nc1
    return found or 0.0


def traces(size: Size, meter: Watch) -> float:
    made = ClassMoments(size["classes"], covariance=False)
    meter.start()
    for x, y in batches(size):
        with meter():
            made.update(x, y)
    # A second pass over the batches: the covariance is never made.
    with meter():
        found = collapse_of(made, rows=batches(size), margin=False).nc1
    return found or 0.0


def loop_in_batches(size: Size, meter: Watch) -> float:
    classes, units = size["classes"], size["units"]
    sums, squares = torch.zeros(classes, units, dtype=torch.float64), torch.zeros(units, units, dtype=torch.float64)
    counts = torch.zeros(classes, dtype=torch.float64)
    meter.start()
    for x, y in batches(size):
        with meter():
            for label in range(classes):
                rows = x[y == label].double()
                sums[label] += rows.sum(0)
                counts[label] += len(rows)
                squares += rows.T @ rows
    with meter():
        means = sums / counts[:, None]
        found = nc1(means, (squares - (means * counts[:, None]).T @ means) / counts.sum())
    return float(found)


MEMORY: dict[str, Tool] = {
    "isthmus collapse_values": projected,
    "isthmus ClassMoments": moments,
    "isthmus ClassMoments, float32": single,
    "loop over classes": per_class,
}
STREAM: dict[str, Tool] = {
    "isthmus ClassMoments": streamed,
    "isthmus, two passes, with making data": traces,
    "loop over classes in each batch": loop_in_batches,
}
WIDE = {tool: STREAM[tool] for tool in list(STREAM)[:2]}  # the loop would take minutes here
PUBLISHED: dict[str, Tool] = {
    "isthmus collapse_values": projected,
    "isthmus ClassMoments": moments,
    "loop over batches and classes": published,
}
TOOLS = {"A": MEMORY, "B": STREAM, "C": WIDE, "D": PUBLISHED}


def sections(quick: bool) -> dict[str, tuple[str, Size]]:
    """Give title and size of each table; in a quick look sizes are small and nothing is claimed."""
    if quick:
        small = {"samples": 1_000, "units": 24, "classes": 10, "batch": 100}
        return {
            letter: (f"{what}, small", small)
            for letter, what in zip("ABCD", ("memory", "batches", "peak", "published"), strict=True)
        }
    many = {"samples": 50_000, "units": 512, "classes": 100, "batch": 500}
    few = {**many, "samples": 2_500}
    wide = {"samples": 20_000, "units": 2_048, "classes": 1_000, "batch": 1_000}
    return {
        "A": ("50,000 x 512 of 100 classes in memory", many),
        "B": ("the same in batches of 500", many),
        "C": ("20,000 x 2,048 of 1,000 classes in batches of 1,000, made one by one", wide),
        "D": ("2,500 x 512 of 100 classes, beside the published procedure", few),
    }


def run(letter: str, tool: str, size: Size) -> Row:
    """Measure one tool once."""
    meter = Watch()
    _ = torch.ones(64, 64) @ torch.ones(64, 64)  # libraries are loaded before the clock runs
    value = TOOLS[letter][tool](size, meter)
    peak = resident("VmHWM")
    return {"value": value, "wall": meter.wall, "cpu": meter.cpu, "peak": (peak or 0) - meter.base}


def isolated(letter: str, tool: str, size: Size, threads: int) -> Row:
    """Measure in a process of its own; a tool that fails is a line of the table."""
    print(f"… {letter}: {tool}", file=sys.stderr)
    environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))}
    command = [sys.executable, __file__, "--child", json.dumps([letter, tool, size])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(letter: str, size: Size, rounds: int, threads: int, quick: bool) -> list[Row]:
    """Give a line for each tool: medians over the rounds, tools in turn."""
    runs: dict[str, list[Row]] = {tool: [] for tool in TOOLS[letter]}
    for _ in range(rounds):
        for tool, done in runs.items():
            done.append(run(letter, tool, size) if quick else isolated(letter, tool, size, threads))
    rows: list[Row] = []
    for tool, done in runs.items():
        failed = [each["failed"] for each in done if "failed" in each]
        row: Row = {"section": letter, "tool": tool, "status": f"failed: {failed[0]}" if failed else "ok"}
        if not failed:
            row |= {"value": done[0]["value"], "rounds": len(done)}
            row |= {f"{key}_seconds": statistics.median(each[key] for each in done) for key in ("wall", "cpu")}
            row["peak_megabytes"] = max(each["peak"] for each in done) / 1e6
        rows.append(row)
    return rows


def show(title: str, letter: str, rows: list[Row]) -> None:
    print(f"\n{letter}. {title}")
    print(f"{'':40}{'seconds':>9}{'CPU s':>9}{'x first':>9}{'peak MB':>9}{'NC1':>14}")
    first = rows[0].get("wall_seconds", np.nan)
    for row in rows:
        if row["status"] != "ok":
            print(f"{row['tool']:40}{row['status']}")
            continue
        print(
            f"{row['tool']:40}{row['wall_seconds']:9.3f}{row['cpu_seconds']:9.3f}{row['wall_seconds'] / first:9.2f}"
            f"{row['peak_megabytes']:9.0f}{row['value']:14.8g}"
        )


def goals(rows: list[Row]) -> list[Row]:
    """Hold ours against what was aimed at."""
    by = {(row["section"], row["tool"]): row for row in rows if row["status"] == "ok"}
    found = []
    for tool in ("isthmus collapse_values", "isthmus ClassMoments"):
        if ("A", tool) in by:
            found.append(goal(f"A: 2 s over {tool}", 2 / by["A", tool]["wall_seconds"], 1.0))
        for letter, other in (("A", "loop over classes"), ("D", "loop over batches and classes")):
            if (letter, tool) in by and (letter, other) in by:
                ratio = by[letter, other]["wall_seconds"] / by[letter, tool]["wall_seconds"]
                found.append(goal(f"{letter}: time of {other} over {tool}", ratio, 5.0))
    if ("C", "isthmus ClassMoments") in by:
        # Covariance and means, eigenvectors and a batch in float64, several times over.
        found.append(goal("C: 1,000 MB over peak", 1_000 / by["C", "isthmus ClassMoments"]["peak_megabytes"], 1.0))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes in one process: seconds, no claims")
    parser.add_argument("--sections", default="ABCD", help="which tables, by letter")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(run(*arguments.child)))
        return
    rows: list[Row] = []
    for letter, (title, size) in sections(arguments.quick).items():
        if letter in arguments.sections:
            found = measure(letter, size, arguments.rounds, arguments.threads, arguments.quick)
            show(title, letter, found)
            rows += found
    met = [] if arguments.quick else goals(rows)
    print()
    for each in met:
        verdict = "met" if each["met"] else "missed"
        print(f"{verdict:7} {each['goal']}: {each['value']:.2f}, aimed at {each['least']:g} or more")
    content = {"rows": rows, "goals": met, "threads": arguments.threads, "quick": arguments.quick}
    arguments.json.write_text(json.dumps(plain(content), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Similarity of all pairs of layers beside what users would pick instead: time, memory and error.

    python benchmarks/similarity.py [--quick] [--sections ABCDdEF] [--images 10000] [--rounds 3] [--json FILE]

Every tool runs in a process of its own, tools in turn, so that its peak memory is its own and a drift of the machine
meets all of them. CPU seconds count (of all threads); the clock on the wall is shown beside them. Errors are the
largest over all pairs, against dense float64 kernels. Tools that are not installed are listed as such: `make bench`
installs them (pip install -e ".[bench]").
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from similarity_peers import BANDWIDTH, PEERS
from similarity_tasks import TRUTH, run

WIDTHS = [64, 128, 256, 512, 512, 1024, 1024, 2048, 2048, 4096]
QUICK_WIDTHS = [8, 16, 24]
SLOW = 20.0
"""CPU seconds beyond which a tool is run once."""
OURS = "isthmus float32"

Row = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """One table: tools, the first of which is ours and the measure of the others, on one task."""

    letter: str
    title: str
    task: str
    tools: dict[str, str]
    size: dict[str, Any]
    truths: dict[str, str]
    kinds: dict[str, str]
    rounds: int


def sections(arguments: argparse.Namespace) -> list[Section]:
    """List what is compared; a tool's description says which estimator it computes."""
    quick = arguments.quick
    arrays = {"widths": QUICK_WIDTHS if quick else WIDTHS, "samples": 60 if quick else 2000}
    models = {
        "data_dir": arguments.data_dir,
        "depths": [8, 8] if quick else [20, 20],
        "images": 32 if quick else arguments.images,
        "batch": 16 if quick else 125,
        "layers": 4 if quick else 25,
    }
    exact = models | {"images": 32 if quick else min(arguments.images, 2000)}
    many = {"widths": arrays["widths"], "samples": 400 if quick else 50_000, "block": 100 if quick else 2000}
    many |= {"narrow": 512, "memory": 2 << 30}
    offsets = {"width": 32 if quick else 256, "samples": 200 if quick else 1000}
    offsets |= {"offsets": [0, 10, 100, 1000]}
    n, layers = arrays["samples"], len(arrays["widths"])
    pairs = f"{layers} x {layers} layers, {n} samples"
    hsic1 = {name: "HSIC₁, minibatches" for name, peer in PEERS.items() if peer.models}
    rounds = 1 if quick else arguments.rounds
    return [
        array_section("A", f"linear CKA, {pairs}", "linear", arrays, rounds, fallback="debiased"),
        array_section("B", f"debiased linear CKA, {pairs}", "debiased", arrays, rounds),
        array_section("C", f"RBF CKA, bandwidth {BANDWIDTH} x median, {pairs}", "rbf", arrays, rounds),
        Section(
            "D",
            f"two ResNet{models['depths'][0]}, {models['layers']} x {models['layers']} layers, flattened features, "
            f"{models['images']} images in batches of {models['batch']}, with the forward passes",
            "models",
            {
                "isthmus minibatch float32": "HSIC₁, minibatches",
                "isthmus minibatch float64": "HSIC₁, minibatches",
                **hsic1,
                "forward passes alone": "nothing",
            },
            models,
            dict.fromkeys(["isthmus minibatch float32", "isthmus minibatch float64", *hsic1], f"{TRUTH} minibatch"),
            {},
            1,
        ),
        Section(
            "d",
            f"the same networks, exact over all of {exact['images']} images",
            "models",
            {f"isthmus exact {precision}": "debiased, all samples" for precision in ("float32", "bf16")},
            exact,
            {f"isthmus exact {precision}": f"{TRUTH} exact" for precision in ("float32", "bf16")},
            {},
            1,
        ),
        Section(
            "E",
            f"linear CKA, {layers} x {layers} layers, {many['samples']} samples",
            "many",
            {OURS: "biased, all samples", "isthmus bf16": "biased, all samples"},
            many,
            {OURS: TRUTH, "isthmus bf16": TRUTH},
            {},
            1,
        ),
        offset_section(offsets),
    ]


def array_section(
    letter: str, title: str, task: str, size: dict[str, Any], rounds: int, fallback: str | None = None
) -> Section:
    ours = [OURS, "isthmus float64", "isthmus bf16"]
    kinds = dict.fromkeys(ours, task)
    for name, peer in PEERS.items():
        kind = task if task in peer.arrays else fallback
        if kind in peer.arrays:
            kinds[name] = str(kind)
    tools = {name: "biased" if kind != "debiased" else "debiased" for name, kind in kinds.items()}
    return Section(letter, title, task, tools, size, dict.fromkeys(kinds, TRUTH), kinds, rounds)


def offset_section(size: dict[str, Any]) -> Section:
    kinds = {"isthmus float32": "linear", "isthmus bf16": "linear"}
    for name, peer in PEERS.items():
        kinds[name] = "linear" if "linear" in peer.arrays else "debiased"
    means = ", ".join(map(str, size["offsets"]))
    return Section(
        *("F", f"error of one pair of float32 layers with mean/std {means}", "offsets"),
        *({name: kind.replace("linear", "biased") for name, kind in kinds.items()}, size),
        *(dict.fromkeys(kinds, TRUTH), kinds, 1),
    )


# Running


class Runner:
    """Runs tools once for each thing to measure, in processes of their own or, for a quick look, in this one."""

    def __init__(self, threads: int, isolated: bool, with_peers: bool) -> None:
        self.isolated, self.with_peers = isolated, with_peers
        self._environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))}
        self._done: dict[str, list[Row]] = {}

    def measure(self, specs: Sequence[dict[str, Any]], rounds: int) -> list[list[Row]]:
        """Run each in turn, as often as there are rounds; what has been measured before is not run again."""
        keys = [json.dumps(spec, sort_keys=True) for spec in specs]
        for _ in range(rounds):
            for key, spec in zip(keys, specs, strict=True):
                runs = self._done.setdefault(key, [])
                if len(runs) < rounds and not any("failed" in run or run["cpu"] > SLOW for run in runs):
                    print(f"… {spec['who']}", file=sys.stderr)
                    runs.append(self._run(spec))
        return [self._done[key] for key in keys]

    def _run(self, spec: dict[str, Any]) -> Row:
        if not self.isolated and (spec["task"], spec["who"]) != ("many", OURS):
            try:
                return run(spec)
            except Exception as error:  # a tool that fails is a line of the table
                return {"failed": f"{type(error).__name__}: {error}"}
        command = [sys.executable, __file__, "--child", json.dumps(spec)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=self._environment)
        if done.returncode:
            return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
        return json.loads(done.stdout.splitlines()[-1])

    def missing(self, who: str) -> str:
        """Say why a tool does not run; empty where it does."""
        if who not in PEERS:
            return ""
        if not PEERS[who].installed:
            return "not installed"
        return "" if self.with_peers else "left out"


def measure_section(section: Section, runner: Runner) -> list[Row]:
    specs = {who: spec(section, who, who) for who in section.tools if not runner.missing(who)}
    truths = {who: spec(section, who, section.truths[who]) for who in specs if who in section.truths}
    found = dict(zip(specs, runner.measure(list(specs.values()), section.rounds), strict=True))
    true = dict(zip(truths, runner.measure(list(truths.values()), 1), strict=True))
    rows = []
    for who, estimator in section.tools.items():
        row: Row = {"section": section.letter, "tool": who, "estimator": estimator, "version": version(who)}
        row |= summary(found[who], true.get(who)) if who in found else {"status": runner.missing(who)}
        rows.append(row)
    ours = rows[0]
    for row in rows:
        if "cpu_seconds" in row and ours.get("cpu_seconds"):
            row["times_ours"] = row["cpu_seconds"] / ours["cpu_seconds"]
    return rows


def spec(section: Section, who: str, runs: str) -> dict[str, Any]:
    kind = section.kinds.get(who, section.task)
    if section.task == "offsets":
        return {"task": "offsets", "kind": kind, "who": runs, "size": section.size}
    return {"task": kind, "who": runs, "size": section.size}


def version(who: str) -> str | None:
    try:
        return metadata.version(who.split()[0].replace("_", "-"))
    except metadata.PackageNotFoundError:
        return None


def summary(runs: Sequence[Row], true: Sequence[Row] | None) -> Row:
    """One line of a table: medians over the rounds, the error of the first."""
    failed = [run["failed"] for run in runs if "failed" in run]
    if failed:
        return {"status": f"failed: {failed[0]}"}
    row: Row = {"status": "ok", "note": runs[0]["note"], "rounds": len(runs)}
    for name, key in (("cpu_seconds", "cpu"), ("wall_seconds", "wall")):
        row[name] = statistics.median(run[key] for run in runs)
    row["peak_megabytes"] = max(run["peak"] or 0 for run in runs) / 1e6 or None
    row["loaded_megabytes"] = (runs[0]["loaded"] or 0) / 1e6 or None
    if true and "failed" not in true[0]:
        errors = np.abs(np.subtract(runs[0]["values"], true[0]["values"]))
        row["error"], row["errors"] = float(errors.max()), errors.ravel().tolist() if errors.ndim == 1 else None
    return row


# Goals


def goals(rows: Sequence[Row]) -> list[Row]:
    """Hold the figures against what was aimed at; a goal without its peers is left out."""
    found: list[Row] = []
    for letter in "AB":
        ours, peers = ran(rows, letter)
        if ours and peers:
            best = min(peers, key=lambda row: row["cpu_seconds"])
            found.append(goal(f"{letter}: time of {best['tool']} over ours", best["times_ours"], 1.0))
            found.append(goal(f"{letter}: error of {best['tool']} over ours", best["error"] / ours["error"], 100.0))
    ours, peers = ran(rows, "C")
    if ours and peers:
        found.append(goal("C: time of the fastest peer over ours", min(row["times_ours"] for row in peers), 5.0))
    for tool, least in (("torch_cka", 5.0), ("pytorch-cka", 2.0)):
        found += [
            goal(f"D: time of {tool} over ours", row["times_ours"], least)
            for row in ran(rows, "D")[1]
            if row["tool"] == tool
        ]
    ours = ran(rows, "E")[0]
    if ours and ours["peak_megabytes"]:
        found.append(goal("E: 4000 MB over the peak", 4000 / ours["peak_megabytes"], 1.0))
    return found


def ran(rows: Sequence[Row], letter: str) -> tuple[Row | None, list[Row]]:
    """Ours of a section and the peers that ran in it."""
    done = [row for row in rows if row["section"] == letter and row["status"] == "ok"]
    ours = [row for row in done if row["tool"].startswith("isthmus")]
    return (ours[0] if ours else None), [row for row in done if row["tool"] in PEERS]


def goal(what: str, value: float, least: float) -> Row:
    return {"goal": what, "value": value, "least": least, "met": value >= least}


# Showing


def show(section: Section, rows: Sequence[Row]) -> None:
    print(f"\n{section.letter}. {section.title}")
    if section.task == "offsets":
        show_offsets(section, rows)
        return
    print(f"{'':28}{'estimator':24}{'CPU s':>9}{'wall s':>9}{'x ours':>8}{'error':>10}{'peak MB':>9}{'data MB':>9}")
    for row in rows:
        line = f"{row['tool']:28}{row['estimator']:24}"
        if row["status"] != "ok":
            print(f"{line}{row['status']}")
            continue
        line += f"{row['cpu_seconds']:9.2f}{row['wall_seconds']:9.2f}{number(row.get('times_ours'), '8.2f')}"
        line += number(row.get("error"), "10.1e") + number(row["peak_megabytes"], "9.0f")
        print(f"{line}{number(row['loaded_megabytes'], '9.0f')}")
    for note in dict.fromkeys(row["note"] for row in rows if row.get("note")):
        print(f"({note})")
    if section.task == "many":
        print(f"a dense float32 kernel takes {4 * section.size['samples'] ** 2 / 1e6:.0f} MB per layer")


def show_offsets(section: Section, rows: Sequence[Row]) -> None:
    print(f"{'':28}{'estimator':24}" + "".join(f"{offset:>10}" for offset in section.size["offsets"]))
    for row in rows:
        errors = "".join(number(error, "10.1e") for error in row.get("errors") or [])
        print(f"{row['tool']:28}{row['estimator']:24}{errors or row['status']}  {row.get('note', '')}".rstrip())


def number(value: float | None, form: str) -> str:
    """Format a number; NaN and what is missing stay visible in the same width."""
    return f"{'-' if value is None else 'NaN' if math.isnan(value) else format(value, form):>{int(form.split('.')[0])}}"


def plain(value: Any) -> Any:
    """Turn NaN, which JSON lacks, into None."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=os.environ.get("ISTHMUS_DATA"))
    parser.add_argument("--quick", action="store_true", help="small sizes, mostly in one process: seconds, no claims")
    parser.add_argument("--sections", default="ABCDdEF", help="which tables, by letter (d: exact over all images)")
    parser.add_argument("--images", type=int, default=10_000, help="images in section D")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ours-only", action="store_true", help="leave the other tools out")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(run(arguments.child)))
        return
    runner = Runner(arguments.threads, isolated=not arguments.quick, with_peers=not arguments.ours_only)
    facts = {"machine": platform.processor() or platform.machine(), "threads": arguments.threads}
    facts |= {"python": platform.python_version(), "torch": metadata.version("torch"), "quick": arguments.quick}
    rows: list[Row] = []
    for section in sections(arguments):
        if section.letter in arguments.sections:
            found = measure_section(section, runner)
            show(section, found)
            rows += found
            # After each table, so that an interrupted run keeps what it has measured.
            report = {"facts": facts, "rows": rows, "goals": goals(rows)}
            arguments.json.write_text(json.dumps(plain(report), indent=2))
    print("\ngoals" + " (--quick: far too small to tell)" * arguments.quick)
    for line in goals(rows):
        verdict = "met   " if line["met"] else "missed"
        print(f"{verdict} {line['goal']}: {line['value']:.2f} (at least {line['least']:g})")
    print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()

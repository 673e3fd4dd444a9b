"""The survey: `isthmus.symmetry` on the networks that people have, and the time that it takes.

    python benchmarks/symmetry_coverage.py [--library torchvision|timm|transformers] [--only NAME ...] [--quick]
                                           [--jobs 1] [--limit 900] [--no-verify] [--json FILE] [--markdown]
    python benchmarks/symmetry_coverage.py --show FILE ... [--markdown]
    python benchmarks/symmetry_coverage.py --timing [--json FILE] [--markdown]

It runs all classification models of torchvision, the smallest variant of every family of timm, and the architectures
of transformers in `survey_transformers.py`, each with random weights, in processes of their own that are started anew
after a crash or a hang. Libraries that are not installed are left out; `make survey` installs torchvision and timm
beside the environment. The exit code is 1 if any verification failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import queue
import statistics
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from survey_worker import LIBRARIES

TOLERANCE = 1e-8  # of a check, where rounding allows it
HERE = Path(__file__).resolve().parent
Row = dict[str, Any]


class Worker:
    """A process that measures models one by one, started when needed and ended when it exceeds its time."""

    def __init__(self, *, verify: bool, limit: float) -> None:
        self.command = [sys.executable, str(HERE / "survey_worker.py"), *([] if verify else ["--no-verify"])]
        self.limit = limit
        self.process: subprocess.Popen[str] | None = None

    def measure(self, library: str, name: str) -> Row:
        """Give the row of one model, whatever happens to the process meanwhile."""
        if self.process is None or self.process.poll() is not None:
            environment = {"OMP_NUM_THREADS": "1", **os.environ}
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                self.command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        late = threading.Event()
        timer = threading.Timer(self.limit, self._end, [late])
        timer.start()
        try:
            self.process.stdin.write(f"{library} {name}\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            timer.cancel()
        if answer:
            return json.loads(answer)
        self.close()
        why = f"not done after {self.limit:g} s" if late.is_set() else "the process died"
        return {"library": library, "name": name, "status": "error", "stage": "process", "message": why}

    def _end(self, late: threading.Event) -> None:
        late.set()
        if self.process is not None:
            self.process.kill()

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def survey(
    models: Sequence[tuple[str, str]],
    *,
    verify: bool = True,
    jobs: int = 1,
    limit: float = 900,
    done: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Measure models, several at a time if asked, and tell of each on standard error when it is done.

    Args:
        models: Pairs of library and name.
        verify: Whether to check each symmetry that is found.
        jobs: How many processes to run at a time.
        limit: Seconds after which a model is given up.
        done: Called with each row as it comes.

    Returns:
        A row for each model, in the order asked for; see `survey_worker.measure`.
    """
    waiting: queue.SimpleQueue[tuple[int, str, str]] = queue.SimpleQueue()
    for at, (library, name) in enumerate(models):
        waiting.put((at, library, name))
    rows: dict[int, Row] = {}

    def work() -> None:
        worker = Worker(verify=verify, limit=limit)
        try:
            while True:
                at, library, name = waiting.get_nowait()
                rows[at] = worker.measure(library, name)
                done(rows[at])
                print(f"[{len(rows)}/{len(models)}] {library} {name}: {outcome(rows[at])}", file=sys.stderr, flush=True)
        except queue.Empty:
            pass
        finally:
            worker.close()

    threads = [threading.Thread(target=work) for _ in range(max(1, jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [rows[at] for at in sorted(rows)]


def outcome(row: Row) -> str:
    """Say in a few words what came of a model."""
    if row["status"] != "traced":
        return f"{row['stage']}: {row['message']}"
    if "passed" not in row:
        return "traced"
    within = f" at a tolerance of {row['tolerance']:.0e}" if coarse(row) else ""
    return f"verified, {row['error']:.0e}{within}" if row["passed"] else f"FAILED: {row['message']}"


def summary(rows: Iterable[Row]) -> Row:
    """Count over the rows of one library; medians and extremes are over what was traced."""
    rows = list(rows)
    traced = [row for row in rows if row["status"] == "traced"]
    checked = [row for row in traced if "passed" in row]
    return {
        "models": len(rows),
        "traced": len(traced),
        "verified": sum(row["passed"] for row in checked),
        "coarse": sum(row["passed"] and coarse(row) for row in checked),
        "failed": sum(not row["passed"] for row in checked),
        "unruled": sum(bool(row["unruled"]) for row in traced),
        "share": [middle(row["share"] for row in traced), min((row["share"] for row in traced), default=math.nan)],
        "error": max((row["error"] for row in checked if row["passed"]), default=math.nan),
        "seconds": [
            middle(row["seconds"] for row in traced),
            max((row["seconds"] for row in traced), default=math.nan),
        ],
        "megabytes": max((growth(row) for row in traced), default=math.nan),
    }


def coarse(row: Row) -> bool:
    """Whether the check had to count more than usual as unchanged, because rounding alone changes that much."""
    return row.get("tolerance", TOLERANCE) > TOLERANCE


def middle(values: Iterable[float]) -> float:
    """Give the median, NaN of nothing."""
    values = list(values)
    return statistics.median(values) if values else math.nan


def growth(row: Row) -> float:
    """Megabytes by which the derivation raised the resident set above the loaded model; NaN if not known."""
    return row.get("peak_megabytes", math.nan) - row.get("loaded_megabytes", math.nan)


def cells(row: Row) -> list[str]:
    """Give the row of the table of models."""
    if row["status"] != "traced":
        return [row["name"], f"{row['stage']}: {row['message']}"[:90], *[""] * 7]
    checked = (f"{row['error']:.0e}" if row["passed"] else "FAILED") if "passed" in row else "–"
    if row.get("passed") and coarse(row):
        checked += f" (tolerance {row['tolerance']:.0e})"
    pinned = ", ".join(f"{operator} {count}" for operator, count in row["unruled"].items()) or "none"
    return [
        row["name"],
        f"{row['parameters'] / 1e6:.3g}",
        str(row["groups"]),
        f"{100 * row['share']:.1f}",
        pinned,
        str(sum(row["held"].values())),
        checked,
        f"{row['seconds']:.2f}",
        f"{growth(row):.0f}",
    ]


HEADINGS = [
    *("model", "parameters (M)", "groups", "movable (%)", "axes pinned for want of a rule", "axes held by a rule"),
    *("verification error", "seconds", "MB on top of the model"),
]


def table(headings: Sequence[str], lines: Iterable[Sequence[str]], markdown: bool) -> str:
    """Lay out a table as text or as Markdown."""
    lines = list(lines)
    if markdown:
        rule = ["---"] * len(headings)
        return "\n".join(f"| {' | '.join(line)} |" for line in (headings, rule, *lines))
    widths = [max(len(line[at]) for line in (headings, *lines)) for at in range(len(headings))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (headings, *lines)
    )


SUMMARY = [
    *("library", "models", "traced", "verified", "of these at a coarser tolerance", "failed verification"),
    "with something unruled",
    *("movable, median (least)", "largest error", "seconds, median (most)", "MB on top of the model, most"),
]


def summary_cells(library: str, counted: Row) -> list[str]:
    """Give the row of the table of libraries."""
    traced = f"{counted['traced']} ({100 * counted['traced'] / max(1, counted['models']):.1f} %)"
    typical, least = counted["share"]
    usual, longest = counted["seconds"]
    return [
        *(library, str(counted["models"]), traced),
        *(str(counted[key]) for key in ("verified", "coarse", "failed", "unruled")),
        *(f"{100 * typical:.1f} % ({100 * least:.1f} %)", f"{counted['error']:.0e}"),
        *(f"{usual:.2f} ({longest:.1f})", f"{counted['megabytes']:.0f}"),
    ]


def show(rows: Sequence[Row], markdown: bool) -> None:
    """Print a table for every library, one of the libraries, what lacks a rule, and what went wrong."""
    parts = {library: [row for row in rows if row["library"] == library] for library in LIBRARIES}
    parts = {library: mine for library, mine in parts.items() if mine}
    for library, mine in parts.items():
        print(f"{'## ' if markdown else ''}{library}\n\n{table(HEADINGS, map(cells, mine), markdown)}\n")
    print(table(SUMMARY, [summary_cells(library, summary(mine)) for library, mine in parts.items()], markdown))
    lacking = Counter(operator for row in rows if row["status"] == "traced" for operator in row["unruled"])
    if lacking:
        print("\nwithout a rule: " + ", ".join(f"{name} (in {count})" for name, count in lacking.most_common()))
    for row in rows:
        if row["status"] != "traced" or not row.get("passed", True):
            print(f"\n{row['library']} {row['name']}: {outcome(row)}")


def listed(libraries: Sequence[str], *, quick: bool = False, only: Sequence[str] = ()) -> list[tuple[str, str]]:
    """List what to measure, leaving out libraries that are not installed.

    Raises:
        SystemExit: A name in `only` is in no table.
    """
    found = []
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            print(f"{library} is not installed and left out", file=sys.stderr)
            continue
        module = importlib.import_module(f"survey_{library}")
        found += [(library, name) for name in (module.QUICK if quick else module.names())]
    unknown = set(only) - {name for _, name in found}
    if unknown:
        raise SystemExit(f"--only: no such model: {', '.join(sorted(unknown))}")
    return [pair for pair in found if not only or pair[1] in only]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", action="append", choices=LIBRARIES, help="repeatable; all if not given")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="a few models of each library")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=900, help="seconds after which a model is given up")
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--timing", action="store_true", help="measure time and its growth with depth instead")
    parser.add_argument("--json", type=Path, help="one line for each model, written as it is done")
    parser.add_argument("--show", type=Path, nargs="+", metavar="FILE", help="only show what --json has written")
    parser.add_argument("--markdown", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the survey; give the exit code."""
    options = parse(arguments)
    if options.timing:
        import survey_timing

        return survey_timing.run(options.json, lambda headings, lines: table(headings, lines, options.markdown))
    if options.show:
        rows = [json.loads(line) for file in options.show for line in file.read_text().splitlines()]
        show(rows, options.markdown)
        return failed(rows)
    models = listed(options.library or LIBRARIES, quick=options.quick, only=options.only)
    with options.json.open("w", buffering=1) if options.json else nullcontext() as file:

        def done(row: Row) -> None:
            if file is not None:
                file.write(json.dumps(row) + "\n")

        rows = survey(models, verify=not options.no_verify, jobs=options.jobs, limit=options.limit, done=done)
    show(rows, options.markdown)
    return failed(rows)


def failed(rows: Iterable[Row]) -> int:
    """Give the exit code: 1 if any verification failed."""
    return int(any(not row.get("passed", True) for row in rows))


if __name__ == "__main__":
    sys.exit(main())

"""Paths, their intervals, midpoints and planes: time beside a plain script, and what they say of trained networks.

    python benchmarks/connectivity.py [--networks FOLDER] [--repeats 3] [--quick] [--json FILE]

Both sides measure the same points on the same data in one process, in turn; the ratio of medians is what to read. The
networks are those of matching_pairs.py, trained here if FOLDER does not hold them. `--quick` takes the embedded digits.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matching_pairs
import plain_path
import torch
from torch.utils.data import DataLoader, TensorDataset

import isthmus
from isthmus.merge.paths import midpoint, plane

POINTS = 25
NETWORKS = {"mnist-3x512": 10_000, "vgg11": 2_000, "resnet20-layer": 1_000}
"""Names of networks, and how many test images to measure each on."""


def timed(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, Any]]:
    """Time the calls in turn, so that a drift of the machine meets all of them; one round more is not counted."""
    found: dict[str, dict[str, Any]] = {name: {"seconds": [], "cpu_seconds": []} for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            found[name]["value"] = call()
            if repeat:
                found[name]["seconds"].append(time.perf_counter() - wall)
                found[name]["cpu_seconds"].append(time.process_time() - cpu)
    return found


def rows_of(what: str, found: dict[str, dict[str, Any]], against: str) -> list[dict[str, Any]]:
    """Lines of the table: medians, and how many times as long the plain script takes."""
    plain = found[against]
    return [
        {
            "what": what,
            "tool": name,
            "seconds": statistics.median(one["seconds"]),
            "cpu_seconds": statistics.median(one["cpu_seconds"]),
            "plain_over_ours": statistics.median(plain["seconds"]) / statistics.median(one["seconds"]),
            "plain_over_ours_cpu": statistics.median(plain["cpu_seconds"]) / statistics.median(one["cpu_seconds"]),
            "barrier": one["value"],
        }
        for name, one in found.items()
    ]


def benchmark_paths(name: str, count: int, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Time the path between two networks, from a loader of small batches and from large tensors."""
    a, b = (matching_pairs.network(name, seed, folder) for seed in (0, 1))
    data = matching_pairs.batches(name, "test", count, 1000)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=128)

    def theirs(source: Any) -> float:
        return plain_path.barrier(plain_path.path(a, b, source, POINTS)[0])

    def ours(source: Any) -> float:
        return isthmus.connect(a, b, source, points=POINTS, progress=False).barrier

    rows = []
    for source, what in ((loader, "DataLoader of 128"), (data, "tensors of 1000")):
        calls = {
            "isthmus": lambda source=source: ours(source),
            "plain script": lambda source=source: theirs(source),
        }
        rows += rows_of(f"{name}, {len(x)} images, {POINTS} points, {what}", timed(calls, repeats), "plain script")
    return rows


def benchmark_rest(name: str, count: int, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Time what stands on the path: the interval of its barrier, the midpoint alone, a plane."""
    a, b, c = (matching_pairs.network(name, seed, folder) for seed in (0, 1, 2))
    data = matching_pairs.batches(name, "test", count, 1000)
    path = isthmus.connect(a, b, data, points=POINTS, progress=False)
    calls: dict[str, Callable[[], Any]] = {
        "path": lambda: isthmus.connect(a, b, data, points=POINTS, progress=False).barrier,
        "interval, 1000 resamples": path.barrier_interval,
        "midpoint": lambda: midpoint(a, b, data, progress=False).loss,
        "plane, 11 × 11": lambda: float(plane(a, b, c, data, points=11, progress=False).loss.min()),
    }
    rows = rows_of(f"{name}, what stands on it", timed(calls, repeats), "path")
    for row in rows:
        row["value"] = row.pop("barrier")
        row["of_a_path"] = 1 / row.pop("plain_over_ours")
        del row["plain_over_ours_cpu"]
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'':62}{'':26}{'seconds':>9}{'cpu':>8}{'plain / it':>12}{'in cpu':>8}")
    for row in rows:
        line = f"{row['what']:62}{row['tool']:26}{row['seconds']:9.3f}{row['cpu_seconds']:8.3f}"
        if "barrier" in row:
            line += f"{row['plain_over_ours']:12.2f}{row['plain_over_ours_cpu']:8.2f}   barrier {row['barrier']:.4f}"
        else:
            value = row["value"]
            shown = f"{value[0]:.4f} to {value[1]:.4f}" if isinstance(value, tuple) else f"{value:.4f}"
            line += f"{row['of_a_path']:12.2f} of a path   {shown}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=Path, default=Path("build/networks"), help="folder of the trained networks")
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the embedded digits, in seconds")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    chosen = {matching_pairs.QUICK: 300} if arguments.quick else {name: NETWORKS[name] for name in arguments.only}
    rows = []
    for name, count in chosen.items():
        rows += benchmark_paths(name, count, arguments.networks, arguments.repeats)
    first = next(iter(chosen))
    if first in (matching_pairs.QUICK, "mnist-3x512"):  # of these there are three
        rows += benchmark_rest(first, min(chosen[first], 1000), arguments.networks, arguments.repeats)
    show(rows)
    facts = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    facts |= {"python": platform.python_version(), "torch": torch.__version__, "quick": arguments.quick}
    arguments.json.write_text(json.dumps({"facts": facts, "rows": rows}, indent=2))
    print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()

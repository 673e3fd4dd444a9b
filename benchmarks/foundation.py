"""Speed and memory of the first steps (symmetry, matching) beside a plain script of the published algorithms.

    python benchmarks/foundation.py [--data-dir DIR] [--repeats 5] [--json FILE]

Both sides run in one process, in turn; the ratio of medians is what to read. Memory is measured in a process of its own
as the growth of the peak resident set over the two loaded networks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain_rebasin as plain
import torch

import isthmus
from isthmus import zoo
from isthmus.base.errors import DataFileError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
WIDTHS = (512, 512, 512)


def trained_pair(data_dir: str | None) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor, str]:
    """Train two MLPs for three epochs, on MNIST where it is found and on digits otherwise."""
    try:
        data = zoo.load_data("mnist", "train", data_dir=data_dir or (SHARED if SHARED.exists() else None))
    except DataFileError:
        data = zoo.load_data("digits", "train")
    recipe = zoo.Recipe(epochs=3, batch_size=256, optimizer="adam", lr=1e-3, weight_decay=0.0)
    models = [zoo.build("mlp", data, seed=seed, widths=WIDTHS) for seed in (0, 1)]
    for model in models:
        zoo.train(model, data, recipe)
    return models[0].eval(), models[1].eval(), data.inputs()[:10_000], f"{data.name}, 3 epochs"


def timed(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Time the calls in turn, so that a drift of the machine meets all of them; one round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def row(name: str, ours: list[float], other: list[float] | None = None) -> dict[str, Any]:
    """One line of the table: medians and their ratio."""
    line: dict[str, Any] = {"what": name, "seconds": statistics.median(ours), "spread": [min(ours), max(ours)]}
    if other:
        line |= {"plain_script": statistics.median(other), "ratio": statistics.median(ours) / statistics.median(other)}
    return line


def benchmark_symmetry(repeats: int) -> list[dict[str, Any]]:
    rows = []
    for name, model in (("ResNet20", zoo.resnet(depth=20)), ("VGG16", zoo.vgg(depth=16))):
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        calls = {
            "trace": lambda model=model, x=x: isthmus.symmetry(model, x, verify=False),
            "verified": lambda model=model, x=x: isthmus.symmetry(model, x),
        }
        seconds = timed(calls, repeats)
        rows += [row(f"symmetry of {name}", seconds["trace"]), row("… verified in float64", seconds["verified"])]
    return rows


def benchmark_matching(data_dir: str | None, repeats: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    a, b, inputs, source = trained_pair(data_dir)
    state_a, state_b = dict(a.state_dict()), dict(b.state_dict())
    symmetry = isthmus.symmetry(a, inputs[:8])
    data = list(inputs.split(1000))
    seconds = timed(
        {
            "weights": lambda: isthmus.match(a, b, symmetry=symmetry, restarts=1),
            "plain weights": lambda: plain.weight_matching(state_a, state_b),
            "activations": lambda: isthmus.match(a, b, data, method="activations", symmetry=symmetry),
            "plain activations": lambda: plain.activation_matching(state_a, state_b, inputs),
        },
        repeats,
    )
    ours = isthmus.match(a, b, symmetry=symmetry, restarts=1)
    theirs = plain.objective(state_a, plain.permute(state_b, plain.weight_matching(state_a, state_b)))
    rows = [
        row("weight matching, one restart", seconds["weights"], seconds["plain weights"]),
        row(f"activation matching, {len(inputs)} samples", seconds["activations"], seconds["plain activations"]),
    ]
    facts = {"networks": f"two MLPs {WIDTHS}, {source}", "objective": ours.objective, "plain_objective": theirs}
    return rows, facts


def peak_resident() -> int:
    """Largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss is inherited from the parent process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_memory(method: str) -> None:
    """In a process of its own: growth of the peak resident set during a match, in bytes, with the models' size."""
    torch.set_num_threads(1)
    a, b = (zoo.mlp(784, (2048,) * 4, 10, seed=seed).eval() for seed in (0, 1))
    data = list(torch.randn(2000, 784, generator=torch.Generator().manual_seed(0)).split(500))
    symmetry = isthmus.symmetry(a, data[0][:2], verify=False)
    small = zoo.mlp(784, (8,) * 4, 10, seed=0).eval()  # loads what is loaded at first use
    isthmus.match(small, small, data, method=method)
    before = peak_resident()
    isthmus.match(a, b, data, method=method, symmetry=symmetry, restarts=1)
    grown = peak_resident() - before
    size = sum(p.numel() * p.element_size() for p in a.parameters())
    statistics_bytes = 4 * 2048**2 * 8 if method == "activations" else 0
    print(json.dumps({"grown": grown, "two_models": 2 * size, "statistics": statistics_bytes}))


def benchmark_memory() -> list[dict[str, Any]]:
    rows = []
    for method in ("weights", "activations"):
        run = subprocess.run(
            [sys.executable, __file__, "--measure-memory", method], capture_output=True, text=True, check=True
        )
        found = json.loads(run.stdout.splitlines()[-1])
        total = found["two_models"] + found["grown"]
        rows.append(
            {
                "what": f"peak memory, {method}, MLP 4 × 2048",
                "megabytes": total / 1e6,
                "two_models": found["two_models"] / 1e6,
                "statistics": found["statistics"] / 1e6,
                "times_two_models": (total - found["statistics"]) / found["two_models"],
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'':46}{'seconds':>9}{'plain':>9}{'ratio':>7}")
    for line in rows:
        if "seconds" in line:
            plain_seconds = f"{line['plain_script']:9.3f}{line['ratio']:7.2f}" if "ratio" in line else ""
            print(f"{line['what']:46}{line['seconds']:9.3f}{plain_seconds}")
    for line in rows:
        if "megabytes" in line:
            print(
                f"{line['what']:46}{line['megabytes']:9.0f} MB: {line['times_two_models']:.2f} times the two models' "
                f"{line['two_models']:.0f} MB, besides {line['statistics']:.0f} MB of statistics"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=os.environ.get("ISTHMUS_DATA"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--measure-memory", choices=("weights", "activations"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_memory:
        measure_memory(arguments.measure_memory)
        return
    matching, facts = benchmark_matching(arguments.data_dir, arguments.repeats)
    rows = [*benchmark_symmetry(arguments.repeats), *matching, *benchmark_memory()]
    facts |= {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    facts |= {"python": platform.python_version(), "torch": torch.__version__}
    show(rows)
    print(f"objective of weight matching {facts['objective']:.3f}, of the plain script {facts['plain_objective']:.3f}")
    arguments.json.write_text(json.dumps({"facts": facts, "rows": rows}, indent=2))
    print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()

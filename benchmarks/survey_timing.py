"""How long `isthmus.symmetry` takes without the check, how much memory, and how both grow with depth.

Every figure is the best of several calls in a process of its own, after one call on a small network that loads what is
loaded at first use; the peak is that of the whole resident set, Python, torch and the network included.

    python benchmarks/survey_timing.py --measure llama --depth 80
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from survey_torchvision import admit_foreign_build
from survey_worker import MEGABYTE, peak_resident, reset_peak
from torch import Tensor, nn

import isthmus

REPEATS = 3
LLAMA_DEPTHS = (10, 20, 40, 80)
MLP_DEPTHS = (25, 50, 100, 200)
# Seconds and megabytes on two cores that the whole call must stay under.
GOALS = {"resnet50": (1.5, None), "vit_b_16": (1.5, None), "swin_t": (2.5, None), "llama": (15.0, 2048)}
LLAMA: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
Row = dict[str, Any]


class ResidualMLP(nn.Module):
    """A stream of 32 units to which each block of two linear layers adds."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)) for _ in range(depth)
        )
        self.last = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs x 8 to inputs x 4."""
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def subject(name: str, depth: int) -> tuple[nn.Module, Any]:
    """Build a network and its example input; Llama with 70 billion parameters at 80 layers, on the meta device."""
    admit_foreign_build()
    if name == "mlp":
        return ResidualMLP(depth), torch.zeros(2, 8)
    if name == "llama":
        import transformers

        with torch.device("meta"):
            config = transformers.LlamaConfig(**LLAMA, num_hidden_layers=depth)
            return transformers.LlamaForCausalLM(config), {"input_ids": torch.zeros(1, 16, dtype=torch.long)}
    models = importlib.import_module("torchvision.models")
    return models.get_model(name, weights=None), torch.zeros(2, 3, 224, 224)


def measure(name: str, depth: int = 0) -> Row:
    """Time the whole call without the check, in this process.

    Returns:
        `seconds` (the best call), `peak_megabytes` of the process meanwhile, `groups` and `parameters`.
    """
    model, inputs = subject(name, depth)
    isthmus.symmetry(nn.Linear(2, 2), torch.ones(1, 2), verify=False)
    seconds = []
    reset_peak()
    found = None
    for _ in range(REPEATS):
        start = time.perf_counter()
        found = isthmus.symmetry(model, inputs, verify=False)
        seconds.append(time.perf_counter() - start)
    peak = peak_resident()
    assert found is not None
    return {
        "name": name,
        "depth": depth,
        "seconds": min(seconds),
        "peak_megabytes": peak / MEGABYTE if peak is not None else math.nan,
        "groups": len(found.groups),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def exponent(rows: Sequence[Row]) -> float:
    """Fit seconds = c · depth^k by least squares of the logarithms; give k."""
    x = [math.log(row["depth"]) for row in rows]
    y = [math.log(row["seconds"]) for row in rows]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - middle_x) ** 2 for a in x)


def in_a_process(name: str, depth: int = 0) -> Row | None:
    """Run `measure` in a process of its own; None, and a line on standard error, if it fails."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--measure", name, "--depth", str(depth)],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={"OMP_NUM_THREADS": "2", **os.environ},
    )
    if done.returncode:
        print(f"{name} could not be measured (exit code {done.returncode})", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def run(file: Path | None, table: Callable[[Sequence[str], list[list[str]]], str]) -> int:
    """Measure all, print a table and the exponents of growth; the exit code is 0.

    Args:
        file: Where to write the rows as JSON, if anywhere.
        table: Lays out headings and lines.
    """
    subjects = [("resnet50", 0), ("vit_b_16", 0), ("swin_t", 0)]
    subjects += [("llama", depth) for depth in LLAMA_DEPTHS] + [("mlp", depth) for depth in MLP_DEPTHS]
    rows = [row for name, depth in subjects if (row := in_a_process(name, depth))]
    print(table(["network", "layers", "parameters (M)", "groups", "seconds", "goal", "peak MB", "goal"], cells(rows)))
    for name in ("llama", "mlp"):
        deep = [row for row in rows if row["name"] == name]
        if len(deep) > 1:
            print(f"\n{name}: seconds grow as depth to the power of {exponent(deep):.2f}")
    if file:
        file.write_text(json.dumps(rows, indent=1))
    return 0


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Give the lines of the table; the goal of Llama is for 80 layers."""
    lines = []
    for row in rows:
        seconds, peak = GOALS.get(row["name"], (None, None)) if row["depth"] in (0, 80) else (None, None)
        lines.append(
            [
                *(row["name"], str(row["depth"] or "–"), f"{row['parameters'] / 1e6:.3g}", str(row["groups"])),
                *(f"{row['seconds']:.2f}", f"{seconds:g}" if seconds else "–"),
                *(f"{row['peak_megabytes']:.0f}", f"{peak:g}" if peak else "–"),
            ]
        )
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", required=True)
    parser.add_argument("--depth", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    print(json.dumps(measure(options.measure, options.depth)))

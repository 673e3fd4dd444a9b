"""Measures models of the survey one by one, in a process of its own, so that a crash or a hang costs one model only.

Reads lines `library name` and writes for each one line of JSON; see `measure` for what it holds.

    echo "transformers llama" | python benchmarks/survey_worker.py [--no-verify]
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from survey_torchvision import admit_foreign_build
from torch import nn

import isthmus
from isthmus.align.symmetry import Symmetry
from isthmus.align.terms import groups_of
from isthmus.base.errors import IsthmusError

LIBRARIES = ("torchvision", "timm", "transformers")
MEGABYTE = 2**20


def peak_resident() -> int | None:
    """Give the largest resident set since `reset_peak`, in bytes; None where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM")), None)
    return int(line.split()[1]) * 1024 if line else None


def reset_peak() -> None:
    """Forget the largest resident set so far; where the system cannot, the peak is that of the whole process."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def movable_share(found: Symmetry, model: nn.Module) -> float:
    """Share of a model's parameters, counted by entries, that lie on at least one axis that can be permuted."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    moved = sum(size for name, size in sizes.items() if groups_of(found.layout[name]))
    return moved / max(1, sum(sizes.values()))


def measure(library: str, name: str, *, verify: bool = True) -> dict[str, Any]:
    """Derive the symmetry of one model of the survey, and check it.

    Args:
        library: "torchvision", "timm" or "transformers".
        name: One of the names that the library's table lists.
        verify: Whether to measure that random permutations change nothing.

    Returns:
        `status` "traced", or "error" with `stage` ("build", "trace") and `message`. If traced: `parameters`, `groups`,
        `kinds`, `share` of the parameters with an axis that can be permuted; `unruled` and `held`, the axes pinned for
        want of a rule and by a rule that found no structure, by operator, with `reasons`, one for each of the latter;
        `seconds` of the derivation, `peak_megabytes` of the process meanwhile and `loaded_megabytes` before. With
        `verify` also `passed`, `error`, `sensitivity`, `tolerance` (what counted as unchanged), `verify_seconds` and,
        if it failed, `message`.
    """
    row: dict[str, Any] = {"library": library, "name": name}
    torch.manual_seed(0)
    try:
        admit_foreign_build()  # timm and transformers import torchvision where they find it
        model, inputs = importlib.import_module(f"survey_{library}").build(name)
    except Exception as error:  # whatever a library raises belongs into the table
        return row | {"status": "error", "stage": "build", "message": _message(error)}
    model.eval()
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    reset_peak()
    loaded, start = peak_resident(), time.perf_counter()
    try:
        found = isthmus.symmetry(model, inputs, verify=False)
    except Exception as error:
        return row | {"status": "error", "stage": "trace", "message": _message(error)}
    row["seconds"] = time.perf_counter() - start
    peak = peak_resident()
    if peak is not None and loaded is not None:
        row |= {"peak_megabytes": peak / MEGABYTE, "loaded_megabytes": loaded / MEGABYTE}
    row |= describe(found, model)
    return row | (verified(found, model, inputs) if verify else {})


def describe(found: Symmetry, model: nn.Module) -> dict[str, Any]:
    """Say what was found: groups and their kinds, the share that moves, and what is pinned by which operator."""
    unruled = {(item.name, item.axis) for item in found.unruled}
    held = [item for item in found.pinned if item.kind == "operator" and (item.name, item.axis) not in unruled]
    return {
        "status": "traced",
        "groups": len(found.groups),
        "kinds": dict(Counter(group.kind for group in found.groups)),
        "share": movable_share(found, model),
        "unruled": dict(Counter(item.operator for item in found.unruled)),
        "held": dict(Counter(item.operator for item in held)),
        "reasons": {item.operator: item.reason for item in reversed(held)},
    }


def verified(found: Symmetry, model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Measure that random permutations change nothing; a failure is recorded, not raised."""
    start = time.perf_counter()
    row: dict[str, Any] = {"passed": False}
    try:
        report = found.verify(model, inputs)
        row |= {"error": report.error, "sensitivity": report.sensitivity, "tolerance": report.tolerance}
        report.check()
        row["passed"] = True
    except IsthmusError as error:
        row["message"] = str(error)
    except Exception as error:
        row["message"] = _message(error)
    return row | {"verify_seconds": time.perf_counter() - start}


def _message(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def main() -> None:
    """Answer lines on standard input until it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-verify", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of the libraries, about their own affairs
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print must not mix with the answers
    isthmus.symmetry(nn.Linear(2, 2), torch.ones(1, 2), verify=False)  # what torch loads at first use counts for nobody
    for line in sys.stdin:
        library, name = line.split()
        print(json.dumps(measure(library, name, verify=not options.no_verify)), file=answers)
        gc.collect()


if __name__ == "__main__":
    main()

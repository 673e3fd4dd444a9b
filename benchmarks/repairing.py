"""Repair of averaged networks: what it gives at the midpoint, and how the variance of units collapses without it.

    python benchmarks/repairing.py --networks FOLDER [--quick] [--sections AB] [--only TEXT] [--json FILE]

A. MLPs of 2 to 21 hidden layers on MNIST, beside the table of the paper (Jordan et al. 2023).
B. Convolutional networks with batch norm and with layer norm on Fashion-MNIST: points lost against the parents.

Networks are matched by several methods; that whose repaired midpoint has the lowest loss on training data is taken.
Statistics are those of training data, accuracies those of test data, in percent. For each pair the variance of the
units over that of their parents' is listed layer by layer (C). Networks are taken from the folder, and trained where it
lacks them (`repairing_pairs.py`).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from matching_pairs import batches, network
from repairing_pairs import DEPTHS, DISTANCES, QUICK
from torch import Tensor, nn

import isthmus
from isthmus.base.evaluation import Evaluation, evaluate
from isthmus.base.interpolation import segment
from isthmus.merge.repairs import repair, variance_ratios

Row = dict[str, Any]
Batches = list[tuple[Tensor, Tensor]]

_COLUMNS = ("naive", "permuted", "repaired", "logits too", "ends")


def pair(name: str, folder: Path, methods: list[str], samples: int) -> Row:
    """Match a pair by every method, and measure the midpoint of the best with and without repair."""
    a, b = (network(name, seed, folder) for seed in (0, 1))
    train, test = batches(name, "train", samples), batches(name, "test", None if samples > 5000 else samples)
    symmetry = isthmus.symmetry(a, test[0][0][:2])
    found = {}
    for method in methods:
        start = time.perf_counter()
        moved = isthmus.match(a, b, train, method=method, symmetry=symmetry).apply(b)
        found[method] = {"matching_seconds": time.perf_counter() - start, **_midpoint(a, moved, train, test)}
    best = min(found, key=lambda method: found[method]["train_loss_repaired"])
    moved = isthmus.match(a, b, train, method=best, symmetry=symmetry).apply(b)
    ends = [_accuracy(evaluate(each, test)) for each in (a, b)]
    return {
        "network": name,
        "ends": sum(ends) / 2,
        "naive": _accuracy(evaluate(_middle(a, b), test)),
        "method": best,
        **found[best],
        "methods": found,
        "variance": {
            "permuted": variance_ratios(_middle(a, moved), (a, moved), train[:4]).to_dict(),
            "repaired": variance_ratios(_repaired(a, moved, train), (a, moved), train).to_dict(),
        },
    }


def _midpoint(a: nn.Module, b: nn.Module, train: Batches, test: Batches) -> Row:
    start = time.perf_counter()
    repaired = _repaired(a, b, train)
    seconds = time.perf_counter() - start
    return {
        "permuted": _accuracy(evaluate(_middle(a, b), test)),
        "repaired": _accuracy(evaluate(repaired, test)),
        "logits too": _accuracy(evaluate(_repaired(a, b, train, logits=True), test)),
        "train_loss_repaired": evaluate(repaired, train).loss,
        "repair_seconds": seconds,
    }


def _repaired(a: nn.Module, b: nn.Module, train: Batches, logits: bool = False) -> nn.Module:
    return repair(_middle(a, b), train, endpoints=(a, b), logits=logits)


def _middle(a: nn.Module, b: nn.Module) -> nn.Module:
    return segment(a, b, None).move(0.5)


def _accuracy(found: Evaluation) -> float:
    assert found.metric is not None
    return 100 * found.metric


def goals(row: Row) -> list[Row]:
    """Hold a pair against what was published."""
    name = row["network"]
    if name in DEPTHS:
        paper = DEPTHS[name]
        return [
            _goal(f"{name}: permuted over published - 1.5, in points", row["permuted"] - paper.permuted, -1.5),
            _goal(f"{name}: repaired over published, in points", row["repaired"] - paper.repaired, 0),
        ]
    if name in DISTANCES:
        other, distance = DISTANCES[name]
        lost = row["ends"] - row["repaired"]
        return [_goal(f"{name}: points lost less than those of {other}", distance - lost, 0)]
    return []


def _goal(text: str, value: float, least: float) -> Row:
    return {"goal": text, "value": value, "least": least, "met": value >= least}


def show(row: Row) -> None:
    paper = DEPTHS.get(row["network"])
    cells = "".join(f"{row[column]:{max(10, len(column) + 2)}.2f}" for column in _COLUMNS)
    published = f"   paper: {paper.naive} / {paper.permuted} / {paper.repaired} [{paper.ends}]" if paper else ""
    print(f"{row['network']:18}{row['method']:14}{cells}{row['repair_seconds']:10.2f}{published}", flush=True)


def show_variance(row: Row) -> None:
    print(f"\nC. {row['network']}: variance of the units over that of the parents', permuted → repaired")
    before, after = row["variance"]["permuted"], row["variance"]["repaired"]
    for name, one, other in zip(before["layers"], before["ratio"], after["ratio"], strict=True):
        print(f"   {name:28}{one:8.3f} → {other:8.5f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=Path, help="folder of trained networks; None for a temporary one")
    parser.add_argument("--quick", action="store_true", help="one small pair in seconds: no claims")
    parser.add_argument("--sections", default="AB", help="which tables, by letter")
    parser.add_argument("--only", default="", help="networks whose name has this in it")
    parser.add_argument("--methods", nargs="+", default=["weights", "iterated"], help="of matching")
    parser.add_argument("--samples", type=int, default=10_000, help="of training data")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    names = [QUICK] if chosen.quick else [*(DEPTHS if "A" in chosen.sections else ())]
    names += [] if chosen.quick or "B" not in chosen.sections else [*DISTANCES]
    rows: list[Row] = []
    met: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (chosen.networks or Path(temporary)).absolute()
        columns = "".join(f"{name:>{max(10, len(name) + 2)}}" for name in (*_COLUMNS, "repair s"))
        print(f"{'':18}{'matched by':14}{columns}")
        for name in names:
            if chosen.only in name:
                rows.append(pair(name, folder, chosen.methods, 1000 if chosen.quick else chosen.samples))
                show(rows[-1])
                met += goals(rows[-1])
                content = {"rows": rows, "goals": met, "threads": chosen.threads, "quick": chosen.quick}
                chosen.json.write_text(json.dumps(_plain(content), indent=1), encoding="utf-8")
    for row in rows:
        show_variance(row)
    print()
    for each in met:
        verdict = "met" if each["met"] else "missed"
        print(f"{verdict:7} {each['goal']}: {each['value']:.4g}, aimed at {each['least']:g} or more")


def _plain(value: Any) -> Any:
    """Put None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()

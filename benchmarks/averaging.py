"""Means of two networks that know more than weights: Fisher information, RegMean, least squares, beside the plain mean.

    python benchmarks/averaging.py --networks FOLDER [--quick] [--samples 5000] [--test N] [--json FILE] [NAME …]

The second network is brought into the order of the first by `match` on training data. What is merged reads `--samples`
training images, repairs included; everything is measured on test images. "halves" are two networks of which each was
trained on half of the classes, with outputs for all: merged on data of both. Networks are trained and kept in the
folder as `matching_pairs.py` does.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matching_pairs import KINDS, QUICK, batches, network
from torch import Tensor, nn

import isthmus
from isthmus import zoo
from isthmus.base.architecture import State, full_state
from isthmus.base.evaluation import evaluate
from isthmus.base.interpolation import weighted_mean
from isthmus.merge import repair
from isthmus.merge.averages.fisher import fisher_merge
from isthmus.merge.averages.least_squares import least_squares_merge
from isthmus.merge.averages.regmean import regmean_merge

Row = dict[str, Any]
Batches = list[tuple[Tensor, Tensor]]
Merge = Callable[[Sequence[nn.Module], Sequence[Batches]], State]
"""Merges aligned networks, given data that each of them was trained on."""

NAMES = ("mnist-2x128", "mnist-6x128", "mnist-3x512", "resnet20-batch", "mnist-2x128 halves")
ROWS = 2000
"""Positions of each layer that are read from a batch."""

METHODS: dict[str, Merge] = {
    "mean": lambda models, _: weighted_mean([full_state(model) for model in models]),
    "Fisher, one label drawn": lambda models, own: fisher_merge(models, own_data=_few(own), draws=1),
    "Fisher, normalised": lambda models, own: fisher_merge(models, own_data=_few(own), draws=1, normalise=True),
    "RegMean": lambda models, own: regmean_merge(models, own_data=own, rows=ROWS).state,
    "RegMean, biases averaged": lambda models, own: regmean_merge(models, own_data=own, rows=ROWS, bias="mean").state,
    "least squares, parents' inputs": lambda models, own: (
        least_squares_merge(models, _all(own), inputs="parents", rows=ROWS).state
    ),
    "least squares": lambda models, own: least_squares_merge(models, _all(own), rows=ROWS).state,
    "least squares, own data": lambda models, own: least_squares_merge(models, own_data=own, rows=ROWS).state,
}


class Ensemble(nn.Module):
    """The logarithm of the mean of the networks' probabilities."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs to logits."""
        return torch.stack([model(x).softmax(-1) for model in self.models]).mean(0).log()


def _few(own: Sequence[Batches]) -> list[Batches]:
    return [data[: max(1, 1000 // len(data[0][0]))] for data in own]


def _all(own: Sequence[Batches]) -> Batches:
    return own[0] if all(data is own[0] for data in own) else [batch for data in own for batch in data]


def case(name: str, folder: Path, samples: int | None, tested: int | None) -> Row:
    """Merge one pair in every way."""
    kind = name.removesuffix(" halves")
    test = batches(kind, "test", tested)
    if kind == name:
        models = [network(kind, seed, folder) for seed in (0, 1)]
        own = [batches(kind, "train", samples)] * 2
    else:
        models = [_half(kind, half, folder) for half in (0, 1)]
        own = [_of_half(batches(kind, "train", samples), half) for half in (0, 1)]
    matching = isthmus.match(models[0], models[1], _all(own))
    models = [models[0], matching.apply(models[1])]
    rows = [_row(f"parent {index}", model, test) for index, model in enumerate(models)]
    rows.append(_row("ensemble", Ensemble(models), test))
    for method, merge in METHODS.items():
        if method.endswith("own data") and own[0] is own[1]:
            continue
        start = time.perf_counter()
        model = _filled(models[0], merge(models, own))
        seconds = time.perf_counter() - start
        rows.append({**_row(method, model, test), "seconds": seconds})
        repaired = repair(model, _all(own), endpoints=models, weights=[0.5, 0.5])
        rows.append(_row(f"{method} + repair", repaired, test))
    return {"networks": name, "samples": samples, "rows": rows}


def _filled(model: nn.Module, state: State) -> nn.Module:
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for name, place in full_state(merged).items():
            place.copy_(state[name])
    return merged


def _row(what: str, model: nn.Module, test: Batches) -> Row:
    found = evaluate(model, test)
    return {"what": what, "loss": found.loss, "accuracy": found.metric}


def _of_half(data: Batches, half: int) -> Batches:
    kept = [(x[y // 5 == half], y[y // 5 == half]) for x, y in data]
    return [(x, y) for x, y in kept if len(y) > 1]


def _half(kind: str, half: int, folder: Path) -> nn.Module:
    """Give a network that was trained on the first or the last five classes."""
    path, model = folder / f"{kind}-half-{half}.pt", KINDS[kind].make(half)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    data = KINDS[kind].load("train")
    assert isinstance(data, zoo.Dataset)
    kept = data.labels // 5 == half
    data = replace(data, images=data.images[kept], labels=data.labels[kept])
    zoo.train(model, data, replace(KINDS[kind].recipe, seed=half, epochs=min(10, KINDS[kind].recipe.epochs)))
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    torch.save(model.state_dict(), unfinished)
    unfinished.replace(path)
    return model.eval()


def _show(found: Row) -> None:
    print(
        f"\n{found['networks']}, {found['samples'] or 'all'} images\n{'':42}{'loss':>9}{'accuracy':>10}{'seconds':>9}"
    )
    for row in found["rows"]:
        seconds = f"{row['seconds']:9.1f}" if "seconds" in row else ""
        print(f"{row['what']:42}{row['loss']:9.4f}{100 * row['accuracy']:10.2f}{seconds}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all")
    parser.add_argument("--networks", type=Path, required=True, help="folder of the trained networks")
    parser.add_argument("--samples", type=int, default=5000, help="training images that the merges read")
    parser.add_argument("--test", type=int, help="test images; all by default")
    parser.add_argument("--quick", action="store_true", help="small networks and data that need no files")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = (QUICK, f"{QUICK} halves") if arguments.quick else arguments.names or NAMES
    cases = []
    for name in names:
        cases.append(case(name, arguments.networks, None if arguments.quick else arguments.samples, arguments.test))
        _show(cases[-1])
    if arguments.json:
        facts = {"machine": platform.machine(), "threads": arguments.threads, "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"facts": facts, "cases": cases}, indent=1))


if __name__ == "__main__":
    main()

"""Layer by layer between two networks: how linear features are halfway, why, and which layers have a loss barrier.

    python benchmarks/feature_connectivity.py --networks FOLDER [--quick] [--only TEXT] [--json FILE]

Pairs are trained independently and left as they are, or matched by weights, by activations, by iterated activations;
or they are spawned: one start, trained for a few epochs, goes on twice with the images in another order (Frankle et al.
2020). Activations are matched on the training set. Features are those of the test set, halfway: 1 - cosine as in
Zhou et al. (2023), and their two conditions. Networks with batch norm are shown as they come, and with the statistics
of the network halfway reset on the training set. Layer-wise barriers follow Adilova et al. (2024).

Trained networks are taken from the folder, and trained where it lacks them (`matching_pairs.py`).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matching_pairs import KINDS, QUICK, batches, network
from similarity import goal, plain
from torch import nn

from isthmus import zoo
from isthmus.align import match
from isthmus.merge import connect
from isthmus.merge.layerwise import FeatureConnectivity, feature_connectivity, layerwise_paths

Row = dict[str, Any]
Batches = list[tuple[torch.Tensor, torch.Tensor]]

INDEPENDENT, SPAWNED = "independent", "spawned"
MATCHED = ("weights", "activations", "iterated")

SHOWN = {
    "cosine_distance": "1 - cosine of the features halfway and the mean of the features",
    "endpoint_distance": "1 - cosine of the features of the two networks",
    "weak_additivity": "weak additivity at activations",
    "commutativity": "commutativity at linear layers",
}


@dataclass(frozen=True)
class Study:
    """One kind of network."""

    kind: str
    ways: tuple[str, ...]
    start_epochs: int
    """Epochs that spawned networks have in common."""
    samples: int | None
    """Of the test set; None for all."""
    calibration: int
    """Of the training set, for matching and for repair."""
    loss_samples: int
    """Of the test set, for the losses along paths."""
    repairs: tuple[str | None, ...] = (None,)
    blocks: tuple[str, ...] | None = None
    """For the layer-wise paths; None for every layer with parameters."""
    batch_size: int = 500
    """All activations of a batch are held at once."""
    hows: tuple[Literal["single", "prefix", "suffix"], ...] = ("single", "prefix", "suffix")


_BLOCKS = tuple(f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3))


STUDIES = (
    Study("mnist-3x512", (INDEPENDENT, *MATCHED, SPAWNED), 2, None, 10_000, 2_000),
    Study("resnet20-batch", (INDEPENDENT, *MATCHED), 0, 1_000, 500, 500, (None, "reset"), _BLOCKS, 100, ("single",)),
)
QUICK_STUDY = Study(QUICK, (INDEPENDENT, "weights", SPAWNED), 2, None, 500, 200)


def pairs(study: Study, folder: Path, calibration: Batches) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Give each pair with what was done to it."""
    a, b = (network(study.kind, seed, folder) for seed in (0, 1))
    for way in study.ways:
        if way == INDEPENDENT:
            yield way, a, b
        elif way == SPAWNED:
            yield way, *spawned(study, folder)
        else:
            yield way, a, match(a, b, calibration, method=way).apply(b)


def spawned(study: Study, folder: Path) -> tuple[nn.Module, nn.Module]:
    """Train one start, then two continuations for the rest of the epochs; kept in the folder."""
    kind, names = KINDS[study.kind], [f"{study.kind}-from-{study.start_epochs}-{seed}.pt" for seed in (0, 1)]
    models = [kind.make(0) for _ in names]
    if not all((folder / name).exists() for name in names):
        data = kind.load("train")
        rest = kind.recipe.epochs - study.start_epochs
        opening = replace(kind.recipe, epochs=study.start_epochs, schedule="constant", seed=2)
        zoo.train(models[0], data, opening, progress=None)
        models[1].load_state_dict(copy.deepcopy(models[0].state_dict()))
        for seed, (model, name) in enumerate(zip(models, names, strict=True)):
            zoo.train(model, data, replace(kind.recipe, epochs=rest, warmup_epochs=0.0, seed=seed), progress=None)
            torch.save(model.state_dict(), folder / name)
    for model, name in zip(models, names, strict=True):
        model.load_state_dict(torch.load(folder / name, weights_only=True))
    return models[0].eval(), models[1].eval()


def measure(study: Study, folder: Path) -> list[Row]:
    """Measure every pair with every repair."""
    calibration = batches(study.kind, "train", study.calibration, study.batch_size)
    test = batches(study.kind, "test", study.samples, study.batch_size)
    losses = batches(study.kind, "test", study.loss_samples, study.batch_size)
    rows = []
    for way, a, b in pairs(study, folder, calibration):
        print(f"… {study.kind}, {way}", file=sys.stderr)
        for repair in study.repairs:
            found = feature_connectivity(a, b, test, repair=repair, repair_data=calibration)
            path = connect(a, b, losses, points=3, repair=repair, repair_data=calibration)
            rows.append(
                {"kind": study.kind, "way": way, "repair": repair, "barrier": path.barrier, "found": found.to_dict()}
            )
            rows[-1]["arrays"] = found
        if way in (INDEPENDENT, "weights"):
            rows[-1]["layerwise"] = {
                how: layerwise_paths(a, b, losses, how=how, points=5).to_dict()
                for how in ("single", "prefix", "suffix")
            }
    return rows


def goals(rows: list[Row]) -> list[Row]:
    """Hold spawned, matched and independent pairs against each other; the first layer is exact and left out."""
    by_way: dict[str, FeatureConnectivity] = {row["way"]: row["arrays"] for row in rows if row["repair"] is None}
    alone, near = by_way[INDEPENDENT], by_way.get(SPAWNED)
    name, found = rows[0]["kind"], []
    if near is not None:
        largest = float(near.cosine_distance.max())
        found.append(goal(f"{name}: 0.01 over the largest distance of a spawned pair", 0.01 / largest, 1))
    for way in (way for way in MATCHED if way in by_way):
        matched = by_way[way]
        here = alone.cosine_distance > 1e-6
        ratio = float((alone.cosine_distance[here] / matched.cosine_distance[here]).min())
        found.append(goal(f"{name}: distance of independent over {way}, least of the layers", ratio, 3))
        ratios = {"independent": alone.commutativity / np.maximum(matched.commutativity, 1e-12)}
        if near is not None:
            ratios["matched"] = matched.commutativity / np.maximum(near.commutativity, 1e-12)
        for which, values in ratios.items():
            less = way if which == "independent" else SPAWNED
            more = "independent" if which == "independent" else way
            least = float(values[alone.commutativity > 1e-6].min())
            found.append(goal(f"{name}: commutativity of {more} over {less}, least of the layers", least, 1))
    return found


def show(rows: list[Row]) -> None:
    titles = [row["way"] + (f", {row['repair']}" if row["repair"] else "") for row in rows]
    first: FeatureConnectivity = rows[0]["arrays"]
    print(f"\n{rows[0]['kind']}, {first.samples} samples")
    head = f"{'':36}" + "".join(f"{title:>20}" for title in titles)
    print(head)
    print(f"{'loss barrier':36}" + "".join(f"{row['barrier']:20.4f}" for row in rows))
    for key, title in SHOWN.items():
        print(f"{title}")
        columns = [getattr(row["arrays"], key) for row in rows]
        for index, layer in enumerate(first.layers):
            cells = [column[index] for column in columns]
            if not np.isnan(cells[0]):
                print(f"  {layer:34}" + "".join(f"{cell:20.5f}" for cell in cells))
    for row in rows:
        for how, found in row.get("layerwise", {}).items():
            print(f"layer-wise barriers, {row['way']}, {how}: of all layers together {found['whole']['barrier']:.4f}")
            print(f"{'':36}{'own ends':>20}{'halfway':>20}{'cost of the swap':>20}")
            for part in found["layers"]:
                cells = (part["barrier"], part["midpoint_barrier"], part["swap_cost"])
                print(f"  {part['layer']:34}" + "".join(f"{cell:20.4f}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=Path, help="folder of trained networks; None for a temporary one")
    parser.add_argument("--quick", action="store_true", help="small networks on the embedded digits: no claims")
    parser.add_argument("--only", default="", help="kinds of networks whose name has this in it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    content: Row = {"rows": [], "goals": [], "threads": chosen.threads, "quick": chosen.quick}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (chosen.networks or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        for study in (QUICK_STUDY,) if chosen.quick else STUDIES:
            if chosen.only in study.kind:
                rows = measure(study, folder)
                show(rows)
                content["goals"] += goals(rows)
                content["rows"] += [{key: value for key, value in row.items() if key != "arrays"} for row in rows]
                chosen.json.write_text(json.dumps(plain(content), indent=1), encoding="utf-8")
    print()
    for each in content["goals"]:
        verdict = "met" if each["met"] else "missed"
        print(f"{verdict:7} {each['goal']}: {each['value']:.4g}, aimed at {each['least']:g} or more")


if __name__ == "__main__":
    main()

"""Neural collapse, and what hides in it: how far networks collapse, and which fine labels survive inside coarse ones.

    python benchmarks/neural_collapse.py [--quick] [--limit 500] [--threads 1] [--json FILE] [TABLE …]

The networks are those of `notebooks/train_collapse.py`, read from its cache folder and trained where they are missing.
Tables: `training` (collapse by epoch, with a control), `coarse` (clusters inside coarse classes beside those of the
pixels; a probe of clusters beside one of fine labels and a network that was trained on these), `variants` (other pairs,
weight decays and depths, and coarse labels dealt out at random), `epochs` (clusters by epoch) and `across` (clusters of
two networks). Everything but test accuracies and probes is of training images.

Clusters are those of spectral clustering in whitened principal components, as many in each coarse class as it has fine
ones; the table `coarse` has those of k-means in the same components (`kmeans_…`) and in a t-SNE (`tsne_…`) beside them,
always of the network and of the pixels alike: pixels of classes that look different are told apart by any of them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isthmus import zoo
from isthmus.align.subclasses import (
    Agreement,
    Subclasses,
    agreement,
    cluster_and_probe,
    match_subclasses,
    subclasses,
    subspace_angles,
)
from isthmus.metrics import collect
from isthmus.metrics.collapse import collapse, collapse_over

Row = dict[str, Any]

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
TRAINED = ("collapsing", "control")
CLUSTERINGS: dict[str, Row] = {
    "spectral": {"method": "spectral", "project": "whiten"},
    "kmeans": {"method": "kmeans", "project": "whiten"},
    "tsne": {"method": "kmeans", "project": "tsne"},
}
COLLAPSE = ("nc1", "equinorm", "cosine_spread", "cosine_mean", "simplex_distance", "nc3_squared", "nc4", "accuracy")
GOALS = {"nc1": 0.02, "cosine_spread": 0.05, "nc3_squared": 0.02, "nc4": 0.99}


class Study:
    """The networks of the study, and what was measured on them so far.

    Args:
        quick: Take the small ones.
        limit: Cluster at most so many images of each class.
    """

    def __init__(self, quick: bool, limit: int) -> None:
        if quick:
            os.environ["ISTHMUS_QUICK"] = "1"
        sys.path.insert(0, str(NOTEBOOKS))
        self.networks: Any = importlib.import_module("train_collapse")
        self.plans: dict[str, Any] = self.networks.plans()
        self._limit = limit
        self.row = cache(self._row)
        self.pixels = cache(self._pixels)

    def data(self, name: str, split: str = "train") -> zoo.Coarse:
        """Load what a network was trained or is tested on."""
        return self.networks.data_of(self.plans[name], split)

    def batches(self, name: str) -> Any:
        """Read what a network was trained on, in batches."""
        return zoo.loader(self.data(name).dataset)

    def features(self, name: str, split: str = "train", epoch: int | None = None) -> Tensor:
        """Give what the classifier reads, (images x units)."""
        dataset = self.data(name, split).dataset
        gram = collect(self.networks.load(name, epoch), zoo.loader(dataset), layers=["flatten"], progress=False)
        return gram.rows("flatten", 0, len(dataset), centred=False)

    def clusters(self, coarse: zoo.Coarse, features: Tensor, how: str = "spectral") -> Subclasses:
        """Find as many clusters in each coarse class as it has fine ones."""
        count = {index: len(group) for index, group in enumerate(coarse.groups)}
        labels = coarse.dataset.labels
        return subclasses(features, labels, count=count, limit=self._limit, progress=False, **CLUSTERINGS[how])

    def _pixels(self, data: str, labels: str, images: int | None, how: str = "spectral") -> Agreement:
        coarse = self.networks.labelled(data, labels, images=images)
        return agreement(self.clusters(coarse, coarse.dataset.inputs().flatten(1), how), coarse.fine)

    def clustered_otherwise(self, name: str) -> Row:
        """Measure other clusterings, of the features of a network and of the pixels."""
        plan, coarse, features = self.plans[name], self.data(name), self.features(name)
        found = {}
        for how in ("kmeans", "tsne"):
            found[f"{how}_purity"] = agreement(self.clusters(coarse, features, how), coarse.fine).purity
            found[f"{how}_pixel_purity"] = self.pixels(plan.data, plan.labels, plan.images, how).purity
        return found

    def _row(self, name: str) -> Row:
        """Measure a network that was trained on coarse labels."""
        plan, coarse, test = self.plans[name], self.data(name), self.data(name, "test")
        network: nn.Module = self.networks.load(name)
        pixels = self.pixels(plan.data, plan.labels, plan.images)
        found = collapse(network, self.batches(name), progress=False).last
        features = self.features(name)
        clusters = self.clusters(coarse, features)
        probe = cluster_and_probe(
            features, coarse.dataset.labels, coarse.fine, self.features(name, "test"), test.fine, found=clusters
        )
        return {
            "network": name,
            **{value: getattr(found, value) for value in GOALS},
            "accuracy": found.accuracy,
            "test_accuracy": zoo.evaluate(network, test.dataset)[1],
            "purity": probe.agreement.purity,
            "ari": probe.agreement.within_ari,
            "pixel_purity": pixels.purity,
            "pixel_ari": pixels.within_ari,
            "chance": pixels.chance,
            "probe": probe.accuracy,
            "oracle": probe.oracle,
        }


def training(study: Study) -> list[Row]:
    """Follow collapse by epoch."""
    rows = []
    for name in TRAINED:
        kept = study.networks.kept_epochs(name)
        networks = {epoch: study.networks.load(name, epoch) for epoch in kept}
        curves = collapse_over(networks, study.batches(name), progress=False)
        rows += [
            {"network": name, "epoch": epoch, **{value: getattr(each.last, value) for value in COLLAPSE}}
            for epoch, each in zip(curves.steps, curves.collapses, strict=True)
        ]
    return rows


def coarse(study: Study) -> list[Row]:
    """Compare clusters and probes over seeds with what knows the fine labels, or nothing."""
    rows = []
    for data in study.networks.DATA:
        own = []
        for seed in study.networks.SEEDS:
            full = study.networks.load(f"{data}-full-{seed}")
            accuracy = zoo.evaluate(full, study.data(f"{data}-full-{seed}", "test").dataset)[1]
            name = f"{data}-coarse-{seed}"
            own.append({**study.row(name), "full": accuracy, **study.clustered_otherwise(name)})
        rows += [*own, _mean(f"{data}, mean", own), _spread(f"{data}, standard deviation", own)]
    return rows


def variants(study: Study) -> list[Row]:
    """Measure what else was trained on coarse labels, beside the first network of each data set."""
    known = {*TRAINED, *(f"{data}-full-{seed}" for data in study.networks.DATA for seed in study.networks.SEEDS)}
    known |= {f"{data}-coarse-{seed}" for data in study.networks.DATA for seed in study.networks.SEEDS[1:]}
    return [study.row(name) for name in study.plans if name not in known]


def epochs(study: Study) -> list[Row]:
    """Follow clusters and collapse by epoch."""
    rows = []
    for data in study.networks.DATA:
        name = f"{data}-coarse-0"
        for epoch in study.networks.kept_epochs(name):
            found = collapse(study.networks.load(name, epoch), study.batches(name), progress=False).last
            data_set = study.data(name)
            agreed = agreement(study.clusters(data_set, study.features(name, epoch=epoch)), data_set.fine)
            values = {"nc1": found.nc1, "nc3_squared": found.nc3_squared, "accuracy": found.accuracy}
            rows.append({"network": name, "epoch": epoch, **values, "purity": agreed.purity, "ari": agreed.within_ari})
    return rows


def across(study: Study) -> list[Row]:
    """Compare the clusters of two networks of other seeds, and the directions in which a class varies."""
    rows = []
    for data in study.networks.DATA:
        names = [f"{data}-coarse-{seed}" for seed in (0, 1)]
        shared = study.data(names[0])
        a, b = (study.features(name) for name in names)
        matched = match_subclasses(study.clusters(shared, a), study.clusters(shared, b))
        angles = subspace_angles(a, b, shared.dataset.labels)
        rows.append(
            {
                "networks": data,
                "overlap": matched.overlap,
                "null_overlap": matched.null_overlap,
                "ari": matched.ari,
                "p": matched.p_value,
                "squared_cosine": float(angles.mean.mean()),
                "null_squared_cosine": float(angles.null.mean()),
            }
        )
    return rows


TABLES: dict[str, Callable[[Study], list[Row]]] = {
    "training": training,
    "coarse": coarse,
    "variants": variants,
    "epochs": epochs,
    "across": across,
}


def goals(tables: dict[str, list[Row]]) -> list[Row]:
    """Hold the last epoch of the network that collapses, and the means over seeds, to what is published of others."""
    found = []
    if "training" in tables:
        last = [row for row in tables["training"] if row["network"] == TRAINED[0]][-1]
        for value, bound in GOALS.items():
            met = last[value] >= bound if value == "nc4" else last[value] < bound
            found.append({"goal": f"{TRAINED[0]}: {value}", "value": last[value], "bound": bound, "met": met})
    for row in tables.get("coarse", ()):
        if row["network"].endswith("mean"):
            for what, value, bound in (
                ("purity beyond that of pixels, at least", row["purity"] - row["pixel_purity"], 0.05),
                ("probe of clusters short of fine labels, at most", row["oracle"] - row["probe"], 0.04),
            ):
                met = value >= bound if what.endswith("least") else value <= bound
                found.append({"goal": f"{row['network']}: {what}", "value": value, "bound": bound, "met": met})
    return found


def _mean(name: str, rows: Sequence[Row]) -> Row:
    return {"network": name, **{key: statistics.fmean(row[key] for row in rows) for key in rows[0] if key != "network"}}


def _spread(name: str, rows: Sequence[Row]) -> Row:
    if len(rows) < 2:
        return {"network": name}
    return {"network": name, **{key: statistics.stdev(row[key] for row in rows) for key in rows[0] if key != "network"}}


def _show(name: str, rows: Sequence[Row]) -> None:
    columns = [key for key in rows[0] if key not in ("network", "networks")]
    width = max(len(_label(row)) for row in rows) + 2
    print(f"\n{name:{width}}" + "".join(f"{key:>{_room(key)}}" for key in columns))
    for row in rows:
        cells = (f"{_cell(row.get(key)):>{_room(key)}}" for key in columns)
        print(f"{_label(row):{width}}" + "".join(cells), flush=True)


def _label(row: Row) -> str:
    return str(row.get("network", row.get("networks")))


def _room(key: str) -> int:
    return max(9, len(key) + 2)


def _cell(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; all")
    parser.add_argument("--quick", action="store_true", help="small networks and data that need no files")
    parser.add_argument("--limit", type=int, default=500, help="images of each class that are clustered")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.tables if name not in TABLES]
    if unknown:
        parser.error(f"no table {unknown[0]!r}; there are {', '.join(TABLES)}")
    torch.set_num_threads(arguments.threads)
    study = Study(arguments.quick, min(arguments.limit, 60) if arguments.quick else arguments.limit)
    tables = {}
    for name in arguments.tables or TABLES:
        tables[name] = TABLES[name](study)
        _show(name, tables[name])
    reached = [] if arguments.quick else goals(tables)
    for goal in reached:
        print(f"{'met' if goal['met'] else 'NOT MET':8} {goal['goal']} {goal['bound']}: {goal['value']:.4f}")
    if arguments.json:
        facts = {"machine": platform.machine(), "threads": arguments.threads, "torch": torch.__version__}
        facts |= {"quick": arguments.quick, "limit": arguments.limit}
        arguments.json.write_text(json.dumps({"facts": facts, "goals": reached, **tables}, indent=1))


if __name__ == "__main__":
    main()

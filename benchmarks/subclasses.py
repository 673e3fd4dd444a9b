"""Subclasses inside collapsed classes: which way of clustering finds them, how many, and what a probe of them costs.

    python benchmarks/subclasses.py [--quick] [--sections ABCD] [--data digits] [--images 6000] [--seeds 2]
                                    [--threads 1] [--json FILE]

A. Planted Gaussians in collapsed features: every projection and method, beside k-means of the raw features.
B. How often each criterion finds the planted number of clusters, from 1 to 5.
C. The linear probe beside scikit-learn's logistic regression, raw and standardised, on collapsed features.
D. Networks trained here on pairs of classes: clusters of features and of pixels, probes, and two seeds side by side.

CPU seconds are of this process, all threads. Everything has one seed; D takes one network for each of `--seeds`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isthmus import zoo
from isthmus.align.subclasses import (
    agreement,
    agreements,
    cluster_and_probe,
    linear_probe,
    match_subclasses,
    subclasses,
    subspace_angles,
)
from isthmus.metrics import collect

Row = dict[str, Any]

WAYS: tuple[dict[str, Any], ...] = (
    {"project": "whiten"},
    {"project": "whiten", "dims": 5},
    {"project": "whiten", "dims": 10},
    {"project": "whiten", "dims": 30},
    {"project": "pca"},
    {"project": "tsne"},
    {"project": "whiten", "method": "mixture"},
    {"project": "pca", "method": "mixture"},
    {"project": "whiten", "method": "spectral"},
    {"project": "pca", "method": "spectral"},
)
CRITERIA: tuple[dict[str, Any], ...] = (
    {"method": "kmeans", "count": "eigengap"},
    {"method": "kmeans", "count": "bic"},
    {"method": "kmeans", "count": "gap"},
    {"project": "pca", "method": "kmeans", "count": "gap"},
    {"method": "kmeans", "count": "silhouette"},
    {"method": "mixture", "count": "bic"},
    {"method": "spectral", "count": "eigengap"},
    {"method": "hdbscan", "count": None},
)


def planted(
    counts: list[int], size: int, units: int, seed: int, gap: float = 5.0, sure: float = 4.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Make collapsed features: far class means, subclasses `gap` noises apart, and a wide direction that tells nothing.

    Returns:
        Features in float32 as a network gives them, classes, and subclasses.
    """
    generator = torch.Generator().manual_seed(seed)
    fine = torch.arange(sum(counts)).repeat_interleave(size)
    coarse = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts) * size)
    means = torch.randn(sum(counts), units, generator=generator, dtype=torch.float64)
    means *= gap / 2**0.5 / means.norm(dim=1, keepdim=True)
    noise = torch.randn(len(fine), units, generator=generator, dtype=torch.float64)
    directions = torch.randn(len(counts), units, generator=generator, dtype=torch.float64)
    directions /= directions.norm(dim=1, keepdim=True)
    # How sure a network is varies along the class mean, as an exponential does.
    length = 1000 + sure * torch.empty(len(fine), 1, dtype=torch.float64).exponential_(generator=generator)
    return (means[fine] + noise + length * directions[coarse]).float(), coarse, fine


def clocked(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def named(how: dict[str, Any]) -> str:
    return " ".join(str(value) for value in how.values())


def methods(quick: bool) -> Iterator[Row]:
    """Section A."""
    features, coarse, fine = planted(
        [2, 3] if quick else [2, 3, 4, 5, 6], 40 if quick else 300, 16 if quick else 128, 0
    )
    counts = {0: 2, 1: 3} if quick else dict(enumerate([2, 3, 4, 5, 6]))
    found, seconds = clocked(lambda: plain_kmeans(features, coarse, counts))
    yield scored("A", "scikit-learn's k-means, raw features", agreement(found, fine, coarse=coarse), seconds)
    for how in WAYS:
        found, seconds = clocked(lambda how=how: subclasses(features, coarse, count=counts, progress=False, **how))
        yield scored("A", named(how), agreement(found, fine), seconds)


def plain_kmeans(features: Tensor, coarse: Tensor, counts: dict[int, int]) -> Tensor:
    """What a script would do: cluster the features of each class as they are."""
    from sklearn.cluster import KMeans

    labels, start = torch.zeros_like(coarse), 0
    for name, count in counts.items():
        rows = coarse == name
        own = KMeans(count, n_init=10, random_state=0).fit_predict(features[rows].numpy())  # pyright: ignore[reportArgumentType]
        labels[rows] = torch.as_tensor(own).long() + start
        start += count
    return labels


def scored(section: str, name: str, found: Any, seconds: float) -> Row:
    return {
        "section": section, "name": name, "purity": found.purity, "matched": found.matched_accuracy,
        "ari": found.within_ari, "cpu_seconds": seconds,
    }  # fmt: skip


def numbers(quick: bool) -> Iterator[Row]:
    """Section B: classes of one to five clusters, well apart, in few dimensions."""
    counts = [1, 2] if quick else [1, 2, 3, 4, 5]
    draws = range(1 if quick else 4)
    for how in CRITERIA:
        right, seconds = [], 0.0
        for seed in draws:
            features, coarse, _ = planted(counts, 60 if quick else 150, 12, seed, gap=9.0, sure=1.0)
            found, taken = clocked(
                lambda how=how, x=features, y=coarse: subclasses(x, y, dims=6, largest=8, progress=False, **how)
            )
            right.append(found.counts == torch.tensor(counts))
            seconds += taken
        share = torch.stack(right).double().mean(0)
        name = named(how) if how["count"] else "hdbscan"
        yield {"section": "B", "name": name, "right": share.tolist(), "cpu_seconds": seconds / len(draws)}


def probes(quick: bool) -> Iterator[Row]:
    """Section C."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    size, units = (60, 32) if quick else (3000, 512)
    features, _, fine = planted([2] * 10, 2 * size, units, 0, gap=4.0)
    train = torch.arange(len(fine)) % 2 == 0
    (x, y), (test_x, test_y) = ((features[rows], fine[rows]) for rows in (train, ~train))
    probe, seconds = clocked(lambda: linear_probe(x, y))
    accuracy = probe.accuracy(test_x, test_y)
    yield {"section": "C", "name": "isthmus, whitened", "accuracy": accuracy, "cpu_seconds": seconds}
    others = {
        "scikit-learn, raw": LogisticRegression(max_iter=200),
        "scikit-learn, standardised": make_pipeline(StandardScaler(), LogisticRegression(max_iter=200)),
    }
    for name, model in others.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitted, seconds = clocked(lambda model=model: model.fit(x.numpy(), y.numpy()))
        accuracy = float(fitted.score(test_x.numpy(), test_y.numpy()))
        told = f"{name}{', not converged' if caught else ''}"
        yield {"section": "C", "name": told, "accuracy": accuracy, "cpu_seconds": seconds}


def networks(quick: bool, data: Any, images: int, seeds: int) -> Iterator[Row]:
    """Section D: All-CNN with batch norms, trained on pairs (i, i + 5) past zero training error."""
    pairs = [(name, name + 5) for name in range(5)]
    train, test = (zoo.coarsen(part, pairs) for part in halves(data, images))
    recipe = zoo.Recipe(
        epochs=3 if quick else 20, batch_size=64, lr=0.1, weight_decay=5e-4, precision="bfloat16", warmup_epochs=1.0
    )
    found, features = [], []
    for seed in range(seeds):
        network = zoo.all_cnn(1, 5, width=8 if quick else 24, norm="batch", seed=seed)
        history = zoo.train(network, train.dataset, recipe, progress=False)
        x, y = (last_layer(network, part.dataset) for part in (train, test))
        result = cluster_and_probe(x, train.dataset.labels, train.fine, y, test.fine, count=2)
        found.append(result.found)
        features.append(x)
        yield {
            "section": "D", "name": f"network {seed}", "train_accuracy": history.train_accuracy[-1],
            "purity": result.agreement.purity, "probe": result.accuracy, "oracle": result.oracle,
        }  # fmt: skip
    pixels = train.dataset.inputs().flatten(1)
    ways = WAYS[:2] if quick else tuple(how for how in WAYS if how["project"] != "tsne")
    for how in ways:
        both = {"features": features[0], "pixels": pixels}
        purity = {
            key: one.purity for key, one in agreements(both, train.dataset.labels, train.fine, count=2, **how).items()
        }
        yield {"section": "D", "name": named(how), "purity": purity["features"], "pixels": purity["pixels"]}
    if seeds > 1:
        matching = match_subclasses(found[0], found[1])
        angles = subspace_angles(features[0], features[1], train.dataset.labels, shuffles=50)
        yield {
            "section": "D", "name": "networks 0 and 1", "overlap": matching.overlap, "by chance": matching.null_overlap,
            "ari": matching.ari, "cosine²": float(angles.mean.mean()), "null": float(angles.null.mean()),
        }  # fmt: skip


def halves(data: Any, images: int) -> tuple[zoo.Dataset, zoo.Dataset]:
    return zoo.load_data(data, "train", limit=images), zoo.load_data(data, "test", limit=images)


def last_layer(network: nn.Module, dataset: zoo.Dataset) -> Tensor:
    """Give what the classifier reads, averaged over positions: it is linear, so the order does not matter."""
    gram = collect(network, zoo.loader(dataset, 500), layers="relu8", positions="mean", identify=False, progress=False)
    return gram.rows("relu8", centred=False)


def show(row: Row) -> None:
    figures = {key: value for key, value in row.items() if key not in ("section", "name")}
    shown = "  ".join(
        f"{key} {' '.join(f'{part:.2f}' for part in value) if isinstance(value, list) else f'{value:.3f}'}"
        for key, value in figures.items()
    )
    print(f"{row['section']}  {row['name']:40}{shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: seconds, no claims")
    parser.add_argument("--sections", default="ABCD")
    parser.add_argument("--data", default="digits", choices=["digits", "mnist", "fashion_mnist"])
    parser.add_argument("--images", type=int, default=6000, help="of section D, of training and of test")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tables: dict[str, Callable[[], Iterator[Row]]] = {
        "A": lambda: methods(arguments.quick),
        "B": lambda: numbers(arguments.quick),
        "C": lambda: probes(arguments.quick),
        "D": lambda: networks(arguments.quick, arguments.data, arguments.images, arguments.seeds),
    }
    rows: list[Row] = []
    for letter in arguments.sections:
        for row in tables[letter]():
            show(row)
            rows.append(row)
    if arguments.json is not None:
        about = {"command": sys.argv[1:], "python": platform.python_version(), "torch": torch.__version__}
        text = json.dumps({**about, "threads": arguments.threads, "cores": os.cpu_count(), "rows": rows}, indent=1)
        arguments.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""One tool on one task, measured: what units.py runs in a process of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from similarity_tasks import Meter, forget_peak, resident

from isthmus.metrics import Moments

Task = Callable[[dict[str, Any], Meter], dict[str, Any]]
"""Makes its data, measures inside the meter, and says how good the result is."""

TASKS: dict[str, dict[str, Task]] = {"matching": {}, "clusters": {}}


def task(kind: str, tool: str) -> Callable[[Task], Task]:
    """Enter a function under the kind of task and the tool that it runs."""

    def enter(function: Task) -> Task:
        TASKS.setdefault(kind, {})[tool] = function
        return function

    return enter


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Run a tool once: {"kind", "tool", "size"}; gives seconds, peak memory in bytes and what the task says."""
    meter = Meter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = TASKS[spec["kind"]][spec["tool"]](spec["size"], meter)
    return {**found, "cpu": meter.cpu, "wall": meter.wall, "peak": resident("VmHWM")}


# Matching


def correlations(size: dict[str, Any]) -> np.ndarray:
    """Give correlations of units of two networks that share half of their features."""
    rng = np.random.default_rng(0)
    units, samples = size["units"], size["samples"]
    shared = rng.standard_normal((samples, units))
    x, y = (np.maximum(0, shared[:, rng.permutation(units)] + rng.standard_normal((samples, units))) for _ in range(2))
    x, y = ((z - z.mean(0)) / z.std(0) for z in (x, y))
    return x.T @ y / samples


@task("matching", "isthmus bipartite_matching")
def _ours(size: dict[str, Any], meter: Meter) -> dict[str, Any]:
    from isthmus.align import bipartite_matching

    similarity = torch.from_numpy(correlations(size))
    forget_peak()
    with meter():
        found = bipartite_matching(similarity)
    return {"value": found.total}


@task("matching", "scipy linear_sum_assignment")
def _scipy(size: dict[str, Any], meter: Meter) -> dict[str, Any]:
    from scipy.optimize import linear_sum_assignment

    similarity = correlations(size)
    forget_peak()
    with meter():
        rows, columns = linear_sum_assignment(similarity, maximize=True)
    return {"value": float(similarity[rows, columns].sum())}


@task("matching", "scipy min_weight_full_bipartite")
def _sparse(size: dict[str, Any], meter: Meter) -> dict[str, Any]:
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    similarity = correlations(size)
    forget_peak()
    with meter():
        # Its weights must not be zero.
        rows, columns = min_weight_full_bipartite_matching(csr_array(similarity + 2), maximize=True)
    return {"value": float(similarity[rows, columns].sum())}


# Clusters


def planted(size: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give samples of two networks, each cluster a rotated subspace of the same features, and the true labels."""
    rng = np.random.default_rng(0)
    units, samples, count = size["units"], size["samples"], size["clusters"]
    per, sides = units // count, []
    features = rng.standard_normal((count, samples, max(1, per // 4)))
    for _ in range(2):
        mixed = features @ rng.standard_normal((count, features.shape[2], per))
        side = mixed.transpose(1, 0, 2).reshape(samples, count * per)
        sides.append(side + size["noise"] * rng.standard_normal(side.shape))
    return *sides, np.tile(np.repeat(np.arange(count), per), 2)  # pyright: ignore[reportReturnType]


@task("clusters", "isthmus spectral_clusters")
def _our_clusters(size: dict[str, Any], meter: Meter) -> dict[str, Any]:
    from isthmus.align import spectral_clusters

    x, y, labels = planted(size)
    moments = Moments()
    moments.update({"a": torch.from_numpy(x), "b": torch.from_numpy(y)})
    forget_peak()
    with meter():
        found = spectral_clusters(moments, "a", "b", clusters=size["clusters"])
    return {"value": agreement(labels, torch.cat([found.labels_a, found.labels_b]).numpy())}


@task("clusters", "scikit-learn SpectralClustering")
def _their_clusters(size: dict[str, Any], meter: Meter) -> dict[str, Any]:
    from sklearn.cluster import SpectralClustering

    x, y, labels = planted(size)
    moments = Moments()
    moments.update({"a": torch.from_numpy(x), "b": torch.from_numpy(y)})
    forget_peak()
    with meter():
        blocks = [[moments.correlation(row, column) for column in "ab"] for row in "ab"]
        affinity = torch.cat([torch.cat(row, 1) for row in blocks]).abs().numpy()
        found = SpectralClustering(size["clusters"], affinity="precomputed", random_state=0).fit_predict(affinity)
    return {"value": agreement(labels, found)}


def agreement(labels: np.ndarray, found: np.ndarray) -> float:
    """Compute the adjusted Rand index."""
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(labels, found))

"""The study of a pair of networks: the path before and after matching, the merged network, the similarity of layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from isthmus.align import Matching, Symmetry, match
from isthmus.align.nets.methods import METHODS
from isthmus.base.batches import Data, batches, model_device, require_repeatable
from isthmus.base.errors import DataError
from isthmus.merge import Path, connect, merge
from isthmus.merge.layerwise import FeatureConnectivity, LayerwisePaths, feature_connectivity, layerwise_paths
from isthmus.metrics import Similarity, compare
from isthmus.metrics.capture import Positions

from .plain import number


@dataclass(frozen=True, eq=False)
class Study:
    """What was measured on two networks, A and B.

    Attributes:
        naive: The path from A to B as trained.
        matched: The path from A to B with its units in the order of A's.
        repaired: The same with every point repaired; None if that was not asked for.
        matching: What brings B into the order of A.
        merged: The merged network.
        networks: Loss and metric of "A", "B", "naive average", "ensemble" and "merged".
        similarity: Similarity of each layer of A with each layer of B.
        settings: How all this was made.
        features: How linear the features are halfway, "as trained" and "matched", layer by layer.
        layerwise: Barriers of one layer at a time, likewise; empty if they were not asked for.
    """

    naive: Path
    matched: Path
    repaired: Path | None
    matching: Matching
    merged: nn.Module
    networks: Mapping[str, Mapping[str, float | None]]
    similarity: Similarity
    settings: Mapping[str, Any]
    features: Mapping[str, FeatureConnectivity] = field(default_factory=dict)
    layerwise: Mapping[str, LayerwisePaths] = field(default_factory=dict)

    @property
    def paths(self) -> dict[str, Path]:
        """The paths by what was done to B."""
        named = {"as trained": self.naive, "matched": self.matched, "matched and repaired": self.repaired}
        return {name: path for name, path in named.items() if path is not None}

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float] | None]:
        """Per path a 95 % interval of its loss barrier over the choice of the data; None where it cannot be told."""
        return {name: _interval(path) for name, path in self.paths.items()}

    @property
    def mean_scores(self) -> dict[str, float]:
        """Mean score of each group's units; NaN for a group of which no unit has one."""
        return {name: float(scores.nanmean()) for name, scores in self.matching.scores.items()}

    @property
    def verdict(self) -> str:
        """Say in a sentence what matching did to the loss barrier."""
        before, after = self.naive.barrier, self.matched.barrier
        if not (math.isfinite(before) and math.isfinite(after)):
            return "The loss on the path is not finite everywhere, so there is no barrier to speak of"
        if after >= before:
            return f"Matching does not lower the loss barrier: {number(before)} before, {number(after)} after"
        repaired = "" if self.repaired is None else f", and is {number(self.repaired.barrier)} after repair"
        return f"After matching, the loss barrier falls from {number(before)} to {number(after)}{repaired}"

    def to_dict(self) -> dict[str, Any]:
        """Give all but the merged network as numbers, lists and text."""
        return {
            "verdict": self.verdict,
            "settings": dict(self.settings),
            "networks": {name: dict(figures) for name, figures in self.networks.items()},
            "paths": {name: path.to_dict() for name, path in self.paths.items()},
            "intervals": self.intervals,
            "features": {name: found.to_dict() for name, found in self.features.items()},
            "layerwise": {name: found.to_dict() for name, found in self.layerwise.items()},
            "matching": {
                "method": self.matching.method,
                "objective": self.matching.objective,
                "mean_scores": self.mean_scores,
                "scores": {name: scores.tolist() for name, scores in self.matching.scores.items()},
                "by_weights": list(self.matching.by_weights),
            },
            "similarity": self.similarity.to_dict(),
        }


def study(
    model_a: nn.Module,
    model_b: nn.Module,
    data_eval: Data,
    *,
    data_match: Data | None = None,
    method: str = "weights",
    repair: str | None = None,
    symmetry: Symmetry | None = None,
    weights: Sequence[float] | None = None,
    points: int = 25,
    layers: Iterable[str] | None = None,
    positions: Positions = "mean",
    seed: int = 0,
    device: torch.device | str | None = None,
    eval_name: str = "data_eval",
    match_name: str | None = None,
    progress: bool | None = None,
    verify: bool = True,
    options: Mapping[str, Any] | None = None,
    layer_points: int = 5,
) -> Study:
    """Walk the path between two classifiers before and after matching, merge them, and compare their layers.

    Args:
        model_a: The reference.
        model_b: A network of the same architecture. Neither is changed.
        data_eval: Batches `(x, y)` on which losses, accuracies and similarities are measured.
        data_match: Batches for matching by what networks do and for repair; `data_eval` by default. Where they have
            labels, the paths are measured on them too.
        method: Of `match`.
        repair: None, "auto", "reset", "rescale" or "both", for the matched path and the merged network; see `repair`.
        symmetry: Of both networks; derived by default.
        weights: Of A and B in the merged network and in the naive average; equal by default.
        points: Points on each path, at least 3.
        layers: Layers to compare; all by default.
        positions: How places of feature maps count in the similarity; see `compare`.
        seed: Of the matching.
        device: Where to compute; that of the models by default.
        eval_name: What to call `data_eval` in a report.
        match_name: What to call `data_match` in a report; `eval_name` where there is none.
        progress: Show bars always (True), never (False), or on a terminal (None).
        verify: Refuse a symmetry of which it has not been measured that it holds; see `match`.
        options: Of the mean, such as `{"by_layer": …}`; see `merge`.
        layer_points: Points on the path of each layer; 0 leaves the paths of single layers out, which take a
            measurement for each layer and point.

    Returns:
        The study; `report.write_report` writes it down.

    Raises:
        ArchitectureError: The networks differ, or the repair does not fit them.
        DataError: The data is empty, an iterator, or has no labels that fit.
        LayerNotFoundError: A layer does not exist.
        NotFiniteError: A network or an input holds NaN or infinity.
        SymmetryError: The symmetry cannot be derived, or fails when it is verified.

    >>> from isthmus.zoo import load_data, loader, mlp
    >>> data = loader(load_data("digits", "test"))
    >>> found = study(mlp(64, (16,), seed=0), mlp(64, (16,), seed=1), data, points=3)
    >>> list(found.paths), list(found.networks)
    (['as trained', 'matched'], ['A', 'B', 'naive average', 'ensemble', 'merged'])
    """
    for data in (data_eval, data_match):
        if data is not None:
            require_repeatable(data, "a study reads it several times")
    second = data_eval if data_match is None else data_match
    match_name = eval_name if data_match is None else match_name or "data_match"
    layers = None if layers is None else list(layers)
    common: dict[str, Any] = {"device": device, "progress": progress}
    walk = {"points": points, **common, "also": None if data_match is None else _labelled(match_name, data_match)}
    naive = connect(model_a, model_b, data_eval, **walk)
    similarity = compare(model_a, model_b, data_eval, layers=layers, positions=positions, **common)
    matching = match(model_a, model_b, second, method=method, symmetry=symmetry, seed=seed, verify=verify, **common)
    ordered = matching.apply(model_b)
    matched = connect(model_a, ordered, data_eval, **walk)
    repaired = (
        None if repair is None else connect(model_a, ordered, data_eval, repair=repair, repair_data=second, **walk)
    )
    pair = {"weights": weights, "device": device, "align": None, **(options or {})}
    average = merge([model_a, model_b], data_eval, ensemble=False, **pair).report
    merged = merge([model_a, ordered], data_eval, repair=repair, repair_data=second, **pair)
    settings = {
        **_facts(model_a),
        "method": method,
        **{name: merged.report[name] for name in ("repair", "weights", "samples")},
        "points": points,
        "positions": positions,
        "seed": seed,
        "device": str(model_device(model_a) if device is None else device),
        "eval_data": eval_name,
        "match_data": match_name if METHODS[method].needs or repair is not None or naive.also else None,
    }
    networks: dict[str, Mapping[str, float | None]] = {
        "A": merged.report["parents"][0],
        "B": average["parents"][1],  # as given; put in another order it is the same but for rounding
        "naive average": average["merged"],
        "ensemble": merged.report["ensemble"],
        "merged": merged.report["merged"],
    }
    chosen = None if layers is None else list(layers)
    features, layerwise = _by_layer(
        model_a, {"as trained": model_b, "matched": ordered}, data_eval, chosen, layer_points, common
    )
    return Study(naive, matched, repaired, matching, merged.model, networks, similarity, settings, features, layerwise)


def _labelled(name: str, data: Data) -> dict[str, Data] | None:
    return {name: data} if next(batches(data)).targets is not None else None


def _by_layer(
    model_a: nn.Module,
    others: Mapping[str, nn.Module],
    data: Data,
    layers: list[str] | None,
    points: int,
    common: Mapping[str, Any],
) -> tuple[dict[str, FeatureConnectivity], dict[str, LayerwisePaths]]:
    """Measure the features halfway, and the path of one layer at a time, with B as trained and matched."""
    features = {
        name: feature_connectivity(model_a, model, data, layers=layers, **common) for name, model in others.items()
    }
    layerwise = {}
    if points:
        layerwise = {
            name: layerwise_paths(model_a, model, data, points=points, **common) for name, model in others.items()
        }
    return features, layerwise


def _interval(path: Path) -> tuple[float, float] | None:
    try:
        return path.barrier_interval()
    except DataError:  # of one sample, or of data in another order at each point
        return None


def _facts(model: nn.Module) -> dict[str, Any]:
    return {
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }

"""The units of two networks beside each other: every unit-level tool on every pair of layers, from one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...base.batches import Data
from ...base.errors import DataError, LayerNotFoundError, nearest
from ...metrics.capture import Positions
from ...metrics.folds import UnitFolds, unit_folds
from ...metrics.reading import MASK, Layers, MaskNames
from .baselines import one_to_one_prediction
from .cluster_scores import ClusterScores, cluster_scores
from .clusters import Clusters, spectral_clusters
from .mean_activations import MeanActivations, mean_activations
from .one_to_one import UnitMatching, bipartite_matching, check_minimum, semi_matching
from .prediction import Prediction
from .rotation import RotationTest, rotation_test
from .sparse_prediction import sparse_prediction
from .stability import Stability, matching_stability
from .transport import SoftMatch, soft_matching

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ANALYSES = ("stability", "prediction", "clusters", "transport", "rotation", "means")
"""What `correspond` does beside the matching unless told otherwise."""


@dataclass(frozen=True, eq=False)
class UnitCorrespondence:
    """What the units of layer a have to do with those of layer b.

    Everything was found on the training folds; what is called held out was measured on samples that no step before
    had seen, NaN where a unit has no partner or does not vary. A field whose analysis was not asked for is None.

    Attributes:
        layer_a: Name of the layer of the first network.
        layer_b: Name of the layer of the second network.
        samples: Rows that the tools were run on, and rows held out.
        matching: One-to-one, by correlation.
        semi: Each unit of a with its best partner in b.
        held_out: (units of a,), correlation of the one-to-one pairs on held-out rows.
        semi_held_out: The same of the best partners.
        null: One-to-one matching of the units of a with those of b on other samples; None without a shuffled null.
        null_held_out: (units of a,), correlation of these pairs on held-out rows.
        information: One-to-one matching by mutual information, its similarities in nats.
        information_held_out: (units of a,), mutual information of these pairs on held-out rows.
        stability: How often each unit keeps its partner on parts of the samples.
        one_to_one: Each unit of a predicted from its one-to-one partner.
        prediction: Each unit of a predicted from few units of b (LASSO).
        clusters: Units of both layers in common clusters.
        scores: How evenly the layers share the clusters, and how much of the subspace.
        transport: Soft matching by optimal transport.
        rotation: The matching against that with random rotations of b.
        means: The mean activations of both.
    """

    layer_a: str
    layer_b: str
    samples: tuple[int, int]
    matching: UnitMatching
    semi: UnitMatching
    held_out: Tensor
    semi_held_out: Tensor
    null: UnitMatching | None = None
    null_held_out: Tensor | None = None
    information: UnitMatching | None = None
    information_held_out: Tensor | None = None
    stability: Stability | None = None
    one_to_one: Prediction | None = None
    prediction: Prediction | None = None
    clusters: Clusters | None = None
    scores: ClusterScores | None = None
    transport: SoftMatch | None = None
    rotation: RotationTest | None = None
    means: MeanActivations | None = None

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the correlations of matched units on held-out rows, see `matched_curves`."""
        from .pictures import matched_curves

        return matched_curves(self, ax)

    def summary(self) -> dict[str, Any]:
        """Give the figures that say most, by name; None for what was not asked for or is not defined."""
        p, q = self.matching.shape
        found: dict[str, Any] = {"layer_a": self.layer_a, "layer_b": self.layer_b, "units_a": p, "units_b": q}
        found |= {
            "constant_a": len(self.matching.constant_a),
            "constant_b": len(self.matching.constant_b),
            "samples": self.samples[0],
            "held_out_samples": self.samples[1],
            "one_to_one": _mean(self.held_out),
            "semi": _mean(self.semi_held_out),
            "semi_agreement": self.semi.agreement(self.matching),
            "null": _mean(self.null_held_out),
        }
        if self.information is not None:
            found["information"] = _mean(self.information_held_out)
            found["information_agreement"] = self.information.agreement(self.matching)
        if self.stability is not None:
            found["stability"] = self.stability.mean
        if self.prediction is not None and self.one_to_one is not None:
            found["one_to_one_r2"] = _mean(self.one_to_one.r2)
            found["sparse_r2"] = _mean(self.prediction.r2)
            found["predictors"] = _mean(self.prediction.count.to(torch.float64))
            found["penalty"] = self.prediction.penalty
        if self.clusters is not None:
            found["clusters"] = self.clusters.count
        if self.transport is not None:
            found["transport"] = self.transport.value
        if self.rotation is not None:
            found["rotated"] = _mean(self.rotation.rotated)
            found["rotation_p"] = self.rotation.p_value
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Give a table with a row for each unit of a, best one-to-one correlation on held-out rows first."""
        columns: dict[str, Tensor | None] = {
            "partner": self.matching.partner,
            "correlation": self.matching.similarity,
            "held_out": self.held_out,
            "best": self.semi.partner,
            "best_correlation": self.semi.similarity,
            "best_held_out": self.semi_held_out,
            "null_held_out": self.null_held_out,
            "information_partner": None if self.information is None else self.information.partner,
            "information": None if self.information is None else self.information.similarity,
            "stability": None if self.stability is None else self.stability.frequency,
            "one_to_one_r2": None if self.one_to_one is None else self.one_to_one.r2,
            "sparse_r2": None if self.prediction is None else self.prediction.r2,
            "predictors": None if self.prediction is None else self.prediction.count,
            "cluster": None if self.clusters is None else self.clusters.labels_a,
        }
        known = {name: values.tolist() for name, values in columns.items() if values is not None}
        table = [
            {"unit": unit, **dict(zip(known, row, strict=True))}
            for unit, row in enumerate(zip(*known.values(), strict=True))
        ]
        return sorted(table, key=lambda row: -row["held_out"] if row["held_out"] == row["held_out"] else torch.inf)


@dataclass(frozen=True, eq=False)
class Correspondence:
    """What the units of two networks have to do with each other, layer by layer.

    Attributes:
        pairs: One for each pair of layers, in the order in which they were asked for.
        folds: The moments that all of it was read off; further questions need no further pass.
        settings: How all this was made.
    """

    pairs: tuple[UnitCorrespondence, ...]
    folds: UnitFolds
    settings: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[UnitCorrespondence]:
        return iter(self.pairs)

    def __getitem__(self, layers: str | tuple[str, str] | int) -> UnitCorrespondence:
        """Give one pair: by its place, by both layer names, or by that of the first network where that is enough."""
        if isinstance(layers, int):
            return self.pairs[layers]
        found = [pair for pair in self.pairs if layers in (pair.layer_a, (pair.layer_a, pair.layer_b))]
        if len(found) != 1:
            known = ", ".join(f"({pair.layer_a!r}, {pair.layer_b!r})" for pair in self.pairs)
            problem = "no pair of layers" if not found else "more than one pair of layers"
            raise LayerNotFoundError(f"{problem} {layers!r}; the pairs are {known}")
        return found[0]

    def summary(self) -> list[dict[str, Any]]:
        """Give the figures that say most, a row for each pair of layers."""
        return [pair.summary() for pair in self.pairs]

    def to_dict(self) -> dict[str, Any]:
        """Give settings, summary and the table of the units of each pair, for a file."""
        units = [{"layer_a": pair.layer_a, "layer_b": pair.layer_b, "units": pair.rows()} for pair in self.pairs]
        return {"settings": dict(self.settings), "summary": self.summary(), "pairs": units}


def correspond(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Data,
    *,
    layers: Layers | tuple[Layers, Layers] = None,
    pairs: Any = "same",
    analyses: Iterable[str] = ANALYSES,
    information: bool = False,
    positions: Positions = "samples",
    unit_axis: int | None = None,
    mask: MaskNames = MASK,
    subsample: float | None = None,
    folds: int = 10,
    held_out: int = 2,
    minimum: float | None = None,
    penalty: float | None = None,
    clusters: int | None = None,
    draws: int = 50,
    rotations: int = 20,
    seed: int = 0,
    max_bytes: int = 4 << 30,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Correspondence:
    """Ask which units of two networks are the same, which combine into which, and which form clusters.

    Convergent learning (Li et al. 2015) with what came after, from one pass of the data over both networks: one-to-one
    and semi-matching, sparse prediction, spectral clustering, soft matching, random rotations, mean activations. The
    samples are dealt into folds; the last ones are held out, and what is reported as held out was measured there.

    Args:
        model_a: The network whose units are matched, predicted and listed.
        model_b: The network of the partners; another architecture will do. It may be the same object.
        data: Batches in random order: `x`, `(x, y)` or mappings of keyword inputs; one tensor is one batch. The null
            pairs each sample with one before it; in sorted data neighbours are alike, and it would be too high. What
            all samples share by place, such as the borders of feature maps, stays in it.
        layers: Layer names for both, or a tuple of two lists, one for each. Default: all, see `unit_folds`.
        pairs: "same", each layer with that of the same name; "all"; or pairs of names, see `unit_folds`.
        analyses: Which of `ANALYSES` beside the matching.
        information: Match by mutual information as well; its joint counts need much memory.
        positions: How places of feature maps and tokens are read, see `as_samples`.
        unit_axis: The axis of the units in every activation. Default: told by the kind of module.
        mask: Name of the input that is 0 for padding, which then does not count, see `reader`.
        subsample: Share of the rows of each batch to keep. Default: all.
        folds: Parts of the samples, for cross-validation and stability.
        held_out: How many of them are held out.
        minimum: Correlation below which two units are not matched.
        penalty: Of the LASSO, on standardised units. Default: cross-validated over the training folds.
        clusters: How many. Default: by the largest eigengap.
        draws: Of half of the training folds, for the stability.
        rotations: Random rotations of the units of b.
        seed: Of the folds, the shuffled null, the draws, the rotations and k-means.
        max_bytes: Refuse to keep moments beyond this size.
        device: Where to run. Default: the device of `model_a`.
        progress: Show a bar: always, never, or on a terminal only (None).

    Returns:
        The pairs of layers with everything that was found.

    Raises:
        DataError: An argument cannot be used; layers of a pair differ in their number of rows; the data cannot be read.
        LayerNotFoundError: A network lacks a layer, or did not call it.
        NotFiniteError: An activation holds NaN or infinity.

    >>> _ = torch.manual_seed(0)
    >>> a, b = (nn.Sequential(nn.Linear(4, 6), nn.Tanh()) for _ in range(2))
    >>> _ = b.load_state_dict({name: values.flip(0) for name, values in a.state_dict().items()})
    >>> found = correspond(a, b, torch.randn(400, 4), layers="1", analyses=["prediction"])["1"]
    >>> found.matching.partner.tolist(), bool((found.prediction.r2 > 0.9).all())
    ([5, 4, 3, 2, 1, 0], True)
    """
    chosen = _checked(analyses)
    _check_numbers(minimum, penalty, clusters, draws, rotations)
    kept = unit_folds(
        model_a, model_b, data, layers=layers, pairs=pairs, positions=positions, unit_axis=unit_axis, mask=mask,
        subsample=subsample, folds=folds, held_out=held_out, information=information, seed=seed,
        within=not chosen.isdisjoint(("prediction", "clusters", "rotation")), max_bytes=max_bytes, device=device,
        progress=progress,
    )  # fmt: skip
    options = {
        "minimum": minimum,
        "penalty": penalty,
        "clusters": clusters,
        "draws": draws,
        "rotations": rotations,
        "seed": seed,
    }
    found = tuple(correspondence_of(kept, pair, analyses=chosen, **options) for pair in kept.pairs)
    settings = {**kept.convention, "folds": folds, "held_out": held_out, **options, "analyses": sorted(chosen)}
    return Correspondence(found, kept, settings)


def correspondence_of(
    folds: UnitFolds,
    pair: tuple[str, str],
    *,
    analyses: Iterable[str] = ANALYSES,
    minimum: float | None = None,
    penalty: float | None = None,
    clusters: int | None = None,
    draws: int = 50,
    rotations: int = 20,
    seed: int = 0,
) -> UnitCorrespondence:
    """Read one pair of layers off moments that are there already; see `correspond` for the arguments.

    Args:
        folds: From `unit_folds`, with the moments inside each layer where predictions, clusters or rotations are asked.
        pair: One of `folds.pairs`.
        analyses: Which of `ANALYSES`.
        minimum: Correlation below which two units are not matched.
        penalty: Of the LASSO. Default: cross-validated.
        clusters: How many. Default: by the largest eigengap.
        draws: Of half of the training folds.
        rotations: Random rotations of the units of b.
        seed: Of draws, rotations and k-means.

    Raises:
        DataError: An argument cannot be used.
        LayerNotFoundError: The moments of the pair, or inside a layer, were not kept.
    """
    chosen, (a, b) = _checked(analyses), pair
    matching = bipartite_matching(folds.train, a, b, minimum=minimum)
    found: dict[str, Any] = {"matching": matching, **_matched(folds, a, b, matching, minimum)}
    if "stability" in chosen:
        found["stability"] = matching_stability(folds.train_parts, a, b, draws=draws, seed=seed)
    if "prediction" in chosen:
        how = {"predictors": b, "targets": a, "held_out": folds.held_out}
        found["one_to_one"] = one_to_one_prediction(folds.train, matching=matching.partner, **how)
        parts = folds.train_parts if penalty is None else folds.train
        found["prediction"] = sparse_prediction(parts, penalty=penalty, **how)
    if "clusters" in chosen:
        found["clusters"] = spectral_clusters(folds.train, a, b, clusters=clusters, seed=seed)
        found["scores"] = cluster_scores(found["clusters"], folds.held_out, a, b)
    if "transport" in chosen:
        found["transport"] = soft_matching(folds.train, a, b)
    if "rotation" in chosen:
        found["rotation"] = rotation_test(folds.train, a, b, rotations=rotations, seed=seed)
    if "means" in chosen:
        found["means"] = mean_activations(folds.train, a, b, matching.partner)
    names = folds.layer_names[folds.pairs.index(pair)]
    samples = (folds.train.count(a), folds.held_out.count(a))
    return UnitCorrespondence(*names, samples, **found)


def _matched(folds: UnitFolds, a: str, b: str, matching: UnitMatching, minimum: float | None) -> dict[str, Any]:
    semi = semi_matching(folds.train, a, b, minimum=minimum)
    found: dict[str, Any] = {"semi": semi, "semi_held_out": semi.on(folds.held_out, a, b)}
    found["held_out"] = matching.on(folds.held_out, a, b)
    shuffled = folds.null_name(b)
    if shuffled is not None:
        found["null"] = bipartite_matching(folds.train, a, shuffled)
        found["null_held_out"] = found["null"].on(folds.held_out, a, shuffled)
    if folds.counts_train is not None and folds.counts_held_out is not None:
        found["information"] = bipartite_matching(folds.counts_train.mutual_information(a, b, corrected=True))
        unseen = folds.counts_held_out.mutual_information(a, b, corrected=True)
        found["information_held_out"] = found["information"].on(unseen)
    return found


def _checked(analyses: Iterable[str]) -> frozenset[str]:
    chosen = (analyses,) if isinstance(analyses, str) else tuple(analyses)
    for name in chosen:
        if name not in ANALYSES:
            raise DataError(f"no analysis {name!r}{nearest(str(name), ANALYSES)}")
    return frozenset(chosen)


def _check_numbers(
    minimum: float | None, penalty: float | None, clusters: int | None, draws: int, rotations: int
) -> None:
    # Each tool refuses these too, but only after the pass over the data.
    check_minimum(minimum)
    if penalty is not None and not 0 <= penalty < math.inf:
        raise DataError(f"penalty is {penalty}; expected a number from 0 on, or None to cross-validate it")
    for name, value in (("clusters", clusters), ("draws", draws), ("rotations", rotations)):
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}; expected at least 1")


def _mean(values: Tensor | None) -> float | None:
    if values is None or values.isnan().all():
        return None
    return float(values.to(torch.float64).nanmean())

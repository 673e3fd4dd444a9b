"""Where the products of linear kernels are taken, samples x samples or units x units, by what each costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from ..base.errors import DataError

Space = Literal["auto", "sample", "feature", "mixed"]
Pair = tuple[str, str]

TILE = 512
"""Samples along the side of a tile, in main memory."""


@dataclass(frozen=True)
class Plan:
    """Which layers get samples x samples kernels; pairs with any other layer get units x units products.

    Attributes:
        samples: Number of samples.
        units: Number of units by layer, of both sides.
        space: "sample" or "feature" by layer.
        choice: The option taken: "sample", "feature" or "mixed".
        threshold: Layers with at least this many units are in sample space; None where no layer is.
        thresholds: Floating-point operations for every threshold there is, None for feature space throughout.
        flops: Floating-point operations of each option; "mixed" is the best threshold that leaves layers on both sides.
        bytes: Working memory of each option beyond the rows, for float32; with less of it the work takes more passes.
    """

    samples: int
    units: Mapping[str, int]
    space: Mapping[str, str]
    choice: str
    threshold: int | None
    thresholds: Mapping[int | None, float]
    flops: Mapping[str, float]
    bytes: Mapping[str, int]

    def __str__(self) -> str:
        lines = [f"{self.samples} samples, {len(self.units)} layers, in {self.choice} space", "space    Gflop      MiB"]
        for option, flops in self.flops.items():
            mark = " <-" if option == self.choice else ""
            lines.append(f"{option:8}{flops / 1e9:6.3g} {self.bytes[option] / 2**20:8.3g}{mark}")
        width = max(map(len, self.units))
        lines += [f"{name:{width}} {self.units[name]:6} {space}" for name, space in self.space.items()]
        return "\n".join(lines)


def plan(
    samples: int,
    units_a: Mapping[str, int],
    units_b: Mapping[str, int],
    *,
    space: Space = "auto",
    own: bool = True,
) -> Plan:
    """Choose the cheapest way to compare each of one list of layers with each of another by linear kernels.

    In sample space every kernel is computed once, n² p operations (one triangle of tiles), and all pairs are one
    product of stacked kernels, n² L₁ L₂. In feature space each pair takes 2 n p q, a layer with itself n p². A layer of
    few units is cheaper in feature space; so all thresholds on the number of units are tried.

    Args:
        samples: Number of samples n.
        units_a: Number of units p by layer of the rows.
        units_b: Number of units q by layer of the columns; a name that is also in `units_a` is the same layer.
        space: "auto" takes the cheapest; "sample", "feature" and "mixed" (the best proper threshold) are as asked.
        own: Whether each layer is also compared with itself, which a normalised index needs.

    Raises:
        DataError: There are no layers or samples, `space` is none of these, or it is "mixed" and all layers have the
            same number of units.

    >>> chosen = plan(2000, {"conv": 64, "fc": 4096}, {"other": 128})
    >>> chosen.choice, chosen.threshold
    ('mixed', 128)
    >>> print(chosen)
    2000 samples, 3 layers, in mixed space
    space    Gflop      MiB
    sample    17.2        3
    feature   35.7      132
    mixed     16.9     2.09 <-
    conv      64 feature
    fc      4096 sample
    other    128 sample
    """
    units = {**units_a, **units_b}
    if samples < 1 or not units_a or not units_b or min(units.values()) < 1:
        raise DataError(f"nothing to plan: {samples} samples of the layers {dict(units_a)} and {dict(units_b)}")
    widths = sorted(set(units.values()))
    pairs = needed(units_a, units_b, own=own)
    sides = set(units_a), set(units_b)
    thresholds = {t: _flops(samples, units, pairs, sides, t, own) for t in (*widths, None)}
    best: dict[str, int | None] = {"sample": widths[0], "feature": None}
    if widths[1:]:
        best["mixed"] = min(widths[1:], key=lambda t: thresholds[t])
    if space not in ("auto", "sample", "feature", "mixed") or (space == "mixed" and "mixed" not in best):
        reason = f"all layers have {widths[0]} units" if space == "mixed" else f"expected auto, {', '.join(best)}"
        raise DataError(f"space is {space!r}; {reason}")
    choice = min(best, key=lambda option: thresholds[best[option]]) if space == "auto" else space
    threshold = best[choice]
    return Plan(
        samples=samples,
        units=units,
        space={name: "sample" if _wide(width, threshold) else "feature" for name, width in units.items()},
        choice=choice,
        threshold=threshold,
        thresholds=thresholds,
        flops={option: thresholds[t] for option, t in best.items()},
        bytes={option: _bytes(samples, units, pairs, t) for option, t in best.items()},
    )


def needed(layers_a: Iterable[str], layers_b: Iterable[str], *, own: bool) -> list[Pair]:
    """List the pairs to compute, each unordered pair once, each layer with itself included if `own`."""
    layers_a, layers_b = list(layers_a), list(layers_b)
    pairs = [(a, b) for a in layers_a for b in layers_b]
    if own:
        pairs += [(name, name) for name in (*layers_a, *layers_b)]
    return list({frozenset(pair): pair for pair in pairs}.values())


def _wide(width: int, threshold: int | None) -> bool:
    return threshold is not None and width >= threshold


def _flops(
    n: int, units: Mapping[str, int], pairs: list[Pair], sides: tuple[set[str], set[str]], t: int | None, own: bool
) -> float:
    wide = {name for name, width in units.items() if _wide(width, t)}
    stacked = len(wide & sides[0]) * len(wide & sides[1]) + own * len(wide)
    total = n * n * (sum(units[name] for name in wide) + stacked)
    for a, b in pairs:
        if not (a in wide and b in wide):
            total += n * units[a] * units[b] * (1 if a == b else 2)
    return float(total)


def _bytes(n: int, units: Mapping[str, int], pairs: list[Pair], t: int | None) -> int:
    wide = {name for name, width in units.items() if _wide(width, t)}
    tiles = 4 * len(wide) * min(n, TILE) ** 2
    return tiles + sum(8 * units[a] * units[b] for a, b in pairs if not (a in wide and b in wide))

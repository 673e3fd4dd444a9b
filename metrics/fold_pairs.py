"""The pairs of layers of two networks whose units are compared, and the moments that this takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from ..base.errors import DataError
from .batch_checks import Pair, check_pair
from .reading import Reader

PairsOf = Literal["same", "all"] | Iterable[Pair]


def null_of(layer: str) -> str:
    """Name the shuffled layer beside a layer."""
    return f"{layer} (shuffled)"


@dataclass(frozen=True)
class LayerPairs:
    """Pairs of layers, by their names in the networks and in the moments.

    Attributes:
        layers: (layer of a, layer of b) by the names in the networks.
        names: The same by the names in the moments, which tell the networks apart.
        nulls: By each second layer the name of the shuffled one, where there is a null.
        within: Whether each layer is paired with itself as well.
    """

    layers: tuple[Pair, ...]
    names: tuple[Pair, ...]
    nulls: Mapping[str, str]
    within: bool

    @property
    def all_names(self) -> tuple[str, ...]:
        """Names of all layers but the shuffled ones, each once."""
        return tuple(dict.fromkeys(name for pair in self.names for name in pair))

    @property
    def moments(self) -> tuple[Pair, ...]:
        """Pairs whose cross-moments are kept, each once."""
        within = [(name, name) for name in self.all_names] if self.within else []
        nulls = [(a, self.nulls[b]) for a, b in self.names] if self.nulls else []
        return tuple({frozenset(pair): pair for pair in (*self.names, *within, *nulls)}.values())

    def owners(self, read: Reader, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tell of each layer which sample of the latest batch each row is of.

        Raises:
            DataError: The rows of a pair are not of the same samples.
        """
        for a, b in self.names:
            check_pair(a, b, rows)
        owners = {name: read.owners(name) for name in self.all_names}
        for a, b in self.names:
            if not torch.equal(owners[a], owners[b]):
                raise DataError(
                    f"layers {a!r} and {b!r} both have {len(rows[a])} rows, but not as many of each sample, as under "
                    "different masks; read both with positions='mean', or leave the pair out"
                )
        return owners


def check_pairs(pairs: PairsOf) -> Literal["same", "all"] | tuple[Pair, ...]:
    """Read what a user gave as pairs.

    Raises:
        DataError: Something else than "same", "all" or pairs of names.

    >>> check_pairs([("conv1", "conv2"), ["fc", "fc"]])
    (('conv1', 'conv2'), ('fc', 'fc'))
    """
    if isinstance(pairs, str):
        if pairs not in ("same", "all"):
            raise DataError(f"pairs is {pairs!r}; expected 'same', 'all' or pairs of names")
        return pairs
    found: list[Pair] = []
    for pair in pairs:
        names = () if isinstance(pair, str) else tuple(pair)
        if len(names) != 2 or not all(isinstance(name, str) for name in names):
            raise DataError(f"pairs holds {pair!r}; expected (layer of a, layer of b), such as ('conv1', 'conv1')")
        found.append((names[0], names[1]))
    if not found:
        raise DataError("pairs holds none; expected 'same', 'all' or pairs of names")
    return tuple(dict.fromkeys(found))


def layer_pairs(
    pairs: Literal["same", "all"] | Sequence[Pair], read: Reader, *, shuffled: bool, within: bool
) -> LayerPairs:
    """Find the layers of pairs among those that the first batch chose.

    Args:
        pairs: As `check_pairs` gives them.
        read: The reader, after its first batch.
        shuffled: Whether there is a null.
        within: Whether each layer is paired with itself as well.

    Raises:
        DataError: The two networks have other names, although the pairs are those of the same name.
    """
    names = [dict(zip(*side, strict=True)) for side in zip(read.layers, read.names, strict=True)]
    if pairs == "same":
        _check_names(*read.layers)
        layers = tuple((name, name) for name in read.layers[0])
    elif pairs == "all":
        layers = tuple(product(read.layers[0], read.layers[1]))
    else:
        layers = tuple((_captured(a, names[0]), _captured(b, names[1])) for a, b in pairs)
    found = tuple((names[0][a], names[1][b]) for a, b in layers)
    nulls = {b: null_of(b) for _, b in found} if shuffled else {}
    return LayerPairs(layers, found, nulls, within)


def _check_names(a: Sequence[str], b: Sequence[str]) -> None:
    if a != b:
        raise DataError(
            f"the layers of the networks have other names, {', '.join(a)} and {', '.join(b)}; give the pairs to "
            "compare, pairs=[(layer of a, layer of b), ...], or pairs='all'"
        )


def _captured(name: str, names: Mapping[str, str]) -> str:
    # The reader has refused what did not run; of several outputs it takes the first.
    return name if name in names else next(key for key in names if key.startswith(f"{name}["))

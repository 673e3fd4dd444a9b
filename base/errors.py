"""The errors that Isthmus raises on purpose; each is also the built-in type that fits."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class IsthmusError(Exception):
    """Base of every deliberate error: bad input, said before work starts, with the remedy."""

    def __str__(self) -> str:
        # KeyError would print the repr of its message.
        return str(self.args[0]) if self.args else ""


class ArchitectureError(IsthmusError, ValueError):
    """Two networks, or a network and a checkpoint, do not have the same parameters."""


class CheckpointError(IsthmusError, ValueError):
    """A file is not a readable checkpoint."""


class DataError(IsthmusError, ValueError):
    """A batch or a data set cannot be used: empty, without labels, of the wrong shape."""


class DataFileError(DataError, FileNotFoundError):
    """A data set's file is missing or damaged."""


class NotFiniteError(IsthmusError, ValueError):
    """A tensor holds NaN or infinity."""


class DivergedError(NotFiniteError):
    """A training reached a loss that is not finite: no wrong use, but a failure of the run."""


class LayerNotFoundError(IsthmusError, KeyError):
    """A module or layer name that the network does not have."""


class SymmetryError(IsthmusError, ValueError):
    """A network cannot be traced, or a claimed symmetry changes its outputs."""


class OutputError(IsthmusError, OSError):
    """A file or folder cannot be written."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Name the known names closest to a misspelt one, as the end of an error message.

    >>> nearest("layer1.conv", ["layer1.conv1", "layer2.conv1", "fc"])
    '; did you mean layer1.conv1, layer2.conv1?'
    >>> nearest("x", [])
    ''
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {', '.join(close)}?"
    return f"; known: {', '.join(known[:12])}{', …' if len(known) > 12 else ''}" if known else ""

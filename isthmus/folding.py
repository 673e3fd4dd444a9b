"""Many names in few words: `h.{0-11}.mlp.{weight,bias}`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

# For each piece of a name, what may stand there.
Pattern = tuple[tuple[str, ...], ...]

_PIECE = re.compile(r"\[\d+\]|\d+|\.|[^\d.\[\]]+|.")


def fold(names: Iterable[str]) -> dict[str, list[str]]:
    """Write names that differ in a number or in a whole word as one pattern; the patterns mean these names, no others.

    Args:
        names: Of modules, parameters or axes, such as `fc.weight[0]`; each once.

    Returns:
        For each pattern the names that it stands for; both in the order in which they were given.

    >>> list(fold(["h.0.fc.weight", "h.0.fc.bias", "h.1.fc.weight", "h.1.fc.bias", "head.weight"]))
    ['h.{0-1}.fc.{weight,bias}', 'head.weight']
    >>> fold(["layer1.conv", "layer2.conv"])
    {'layer{1-2}.conv': ['layer1.conv', 'layer2.conv']}
    """
    place = {name: at for at, name in enumerate(names)}
    found: dict[Pattern, list[str]] = {tuple((piece,) for piece in _PIECE.findall(name)): [name] for name in place}
    rank = {piece: at for at, piece in enumerate(dict.fromkeys(p for pattern in found for (p,) in pattern))}
    before = 0
    while len(found) != before:
        before = len(found)
        for at in _places(found):
            alike: dict[Pattern, list[Pattern]] = {}
            for pattern in found:
                key = (*pattern[:at], (), *pattern[at + 1 :]) if _varies(pattern, at) else pattern
                alike.setdefault(key, []).append(pattern)
            found = {
                _merged(at, each, rank): [n for pattern in each for n in found[pattern]] for each in alike.values()
            }
    members = sorted((sorted(each, key=place.__getitem__), pattern) for pattern, each in found.items())
    members.sort(key=lambda item: place[item[0][0]])
    return {"".join(map(_written, pattern)): each for each, pattern in members}


def braced(values: Iterable[int]) -> str:
    """Write numbers as ranges.

    >>> braced([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in _runs(sorted(values)))


def _runs(values: list[int]) -> Iterator[tuple[int, int]]:
    first = last = None
    for value in values:
        if first is None or last is None or value != last + 1:
            if first is not None and last is not None:
                yield first, last
            first = value
        last = value
    if first is not None and last is not None:
        yield first, last


def _places(patterns: Iterable[Pattern]) -> list[int]:
    """List the places of pieces: those that hold numbers first, for the blocks of a network are numbered."""
    numbers: dict[int, bool] = {}
    for pattern in patterns:
        for at, pieces in enumerate(pattern):
            numbers[at] = numbers.get(at, False) or pieces[0].isdigit()
    return sorted(numbers, key=lambda at: (not numbers[at], at))


def _varies(pattern: Pattern, at: int) -> bool:
    """Tell whether a place is a number, an axis or a whole word: parts of words stay what they are."""
    if at >= len(pattern) or pattern[at][0] == ".":
        return False
    if pattern[at][0].strip("[]").isdigit():
        return True
    around = [pattern[near][0] for near in (at - 1, at + 1) if 0 <= near < len(pattern)]
    return all(piece == "." or piece.startswith("[") for piece in around)


def _merged(at: int, alike: list[Pattern], rank: Mapping[str, int]) -> Pattern:
    if len(alike) == 1:
        return alike[0]
    pieces = sorted({piece for pattern in alike for piece in pattern[at]}, key=rank.__getitem__)
    return (*alike[0][:at], tuple(pieces), *alike[0][at + 1 :])


def _written(pieces: tuple[str, ...]) -> str:
    if len(pieces) == 1:
        return pieces[0]
    bare = [piece.strip("[]") for piece in pieces]
    if all(piece.isdigit() and str(int(piece)) == piece for piece in bare):
        inside = braced(map(int, bare))
    else:
        inside = ",".join(pieces)
    return f"[{inside}]" if pieces[0].startswith("[") and bare != list(pieces) else f"{{{inside}}}"

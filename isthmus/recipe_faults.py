"""What is wrong with a recipe: collected whole, each fault with its line and key, and said at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from isthmus.base.errors import IsthmusError

from .recipe_lines import Place


class RecipeFileError(IsthmusError, ValueError):
    """A recipe cannot be followed: what is wrong, each fault with file, line and key."""


class Faults:
    """Faults as they are found.

    Args:
        name: What to call the recipe: its file, or what was typed.
        lines: On which line each key stands, where there is a file.
        flags: What to call keys, and all below them, where options were typed instead.
    """

    def __init__(
        self, name: str, lines: Mapping[Place, int] | None = None, flags: Mapping[Place, str] | None = None
    ) -> None:
        self.name = name
        self.lines = lines
        self.flags = flags or {}
        self.found: list[tuple[int, str]] = []
        self.tables: set[str | int] = set()
        self.unread: set[str | int] = set()

    def seal(self) -> None:
        """End the reading: of tables in which it found a fault, nothing more is said, as defaults stand in them."""
        self.unread = set(self.tables)

    def add(self, place: Place, message: str) -> None:
        """Note a fault; a key that is missing is looked for where its table begins."""
        if place[0] in self.unread:
            return
        self.tables.add(place[0])
        line = 1
        if self.lines is not None:
            known = (place[:size] for size in range(len(place), 0, -1))
            line = next((self.lines[part] for part in known if part in self.lines), 1)
        where = f"{self.name}:{line}: " if self.lines is not None else ""
        self.found.append((line, f"{where}{self._called(place)}: {message}"))

    def _called(self, place: Place) -> str:
        for size in range(len(place), 0, -1):
            if place[:size] in self.flags:
                return " ".join([self.flags[place[:size]], *(str(part) for part in place[size:])])
        return written(place)

    def refuse(self) -> None:
        """Say all faults in the order of the file, if there are any.

        Raises:
            RecipeFileError: There are.
        """
        said = list(dict.fromkeys(message for _, message in sorted(self.found, key=lambda fault: fault[0])))
        if said:
            count = "" if len(said) == 1 else f"{len(said)} faults in {self.name}:\n"
            raise RecipeFileError(count + "\n".join(said))


def written(place: Place) -> str:
    """Write a place as one would type it.

    >>> written(("inputs", 1, "path")), written(("sha256", "a.pt"))
    ('inputs[1].path', 'sha256."a.pt"')
    """
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if re.fullmatch(r"[\w-]+", part) else f'"{part}"')
    return text


def file_name(path: Path | None) -> str:
    """Call a recipe by its file, or "the recipe" where there is none."""
    return "the recipe" if path is None else str(path)

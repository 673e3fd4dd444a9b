"""From the text of a recipe to a recipe: keys, types, defaults; every fault noted with its line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from sys import version_info
from typing import Any

from isthmus.base.errors import nearest

from .commands.methods import UNALIGNED
from .commands.options import DataOptions, NetworkOptions
from .recipe import Alignment, Input, Recipe
from .recipe_faults import Faults, RecipeFileError
from .recipe_lines import Place, lines


@dataclass(frozen=True)
class Kind:
    """A type of value: its name in messages, and what belongs to it."""

    name: str
    holds: Callable[[Any], bool]

    def many(self, plural: str) -> Kind:
        """Give the type of arrays of these."""
        return Kind(f"an array of {plural}", lambda value: isinstance(value, list) and all(map(self.holds, value)))


TEXT = Kind("text", lambda value: isinstance(value, str) and bool(value))
WHOLE = Kind("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool))
NATURAL = Kind("a whole number, not negative", lambda value: WHOLE.holds(value) and value >= 0)
POSITIVE = Kind("a whole number of at least 1", lambda value: WHOLE.holds(value) and value > 0)
NUMBER = Kind("a number", lambda value: isinstance(value, (int, float)) and not isinstance(value, bool))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TABLE = Kind("a table", lambda value: isinstance(value, dict))
TABLES = TABLE.many("tables")
TEXTS = TEXT.many("texts")
SIZES = POSITIVE.many("whole numbers of at least 1")


class Reader:
    """Takes the keys of one table, one by one, and notes what is wrong with them.

    Args:
        table: The table.
        place: Where it stands.
        faults: Where to note.
        folder: To which paths are relative.
    """

    def __init__(self, table: Mapping[str, Any], place: Place, faults: Faults, folder: Path) -> None:
        self.table, self.place, self.faults, self.folder = table, place, faults, folder
        self.known: list[str] = []

    def take(self, key: str, kind: Kind, default: Any = None, required: bool = False) -> Any:
        """Give the value of a key, or the default where it is missing or of another type."""
        self.known.append(key)
        if key not in self.table:
            if required:
                self.faults.add((*self.place, key), f"is missing; give {kind.name}")
            return default
        value = self.table[key]
        if not kind.holds(value):
            self.faults.add((*self.place, key), f"is {_shown(value)}; expected {kind.name}")
            return default
        return value

    def path(self, key: str, required: bool = False) -> Path | None:
        """Give the value of a key as a path."""
        found = self.take(key, TEXT, required=required)
        return None if found is None else self.folder / found

    def below(self, key: str) -> Reader | None:
        """Read a table within this one; None where there is none."""
        found = self.take(key, TABLE)
        return None if found is None else Reader(found, (*self.place, key), self.faults, self.folder)

    def close(self) -> None:
        """Note every key that nobody asked for."""
        for key in self.table:
            if key not in self.known:
                self.faults.add((*self.place, key), f"there is no such key{nearest(key, self.known)}")


def read(path: Path) -> tuple[Recipe, Faults]:
    """Read a recipe; what its methods and files are is for `check`.

    Returns:
        The recipe, and its unknown keys and values of the wrong type, in whose place defaults stand.

    Raises:
        RecipeFileError: It is missing or no TOML.
    """
    text = _text(path)
    # tomllib is part of Python from 3.11 on; tomli is the same parser for 3.10
    parser = import_module("tomllib" if version_info >= (3, 11) else "tomli")
    try:
        content = parser.loads(text)
    except parser.TOMLDecodeError as error:
        raise RecipeFileError(f"{path} is not TOML: {error}") from error
    places = lines(text)
    faults = Faults(str(path), places)
    recipe = _recipe(Reader(content, (), faults, path.parent), path, places)
    faults.seal()
    return recipe, faults


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeFileError(f"no recipe at {path.resolve()}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeFileError(f"{path} cannot be read as text: {error}") from error


def _recipe(top: Reader, path: Path, places: Mapping[Place, int]) -> Recipe:
    output = top.path("output", required=True) or path
    inputs, base = _inputs(top), top.path("base")
    model, data = _model(top), _data(top)
    method, options, split = _merge(top)
    repair = top.below("repair")
    repaired = None if repair is None else repair.take("method", TEXT, "auto")
    # networks that were fine-tuned from one parent have its order of units
    in_order = method in UNALIGNED or base is not None or any(found.base for found in inputs)
    align = _align(top, None if in_order else "weights")
    hashes, versions = top.take("sha256", TABLE, {}), top.take("versions", TABLE, {})
    _check_texts(top, hashes, "sha256")
    seed, device = top.take("seed", NATURAL, 0), top.take("device", TEXT, "cpu")
    for reader in (repair, top):
        if reader is not None:
            reader.close()
    known = {top.folder / name: digest for name, digest in hashes.items()}
    made = {"sha256": known, "versions": versions, "file": path, "lines": places}
    return Recipe(inputs, output, method, options, split, base, model, data, align, repaired, seed, device, **made)


def _check_texts(top: Reader, table: Mapping[str, Any], key: str) -> None:
    for name, value in table.items():
        if not TEXT.holds(value):
            top.faults.add((key, name), f"is {_shown(value)}; expected text")


def _inputs(top: Reader) -> tuple[Input, ...]:
    found = []
    for index, table in enumerate(top.take("inputs", TABLES, [], required=True)):
        reader = Reader(table, ("inputs", index), top.faults, top.folder)
        path, weight, base = reader.path("path", required=True), reader.take("weight", NUMBER), reader.path("base")
        reader.close()
        found.append(Input(path or top.folder, weight, base))
    return tuple(found)


def _model(top: Reader) -> NetworkOptions | None:
    reader = top.below("model")
    if reader is None:
        return None
    found = NetworkOptions(reader.take("name", TEXT, "", required=True), reader.take("args", TABLE, {}))
    reader.close()
    return found


def _data(top: Reader) -> DataOptions | None:
    reader = top.below("data")
    if reader is None:
        return None
    found = DataOptions(
        data=reader.take("name", TEXT, "", required=True),
        data_args=reader.take("args", TABLE),
        data_dir=reader.path("dir"),
        split=reader.take("split", TEXT),
        limit=reader.take("limit", POSITIVE),
        batch_size=reader.take("batch_size", POSITIVE),
    )
    reader.close()
    return found


def _merge(top: Reader) -> tuple[str, Mapping[str, Any], str]:
    reader = top.below("merge")
    if reader is None:
        return "mean", {}, "train"
    method, options = reader.take("method", TEXT, "mean"), reader.take("options", TABLE, {})
    split = reader.take("split", TEXT, "train")
    reader.close()
    return method, options, split


def _align(top: Reader, usual: str | None) -> Alignment:
    reader = top.below("align")
    if reader is None:
        return Alignment(method=usual)
    matchings = tuple(top.folder / name for name in reader.take("matchings", TEXTS, []))
    method = reader.take("method", TEXT, None if matchings else usual)
    shape = reader.take("input_shape", SIZES)
    found = Alignment(
        method=None if method == "none" else method,
        options=reader.take("options", TABLE, {}),
        restarts=reader.take("restarts", POSITIVE, 2),
        matchings=matchings,
        symmetry=reader.path("symmetry"),
        input_shape=None if shape is None else tuple(shape),
        verify=reader.take("verify", FLAG, True),
    )
    reader.close()
    return found


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "an array"
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)

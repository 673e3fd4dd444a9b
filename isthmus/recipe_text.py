"""Recipes as text: TOML of plain values, and the complete recipe that stands beside a result."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isthmus.align.nets.methods import METHODS as ALIGNMENTS
from isthmus.base.errors import OutputError
from isthmus.merge.methods import METHODS

from .provenance import versions
from .recipe import Recipe
from .recipe_checks import option_defaults


def toml(content: Mapping[str, Any]) -> str:
    """Write TOML; None is left out, as TOML has no word for it.

    Args:
        content: Text, numbers, flags, lists, and mappings of these by text.

    Raises:
        OutputError: A value is of another type.

    >>> print(toml({"seed": 0, "model": {"name": "mlp", "args": {"widths": [8, 8]}}, "inputs": [{"path": "a"}]}))
    seed = 0
    <BLANKLINE>
    [model]
    name = "mlp"
    args = { widths = [8, 8] }
    <BLANKLINE>
    [[inputs]]
    path = "a"
    """
    content = {key: value for key, value in content.items() if value is not None}
    blocks = [[f"{_key(key)} = {_value(value)}" for key, value in content.items() if not _is_block(value)]]
    for key, value in content.items():
        for table in [value] if isinstance(value, Mapping) else value if _is_block(value) else []:
            header = f"[{_key(key)}]" if isinstance(value, Mapping) else f"[[{_key(key)}]]"
            rows = [f"{_key(name)} = {_value(part)}" for name, part in table.items() if part is not None]
            blocks.append([header, *rows])
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _is_block(value: Any) -> bool:
    many = isinstance(value, (list, tuple)) and len(value) > 0
    return isinstance(value, Mapping) or (many and all(isinstance(part, Mapping) for part in value))


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _text(key)


def _text(value: str) -> str:
    # the escapes of JSON are among those of TOML, which wants one more
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (str, os.PathLike)):
        return _text(str(value))
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_key(key)} = {_value(part)}" for key, part in value.items() if part is not None)
        return f"{{ {inner} }}" if inner else "{}"
    raise OutputError(f"a {type(value).__name__} cannot be written into a recipe: {value!r}; use plain values")


def complete(
    recipe: Recipe,
    repair: str | None = None,
    hashes: Mapping[Path, str] | None = None,
    folder: Path | None = None,
) -> str:
    """Write a recipe with every default.

    Args:
        recipe: What was followed, or is to be.
        repair: How it was repaired, where the recipe left the choice open.
        hashes: SHA-256 of each file; with versions then, as it has been followed.
        folder: Where it will stand; beside its output by default.
    """

    def near(path: Path | None) -> str | None:
        if path is None:
            return None
        try:
            return Path(os.path.relpath(path, recipe.output.parent if folder is None else folder)).as_posix()
        except ValueError:  # another drive
            return path.absolute().as_posix()

    content = {
        "output": near(recipe.output),
        "base": near(recipe.base),
        "seed": recipe.seed,
        "device": recipe.device,
        "inputs": [
            {
                "path": near(found.path),
                "weight": 1.0 if found.weight is None else found.weight,
                "base": near(found.base),
            }
            for found in recipe.inputs
        ],
        "model": None if recipe.model is None else {"name": recipe.model.model, "args": recipe.model.model_args},
        "data": _data(recipe, near),
        "align": _align(recipe, near),
        "merge": {
            "method": recipe.method,
            "split": recipe.split,
            "options": {**option_defaults(METHODS[recipe.method]), **recipe.options},
        },
        "repair": None if recipe.repair is None else {"method": repair or recipe.repair},
    }
    if hashes is not None:
        content |= {"sha256": {near(path): digest for path, digest in hashes.items()}, "versions": versions()}
    return f"# Isthmus: what {recipe.output.name} is made from. Paths are relative to this file.\n{toml(content)}\n"


def _data(recipe: Recipe, near: Any) -> dict[str, Any] | None:
    data = recipe.data
    if data is None:
        return None
    return {
        "name": data.data,
        "args": data.data_args,
        "dir": near(data.data_dir),
        "split": data.split,
        "limit": data.limit,
        "batch_size": data.batch_size,
    }


def _align(recipe: Recipe, near: Any) -> dict[str, Any]:
    align = recipe.align
    if align.matchings:
        return {"matchings": list(map(near, align.matchings))}
    if align.method is None:
        return {"method": "none"}
    known = ALIGNMENTS.get(align.method)
    return {
        "method": align.method,
        "restarts": align.restarts,
        "symmetry": near(align.symmetry),
        "input_shape": align.input_shape,
        "verify": align.verify,
        "options": {**({} if known is None else option_defaults(known)), **align.options},
    }

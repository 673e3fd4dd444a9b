"""Where results go: checks before any work, and what is printed after it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from isthmus.base.errors import OutputError

from ..plain import dumps


def check_file(path: Path | None, suffixes: Iterable[str] = ()) -> None:
    """Check that a file can be written, before any work.

    Args:
        path: The file; None passes.
        suffixes: How its name may end; anything by default.

    Raises:
        OutputError: Its folder is missing or cannot be written, a folder stands there, or the name ends otherwise.
    """
    if path is None:
        return
    if suffixes and path.suffix not in suffixes:
        raise OutputError(f"{path}: the name of this file must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; name a file in it")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {path.parent.absolute()}; make it first")
    _check_writable(path.parent)


def check_folder(path: Path | None) -> None:
    """Check that a folder can be written or made, before any work, without making it; None passes.

    Raises:
        OutputError: It cannot.
    """
    if path is not None:
        here = path.absolute()
        while not here.exists():
            here = here.parent
        _check_writable(here)


def _check_writable(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}; choose another place") from error


def emit(as_json: bool, content: Mapping[str, Any], lines: Iterable[str]) -> None:
    """Print a result: as one JSON object, or as lines for a person."""
    click.echo(dumps(content) if as_json else "\n".join(lines))

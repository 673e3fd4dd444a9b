"""What a result came from: files by their content, versions of what computed it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isthmus.base.files import PathLike, sha256


def describe_files(files: Mapping[str, PathLike]) -> list[dict[str, Any]]:
    """Give name, size and SHA-256 of files, by what they are ("network A", …)."""
    return [
        {"role": role, "name": Path(path).name, "sha256": sha256(path), "bytes": Path(path).stat().st_size}
        for role, path in files.items()
    ]


def versions() -> dict[str, str]:
    """Give the versions of this library and of what it computes with."""
    from . import __version__

    return {
        "isthmus": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }

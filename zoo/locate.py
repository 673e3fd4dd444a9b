"""Where the files of a data set are looked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..base.errors import DataFileError
from ..base.files import PathLike

VARIABLE = "ISTHMUS_DATA"


def find_file(name: str, filenames: Sequence[str], subfolders: Sequence[str], data_dir: PathLike | None) -> Path:
    """Find the first of several file names, in the data folder or one of its subfolders.

    Args:
        name: The data set, for the message.
        filenames: Names of the file, the preferred one first.
        subfolders: Folders below the data folder where it may be; they come before the data folder itself.
        data_dir: The data folder; None for the environment variable `ISTHMUS_DATA`.

    Raises:
        DataFileError: None is there; says where it was looked for and where to put it.
    """
    root = data_dir if data_dir is not None else os.environ.get(VARIABLE)
    wanted = " or ".join(filenames)
    if not root:
        raise DataFileError(
            f"{name}: no data folder is known; pass data_dir, or set the environment variable {VARIABLE} to the "
            f"folder that holds {wanted}, in it or in its subfolder {subfolders[0]}"
        )
    folders = [*(Path(root) / subfolder for subfolder in subfolders), Path(root)]
    for filename in filenames:
        for folder in folders:
            if (folder / filename).is_file():
                return folder / filename
    raise DataFileError(
        f"{name}: no {wanted}; looked in {', '.join(str(folder.absolute()) for folder in folders)}. Put it in "
        f"{folders[0].absolute()}, or let data_dir or the environment variable {VARIABLE} name the folder that has it"
    )

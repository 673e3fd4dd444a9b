"""CIFAR-10, from its official Python batches or from a compact archive of JPEG images."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np

from ..base.errors import DataFileError
from ..base.progress import progress
from .subset import kept_rows

SHAPE = (3, 32, 32)
COMPACT = "cifar10_jpeg_q75.npz"
FIRST_BATCH = "data_batch_1"


def _encode(text: str, encoding: str = "latin1") -> bytes:
    # How Python 3 spells bytes in pickles of protocol 2; any other codec has no business here.
    return text.encode("latin1" if encoding == "latin1" else "ascii")


class _BatchUnpickler(pickle.Unpickler):
    """Builds arrays and built-in containers; refuses every other class or function, so nothing can run."""

    def find_class(self, module: str, name: str) -> object:
        match module.replace("numpy._core", "numpy.core"), name:
            case "numpy", ("ndarray" | "dtype"):
                return getattr(np, name)
            case "numpy.core.multiarray", "_reconstruct":
                return np.empty(0).__reduce__()[0]
            case "numpy.core.numeric", "_frombuffer":
                return np.empty(0).__reduce_ex__(5)[0]
            case "_codecs", "encode":
                return _encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 batch holds")


def read_batches(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the official Python version of CIFAR-10 (Krizhevsky, 2009) without running anything that it holds.

    Args:
        folder: `cifar-10-batches-py`, with `data_batch_1` to `data_batch_5` and `test_batch`.
        split: `"train"` or `"test"`.

    Returns:
        Images (n, 3, 32, 32) as uint8 and labels (n,).

    Raises:
        DataFileError: A batch is missing, damaged, or holds something else.
    """
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataFileError(f"cifar10: no {', '.join(missing)} in {folder.absolute()}; put the missing batches there")
    images, labels = zip(*(_read_batch(folder / name) for name in names), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with path.open("rb") as file:
            content = _BatchUnpickler(file, encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataFileError(f"{path} was refused or is damaged: {error}. Fetch it again") from error
    entries = content if isinstance(content, dict) else {}
    by_name = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in entries.items()}
    pixels, labels = by_name.get("data"), by_name.get("labels")
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and isinstance(labels, list)):
        raise DataFileError(f"{path} is no CIFAR-10 batch: it needs 'data', an array of bytes, and 'labels', a list")
    if pixels.shape != (len(labels), np.prod(SHAPE)):
        raise DataFileError(
            f"{path}: data of shape {pixels.shape} beside {len(labels)} labels; expected ({len(labels)}, 3072)"
        )
    if not all(isinstance(label, int) for label in labels):
        raise DataFileError(f"{path}: the labels are not integers")
    return pixels.reshape(-1, *SHAPE), np.array(labels)


def read_compact(path: Path, split: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read the compact archive: CIFAR-10 whose images went through JPEG at quality 75, so no longer the exact pixels.

    Image i of a split is the common `header` followed by its `_bytes` from `_offsets[i]` to `_offsets[i + 1]`.

    Args:
        path: `cifar10_jpeg_q75.npz`.
        split: `"train"` or `"test"`.
        limit: Decode this many images, drawn from the split; None for all (about 10,000 a second).

    Returns:
        Images (n, 3, 32, 32) as uint8 and labels (n,).

    Raises:
        DataFileError: The archive is damaged or holds something else.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            header = archive["header"].tobytes()
            stream = archive[f"{split}_bytes"].tobytes()
            offsets = archive[f"{split}_offsets"].astype(np.int64)
            labels = archive[f"{split}_labels"].astype(np.int64)
    except Exception as error:  # and so can a damaged archive
        raise DataFileError(f"{path} is damaged or not this archive: {error}. Fetch it again") from error
    if offsets.shape != (len(labels) + 1,) or (np.diff(offsets) < 0).any() or offsets[-1] != len(stream):
        raise DataFileError(
            f"{path}: {split}_offsets of shape {offsets.shape} do not cut {len(stream)} bytes into {len(labels)} images"
        )
    rows = kept_rows(len(labels), limit)
    images = np.empty((len(rows), *SHAPE), dtype=np.uint8)
    for i, row in enumerate(progress(rows, f"decoding {path.name}")):
        images[i] = _decode(header + stream[offsets[row] : offsets[row + 1]], path, row)
    return images, labels[rows]


def _decode(jpeg: bytes, path: Path, row: int) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
            pixels = np.asarray(image)
    except (OSError, SyntaxError) as error:
        raise DataFileError(f"{path}: image {row} cannot be decoded: {error}. Fetch it again") from error
    if pixels.shape != (32, 32, 3):
        raise DataFileError(f"{path}: image {row} has shape {pixels.shape}, expected (32, 32, 3)")
    return pixels.transpose(2, 0, 1)

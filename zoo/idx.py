"""IDX files, the format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from ..base.errors import DataFileError
from ..base.files import PathLike

_UNSIGNED_BYTE = 0x08
_GZIP = b"\x1f\x8b"


def read_idx(path: PathLike, dimensions: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, compressed with gzip or not.

    The format is that of LeCun's MNIST page: two zero bytes, a type code, the number of axes, the length of each axis
    as a big-endian 32-bit integer, then the values.

    Args:
        path: The file; whether it is compressed is read from its first bytes, not from its name.
        dimensions: The number of axes it must have: 3 for images, 1 for labels.

    Returns:
        A uint8 array of the shape that the file gives.

    Raises:
        DataFileError: It is missing, is no IDX file of bytes, has other axes, or holds too few or too many bytes.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "labels"
    ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]))
    ...     read_idx(path, 1)
    array([7, 2, 1], dtype=uint8)
    """
    path = Path(path)
    try:
        with path.open("rb") as plain:
            compressed = plain.read(2) == _GZIP
        with gzip.open(path, "rb") if compressed else path.open("rb") as file:
            shape = _read_shape(path, file.read(4 + 4 * dimensions), dimensions)
            # One byte more than there should be: tells a file that is too long, and lets gzip reach its checksum.
            body = file.read(math.prod(shape) + 1)
    except DataFileError:
        raise  # it is an OSError as well
    except FileNotFoundError as error:
        raise DataFileError(f"no file at {path.absolute()}") from error
    except (EOFError, zlib.error, OSError) as error:
        raise DataFileError(f"{path} is damaged or cut short: {error}. Fetch it again") from error
    if len(body) != math.prod(shape):
        found = "more" if len(body) > math.prod(shape) else f"only {len(body)}"
        raise DataFileError(f"{path} announces {math.prod(shape)} values {shape} but holds {found}; fetch it again")
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


def _read_shape(path: Path, header: bytes, dimensions: int) -> tuple[int, ...]:
    expected = bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    if header[:4] != expected:
        raise DataFileError(
            f"{path} starts with {header[:4].hex(' ') or 'nothing'}, not with {expected.hex(' ')}: "
            f"not an IDX file of bytes with {dimensions} axes"
        )
    if len(header) < 4 + 4 * dimensions:
        raise DataFileError(f"{path} ends inside its header, after {len(header)} bytes; fetch it again")
    return struct.unpack(f">{dimensions}I", header[4:])

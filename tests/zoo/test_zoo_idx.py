"""IDX files: what is written is read, and nothing damaged is."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.base.errors import DataFileError
from isthmus.zoo.idx import read_idx


def idx_bytes(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
    compressed=st.booleans(),
)
def test_read_what_was_written(tmp_path: Path, shape: list[int], seed: int, compressed: bool):
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    content = idx_bytes(values)
    # the name says nothing about the compression
    path = tmp_path / "values"
    path.write_bytes(gzip.compress(content) if compressed else content)
    read = read_idx(path, len(shape))
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, values)


@pytest.mark.parametrize("compressed", [False, True])
def test_cut_short_anywhere(tmp_path: Path, compressed: bool):
    values = np.random.default_rng(0).integers(0, 256, (3, 4, 4), dtype=np.uint8)
    content = gzip.compress(idx_bytes(values)) if compressed else idx_bytes(values)
    path = tmp_path / "images"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DataFileError, match="images"):
            read_idx(path, 3)


def test_flipped_byte_fails_the_checksum(tmp_path: Path):
    content = bytearray(gzip.compress(idx_bytes(np.arange(200, dtype=np.uint8)), compresslevel=0))
    content[100] ^= 1
    path = tmp_path / "labels.gz"
    path.write_bytes(content)
    with pytest.raises(DataFileError, match="damaged"):
        read_idx(path, 1)


def test_too_long(tmp_path: Path):
    path = tmp_path / "labels"
    path.write_bytes(idx_bytes(np.arange(5, dtype=np.uint8)) + b"\0")
    with pytest.raises(DataFileError, match=r"announces 5 values \(5,\) but holds more"):
        read_idx(path, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with nothing"),
        (bytes([0, 0, 8, 3]) + bytes(12), "with 1 axes"),
        (bytes([0, 0, 13, 1]) + bytes(4), "starts with 00 00 0d 01"),
        (b"<html>not found</html>", "not an IDX file"),
    ],
)
def test_another_kind_of_file(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(DataFileError, match=message):
        read_idx(path, 1)


def test_missing_file(tmp_path: Path):
    with pytest.raises(DataFileError, match="no file at"):
        read_idx(tmp_path / "labels", 1)

"""CIFAR-10: both forms of its files, read without running anything."""

import io
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isthmus.base.errors import DataFileError
from isthmus.zoo import load_data
from isthmus.zoo.cifar import COMPACT, read_batches, read_compact
from isthmus.zoo.subset import kept_rows


def random_batch(seed: int, count: int = 4) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072), dtype=np.uint8), rng.integers(0, 10, count).tolist()


def python2_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """Spell the pickle as Python 2 and numpy 1 did for the official files: every string is a byte string."""

    def string(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    shape = integer(pixels.shape[0]) + integer(pixels.shape[1]) + b"\x86"
    dtype = b"cnumpy\ndtype\n" + string(b"u1") + integer(0) + integer(1) + b"\x87R"
    dtype += b"(" + integer(3) + string(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + integer(0) + b"\x85" + string(b"b") + b"\x87R"
    raw = pixels.tobytes()
    array += b"(" + integer(1) + shape + dtype + b"\x89" + b"T" + struct.pack("<i", len(raw)) + raw + b"tb"
    entries = string(b"data") + array + string(b"labels") + b"](" + b"".join(map(integer, labels)) + b"e"
    return b"\x80\x02}(" + entries + b"u."


def write_official(folder: Path, spell=lambda pixels, labels: python2_pickle(pixels, labels)) -> Path:
    batches = folder / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    for i, name in enumerate([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]):
        (batches / name).write_bytes(spell(*random_batch(i)))
    return batches


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def smooth_images(count: int) -> np.ndarray:
    ramp = np.linspace(0, 200, 32)
    return np.stack([ramp[:, None, None] + np.zeros((32, 32, 3)) + 5 * i for i in range(count)]).astype(np.uint8)


def write_compact(folder: Path, images: np.ndarray, labels: list[int], **changes: np.ndarray) -> Path:
    streams = [jpeg(image) for image in images]
    length = next(i for i, column in enumerate(zip(*streams, strict=False)) if len(set(column)) > 1)
    tails = [stream[length:] for stream in streams]
    content: dict[str, np.ndarray] = {"header": np.frombuffer(streams[0][:length], dtype=np.uint8)}
    for split in ("train", "test"):
        content[f"{split}_bytes"] = np.frombuffer(b"".join(tails), dtype=np.uint8)
        content[f"{split}_offsets"] = np.cumsum([0, *map(len, tails)]).astype(np.uint32)
        content[f"{split}_labels"] = np.array(labels, dtype=np.uint8)
    np.savez(folder / COMPACT, **{**content, **changes})  # pyright: ignore[reportArgumentType]
    return folder / COMPACT


@pytest.mark.parametrize(
    "spell",
    [
        python2_pickle,
        lambda pixels, labels: pickle.dumps({b"data": pixels, b"labels": labels}, protocol=2),
        lambda pixels, labels: pickle.dumps({"data": pixels, "labels": labels}, protocol=2),
        lambda pixels, labels: pickle.dumps({"data": pixels, "labels": labels}, protocol=5),
    ],
    ids=["python 2", "byte keys", "string keys", "protocol 5"],
)
def test_official_batches(tmp_path: Path, spell):
    folder = write_official(tmp_path, spell)
    images, labels = read_batches(folder, "train")
    expected = [random_batch(i) for i in range(5)]
    # a row is the red plane, then the green, then the blue, each row by row
    for i in range(20):
        pixels = expected[i // 4][0][i % 4]
        assert images[i, 1, 2, 3] == pixels[1024 + 2 * 32 + 3]
        np.testing.assert_array_equal(images[i].reshape(-1), pixels)
    assert labels.tolist() == [label for _, row in expected for label in row]
    assert read_batches(folder, "test")[1].tolist() == random_batch(5)[1]


def test_load_data_prefers_the_official_pixels(tmp_path: Path):
    folder = write_official(tmp_path / "cifar10")
    write_compact(tmp_path / "cifar10", smooth_images(2), [1, 2])
    data = load_data("cifar10", "test", data_dir=tmp_path)
    assert data.labels.tolist() == random_batch(5)[1]
    assert data.source == str(folder)
    assert load_data("cifar10", "test", data_dir=folder).labels.tolist() == data.labels.tolist()


@pytest.mark.parametrize("where", ["value", "key"])
def test_nothing_is_run(tmp_path: Path, where: str):
    marker = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

        def __hash__(self):
            return 0

    attack = {"data": Attack()} if where == "value" else {Attack(): 1}
    folder = write_official(tmp_path, lambda pixels, labels: pickle.dumps(attack))
    with pytest.raises(DataFileError, match=r"data_batch_1 was refused .*mkdir"):
        read_batches(folder, "train")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "is no CIFAR-10 batch"),
        ({"data": np.zeros((2, 3072), dtype=np.float32), "labels": [1, 2]}, "an array of bytes"),
        ({"data": np.zeros((2, 3072), dtype=np.uint8)}, "'labels', a list"),
        ({"data": np.zeros((2, 3072), dtype=np.uint8), "labels": [1]}, r"\(2, 3072\) beside 1 labels"),
        ({"data": np.zeros((2, 784), dtype=np.uint8), "labels": [1, 2]}, r"expected \(2, 3072\)"),
        ({"data": np.zeros((1, 3072), dtype=np.uint8), "labels": ["cat"]}, "not integers"),
    ],
)
def test_batch_with_other_content(tmp_path: Path, content: object, message: str):
    folder = write_official(tmp_path, lambda pixels, labels: pickle.dumps(content, protocol=2))
    with pytest.raises(DataFileError, match=message):
        read_batches(folder, "test")


def test_batch_cut_short(tmp_path: Path):
    folder = write_official(tmp_path)
    content = (folder / "test_batch").read_bytes()
    for length in range(0, len(content), 97):
        (folder / "test_batch").write_bytes(content[:length])
        with pytest.raises(DataFileError, match="test_batch"):
            read_batches(folder, "test")


def test_missing_batch_is_named(tmp_path: Path):
    folder = write_official(tmp_path)
    (folder / "data_batch_3").unlink()
    with pytest.raises(DataFileError, match="no data_batch_3 in"):
        load_data("cifar10", data_dir=tmp_path)


def test_labels_beyond_the_classes(tmp_path: Path):
    write_official(tmp_path, lambda pixels, labels: python2_pickle(pixels, [10] * 4))
    with pytest.raises(DataFileError, match="no labels from 0 to 9"):
        load_data("cifar10", data_dir=tmp_path)


def test_compact_archive(tmp_path: Path):
    originals = smooth_images(6)
    write_compact(tmp_path, originals, [3, 1, 4, 1, 5, 9])
    data = load_data("cifar10", "train", data_dir=tmp_path)
    assert data.labels.tolist() == [3, 1, 4, 1, 5, 9]
    error = np.abs(data.images.numpy().transpose(0, 2, 3, 1).astype(int) - originals)
    assert error.max() <= 4
    assert "JPEG" in data.source
    few = load_data("cifar10", "train", data_dir=tmp_path, limit=3)
    rows = kept_rows(6, 3)
    assert few.labels.tolist() == data.labels[rows].tolist()
    assert np.array_equal(few.images, data.images[rows])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_offsets": np.array([0, 5])}, "do not cut"),
        ({"train_offsets": np.array([0, 9, 5])}, "do not cut"),
        ({"header": np.zeros(10, dtype=np.uint8)}, "image 0 cannot be decoded"),
        ({"header": np.array([object()])}, "damaged"),
    ],
)
def test_compact_archive_with_other_content(tmp_path: Path, changes: dict[str, np.ndarray], message: str):
    path = write_compact(tmp_path, smooth_images(2), [0, 1], **changes)
    with pytest.raises(DataFileError, match=message):
        read_compact(path, "train")


def test_compact_archive_of_other_images(tmp_path: Path):
    path = write_compact(tmp_path, smooth_images(2)[:, :16], [0, 1])
    with pytest.raises(DataFileError, match=r"image 0 has shape \(16, 32, 3\)"):
        read_compact(path, "train")


def test_compact_archive_cut_short(tmp_path: Path):
    path = write_compact(tmp_path, smooth_images(3), [0, 1, 2])
    content = path.read_bytes()
    for length in range(0, len(content), 101):
        path.write_bytes(content[:length])
        with pytest.raises(DataFileError, match=r"q75\.npz"):
            read_compact(path, "train")

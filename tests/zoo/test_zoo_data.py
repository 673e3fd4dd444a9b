"""Data sets and loaders."""

import dataclasses
import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isthmus.base.errors import DataError, DataFileError, NotFiniteError
from isthmus.zoo import DATASETS, Dataset, load_data, loader
from isthmus.zoo.subset import kept_rows

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def needs(folder: str):
    return pytest.mark.skipif(not (SHARED / folder).is_dir(), reason=f"no {folder} in {SHARED}")


def write_idx(path: Path, values: np.ndarray) -> None:
    content = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    content += values.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder: Path, images: int = 6, labels: list[int] | None = None, suffix: str = ".gz") -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (images, 28, 28))
    for prefix in ("train", "t10k"):
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", pixels)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", np.array(labels or range(images)))


def random_set(name: str = "mine", count: int = 30, channels: int = 3, size: int = 16) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)
    return Dataset(
        name, "train", images, torch.arange(count) % 10, tuple("0123456789"), (0.0,) * channels, (1.0,) * channels, "-"
    )


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    expected = sorted((int(label), tuple(row)) for row, label in zip(pixels, labels, strict=True))
    parts = [load_data("digits", "train"), load_data("digits", "test")]
    found = [
        (int(label), tuple((image.flatten().double() * 16).tolist()))
        for part in parts
        for image, label in zip(part.images, part.labels, strict=True)
    ]
    assert sorted(found) == expected


def test_digits_split_is_stratified_and_fixed():
    train, test = load_data("digits", "train"), load_data("digits", "test")
    totals = train.labels.bincount() + test.labels.bincount()
    assert ((test.labels.bincount() - 0.2 * totals).abs() <= 0.5).all()
    assert test.labels[:12].tolist() == [4, 5, 6, 9, 4, 7, 8, 9, 9, 6, 9, 9]
    assert torch.equal(test.images, load_data("digits", "test").images)


@pytest.mark.parametrize(
    "name",
    [
        "digits",
        pytest.param("mnist", marks=needs("mnist")),
        pytest.param("fashion_mnist", marks=needs("fashion_mnist")),
    ],
)
def test_inputs_of_the_training_split_are_normalised(name: str):
    data = load_data(name, "train", data_dir=SHARED)
    inputs = data.inputs()
    assert inputs.dtype == torch.float32
    assert abs(inputs.double().mean()) < 5e-4
    assert abs(inputs.double().std() - 1) < 5e-4


@needs("cifar10")
def test_cifar10_channels_are_normalised():
    data = load_data("cifar10", "train", data_dir=SHARED, limit=4000)
    assert data.images.shape == (4000, 3, 32, 32)
    inputs = data.inputs().double()
    assert inputs.mean((0, 2, 3)).abs().max() < 0.02
    assert (inputs.std((0, 2, 3)) - 1).abs().max() < 0.03
    assert data.classes[int(data.labels[0])] == "frog"


@needs("cifar10")
def test_limit_reaches_every_class_of_a_sorted_file():
    data = load_data("cifar10", "test", data_dir=SHARED, limit=200)
    assert data.labels.bincount(minlength=10).min() >= 10
    assert (data.labels.diff() >= 0).all()


@settings(deadline=None)
@given(count=st.integers(1, 300), limit=st.integers(1, 310), more=st.integers(0, 50))
def test_rows_of_a_limit_are_distinct_and_nested(count: int, limit: int, more: int):
    rows = kept_rows(count, limit).tolist()
    assert len(rows) == min(count, limit)
    assert rows == sorted(set(rows))
    assert set(rows) <= set(kept_rows(count, limit + more).tolist()) <= set(kept_rows(count, None).tolist())


def test_rows_of_a_limit_follow_no_rotation():
    rows = kept_rows(10_000, 2000)
    for period in (2, 5, 10):
        shares = np.bincount(rows % period) * period / 2000
        assert abs(shares - 1).max() < 0.2


@needs("mnist")
def test_mnist_is_the_canonical_one():
    test = load_data("mnist", "test", data_dir=SHARED)
    assert test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert test.images.dtype == torch.uint8


def test_normalisation_by_hand():
    images = torch.tensor([[[[0, 255]], [[51, 102]]]], dtype=torch.uint8)
    data = Dataset("mine", "test", images, torch.zeros(1, dtype=torch.int64), ("a",), (0.5, 0.2), (0.25, 0.1), "-")
    torch.testing.assert_close(data.inputs(), torch.tensor([[[[-2.0, 2.0]], [[0.0, 2.0]]]]), atol=1e-6, rtol=0)
    as_floats = dataclasses.replace(data, images=images / 255)
    torch.testing.assert_close(as_floats.inputs(), data.inputs(), atol=1e-6, rtol=0)
    assert images.tolist() == [[[[0, 255]], [[51, 102]]]]


@pytest.mark.parametrize("below", ["", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str, suffix: str):
    write_mnist(tmp_path / below, suffix=suffix)
    data = load_data("mnist", "train", data_dir=tmp_path)
    assert data.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert str(tmp_path) in data.source
    monkeypatch.setenv("ISTHMUS_DATA", str(tmp_path))
    assert torch.equal(load_data("mnist", "train").images, data.images)


def test_missing_files_say_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ISTHMUS_DATA", raising=False)
    with pytest.raises(DataFileError, match=r"data_dir.*ISTHMUS_DATA.*t10k-images-idx3-ubyte"):
        load_data("mnist", "test")
    with pytest.raises(DataFileError) as caught:
        load_data("fashion_mnist", "train", data_dir=tmp_path)
    message = str(caught.value)
    places = (tmp_path / "fashion_mnist", tmp_path / "FashionMNIST/raw", tmp_path)
    for part in ("train-images-idx3-ubyte.gz", "ISTHMUS_DATA", *map(str, places)):
        assert part in message
    with pytest.raises(DataFileError, match=r"cifar-10-batches-py/data_batch_1 or .*cifar10_jpeg_q75\.npz"):
        load_data("cifar10", data_dir=tmp_path)


def test_more_labels_than_images(tmp_path: Path):
    write_mnist(tmp_path, labels=[1, 2, 3])
    with pytest.raises(DataFileError, match=r"holds 6 images but .* 3 labels"):
        load_data("mnist", data_dir=tmp_path)


def test_labels_that_are_no_class(tmp_path: Path):
    write_mnist(tmp_path, labels=[1, 2, 3, 4, 5, 10])
    with pytest.raises(DataFileError, match="no labels from 0 to 9"):
        load_data("mnist", data_dir=tmp_path)


def test_wrong_use():
    with pytest.raises(DataError, match="did you mean fashion_mnist"):
        load_data("fashion-mnist")
    with pytest.raises(DataError, match="no split 'valid'"):
        load_data("digits", "valid")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="limit is 0"):
        load_data("digits", limit=0)
    with pytest.raises(DataError, match="batch_size is 0"):
        loader(load_data("digits", limit=3), 0)
    assert DATASETS == ("digits", "mnist", "fashion_mnist", "cifar10")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(30, 3, 16)}, DataError, r"\(30, 3, 16\) beside labels of shape \(30,\)"),
        ({"labels": torch.zeros(29, dtype=torch.int64)}, DataError, r"labels of shape \(29,\)"),
        ({"labels": torch.zeros(30)}, DataError, "torch.float32"),
        ({"mean": (0.0,)}, DataError, "for 3 channels"),
        ({"std": (1.0, 0.0, 1.0)}, DataError, "std above zero"),
        ({"classes": ("a",)}, DataError, "labels from 0 to 9 for 1 classes"),
        ({"images": torch.full((30, 3, 2, 2), float("nan"))}, NotFiniteError, "NaN"),
    ],
)
def test_data_set_that_does_not_fit_together(change: dict[str, object], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        dataclasses.replace(random_set(), **change)  # pyright: ignore[reportArgumentType]


@settings(max_examples=20, deadline=None)
@given(batch_size=st.integers(1, 40), seed=st.integers(0, 99))
def test_loader_gives_each_image_once(batch_size: int, seed: int):
    data = random_set()
    plain = list(loader(data, batch_size))
    assert len(plain) == len(loader(data, batch_size)) == -(-30 // batch_size)
    assert torch.equal(torch.cat([x for x, _ in plain]), data.inputs())
    assert torch.equal(torch.cat([y for _, y in plain]), data.labels)
    shuffled = loader(data, batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed))
    epochs = [torch.cat([x for x, _ in shuffled]) for _ in range(2)]
    for epoch in epochs:
        assert torch.equal(epoch.flatten(1).sum(1).sort()[0], data.inputs().flatten(1).sum(1).sort()[0])
    assert not torch.equal(*epochs)
    again = loader(data, batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(torch.cat([x for x, _ in again]), epochs[0])


def test_loader_leaves_the_global_generator():
    state = torch.get_rng_state()
    list(loader(random_set(), 7, shuffle=True, augment=True))
    assert torch.equal(torch.get_rng_state(), state)


def crops(image: Tensor, pad: int) -> list[Tensor]:
    """List every crop of the padded image, then the same mirrored; written with plain loops."""
    channels, size, _ = image.shape
    padded = torch.zeros(channels, size + 2 * pad, size + 2 * pad, dtype=image.dtype)
    padded[:, pad : pad + size, pad : pad + size] = image
    places = [(y, x) for y in range(2 * pad + 1) for x in range(2 * pad + 1)]
    plain = [padded[:, y : y + size, x : x + size] for y, x in places]
    return plain + [crop[:, :, range(size - 1, -1, -1)] for crop in plain]


@pytest.mark.parametrize("name", ["mine", "mnist"])
def test_augmentation_is_a_crop_and_perhaps_a_mirror(name: str):
    data = random_set(name, count=200)
    ((x, y),) = loader(data, 200, augment=True)
    assert torch.equal(y, data.labels)
    pixels = (x * 255).round().to(torch.uint8)
    which = []
    for original, changed in zip(data.images, pixels, strict=True):
        matches = [i for i, crop in enumerate(crops(original, 2)) if torch.equal(crop, changed)]
        assert len(matches) == 1
        which.append(matches[0])
    mirrored = sum(i >= 25 for i in which)
    assert mirrored == 0 if name == "mnist" else 70 < mirrored < 130
    assert {i % 25 for i in which} == set(range(25))

"""Data sets: digits (embedded in scikit-learn), MNIST, Fashion-MNIST and CIFAR-10, held in memory as tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.errors import DataError, DataFileError, NotFiniteError, nearest
from ..base.files import PathLike
from .cifar import COMPACT, FIRST_BATCH, read_batches, read_compact
from .idx import read_idx
from .locate import find_file
from .subset import kept_rows
from .text import Text, TextLoader

Split = Literal["train", "test"]

_NUMERALS = tuple("0123456789")
_CLOTHES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# Classes, then mean and standard deviation of each channel over the training split, pixels in [0, 1]. Those of CIFAR-10
# are of its original pixels; JPEG leaves the means and takes less than 1 % off the deviations.
_KNOWN: dict[str, tuple[tuple[str, ...], tuple[float, ...], tuple[float, ...]]] = {
    "digits": (_NUMERALS, (0.3058,), (0.3764,)),
    "mnist": (_NUMERALS, (0.1307,), (0.3081,)),
    "fashion_mnist": (_CLOTHES, (0.2860,), (0.3530,)),
    "cifar10": (_CIFAR, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}

DATASETS = tuple(_KNOWN)

# Where torchvision puts the same files.
_TORCHVISION = {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw"}

# A mirrored numeral is another sign.
_NEVER_FLIPPED = ("digits", "mnist")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images in memory.

    Attributes:
        name: `"digits"`, `"mnist"`, `"fashion_mnist"`, `"cifar10"`, or your own.
        split: `"train"` or `"test"`.
        images: (n, channels, height, width); uint8 in 0 to 255, or floating-point.
        labels: (n,) int64.
        classes: Name of each label.
        mean: Mean of each channel over the training split, with uint8 pixels scaled to [0, 1].
        std: Standard deviation of each channel, likewise.
        source: Where the images come from, and what was done to them.

    Raises:
        DataError: The images and labels do not fit each other, or there are none.
        NotFiniteError: An image holds NaN or infinity.
    """

    name: str
    split: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim != 4 or not len(images) or labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            raise DataError(
                f"{self.name}: images of shape {tuple(images.shape)} beside labels of shape {tuple(labels.shape)} and "
                f"type {labels.dtype}; expected (n, channels, height, width) beside (n,) torch.int64, n > 0"
            )
        if not len(self.mean) == len(self.std) == images.shape[1] or min(self.std) <= 0:
            raise DataError(
                f"{self.name}: mean {self.mean} and std {self.std} for {images.shape[1]} channels; "
                "give one of each per channel, std above zero"
            )
        if int(labels.min()) < 0 or int(labels.max()) >= len(self.classes):
            raise DataError(
                f"{self.name}: labels from {int(labels.min())} to {int(labels.max())} for {len(self.classes)} classes"
            )
        if images.is_floating_point() and not images.isfinite().all():
            raise NotFiniteError(f"{self.name}: the images of shape {tuple(images.shape)} hold NaN or infinity")

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self) -> Tensor:
        """Give all images as normalised float32, (n, channels, height, width)."""
        return self.normalise(self.images)

    def normalise(self, images: Tensor) -> Tensor:
        """Give some of the images as float32 with each channel's mean taken off and divided by its deviation."""
        top = 1.0 if images.is_floating_point() else 255.0
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return images.to(torch.float32).sub(mean * top).div_(std * top)

    def to(self, device: torch.device | str | None) -> Dataset:
        """Give the same data set with its tensors on a device."""
        return dataclasses.replace(self, images=self.images.to(device), labels=self.labels.to(device))


def load_data(
    name: str, split: Split = "train", *, data_dir: PathLike | None = None, limit: int | None = None
) -> Dataset:
    """Load one split of a data set by name.

    `digits` needs no file. `mnist` and `fashion_mnist` are the four IDX files, compressed or not; `cifar10` is the
    official folder `cifar-10-batches-py` or, where that is absent, the archive `cifar10_jpeg_q75.npz`, whose images
    went through JPEG (its `source` says so: accuracies run below those on the original pixels). Nothing is downloaded.

    Args:
        name: `"digits"` (8x8), `"mnist"`, `"fashion_mnist"` (28x28) or `"cifar10"` (32x32, colour).
        split: `"train"` or `"test"`. The 1,797 digits are cut 80 / 20 within each class, always alike.
        data_dir: Folder with the files, in it or in its subfolder of that name; None for the environment variable
            `ISTHMUS_DATA`.
        limit: Keep at most this many images, drawn from the split, always the same ones; None for all.

    Raises:
        DataError: No such data set or split, or the limit is below 1.
        DataFileError: A file is missing or damaged.

    >>> data = load_data("digits", "test")
    >>> data.images.shape, data.classes[3]
    (torch.Size([359, 1, 8, 8]), '3')
    >>> data.inputs().dtype
    torch.float32
    """
    if name not in _KNOWN:
        raise DataError(f"no data set {name!r}{nearest(name, DATASETS)}")
    if split not in ("train", "test"):
        raise DataError(f"no split {split!r} of {name}; there are 'train' and 'test'")
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; keep at least one image, or pass None for all")
    if name == "digits":
        images, labels, source = _read_digits(split)
    elif name == "cifar10":
        images, labels, source = _read_cifar10(split, data_dir, limit)
    else:
        images, labels, source = _read_mnist(name, split, data_dir)
    rows = kept_rows(len(labels), limit)
    classes, mean, std = _KNOWN[name]
    return Dataset(
        name=name,
        split=split,
        images=torch.from_numpy(images[rows]),
        labels=torch.from_numpy(labels[rows].astype(np.int64)),
        classes=classes,
        mean=mean,
        std=std,
        source=source,
    )


def _read_digits(split: Split) -> tuple[np.ndarray, np.ndarray, str]:
    from sklearn.datasets import load_digits

    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    # RandomState, whose stream numpy has frozen for good: the split is the same with every version.
    order = np.random.RandomState(0).permutation(len(labels))
    test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        members = order[labels[order] == label]
        test[members[: round(0.2 * len(members))]] = True
    chosen = test if split == "test" else ~test
    images = (pixels[chosen] / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    return images, labels[chosen], "optical digits, UCI, as embedded in scikit-learn; pixels 0 to 16 scaled to [0, 1]"


def _read_mnist(name: str, split: Split, data_dir: PathLike | None) -> tuple[np.ndarray, np.ndarray, str]:
    prefix = "train" if split == "train" else "t10k"
    stems = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    paths = [find_file(name, (stem, f"{stem}.gz"), (name, _TORCHVISION[name]), data_dir) for stem in stems]
    images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    if len(images) != len(labels):
        raise DataFileError(
            f"{paths[0]} holds {len(images)} images but {paths[1]} {len(labels)} labels; fetch both again"
        )
    if not labels.size or labels.max() > 9:
        raise DataFileError(f"{paths[1]} holds no labels from 0 to 9")
    return images[:, None], labels, str(paths[0].absolute())


def _read_cifar10(split: Split, data_dir: PathLike | None, limit: int | None) -> tuple[np.ndarray, np.ndarray, str]:
    official = "cifar-10-batches-py"
    path = find_file("cifar10", (f"{official}/{FIRST_BATCH}", FIRST_BATCH, COMPACT), ("cifar10",), data_dir)
    if path.name == COMPACT:
        images, labels = read_compact(path, split, limit)
        source = f"{path.absolute()}: CIFAR-10 through JPEG at quality 75, not the original pixels"
    else:
        images, labels = read_batches(path.parent, split)
        source = str(path.parent.absolute())
    if not labels.size or labels.min() < 0 or labels.max() > 9:
        raise DataFileError(f"{path}: no labels from 0 to 9 in the split {split!r}")
    return images, labels, source


@dataclass(frozen=True, eq=False)
class Loader:
    """Batches of a data set, made by `loader`; can be iterated again and again."""

    dataset: Dataset
    batch_size: int
    shuffle: bool
    generator: torch.Generator
    augment: bool

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = self.dataset
        count = len(data)
        order = torch.randperm(count, generator=self.generator).to(data.images.device) if self.shuffle else None
        for start in range(0, count, self.batch_size):
            rows = slice(start, start + self.batch_size)
            chosen = rows if order is None else order[rows]
            images = data.images[chosen]
            if self.augment:
                images = _augment(images, self.generator, flip=data.name not in _NEVER_FLIPPED)
            yield data.normalise(images), data.labels[chosen]


def loader(
    dataset: Dataset | Text,
    batch_size: int = 512,
    *,
    shuffle: bool = False,
    generator: torch.Generator | None = None,
    augment: bool = False,
) -> Loader | TextLoader:
    """Iterate over a data set in batches `(x, y)`, the last one maybe smaller.

    Of images these are normalised images and labels; of a text windows and the next character after each character.

    Args:
        dataset: From `load_data` or `load_text`.
        batch_size: Images or windows in a batch.
        shuffle: A new order in each iteration.
        generator: Source of the orders and of the augmentation, on the CPU; None for one of seed 0.
        augment: Crop at random after padding by an eighth of the size, and mirror half of the images (numerals
            never, and no text).

    Raises:
        DataError: The batch size is below 1.

    >>> batches = loader(load_data("digits", "test"), 100)
    >>> [len(y) for x, y in batches]
    [100, 100, 100, 59]
    """
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; a batch needs at least one image")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    if isinstance(dataset, Text):
        return dataset.batches(batch_size, shuffle=shuffle, generator=generator)
    return Loader(dataset, batch_size, shuffle, generator, augment)


def _augment(images: Tensor, generator: torch.Generator, flip: bool) -> Tensor:
    count, _, height, width = images.shape
    pad_y, pad_x = height // 8, width // 8
    top = torch.randint(2 * pad_y + 1, (count,), generator=generator).to(images.device)
    left = torch.randint(2 * pad_x + 1, (count,), generator=generator).to(images.device)
    windows = F.pad(images, (pad_x, pad_x, pad_y, pad_y)).unfold(2, height, 1).unfold(3, width, 1)
    cropped = windows[torch.arange(count, device=images.device), :, top, left]
    if not flip:
        return cropped
    mirrored = (torch.rand(count, generator=generator) < 0.5).to(images.device)
    return torch.where(mirrored.view(-1, 1, 1, 1), cropped.flip(3), cropped)

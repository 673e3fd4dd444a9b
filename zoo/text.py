"""Text for models of characters, held in memory as one row of integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..base.errors import DataError, DataFileError, nearest
from ..base.files import PathLike
from .locate import find_file

# File name, and subfolders of the data folder where it may be.
_KNOWN: dict[str, tuple[str, tuple[str, ...]]] = {"tinyshakespeare": ("input.txt", ("tinyshakespeare",))}

TEXTS = tuple(_KNOWN)

# Of the whole text, by position, as most who use Tiny Shakespeare split it.
_TRAIN_SHARE = 0.9


@dataclass(frozen=True, eq=False)
class Text:
    """A text cut into windows, each with the next character after every one of its characters.

    Attributes:
        name: `"tinyshakespeare"`, or your own.
        split: `"train"` or `"test"`.
        tokens: (n,) int64, the characters as positions in `classes`.
        context: Characters in a window.
        classes: The characters that there are.
        source: Where the text comes from.

    Raises:
        DataError: The tokens are of the wrong type, out of range, or too few for one window.

    >>> text = Text("mine", "train", torch.arange(10) % 3, 4, ("a", "b", "c"), "made up")
    >>> [(text.decode(x[0]), text.decode(y[0])) for x, y in text.batches(1)]
    [('abca', 'bcab'), ('bcab', 'cabc')]
    """

    name: str
    split: str
    tokens: Tensor
    context: int
    classes: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        tokens = self.tokens
        if tokens.ndim != 1 or tokens.dtype != torch.int64:
            raise DataError(
                f"{self.name}: tokens of shape {tuple(tokens.shape)} and type {tokens.dtype}; expected (n,) torch.int64"
            )
        if not isinstance(self.context, int) or not 1 <= self.context < len(tokens):
            raise DataError(
                f"{self.name}: context is {self.context!r} for {len(tokens)} tokens; pass an integer from 1 "
                f"to {len(tokens) - 1}"
            )
        if int(tokens.min()) < 0 or int(tokens.max()) >= len(self.classes):
            raise DataError(
                f"{self.name}: tokens from {int(tokens.min())} to {int(tokens.max())} for {len(self.classes)} classes"
            )

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def windows(self, start: int = 0) -> tuple[Tensor, Tensor]:
        """Give all windows from a start on, side by side, and the next character after each: twice (n, context)."""
        count = (len(self.tokens) - 1 - start) // self.context
        end = start + count * self.context
        shape = (count, self.context)
        return self.tokens[start:end].view(shape), self.tokens[start + 1 : end + 1].view(shape)

    def inputs(self) -> Tensor:
        """Give all windows, (n, context)."""
        return self.windows()[0]

    def decode(self, tokens: Tensor) -> str:
        """Give the characters of a row of tokens."""
        return "".join(self.classes[token] for token in tokens.tolist())

    def batches(
        self, batch_size: int = 64, *, shuffle: bool = False, generator: torch.Generator | None = None
    ) -> TextLoader:
        """Iterate in batches `(x, y)` of windows and their next characters, the last one maybe smaller.

        Args:
            batch_size: Windows in a batch.
            shuffle: A new order in each iteration, with cuts at new places: windows from a start drawn below `context`.
            generator: Source of the orders and starts, on the CPU; None for one of seed 0.

        Raises:
            DataError: The batch size is below 1.
        """
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; a batch needs at least one window")
        return TextLoader(
            self, batch_size, shuffle, torch.Generator().manual_seed(0) if generator is None else generator
        )

    def to(self, device: torch.device | str | None) -> Text:
        """Give the same text with its tokens on a device."""
        return dataclasses.replace(self, tokens=self.tokens.to(device))


@dataclass(frozen=True, eq=False)
class TextLoader:
    """Batches of a text, made by `Text.batches`; can be iterated again and again."""

    dataset: Text
    batch_size: int
    shuffle: bool
    generator: torch.Generator

    def __len__(self) -> int:
        return -(-self._count() // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        text, count, start = self.dataset, self._count(), 0
        if self.shuffle and self._wholes():
            start = int(torch.randint(text.context, (), generator=self.generator))
        x, y = text.windows(start)
        order = torch.randperm(len(x), generator=self.generator) if self.shuffle else torch.arange(len(x))
        for rows in order[:count].to(x.device).split(self.batch_size):
            yield x[rows], y[rows]

    def _wholes(self) -> int:
        # Windows that there are whatever the start is.
        return len(self.dataset.tokens) // self.dataset.context - 1

    def _count(self) -> int:
        return self._wholes() or len(self.dataset) if self.shuffle else len(self.dataset)


def load_text(
    name: str,
    split: Literal["train", "test"] = "train",
    *,
    context: int = 256,
    data_dir: PathLike | None = None,
    limit: int | None = None,
) -> Text:
    """Load one split of a text by name; its first nine tenths are for training, the rest for tests.

    Args:
        name: `"tinyshakespeare"` (Karpathy 2015; 1,115,394 characters, 65 different ones), as `input.txt`.
        split: `"train"` or `"test"`.
        context: Characters in a window.
        data_dir: Folder with the file, in it or in its subfolder of that name; None for the environment variable
            `ISTHMUS_DATA`.
        limit: Keep at most this many windows, from the beginning of the split; None for all.

    Raises:
        DataError: No such text or split, or the context or the limit does not fit.
        DataFileError: The file is missing, empty or no UTF-8.
    """
    if name not in _KNOWN:
        raise DataError(f"no text {name!r}{nearest(name, TEXTS)}")
    if split not in ("train", "test"):
        raise DataError(f"no split {split!r} of {name}; there are 'train' and 'test'")
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; keep at least one window, or pass None for all")
    filename, subfolders = _KNOWN[name]
    path = find_file(name, (filename,), subfolders, data_dir)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataFileError(f"{path} is no text in UTF-8: {error}; fetch it again") from error
    if not text:
        raise DataFileError(f"{path} is empty; fetch it again")
    classes = tuple(sorted(set(text)))
    cut = int(_TRAIN_SHARE * len(text))
    chosen = text[:cut] if split == "train" else text[cut:]
    if limit is not None:
        chosen = chosen[: limit * context + 1]
    points = np.frombuffer(chosen.encode("utf-32-le"), dtype=np.uint32)
    tokens = np.searchsorted(np.array([ord(each) for each in classes]), points)
    return Text(
        name=name,
        split=split,
        tokens=torch.from_numpy(tokens.astype(np.int64)),
        context=context,
        classes=classes,
        source=str(path.absolute()),
    )

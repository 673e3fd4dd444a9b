"""A `Gram` as a safetensors file, written and read piece by piece."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..base.files import PathLike, write_atomic
from .gram_store import Block, write_bytes
from .state_file import describe_state, open_state

if TYPE_CHECKING:
    from .gram import Gram

_FORMAT = "isthmus.gram.1"
_PIECE = 64 << 20
"""Bytes of rows that are read from a file at a time."""

_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}

Entry = tuple[str, torch.dtype, tuple[int, ...], Callable[[], Iterable[Tensor]]]
"""A tensor of a file: its key, type and shape, and a function that gives its rows piece by piece."""


def write_safetensors(path: PathLike, entries: Iterable[Entry], metadata: dict[str, str]) -> Path:
    """Write a safetensors file, whole or not at all, holding one piece of one tensor at a time.

    Raises:
        OutputError: The file cannot be written.
    """
    entries = list(entries)
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for key, dtype, shape, _ in entries:
        start, end = end, end + dtype.itemsize * int(torch.Size(shape).numel())
        header[key] = {"dtype": _SAFETENSORS[dtype], "shape": shape, "data_offsets": (start, end)}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for *_, pieces in entries:
                for piece in pieces():
                    write_bytes(file, piece)
            file.flush()
            os.fsync(file.fileno())

    return write_atomic(path, write)


def save_gram(gram: Gram, path: PathLike) -> Path:
    """Write a store; see `Gram.save`."""
    entries: list[Entry] = []
    layers = []
    if gram.samples is not None:
        entries.append(_entry("samples", gram.samples))
    for index, (name, layer) in enumerate(gram._layers.items()):
        runs = list(_runs(layer.blocks))
        layers.append({"name": name, "runs": [sum(block.count for block in run) for run in runs]})
        entries.append(_entry(f"shift.{index}", torch.stack([run[0].shift for run in runs])))
        entries.append(_entry(f"mean.{index}", layer.mean))
        shape = (layer.count, len(layer.shift))
        entries.append((f"rows.{index}", layer.dtype, shape, partial(map, Block.read, layer.blocks)))
    content = {"layers": layers, "dtype": str(gram.dtype).removeprefix("torch."), "convention": gram.convention}
    return write_safetensors(path, entries, describe_state(_FORMAT, content))


def _entry(key: str, values: Tensor) -> Entry:
    return key, values.dtype, tuple(values.shape), lambda: [values]


def _runs(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Gather neighbouring blocks of one shift."""
    run: list[Block] = []
    for block in blocks:
        if run and not torch.equal(run[0].shift, block.shift):
            yield run
            run = []
        run.append(block)
    yield run


def load_gram(gram: Gram, path: PathLike, device: torch.device | str) -> None:
    """Fill an empty store from a file; see `Gram.load`."""
    with open_state(path, _FORMAT, "samples of layers", "it was not written by Gram.save") as (file, content):
        _fill(gram, file, content, device)


def _fill(gram: Gram, file: Any, content: dict, device: torch.device | str) -> None:
    gram.dtype = getattr(torch, content["dtype"])
    gram.convention = dict(content["convention"])
    if "samples" in file.keys():  # noqa: SIM118
        gram._samples = [file.get_tensor("samples")]
    for index, layer in enumerate(content["layers"]):
        rows = file.get_slice(f"rows.{index}")
        shifts = file.get_tensor(f"shift.{index}").to(device)
        count, units = rows.get_shape()
        if sum(layer["runs"]) != count or shifts.shape != (len(layer["runs"]), units):
            raise ValueError(f"layer {layer['name']!r} is inconsistent")
        start = 0
        for shift, run in zip(shifts, layer["runs"], strict=True):
            step = max(_PIECE // (8 * units), 1)
            for first in range(start, start + run, step):
                piece = rows[first : min(first + step, start + run)]
                gram._append(layer["name"], piece.to(device), shift)
            start += run
        gram._layers[layer["name"]].mean = file.get_tensor(f"mean.{index}").to(device)

"""Accumulators as files: tensors and a description in one safetensors file, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..base.errors import CheckpointError, OutputError
from ..base.files import PathLike, write_atomic

T = TypeVar("T")

_KEY = "isthmus"


def write_state(path: PathLike, form: str, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write the state of an accumulator; equal states give equal bytes.

    Args:
        path: The file. Its folder must exist.
        form: What the file holds, and in which version: checked on reading.
        content: What JSON can hold.
        tensors: By name.

    Raises:
        OutputError: The file cannot be written.
    """
    from safetensors.torch import save_file

    metadata = describe_state(form, content)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return write_atomic(path, lambda temporary: save_file(whole, temporary, metadata=metadata))


def read_state(
    path: PathLike, form: str, build: Callable[[Any, dict[str, Tensor]], T], device: torch.device | str = "cpu"
) -> T:
    """Read what `write_state` wrote.

    Args:
        path: The file.
        form: As it was written.
        build: Makes the accumulator from content and tensors; what is missing from them is a damaged file.
        device: Where to put the tensors.

    Raises:
        CheckpointError: The file is missing, damaged, or holds something else.
    """
    what = form.split(".")[1].replace("_", " ")
    with open_state(path, form, what, f"it is no file of the form {form}", device) as (file, content):
        return build(content, {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118


def describe_state(form: str, content: Mapping[str, Any]) -> dict[str, str]:
    """Give the metadata of a file that holds a state."""
    # One entry: several would be written in an order that differs from process to process.
    return {_KEY: json.dumps({"format": form, "content": content})}


@contextmanager
def open_state(
    path: PathLike, form: str, what: str, otherwise: str, device: torch.device | str = "cpu"
) -> Iterator[tuple[Any, Any]]:
    """Open the file of a state, to be read inside: whatever goes wrong there is a damaged file.

    Args:
        path: The file.
        form: As it was written.
        what: What it holds, in messages.
        otherwise: What a file of another form is told to be.
        device: Where tensors are put.

    Yields:
        The safetensors file, and the content.

    Raises:
        CheckpointError: The file is missing, damaged, or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            state = json.loads((file.metadata() or {}).get(_KEY, "{}"))
            if state.get("format") != form:
                raise CheckpointError(f"{path} holds no {what}; {otherwise}")
            yield file, state["content"]
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        # Rows that find no room on this machine's disk are no fault of the file.
        if isinstance(error, (CheckpointError, OutputError)):
            raise
        raise CheckpointError(f"{path} is not a whole file of {what}: {error}") from error

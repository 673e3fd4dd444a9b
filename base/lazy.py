"""Checkpoints that are read one tensor at a time, for networks that do not fit in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError
from .files import PathLike, load_state_dict

_PREFIX = "module."


class LazyState(Mapping[str, Tensor]):
    """A state dict whose tensors stay in their safetensors file; each is read anew whenever it is asked for.

    The prefix `module.` that data-parallel training leaves on every name is taken off.

    Args:
        path: A safetensors file.
        device: Where the tensors are put.

    Attributes:
        shapes: Per tensor one without data, of its shape.

    Raises:
        CheckpointError: The file is missing, damaged or of another kind.

    >>> from isthmus.base.files import save_state_dict
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> state = LazyState(save_state_dict({"w": torch.ones(2, 3)}, f"{folder}/net.safetensors"))
    >>> state["w"].sum(), state.shapes["w"].shape
    (tensor(6.), torch.Size([2, 3]))
    """

    def __init__(self, path: PathLike, device: torch.device | str = "cpu") -> None:
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"no checkpoint at {self.path.resolve()}")
        try:
            self._file: Any = safe_open(self.path, framework="pt", device=str(device))
            names = list(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path} is not a whole safetensors file: {error}") from error
        prefix = _PREFIX if all(name.startswith(_PREFIX) for name in names) else ""
        self._names = {name.removeprefix(prefix): name for name in names}
        self.shapes = {
            short: torch.empty(self._file.get_slice(name).get_shape(), device="meta")
            for short, name in self._names.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor."""
        return self._file.get_tensor(self._names[name])

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, in the order of the file."""
        return iter(self._names)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self._names)


def open_state_dict(path: PathLike, device: torch.device | str = "cpu") -> Mapping[str, Tensor]:
    """Open a checkpoint: a safetensors file stays where it is, any other is read whole.

    Args:
        path: The file.
        device: Where tensors are put.

    Raises:
        CheckpointError: The file is missing, damaged or holds more than tensors.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return LazyState(path, device)
    return {name: tensor.to(device) for name, tensor in load_state_dict(path).items()}

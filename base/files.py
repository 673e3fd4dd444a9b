"""Files: written whole or not at all, read without running anything that they hold."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import CheckpointError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

PathLike = str | os.PathLike[str]

_NESTED_KEYS = ("state_dict", "model_state_dict", "model")


def write_atomic(path: PathLike, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then rename it; an interruption leaves `path` as it was.

    Args:
        path: Where the file shall stand. Its folder must exist.
        write: Called with the temporary path.

    Raises:
        OutputError: The folder is missing or cannot be written.
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror} (folder {path.parent})") from error
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes it private; a result is as readable as any file
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def make_folder(path: PathLike) -> Path:
    """Make an output folder, its parents included, and check that it can be written, before any work.

    Raises:
        OutputError: It cannot be made or written, or a file stands there.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to the folder {path}: {error.strerror}; choose another one") from error
    return path


def sha256(path: PathLike) -> str:
    """Give the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()  # hashlib.file_digest is there from Python 3.11 only
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def save_state_dict(state_dict: Mapping[str, Tensor], path: PathLike, metadata: dict[str, str] | None = None) -> Path:
    """Write a state dict: as safetensors if `path` ends so, else with `torch.save`; whole or not at all.

    Args:
        state_dict: Tensors by name.
        path: The file; `.safetensors`, or anything else for PyTorch's own format.
        metadata: Strings to keep beside the tensors (safetensors only).
    """
    import torch

    path = Path(path)
    # Tied weights and views share storage, which safetensors refuses and torch.save would write whole.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state_dict.items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        return write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    return write_atomic(path, lambda temporary: torch.save(tensors, temporary))


def load_state_dict(path: PathLike) -> dict[str, Tensor]:
    """Read a state dict from safetensors or from a `torch.save` file; nothing is unpickled but tensors.

    A dict that holds the state dict under `state_dict`, `model_state_dict` or `model` is opened, and the
    prefix `module.` that data-parallel training leaves on every name is taken off.

    Raises:
        CheckpointError: The file is missing, truncated, holds code, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path.resolve()}")
    content = _load_safetensors(path) if _is_safetensors(path) else _load_torch(path)
    for key in _NESTED_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    return _checked(content, path)


def _checked(content: object, path: Path) -> dict[str, Tensor]:
    import torch

    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict of tensors by name")
    others = [name for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others or not content:
        what = f"entries that are no tensors, such as {others[0]!r}" if others else "nothing"
        raise CheckpointError(
            f"{path} holds {what}; save model.state_dict(), alone or under the key {_NESTED_KEYS[0]!r}"
        )
    prefix = "module." if all(str(name).startswith("module.") for name in content) else ""
    return {str(name).removeprefix(prefix): value for name, value in content.items()}


def _is_safetensors(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        head = file.read(9)
    # eight bytes of header length, then a JSON object
    return len(head) == 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def _load_safetensors(path: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error


def _load_torch(path: Path) -> object:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what torch suspects of a file, the error below says
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {wanted[1]}" if wanted else "it is damaged or holds more than tensors"
        raise CheckpointError(
            f"{path} was refused: {what}, and reading it could run code. Save model.state_dict() instead"
        ) from error
    except Exception as error:  # what torch's reader raises on other bytes is any of a dozen types
        raise CheckpointError(
            f"{path} is not a whole PyTorch checkpoint (truncated, or another kind of file): "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error

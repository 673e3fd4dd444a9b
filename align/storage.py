"""Results in safetensors files: tensors of several kinds by name, and facts as JSON."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from ..base.errors import CheckpointError
from ..base.files import PathLike, save_state_dict


def store(path: PathLike, form: str, facts: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write tensors and facts to a file that says of itself what form it has, whole or not at all.

    Args:
        path: The file, .safetensors.
        form: Its form, by which `stored` knows it.
        facts: JSON values by name.
        parts: Per kind, tensors by name; a kind has no colon in it.
    """
    tensors = {f"{kind}:{name}": tensor for kind, part in parts.items() for name, tensor in part.items()}
    metadata = {"format": form, **{name: json.dumps(value) for name, value in facts.items()}}
    return save_state_dict(tensors, check_suffix(path), metadata)


@contextmanager
def stored(path: PathLike, form: str) -> Iterator[tuple[dict[str, Any], defaultdict[str, dict[str, Tensor]]]]:
    """Read what `store` wrote: the facts, and the tensors by kind and name.

    Raises:
        CheckpointError: The file is missing, of another form, or what is read from it is not what its form promises.
    """
    metadata, tensors = read_tensors(path, form)
    parts: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    with reading(path):
        for key, tensor in tensors.items():
            kind, _, name = key.partition(":")
            parts[kind][name] = tensor
        yield {name: json.loads(value) for name, value in metadata.items() if name != "format"}, parts


def check_suffix(path: PathLike) -> Path:
    """Refuse a file name that does not end in .safetensors."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: permutations and matchings are safetensors files; end the name in .safetensors")
    return path


def read_tensors(path: PathLike, form: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read metadata and tensors of a safetensors file that says of itself that it is of a form.

    Raises:
        CheckpointError: The file is missing, damaged or of another form.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = cast("dict[str, str]", file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if metadata.get("format") != form:
        raise CheckpointError(f"{path} is not a file of the form {form!r} but {metadata.get('format', 'unnamed')!r}")
    return metadata, tensors


@contextmanager
def reading(path: PathLike) -> Iterator[None]:
    """Name the file, as a CheckpointError, where its content is not what its form promises."""
    try:
        yield
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); save it again") from error

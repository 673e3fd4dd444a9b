"""Where trunks and children are kept: in memory, or in a folder from which an interrupted run goes on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from ...base.errors import CheckpointError
from ...base.files import PathLike, make_folder, write_atomic
from ...base.plain import plain
from .training import Checkpoint

# Beside "model", so that such a file is a checkpoint for every command.
_FACTS = "spawning"
_VERSION = 1


class Store(Protocol):
    """Keeps the trunk at some steps, and the children."""

    def trunk(self, step: int) -> dict[str, Any] | None:
        """Give the trunk at a step, or None."""
        ...

    def child(self, step: int, seed: int) -> dict[str, Any] | None:
        """Give a child that left the trunk at a step, or None."""
        ...

    def last_trunk(self, step: int) -> int | None:
        """Give the last step, at most this one, at which there is a trunk."""
        ...

    def keep_trunk(self, step: int, checkpoint: Checkpoint) -> None:
        """Keep the trunk at a step."""
        ...

    def keep_child(self, step: int, seed: int, checkpoint: Checkpoint) -> None:
        """Keep the weights of a child."""
        ...


class Memory:
    """Keeps the last trunk; children live as long as they are measured."""

    def __init__(self) -> None:
        self._step: int | None = None
        self._checkpoint: dict[str, Any] | None = None

    def trunk(self, step: int) -> dict[str, Any] | None:
        """Give the trunk, if it stands at the step."""
        return self._checkpoint if step == self._step else None

    def child(self, step: int, seed: int) -> None:
        """Give nothing: none is kept."""

    def last_trunk(self, step: int) -> int | None:
        """Give the step at which the trunk stands."""
        return self._step

    def keep_trunk(self, step: int, checkpoint: Checkpoint) -> None:
        """Keep it in place of the one before."""
        self._step, self._checkpoint = step, dict(checkpoint)

    def keep_child(self, step: int, seed: int, checkpoint: Checkpoint) -> None:
        """Keep nothing."""


class Folder:
    """One file for each trunk and child, named after the seeds and steps that determine it.

    Args:
        path: The folder; made if it is not there.
        seed: Of the noise of the trunk.
        facts: What determines the training besides, kept in every file; a file with other facts is refused.

    Raises:
        OutputError: The folder cannot be made or written.
    """

    def __init__(self, path: PathLike, seed: int, facts: Mapping[str, Any]) -> None:
        self._facts = {"version": _VERSION, **plain(facts)}
        self._path = make_folder(path)
        self._seed = seed

    def trunk_file(self, step: int) -> Path:
        """Name the file of the trunk at a step."""
        return self._path / f"trunk-{self._seed}-step-{step:06d}.pt"

    def child_file(self, step: int, seed: int) -> Path:
        """Name the file of a child."""
        return self._path / f"trunk-{self._seed}-step-{step:06d}-child-{seed}.pt"

    def trunk(self, step: int) -> dict[str, Any] | None:
        """Read the trunk at a step, if there is one."""
        return self._read(self.trunk_file(step))

    def child(self, step: int, seed: int) -> dict[str, Any] | None:
        """Read a child, if there is one."""
        return self._read(self.child_file(step, seed))

    def last_trunk(self, step: int) -> int | None:
        """Look for the last trunk that is not past a step."""
        name = re.compile(rf"trunk-{self._seed}-step-(\d+)\.pt")
        found = [int(match[1]) for path in self._path.iterdir() if (match := name.fullmatch(path.name))]
        return max((each for each in found if each <= step), default=None)

    def keep_trunk(self, step: int, checkpoint: Checkpoint) -> None:
        """Write all that the trunk needs to go on."""
        self._write(self.trunk_file(step), checkpoint)

    def keep_child(self, step: int, seed: int, checkpoint: Checkpoint) -> None:
        """Write the weights of a child, which goes on no further."""
        self._write(self.child_file(step, seed), {"model": checkpoint["model"]})

    def _write(self, path: Path, checkpoint: Checkpoint) -> None:
        content = {**checkpoint, _FACTS: self._facts}
        write_atomic(path, lambda temporary: torch.save(content, temporary))

    def _read(self, path: Path) -> dict[str, Any] | None:
        if not path.exists():
            return None
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # what torch's reader raises on other bytes is any of a dozen types
            what = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{path} cannot be read: {what}; delete it") from error
        facts = content.pop(_FACTS, None) if isinstance(content, dict) else None
        if facts is None or "model" not in content:
            raise CheckpointError(f"{path} was not written here; choose another folder")
        self._check(facts, path)
        return content

    def _check(self, facts: Mapping[str, Any], path: Path) -> None:
        for name in {**self._facts, **facts}:
            if name not in facts or name not in self._facts or facts[name] != self._facts[name]:
                theirs, ours = (repr(each.get(name, "absent")) for each in (facts, self._facts))
                raise CheckpointError(
                    f"{path} is of another training: its {name} is {theirs}, that of this one {ours}; "
                    "choose another folder, or delete the files of this one"
                )

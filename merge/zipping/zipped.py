"""Networks that share a trunk: one for each task, the merged layers held and computed once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ...base.architecture import check_same_architecture
from ...base.errors import ArchitectureError, CheckpointError, DataError
from ...base.files import PathLike, load_state_dict, save_state_dict
from ...base.running import copied
from .structure import Structure, assembled

FORMAT = "isthmus zipped 1"


@dataclass(frozen=True)
class ZippedGroup:
    """What was done with a group of units.

    Attributes:
        name: Of the group.
        size: Number of units in each network, and in the merged one.
        how: "zip", "permute" or "mean".
        reason: Why it was not zipped, where it was to be.
        across: Share of the merged units that hold one unit of every network.
        correlation: Mean correlation of two units that became one; None where it was not measured.
    """

    name: str
    size: int
    how: str
    reason: str | None = None
    across: float = 1.0
    correlation: float | None = None


class Zipped(nn.Module):
    """Networks that share their first layers; made by `zip_networks`.

    The shared modules are the same objects in every head, and are computed once in `forward`.

    Args:
        heads: One network for each task, or a single one.
        structure: What they share.
        classes: For each head the joint class of each of its outputs; None: outputs are not joined.
        groups: What was done with each group of units.
        parents: Number of parameters of each parent.

    Raises:
        DataError: `classes` does not fit.
    """

    def __init__(
        self,
        heads: Sequence[nn.Module],
        structure: Structure | None = None,
        classes: Sequence[Sequence[int]] | None = None,
        groups: Sequence[ZippedGroup] = (),
        parents: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.structure = structure or Structure(len(heads))
        self.classes = None if classes is None else check_classes(classes, len(heads))
        self.groups = tuple(groups)
        self.parents = tuple(parents) or tuple(_count(head) for head in heads)
        self.training = self.heads.training = heads[0].training  # each head keeps the modes that it has

    @property
    def upto(self) -> str | None:
        """The last layer that is shared; None: all are, or none."""
        return self.structure.upto

    @property
    def parameter_count(self) -> int:
        """Number of parameters, shared ones once."""
        return _count(self)

    def task(self, index: int) -> nn.Module:
        """Give the network of one task.

        Raises:
            DataError: There is no such task.
        """
        if not -len(self.heads) <= index < len(self.heads):
            raise DataError(f"task {index}: there are {len(self.heads)} heads, 0 … {len(self.heads) - 1}")
        return self.heads[index]

    def outputs(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Run every head, the shared modules once; give the outputs of each."""
        known: dict[tuple[str, int], Any] = {}
        found = []
        for number, head in enumerate(self.heads):
            with _remembering(head, self.structure.called if len(self.heads) > 1 else (), known, number == 0):
                found.append(head(*_copies(args), **_copies(kwargs)))
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run every head.

        Returns:
            Joined logits (…, classes) if there are `classes`, minus infinity for a class that no head knows; else the
            outputs of each head in a list, or those of the only one.
        """
        found = self.outputs(*args, **kwargs)
        if self.classes is not None:
            return joined(found, self.classes)
        return found[0] if len(found) == 1 else found

    def save(self, path: PathLike) -> Path:
        """Write to a safetensors file, shared tensors once; whole or not at all.

        Args:
            path: Of the file; it should end in `.safetensors`.
        """
        facts = {
            "format": FORMAT,
            "structure": self.structure.to_json(),
            "classes": self.classes,
            "groups": [asdict(group) for group in self.groups],
            "parents": self.parents,
        }
        path = Path(path)
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path}: what is shared is noted in the file's metadata; let its name end in .safetensors"
            )
        return save_state_dict(self._unique(), path, {"zipped": json.dumps(facts)})

    @classmethod
    def load(cls, path: PathLike, models: Sequence[nn.Module]) -> Zipped:
        """Read a saved one.

        Args:
            path: Of the file.
            models: One network of each head's architecture, in the same sequence; they are copied, and their
                parameters do not matter.

        Raises:
            CheckpointError: The file is missing, damaged or something else.
            ArchitectureError: A tensor of the file does not fit the models.
        """
        facts, tensors = _read(path)
        structure = Structure.from_json(facts["structure"])
        if len(models) != structure.heads:
            raise ArchitectureError(f"{path} holds {structure.heads} heads, and {len(models)} models were passed")
        names = [f"heads.{number}.{structure.upto}.index" for number in range(len(models))]
        indices = [torch.zeros_like(tensors[name]) for name in names] if structure.axis is not None else None
        heads = assembled([copied(model) for model in models], structure, indices)
        groups = [ZippedGroup(**group) for group in facts["groups"]]
        zipped = cls(heads, structure, facts["classes"], groups, facts["parents"])
        own = zipped._unique()
        check_same_architecture(tensors, own, (str(path), "the models"))
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
        return zipped

    def _unique(self) -> dict[str, Tensor]:
        """Name every parameter and buffer that is to be saved, shared ones once."""
        seen: dict[int, str] = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            seen.setdefault(id(tensor), name)
        state = self.state_dict(keep_vars=True)
        return {name: state[name].detach() for name in seen.values()}


def check_classes(classes: Sequence[Sequence[int]], heads: int) -> list[list[int]]:
    """Refuse a map of classes that does not fit.

    Raises:
        DataError: There is not one list for each head, or a class is no number from 0, or is there twice in a head.
    """
    found = [[int(label) for label in own] for own in classes]
    if len(found) != heads:
        raise DataError(
            f"classes has {len(found)} lists for {heads} heads; give one for each, the class of each output"
        )
    for head, own in enumerate(found):
        if not own or min(own) < 0 or len(set(own)) != len(own):
            raise DataError(f"classes[{head}] is {own}; expected different numbers from 0, one for each output")
    return found


def joined(outputs: Sequence[Any], classes: Sequence[Sequence[int]]) -> Tensor:
    """Join the logits of several heads: where two know a class, the larger counts.

    Args:
        outputs: Of each head, (…, outputs).
        classes: For each head the joint class of each output.

    Raises:
        DataError: A head gives no tensor, or another number of outputs.

    >>> joined([torch.tensor([1.0, 2.0]), torch.tensor([3.0])], [[0, 2], [1]])
    tensor([1., 3., 2.])
    """
    for head, (output, own) in enumerate(zip(outputs, classes, strict=True)):
        if not isinstance(output, Tensor) or output.shape[-1:] != (len(own),):
            what = f"of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise DataError(f"head {head} gives {what}, and classes[{head}] names {len(own)} outputs: {list(own)}")
    total = 1 + max(label for own in classes for label in own)
    joint = outputs[0].new_full((*outputs[0].shape[:-1], total), -torch.inf)
    for output, own in zip(outputs, classes, strict=True):
        index = torch.tensor(own, device=output.device)
        joint = joint.index_copy(-1, index, torch.maximum(joint.index_select(-1, index), output.to(joint)))
    return joint


def _read(path: PathLike) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    tensors = load_state_dict(path)
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["zipped"])
        if facts["format"] != FORMAT:
            raise KeyError(facts["format"])
    except (KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} holds no zipped networks (expected the format {FORMAT!r})") from error
    return facts, tensors


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _copies(value: Any) -> Any:
    """Copy tensors, so that what one head does in place is not seen by the next."""
    return tree_map_only(Tensor, torch.clone, value)


@contextmanager
def _remembering(
    head: nn.Module, names: Sequence[str], known: dict[tuple[str, int], Any], first: bool
) -> Iterator[None]:
    """Let modules note what they give or, in later heads, give what was noted."""
    calls: dict[str, int] = {}

    def instead(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            key = (name, calls.get(name, 0))
            calls[name] = key[1] + 1
            if first:
                known[key] = forward(*args, **kwargs)
            return _copies(known[key])

        return call

    with ExitStack() as stack:
        for name in names:
            module = head.get_submodule(name)
            before = vars(module).get("forward")
            stack.callback(_restore, module, before)
            module.forward = instead(name, module.forward)
        yield


def _restore(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward

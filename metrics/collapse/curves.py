"""Neural collapse over training: the same measures for one checkpoint after another."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...base.architecture import check_same_architecture
from ...base.batches import Data, require_repeatable
from ...base.errors import DataError, nearest
from ...base.files import PathLike, load_state_dict
from ...base.running import copied
from .networks import Collapse, check_value, collapse

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Network = nn.Module | Mapping[str, Tensor] | PathLike
"""A network, or a checkpoint: its state dict, or the file of one."""


@dataclass(frozen=True, eq=False)
class CollapseCurves:
    """Neural collapse of several checkpoints of one network.

    Attributes:
        steps: What each checkpoint is called, an epoch say.
        collapses: Of each checkpoint.
    """

    steps: tuple[Any, ...]
    collapses: tuple[Collapse, ...]

    def curve(self, name: str, layer: str | None = None) -> list[float | None]:
        """Give one value for each checkpoint.

        Args:
            name: An attribute of `CollapseValues`, "nc1" say.
            layer: Of which layer. Default: the last, which the classifier reads.

        Raises:
            DataError: There is no such value or layer.
        """
        check_value(name)
        layer = self.collapses[0].layers[-1] if layer is None else layer
        if layer not in self.collapses[0].values:
            raise DataError(f"layer {layer!r} was not measured{nearest(layer, self.collapses[0].layers)}")
        return [getattr(each.values[layer], name) for each in self.collapses]

    def plot(self, ax: Axes | None = None, names: Sequence[str] | None = None, layer: str | None = None) -> Axes:
        """Draw values over the checkpoints, on a logarithmic axis.

        Args:
            ax: Where to draw. Default: a new figure.
            names: Which. Default: NC1, the spread of the cosines, NC3, and 1 - NC4.
            layer: Of which layer. Default: the last.

        Returns:
            The axes.

        Raises:
            DataError: There is no such value or layer.
        """
        from .pictures import training_curves

        return training_curves(self, ax, names, layer)

    def to_dict(self) -> dict[str, Any]:
        """Give the content as plain lists, numbers and strings for JSON."""
        steps = [step if isinstance(step, (int, float)) else str(step) for step in self.steps]
        return {"steps": steps, "collapses": [each.to_dict() for each in self.collapses]}


def collapse_over(
    networks: Iterable[Network] | Mapping[Any, Network],
    data: Data,
    *,
    model: nn.Module | None = None,
    steps: Sequence[Any] | None = None,
    **options: Any,
) -> CollapseCurves:
    """Measure neural collapse of each checkpoint of a training.

    Args:
        networks: Networks, state dicts or files of state dicts, in order, one held at a time; or a mapping of steps to
            them.
        data: Batches with labels, read once for each network.
        model: A network of the architecture, into a copy of which state dicts are loaded.
        steps: What to call each. Default: the keys of a mapping, else 0, 1, 2, …
        options: See `collapse`. Name the classifier to be sure that it is the same in all.

    Raises:
        ArchitectureError: A checkpoint does not fit the model.
        CheckpointError: A file cannot be read.
        DataError: There is no network; a checkpoint came without `model`; `steps` are of another number; the data can
            be read once only, or cannot be used, see `collapse`.

    >>> _ = torch.manual_seed(0)
    >>> data = [(torch.randn(60, 5), torch.arange(60) % 3)]
    >>> model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> states = [{name: scale * x for name, x in model.state_dict().items()} for scale in (1, 2)]
    >>> len(collapse_over(states, data, model=model).curve("nc1"))
    2
    """
    require_repeatable(data, "each network runs over it")
    keys: list[Any] | None = None
    if isinstance(networks, Mapping):
        if any(isinstance(value, Tensor) for value in networks.values()):
            raise DataError("networks is one state dict; pass a list of them, or a mapping of steps to state dicts")
        keys, networks = list(networks), networks.values()
    items = networks if isinstance(networks, Sequence) else list(networks)
    steps = (keys if keys is not None else range(len(items))) if steps is None else steps
    if not items or len(steps) != len(items):
        raise DataError(f"{len(steps)} steps for {len(items)} networks; pass at least one network, and name each")
    if model is None and not all(isinstance(item, nn.Module) for item in items):
        raise DataError("some networks are checkpoints; pass a network of their architecture as model=")
    found = tuple(collapse(network, data, **options) for network in _networks(items, model))
    return CollapseCurves(tuple(steps), found)


def _networks(items: Iterable[Network], model: nn.Module | None) -> Iterator[nn.Module]:
    loaded = None
    for item in items:
        if isinstance(item, nn.Module):
            yield item
            continue
        assert model is not None
        loaded = copied(model) if loaded is None else loaded
        state = load_state_dict(item) if isinstance(item, (str, os.PathLike)) else item
        name = str(item) if isinstance(item, (str, os.PathLike)) else "the checkpoint"
        check_same_architecture(loaded.state_dict(), state, ("model", name))
        with torch.no_grad():
            loaded.load_state_dict(dict(state))
        yield loaded

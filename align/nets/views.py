"""Where the units of groups can be seen as activations, and how they are cut out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ..symmetry import Point, Symmetry
from ..terms import Piece, pieces
from .problem import Family, families


@dataclass(frozen=True)
class View:
    """One look at a family's units: an activation, and which dimensions of a piece of it are the units.

    Attributes:
        key: A name of its own.
        family: Name of the family's group.
        layer: Name under which the activation is captured.
        side: "input" or "output" of the layer.
        axes: Axes of the activation that `piece` describes.
        piece: What they are made of.
        dims: Dimensions of the piece that are the units.
        inner: Group inside the family's blocks whose units they are; None: the family's group itself.
        loose: Dimensions in an order that is not yet known; values are sorted along them, which no order changes.
        weight: Parameter by which the activation is multiplied first, for a projection that is no module of its own.
            The bias is left out.
    """

    key: str
    family: str
    layer: str
    side: str
    axes: tuple[int, ...]
    piece: Piece
    dims: tuple[int, ...]
    inner: str | None = None
    loose: tuple[int, ...] = ()
    weight: str | None = None

    @property
    def name(self) -> str:
        """Group whose units are seen."""
        return self.inner or self.family

    def samples(self, activation: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Cut the units out of an activation.

        Args:
            activation: What entered or left the layer; the units on `axes`, everything else counts as samples.
            parameters: Those of the network, by name; for `weight`.

        Returns:
            (everything else, units).
        """
        if self.weight is not None:
            activation = F.linear(activation, parameters[self.weight].detach())
        first = activation.ndim - len(self.axes)
        flat = activation.movedim(self.axes, tuple(range(first, activation.ndim)))
        for at, positions in enumerate(self.piece.positions):
            if positions is not None:
                flat = flat.index_select(first + at, positions.to(flat.device))
        flat = flat.reshape(-1, *(dim.size for dim in self.piece.dims))
        held = [at for at in range(len(self.piece.dims)) if at not in (*self.dims, *self.loose)]
        flat = flat.permute(0, *(at + 1 for at in (*held, *self.dims, *self.loose)))
        front = flat.shape[: 1 + len(held) + len(self.dims)]
        if self.loose:
            flat = flat.reshape(*front, -1).sort(-1).values.movedim(-1, 1 + len(held))
        units = 1
        for size in front[1 + len(held) :]:
            units *= size
        return flat.reshape(-1, units)


def views(symmetry: Symmetry, model: nn.Module | None = None) -> dict[str, list[View]]:
    """Find, for every family of groups, where its units can be seen.

    Units are seen where all other orders are known. A group that is seen nowhere so is seen through weaker views:
    beside an order that is not known, by what no order changes (values sorted along it), and in the projections of
    `nn.MultiheadAttention`, which are no modules of their own. A group whose order depends on the position of several
    others is not seen.

    Args:
        symmetry: Of the network.
        model: The network, for its attention modules; None: without them.

    Returns:
        Views by the name of each family's group; none for groups that lie within others, which are seen with them.
    """
    found: dict[str, list[View]] = {family.group.name: [] for family in families(symmetry)}
    records = [*_records(symmetry), *(_projections(symmetry, model) if model is not None else ())]
    for family in families(symmetry):
        if family.group.within:
            continue
        candidates = [view for record in records for view in _looks(family, *record)]
        strict = [view for view in candidates if not view.loose and view.weight is None]
        seen = {view.name for view in strict}
        weak = [view for view in candidates if view not in strict and _adds(view, seen)]
        sharp = {view.name for view in weak if not view.loose}
        found[family.group.name] = strict + [v for v in weak if not v.loose or _adds(v, seen | sharp)]
    return found


def _adds(view: View, seen: set[str]) -> bool:
    """Tell whether a weak view shows what is not seen: blocks are seen wherever units inside them are."""
    return view.inner not in seen if view.inner else not seen


_Record = tuple[str, str, tuple[int, ...], list[Piece], str | None]


def _records(symmetry: Symmetry) -> Iterator[_Record]:
    """Gather the points of one activation: several of its axes may hold units."""
    activations: dict[tuple[str, str], dict[int, Point]] = {}
    for point in symmetry.points:
        activations.setdefault((point.layer, point.side), {})[point.axis] = point
    for (layer, side), points in activations.items():
        yield layer, side, tuple(points), pieces([point.term for point in points.values()]), None


def _projections(symmetry: Symmetry, model: nn.Module) -> Iterator[_Record]:
    """Name the projections of attention modules: of the first input by the weight that reads it."""
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            own = "in_proj_weight" if module.in_proj_weight is not None else "q_proj_weight"
            weight = f"{name}.{own}" if name else own
            yield name, "input", (-1,), pieces([symmetry.layout[weight][0]]), weight


def _looks(
    family: Family, layer: str, side: str, axes: tuple[int, ...], found: list[Piece], weight: str | None
) -> Iterator[View]:
    outer = family.group.name
    for part, piece in enumerate(found):
        for at, dim in enumerate(piece.dims):
            if dim.group != outer:
                continue
            inner = [
                other
                for other, d in enumerate(piece.dims)
                if any(group.name == d.group for group in family.inner) and piece.partner(other, outer) == at
            ]
            for units in [[at, other] for other in inner] or [[at]]:
                loose = tuple(i for i, d in enumerate(piece.dims) if i not in units and d.group)
                name = piece.dims[units[1]].group if len(units) > 1 else None
                place = ".".join(map(str, (part, *units)))
                by = f" by {weight}" if weight else ""
                key = f"{name or outer} at {side} of {layer}{by}, part {place}"
                yield View(key, outer, layer, side, axes, piece, tuple(units), name, loose, weight)

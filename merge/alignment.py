"""Bringing networks, and the parents that they were fine-tuned from, into one order before they are merged."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..base.batches import Data, batches
from ..base.errors import DataError, nearest

if TYPE_CHECKING:
    from ..align import ManyMatching, Matching, Symmetry

UNIVERSE = "universe"


class Unsaid(str):
    """The alignment that is made where the user has said nothing and the networks need one."""


UNSAID = Unsaid("weights")


@dataclass(frozen=True)
class Alignment:
    """How networks are to be brought into one order.

    Attributes:
        how: A method of `match`, "universe", matchings, or None.
        options: Further arguments of `match` or `match_many`.
        reason: Why there is none although nobody has said so.
    """

    how: str | Sequence[Matching] | ManyMatching | None
    options: Mapping[str, Any]
    reason: str | None = None

    @property
    def name(self) -> str | None:
        """What to call it in a report."""
        if self.how is None or isinstance(self.how, str):
            return None if self.how is None else str(self.how)
        return "given"

    @property
    def reads(self) -> bool:
        """Whether the networks are run on the data to find it."""
        from ..align.nets.methods import METHODS

        return isinstance(self.how, str) and self.how != UNIVERSE and METHODS[self.how].needs != ""


@dataclass(frozen=True)
class Aligned:
    """Networks and parents in the order of the first network, and the objective of each matching."""

    models: list[nn.Module]
    bases: list[nn.Module]
    objectives: list[float]


def planned(
    align: Any,
    options: Mapping[str, Any] | None,
    count: int,
    bases: Sequence[nn.Module],
    needed: bool,
    data: Data | None,
    symmetry: Symmetry | None,
) -> Alignment:
    """Settle how networks are to be aligned, and refuse what cannot be done.

    Args:
        align: As the user gave it, or an `Unsaid`.
        options: Further arguments of `match` or `match_many`; None: none.
        count: The number of networks.
        bases: The parent of each, one for all, or none.
        needed: Whether the method of merging needs one order of units.
        data: Batches; None: none.
        symmetry: Of the networks; None: it is to be derived.

    Raises:
        DataError: An argument does not fit, or data is missing.
    """
    if isinstance(align, Unsaid) and not options:
        if count == 1:
            return Alignment(None, {}, "there is one network")
        if not needed:
            return Alignment(None, {}, "the method finds by itself which units belong together")
        if len({id(base) for base in bases}) == 1:
            return Alignment(None, {}, "the networks come from one base, and its order of units is theirs")
    _check(align, count)
    _check_options(align, options or {})
    if isinstance(align, str):
        _check_data(align, data, symmetry)
    return Alignment(align, options or {})


def aligned(
    models: Sequence[nn.Module],
    bases: Sequence[nn.Module],
    alignment: Alignment,
    *,
    data: Data | None = None,
    symmetry: Symmetry | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    verify: bool = True,
) -> Aligned:
    """Bring networks into the order of the first, and parents, where each has its own, along with them."""
    if alignment.how is None:
        return Aligned(list(models), list(bases), [])
    found = _found(models, alignment, data, symmetry, seed, device, verify)
    from ..align import ManyMatching

    if isinstance(found, ManyMatching):
        moves = [found.between(0, index) for index in range(1, len(models))]
        objectives = [found.objective]
    else:
        moves, objectives = found, [matching.objective for matching in found]
    moved = [move.apply(model) for move, model in zip(moves, models[1:], strict=True)]
    parents = list(bases)
    if len(parents) > 1:
        parents[1:] = [move.apply(base) for move, base in zip(moves, bases[1:], strict=True)]
    return Aligned([models[0], *moved], parents, objectives)


def _found(
    models: Sequence[nn.Module],
    alignment: Alignment,
    data: Data | None,
    symmetry: Symmetry | None,
    seed: int,
    device: torch.device | str | None,
    verify: bool,
) -> Sequence[Matching] | ManyMatching:
    from ..align import match, match_many
    from ..align import symmetry as derive

    if not isinstance(alignment.how, str):
        assert alignment.how is not None
        return alignment.how
    example = None if data is None else next(batches(data))
    symmetry = derive(models[0], example, verify=False) if symmetry is None else symmetry
    if verify and example is not None:  # once for all
        symmetry = symmetry.verified(models[0], example)
    settings: dict[str, Any] = {
        "symmetry": symmetry,
        "seed": seed,
        "device": device,
        "verify": verify and example is None,
        **alignment.options,
    }
    if alignment.how == UNIVERSE:
        return match_many(models, data, **settings)
    settings["method"] = str(alignment.how)
    return [match(models[0], model, data, **settings) for model in models[1:]]


def _check(align: Any, count: int) -> None:
    from ..align import ManyMatching
    from ..align.nets.methods import METHODS

    known = [*METHODS, UNIVERSE]
    if isinstance(align, str):
        if align not in known:
            raise DataError(
                f"align {align!r} is unknown{nearest(align, known)}; choose a method of match "
                f"({', '.join(METHODS)}), {UNIVERSE!r}, a list of matchings, or None"
            )
    elif isinstance(align, ManyMatching):
        if len(align) != count:
            raise DataError(f"the matching is of {len(align)} networks, and there are {count}; pass all of them")
    elif align is not None and not (isinstance(align, Sequence) and len(align) == count - 1):
        raise DataError(
            f"{count} networks need {count - 1} matchings: pass align=[...] with one for each but the first"
        )


def _check_options(align: Any, options: Mapping[str, Any]) -> None:
    if not options:
        return
    if not isinstance(align, str):
        raise DataError("align_options are arguments of match, and nothing is matched here; name a method in align=")
    from ..align import match, match_many
    from ..align.nets.methods import METHODS

    function = match_many if align == UNIVERSE else match
    taken = {"data", "symmetry", "seed", "device", "verify", *(() if align == UNIVERSE else ("method",))}
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in taken]
    known += [] if align == UNIVERSE else METHODS[align].options
    for option in options:
        if option not in known:
            raise DataError(f"align_options: {align!r} has no option {option!r}{nearest(option, known)}")


def _check_data(align: str, data: Data | None, symmetry: Symmetry | None) -> None:
    from ..align.nets.methods import METHODS

    if data is None and align != UNIVERSE and METHODS[align].needs:
        raise DataError(f"align={align!r} runs the networks on data; pass data, or align='weights'")
    if data is None and symmetry is None:
        raise DataError(
            f"align={align!r} runs the network once to find its symmetry; pass data or symmetry=, or align=None "
            "for networks whose units are in the same order already"
        )

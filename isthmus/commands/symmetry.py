"""`isthmus symmetry`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import (
    ArgFile,
    DataOptions,
    NetworkOptions,
    common_options,
    data_options,
    input_shape_option,
    network_options,
)
from .outputs import check_file, emit

if TYPE_CHECKING:
    from isthmus.align import Pinned, Symmetry

_AXES_SHOWN = 3


@click.command("symmetry")
@network_options
@data_options
@input_shape_option
@click.option("--save", type=ArgFile, help="Write the symmetry to this file, for `isthmus match --symmetry`.")
@click.option(
    "--verify/--no-verify", default=True, help="Measure that random permutations leave the outputs as they are."
)
@common_options
def command(
    network: NetworkOptions,
    data: DataOptions,
    input_shape: tuple[int, ...] | None,
    save: Path | None,
    verify: bool,
    device: str,
    seed: int,
    as_json: bool,
) -> None:
    """List the units of a network that can be permuted together, and what must keep its order."""
    check_file(save)
    from .inputs import check_device, find_symmetry, make_network, open_data

    check_device(device)
    source = None if data.data is None else open_data(data, data.split or "train")
    model = make_network(network, None if source is None else source.dataset, seed)
    found = find_symmetry(model.eval(), source, input_shape, verify)
    if save is not None:
        found.save(save)
    emit(as_json, _content(found, verify), _lines(found, verify))


def _content(found: Symmetry, verified: bool) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "architecture": found.architecture,
        "verified": verified,
        "groups": [asdict(group) for group in found.groups],
        "unruled": [asdict(item) for item in found.unruled],
        "pinned": [asdict(item) for item in found.pinned],
    }


def _lines(found: Symmetry, verified: bool) -> Iterator[str]:
    from ..plain import table

    if found.unruled:
        yield "pinned for want of a rule; the true symmetry may be larger:"
        yield from map(_held, found.unruled)
        yield ""
    units = sum(group.size for group in found.groups)
    check = "verified" if verified else "not verified"
    yield f"{found.architecture}: {len(found.groups)} groups, {units:,} units, {check}"
    if found.groups:
        yield ""
        yield table(("group", "size", "kind", "axes"), [(g.name, g.size, g.kind, _axes(g.axes)) for g in found.groups])
    others = [item for item in found.pinned if item not in found.unruled and item.kind == "operator"]
    if others:
        yield ""
        yield "pinned by an operator:"
        yield from map(_held, others)


def _held(item: Pinned) -> str:
    return f"  {item.name}[{item.axis}] ({item.size}): {item.operator}: {item.reason}"


def _axes(axes: tuple[tuple[str, int], ...]) -> str:
    shown = ", ".join(f"{name}[{axis}]" for name, axis in axes[:_AXES_SHOWN])
    return shown + (f" and {len(axes) - _AXES_SHOWN} more" if len(axes) > _AXES_SHOWN else "")

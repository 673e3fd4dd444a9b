"""`isthmus symmetry`."""

from __future__ import annotations

import math
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
    from torch import nn

    from isthmus.align import Symmetry


@click.command("symmetry")
@network_options
@data_options
@input_shape_option
@click.option("--save", type=ArgFile, help="Write the symmetry to this file, for `isthmus match --symmetry`.")
@click.option(
    "--verify/--no-verify", default=True, help="Measure that random permutations leave the outputs as they are."
)
@click.option("--all", "everything", is_flag=True, help="List every axis and every group; repetitions are folded else.")
@click.option("--plot", type=ArgFile, help="Draw the groups along the network to this file, .png, .svg or .pdf.")
@common_options
def command(
    network: NetworkOptions,
    data: DataOptions,
    input_shape: tuple[int, ...] | None,
    save: Path | None,
    verify: bool,
    everything: bool,
    plot: Path | None,
    device: str,
    seed: int,
    as_json: bool,
) -> None:
    """List the units of a network that can be permuted together, and what must keep its order."""
    check_file(save)
    check_file(plot, (".png", ".svg", ".pdf"))
    from ..listing import symmetry_lines
    from .inputs import check_device, find_symmetry, make_network, open_data

    check_device(device)
    source = None if data.data is None else open_data(data, data.split or "train")
    model = make_network(network, None if source is None else source.dataset, seed)
    found = find_symmetry(model.eval(), source, input_shape, verify)
    if save is not None:
        found.save(save)
    if plot is not None:
        from .. import figures

        figures.save(figures.symmetry_figure(found), plot)
    parameters = _parameters(model, found)
    lines = symmetry_lines(found, parameters["share"], everything=everything)
    emit(as_json, _content(found, parameters), [*lines, *([] if plot is None else [f"wrote {plot}"])])


def _parameters(model: nn.Module, found: Symmetry) -> dict[str, Any]:
    """Count parameters, and those that belong to a tensor with an axis that can be permuted."""
    permuted = {name for group in found.groups for name, _ in group.axes}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total, permutable = sum(sizes.values()), sum(size for name, size in sizes.items() if name in permuted)
    return {"total": total, "permutable": permutable, "share": permutable / total if total else 0.0}


def _content(found: Symmetry, parameters: dict[str, Any]) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "architecture": found.architecture,
        "verified": found.is_verified,
        "verification": None if found.verification is None else found.verification.to_json(),
        "groups": [asdict(group) for group in found.groups],
        "unruled": [asdict(item) for item in found.unruled],
        "pinned": [asdict(item) for item in found.pinned],
        "order": found.order,
        "log10_permutations": found.order / math.log(10),
        "parameters": parameters,
    }

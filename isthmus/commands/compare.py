"""`isthmus compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import (
    ArgFile,
    DataOptions,
    JsonObject,
    Names,
    NetworkOptions,
    common_options,
    data_options,
    network_options,
)
from .outputs import check_file, emit

if TYPE_CHECKING:
    from isthmus.metrics import Similarity
    from isthmus.metrics.capture import Positions
    from isthmus.metrics.similarity import Significance


@click.command("compare")
@click.argument("a", type=ArgFile)
@click.argument("b", type=ArgFile)
@network_options
@data_options
@click.option("--index", default="cka", show_default=True, help="cka, hsic, cca, svcca, pwcca, procrustes, rsa, …")
@click.option(
    "--index-args",
    type=JsonObject(),
    default="{}",
    help='JSON object: parameters of the index, e.g. {"kernel": "rbf", "debiased": true}.',
)
@click.option(
    "--significance",
    type=click.Choice(["permutation", "jackknife", "both"]),
    help="Shuffle samples for p-values, leave groups of them out for an interval, or both.",
)
@click.option(
    "--positions",
    type=click.Choice(["samples", "features", "mean"]),
    default="samples",
    show_default=True,
    help="How places of feature maps and tokens count.",
)
@click.option("--layers", type=Names(), help="Layers of both networks, e.g. fc1,fc2; all by default.")
@click.option("--plot", type=ArgFile, help="Draw the map to this file, .png, .svg or .pdf.")
@common_options
def command(
    a: Path,
    b: Path,
    network: NetworkOptions,
    data: DataOptions,
    index: str,
    index_args: dict[str, Any],
    significance: Significance | None,
    positions: Positions,
    layers: tuple[str, ...] | None,
    plot: Path | None,
    device: str,
    seed: int,
    as_json: bool,
) -> None:
    """Compare the representations of each layer of checkpoint A with those of each layer of checkpoint B.

    On the test split unless --split says otherwise.
    """
    check_file(plot, (".png", ".svg", ".pdf"))
    from isthmus.metrics.compare import compare, find_index

    from ..plain import table
    from .inputs import check_device, load_networks, open_data

    find_index(index, index_args)
    check_device(device)
    source = open_data(data, data.split or "test", device)
    model_a, model_b = (model.to(device) for model in load_networks(network, (a, b), source))
    found = compare(
        model_a, model_b, source.batches, index=index, layers=layers, positions=positions, significance=significance,
        seed=seed, **index_args,
    )  # fmt: skip
    if plot is not None:
        from .. import figures

        figures.save(figures.similarity_figure(found), plot)
    how = f"positions={positions}, {found.index}: {found.convention['estimator']}"
    samples = f"{found.convention['samples']:,} samples, {how}"
    lines = [f"measured on {source}: {samples}", "", table(*_rows(found))]
    emit(
        as_json,
        {**found.to_dict(), "measured_on": source.to_dict(), "seed": seed},
        [*lines, *([] if plot is None else [f"wrote {plot}"])],
    )


def _rows(found: Similarity) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    from ..plain import number

    headers = ["layer of A", "same layer of B", "most similar layer of B", found.label]
    headers += ["p"] * (found.p_values is not None) + ["95 % interval"] * (found.interval is not None)
    rows = []
    for row, (layer, nearest) in enumerate(zip(found.layers_a, found.nearest_layers(), strict=True)):
        column = found.layers_b.index(nearest)
        cells = [layer, number(found.values[row, row]) if row < len(found.layers_b) else "–"]
        cells += [nearest, number(found.values[row, column])]
        if found.p_values is not None:
            cells.append(number(found.p_values[row, column]))
        if found.interval is not None:
            cells.append(" … ".join(number(end) for end in found.interval[:, row, column]))
        rows.append(tuple(cells))
    return tuple(headers), rows

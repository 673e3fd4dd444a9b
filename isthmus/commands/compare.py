"""`isthmus compare`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import ArgFile, DataOptions, Names, NetworkOptions, common_options, data_options, network_options
from .outputs import check_file, emit


@click.command("compare")
@click.argument("a", type=ArgFile)
@click.argument("b", type=ArgFile)
@network_options
@data_options
@click.option("--index", default="cka", show_default=True, help="The similarity index.")
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
    positions: str,
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
    from isthmus.metrics import compare

    from ..plain import number, table
    from .inputs import check_device, load_networks, open_data

    check_device(device)
    source = open_data(data, data.split or "test", device)
    model_a, model_b = (model.to(device) for model in load_networks(network, (a, b), source))
    found = compare(model_a, model_b, source.batches, index=index, layers=layers, positions=positions)  # pyright: ignore[reportArgumentType]
    if plot is not None:
        from .. import figures

        figures.save(figures.similarity_figure(found), plot)
    best = found.values.argmax(1)
    rows = [
        (layer, number(found.values[row, row]), found.layers_b[best[row]], number(found.values[row, best[row]]))
        for row, layer in enumerate(found.layers_a)
    ]
    headers = ("layer of A", "same layer of B", "most similar layer of B", found.index.upper())
    samples = f"{found.convention['samples']:,} samples, positions={positions}, {found.convention['estimator']}"
    lines = [f"measured on {source}: {samples}", "", table(headers, rows)]
    emit(
        as_json,
        {**found.to_dict(), "measured_on": source.to_dict(), "seed": seed},
        [*lines, *([] if plot is None else [f"wrote {plot}"])],
    )

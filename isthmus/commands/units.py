"""`isthmus units`."""

from __future__ import annotations

from collections.abc import Sequence
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
from .outputs import check_folder, emit

if TYPE_CHECKING:
    from torch import nn

    from isthmus.align.units import Correspondence
    from isthmus.metrics.capture import Positions

    from .inputs import Source

_WITHOUT = ("stability", "prediction", "clusters", "transport", "rotation", "means")


@click.command("units")
@click.argument("a", type=ArgFile)
@click.argument("b", type=ArgFile)
@network_options
@data_options
@click.option("--model-b", metavar="NAME", help="The architecture of B, where it is another.")
@click.option("--model-b-args", type=JsonObject(), help="JSON object: its arguments; those of --model by default.")
@click.option("--layer", "layers", type=Names(), required=True, help="Layers of both networks, e.g. conv1,conv2.")
@click.option("--layer-b", "layers_b", type=Names(), help="Layers of B, one for each of A's; by default the same.")
@click.option(
    "--positions",
    type=click.Choice(["samples", "features", "mean"]),
    default="samples",
    show_default=True,
    help="How places of feature maps and tokens count.",
)
@click.option("--minimum", type=float, help="Leave units alone rather than match them below this correlation.")
@click.option("--penalty", type=float, help="Of the LASSO; cross-validated by default.")
@click.option("--clusters", type=click.IntRange(1), help="How many; by the largest eigengap by default.")
@click.option("--information", is_flag=True, help="Match by mutual information as well.")
@click.option("--without", type=Names(), default=(), help=f"Leave out some of {', '.join(_WITHOUT)}.")
@click.option("--folds", type=click.IntRange(3), default=10, show_default=True, help="Parts of the samples.")
@click.option("--held-out", type=click.IntRange(1), default=2, show_default=True, help="Folds that are held out.")
@click.option("--pictures", type=click.IntRange(0), default=8, show_default=True, help="Pairs of units to show.")
@click.option("--maximise", is_flag=True, help="Show inputs that were made to drive each unit, too.")
@click.option("--out", type=ArgFile, help="Folder for tables, matchings, pictures and a page that shows them.")
@common_options
def command(
    a: Path,
    b: Path,
    network: NetworkOptions,
    data: DataOptions,
    model_b: str | None,
    model_b_args: dict[str, Any] | None,
    layers: tuple[str, ...],
    layers_b: tuple[str, ...] | None,
    positions: Positions,
    without: tuple[str, ...],
    pictures: int,
    maximise: bool,
    out: Path | None,
    device: str,
    seed: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Ask which units of checkpoints A and B are the same, which combine into which, and which form clusters.

    Partners and predictors are found on some folds of the data and measured on the others; the test split unless
    --split says otherwise. A factory must give its samples in random order, since the null pairs neighbours.
    """
    check_folder(out)
    if layers_b is not None and len(layers_b) != len(layers):
        raise click.UsageError(f"--layer-b: {len(layers_b)} layers for {len(layers)} of --layer")
    _check_without(without)
    from isthmus.align.units import ANALYSES, correspond

    from .inputs import check_device, load_networks, open_data

    check_device(device)
    source = open_data(data, data.split or "test", device)
    other = NetworkOptions(model_b or network.model, network.model_args if model_b_args is None else model_b_args)
    networks = [load_networks(*each, source)[0].to(device) for each in ((network, (a,)), (other, (b,)))]
    found = correspond(
        networks[0], networks[1], _in_random_order(source, data, seed),
        pairs=list(zip(layers, layers_b or layers, strict=True)), positions=positions,
        analyses=[name for name in ANALYSES if name not in without], seed=seed, **options,
    )  # fmt: skip
    written = []
    if out is not None:
        sheets = _sheets(found, networks, source, pictures, maximise)
        written = [_write(found, out, sheets, source, {"network A": a, "network B": b})]
    content = found.to_dict() | {"measured_on": source.to_dict(), "out": None if out is None else str(out)}
    emit(as_json, content, [*_lines(found, source), *written])


def _in_random_order(source: Source, data: DataOptions, seed: int) -> Any:
    # The null pairs each sample with its neighbour; in sorted data both would be of one class.
    if source.dataset is None:
        return source.batches
    import torch

    from isthmus.zoo import loader

    generator = torch.Generator().manual_seed(seed)
    return loader(source.dataset, data.batch_size or 512, shuffle=True, generator=generator)


def _check_without(without: tuple[str, ...]) -> None:
    for name in without:
        if name not in _WITHOUT:
            raise click.UsageError(f"--without {name}: expected some of {', '.join(_WITHOUT)}")


def _lines(found: Correspondence, source: Source) -> list[str]:
    from ..plain import table
    from ..units_report import summary_table

    unseen = ", ".join(sorted({f"{pair.samples[1]:,}" for pair in found}))
    silent = [
        f"{len(units)} units of {name} {layer} do not vary and are left out: {', '.join(map(str, units))}"
        for pair in found
        for name, layer, units in (
            ("A's", pair.layer_a, pair.matching.constant_a),
            ("B's", pair.layer_b, pair.matching.constant_b),
        )
        if units
    ]
    return [f"measured on {source}: {unseen} held-out rows", "", table(*summary_table(found)), "", *silent]


def _sheets(
    found: Correspondence, models: Sequence[nn.Module], source: Source, count: int, maximise: bool
) -> dict[tuple[str, str], dict[str, Any]]:
    if not count:
        return {}
    from isthmus.align.units import see_pairs
    from isthmus.zoo import Dataset

    dataset = source.dataset
    images = isinstance(dataset, Dataset)
    look: dict[str, Any] = {"mean": dataset.mean, "std": dataset.std} if images else {}
    sheets = {}
    for pair in found:
        pairs = pair.matching.pairs
        held_out = pair.held_out[pairs[:, 0]]
        best = held_out.nan_to_num(nan=-1.0).argsort(descending=True)
        chosen = {"Units that both networks have": best[:count], "Units that only one has": best[count:][-count:]}
        layers = (pair.layer_a, pair.layer_b)
        sheets[layers] = {
            title: see_pairs(
                models[0],
                models[1],
                source.batches,
                layers,
                pairs[places],
                similarities=held_out[places],
                maximise=maximise,
                **look,
            )
            for title, places in chosen.items()
            if len(places)
        }
    return sheets


def _write(found: Correspondence, out: Path, sheets: Any, source: Source, files: dict[str, Path]) -> str:
    from ..units_report import write_units

    return f"wrote {write_units(found, out, sheets=sheets, measured_on=str(source), files=files)}"

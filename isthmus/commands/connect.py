"""`isthmus connect`."""

from __future__ import annotations

from pathlib import Path as File
from typing import TYPE_CHECKING

import click

from .options import (
    ArgFile,
    DataOptions,
    NetworkOptions,
    common_options,
    data_options,
    network_options,
    repair_option,
)
from .outputs import check_file, emit

if TYPE_CHECKING:
    from isthmus.merge import Path

    from .inputs import Source


@click.command("connect")
@click.argument("a", type=ArgFile)
@click.argument("b", type=ArgFile)
@network_options
@data_options
@click.option("--matching", type=ArgFile, help="Bring B into the order of A by this file of `isthmus match --out`.")
@click.option("--points", type=click.IntRange(3), default=25, show_default=True, help="Points on the path.")
@repair_option
@click.option("--plot", type=ArgFile, help="Draw loss against alpha to this file, .png, .svg or .pdf.")
@common_options
def command(
    a: File,
    b: File,
    network: NetworkOptions,
    data: DataOptions,
    matching: File | None,
    points: int,
    repair: str | None,
    plot: File | None,
    device: str,
    seed: int,
    as_json: bool,
) -> None:
    """Measure loss and accuracy on the straight path from checkpoint A to checkpoint B.

    Measured on the test split unless --split says otherwise; repaired on the train split.
    """
    check_file(plot, (".png", ".svg", ".pdf"))
    from isthmus.align import Matching
    from isthmus.merge import connect

    from .inputs import check_device, load_networks, open_both

    check_device(device)
    found = None if matching is None else Matching.load(matching)
    measured, calibration = open_both(data, device)
    model_a, model_b = (model.to(device) for model in load_networks(network, (a, b), measured))
    if found is not None:
        model_b = found.apply(model_b)
    path = connect(model_a, model_b, measured.batches, points=points, repair=repair, repair_data=calibration.batches)
    if plot is not None:
        _draw(path, plot, found is not None)
    repaired_on = None if repair is None else calibration.to_dict()
    content = {**path.to_dict(), "measured_on": measured.to_dict(), "repaired_on": repaired_on, "seed": seed}
    lines = _lines(path, measured, calibration)
    emit(as_json, content, [*lines, *([] if plot is None else [f"wrote {plot}"])])


def _lines(path: Path, measured: Source, calibration: Source) -> list[str]:
    from ..plain import number, percent, table

    accuracy = path.accuracy.tolist() if path.accuracy is not None else [None] * len(path.alphas)
    rows = [
        (f"{alpha:.3f}", f"{loss:.4f}", percent(share))
        for alpha, loss, share in zip(path.alphas, path.loss, accuracy, strict=True)
    ]
    return [
        f"measured on {measured}: {path.samples:,} samples",
        *([f"repaired ({path.repair}) on {calibration}: these networks have seen it"] if path.repair else []),
        "",
        table(("alpha", "loss", "accuracy"), rows),
        "",
        f"loss barrier      {number(path.barrier)}",
        f"accuracy barrier  {number(path.accuracy_barrier)}",
    ]


def _draw(path: Path, file: File, matched: bool) -> None:
    from .. import figures

    name = "as trained" if not matched else "matched" if path.repair is None else "matched and repaired"
    figures.save(figures.path_figure({name: path}), file)

"""`isthmus collapse`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .coarse import Groups, Labelled, check_embedding, coarse_option, embedding_option, open_labelled
from .options import ArgFile, DataOptions, Names, NetworkOptions, common_options, data_options, network_options
from .outputs import check_file, check_folder, emit

if TYPE_CHECKING:
    from isthmus.metrics.collapse import CollapseCurves

    from ..collapse_figures import Embedding
    from ..features import Features

_DRAWN = 2000


@click.command("collapse")
@click.argument("networks", metavar="NET...", nargs=-1, required=True, type=ArgFile)
@network_options
@data_options
@coarse_option
@click.option("--layers", type=Names(), help="Layers to measure on the way, e.g. conv1,conv2; or all.")
@click.option("--classifier", metavar="LAYER", help="The last linear layer; found by default.")
@click.option("--classes", type=click.IntRange(2), help="Their number; that of the classifier's outputs by default.")
@click.option("--steps", type=Names(), help="What to call each checkpoint, e.g. 0,1,10; by default from its name.")
@click.option(
    "--positions",
    type=click.Choice(["mean", "features", "samples"]),
    default="mean",
    show_default=True,
    help="How places of feature maps and tokens of --layers count.",
)
@click.option("--weighted", is_flag=True, help="Let classes count by their size.")
@click.option("--plot", type=ArgFile, help="Draw the values to this file, .png, .svg or .pdf.")
@click.option("--report", type=ArgFile, help="Folder for a page with pictures and tables, and all values as files.")
@embedding_option
@common_options
def command(
    networks: tuple[Path, ...],
    network: NetworkOptions,
    data: DataOptions,
    coarse: str | Groups | None,
    layers: tuple[str, ...] | None,
    steps: tuple[str, ...] | None,
    plot: Path | None,
    report: Path | None,
    embedding: Embedding,
    device: str,
    seed: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure neural collapse of a network, or of several checkpoints of one training, in their order.

    On the train split unless --split says otherwise: collapse is a property of what a network was trained on.
    """
    check_file(plot, (".png", ".svg", ".pdf"))
    check_folder(report)
    check_embedding(embedding)
    if steps is not None and len(steps) != len(networks):
        raise click.UsageError(f"--steps: {len(steps)} names for {len(networks)} checkpoints")
    from isthmus.metrics.collapse import CollapseCurves

    from .inputs import check_device

    check_device(device)
    labelled = open_labelled(data, coarse, data.split or "train", device, seed)
    names = ("all" if layers == ("all",) else layers) if layers is not None else None
    found, features = _measure(networks, network, labelled, names, options, report is not None, seed, device)
    curves = CollapseCurves(step_names(networks) if steps is None else _numbers(steps), tuple(found))
    written = [] if plot is None else [f"wrote {_plot(curves, plot)}"]
    if report is not None:
        assert features is not None
        drawing: dict[str, Any] = {"embedding": embedding, "seed": seed}
        written.append(f"wrote {_write(curves, features, labelled, networks, report, drawing)}")
    content = {
        **curves.to_dict(),
        "measured_on": labelled.source.to_dict(),
        "coarse": labelled.groups,
        "class_names": labelled.class_names,
    }
    emit(as_json, content, [*_lines(curves, labelled), *written])


def _measure(
    paths: Sequence[Path], network: NetworkOptions, labelled: Labelled, layers: Any, options: dict[str, Any],
    draw: bool, seed: int, device: str,
) -> tuple[list[Any], Features | None]:  # fmt: skip
    from isthmus.metrics.collapse import collapse

    from ..features import read_features
    from .inputs import load_networks

    for path in paths:  # all are checked before any is measured; one is held at a time
        load_networks(network, (path,), labelled.source)
    found, model = [], None
    for path in paths:
        model = load_networks(network, (path,), labelled.source)[0].to(device)
        found.append(collapse(model, labelled.source.batches, layers=layers, **options))
        options = {**options, "classifier": found[-1].classifier}  # the same in all
    if not draw or model is None:
        return found, None
    last = found[-1]
    layer = last.layers[-1] if last.classifier is None else None
    positions = "mean" if options["positions"] == "samples" else options["positions"]
    how: dict[str, Any] = {"layer": layer, "classifier": last.classifier, "positions": positions}
    return found, read_features(model, labelled.fine.batches, limit=_DRAWN, seed=seed, **how)


def step_names(paths: Sequence[Path]) -> tuple[Any, ...]:
    """Call checkpoints by the last number in their names, where these tell them apart and rise, else by their names.

    >>> step_names([Path("net/epoch-003.pt"), Path("net/epoch-020.pt")]), step_names([Path("a.pt"), Path("b.pt")])
    ((3, 20), ('a', 'b'))
    """
    found = [re.findall(r"\d+", path.stem) for path in paths]
    if len(paths) > 1 and all(found):
        numbers = tuple(int(each[-1]) for each in found)
        if all(one < other for one, other in pairwise(numbers)):
            return numbers
    return tuple(path.stem for path in paths)


def _numbers(steps: Sequence[str]) -> tuple[Any, ...]:
    try:
        return tuple(float(step) if "." in step or "e" in step else int(step) for step in steps)
    except ValueError:
        return tuple(steps)


def _plot(curves: CollapseCurves, path: Path) -> Path:
    from ..collapse_figures import curves_figure, depth_figure
    from ..figures import save

    several = len(curves.steps) > 1
    return save(curves_figure(curves) if several else depth_figure(curves.collapses[0]), path)


def _write(
    curves: CollapseCurves,
    features: Features,
    labelled: Labelled,
    paths: Sequence[Path],
    folder: Path,
    drawing: dict[str, Any],
) -> Path:
    from ..collapse_report import write_collapse
    from ..subclass_study import coarse_labels, coarse_map

    fine = None
    if labelled.groups is not None:
        fine = features.labels
        features = replace(features, labels=coarse_labels(fine, coarse_map(labelled.groups)))
    files = {
        "the network" if len(paths) == 1 else f"checkpoint {step}": path
        for step, path in zip(curves.steps, paths, strict=True)
    }
    return write_collapse(
        curves, folder, features=features, class_names=labelled.class_names, fine=fine,
        fine_names=labelled.fine_names, measured_on=str(labelled.source), files=files, **drawing,
    )  # fmt: skip


def _lines(curves: CollapseCurves, labelled: Labelled) -> list[str]:
    from ..collapse_report import value_table
    from ..plain import table

    last = curves.collapses[-1]
    lines = [f"measured on {labelled.source}: {last.last.samples:,} samples of {last.last.classes} classes", ""]
    if len(curves.steps) > 1:
        lines += [table(*value_table(curves)), ""]
    if len(curves.steps) == 1 or len(last.layers) > 1:
        lines += [table(*value_table(curves, "layer")), ""]
    return lines

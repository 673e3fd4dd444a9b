"""`isthmus connect`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path as File
from typing import TYPE_CHECKING, Any

import click

from .methods import NEEDS
from .options import (
    ArgFile,
    DataOptions,
    Names,
    NetworkOptions,
    common_options,
    data_options,
    network_options,
    repair_option,
)
from .outputs import check_file, emit

if TYPE_CHECKING:
    from torch import nn

    from isthmus.merge import Path

    from .inputs import Source

_PICTURES = (".png", ".svg", ".pdf")


@click.command("connect")
@click.argument("a", type=ArgFile)
@click.argument("b", type=ArgFile)
@click.argument("c", type=ArgFile, required=False)
@network_options
@data_options
@click.option(
    "--matching",
    "matchings",
    multiple=True,
    metavar="[NAME=]FILE",
    help="Bring B into the order of A by this file of `isthmus match --out`; again for further curves.",
)
@click.option("--match", "methods", type=Names(), help=f"Match here, a curve for each: {', '.join(NEEDS)}.")
@click.option("--points", type=click.IntRange(3), default=25, show_default=True, help="Points on the path.")
@repair_option
@click.option("--interval", is_flag=True, help="Give 95 % intervals of the barriers over the choice of samples.")
@click.option("--also-split", type=click.Choice(["train", "test"]), help="Measure on this split of the data too.")
@click.option("--midpoint", is_flag=True, help="Measure the network halfway, and nothing else.")
@click.option("--layerwise", is_flag=True, help="Measure the paths of one layer at a time.")
@click.option("--features", is_flag=True, help="Measure how linear the features are halfway, layer by layer.")
@click.option("--plot", type=ArgFile, help="Draw loss against alpha to this file, .png, .svg or .pdf.")
@click.option("--plane", type=ArgFile, help="Draw the loss on the plane through A, B and C to this file.")
@common_options
def command(
    a: File, b: File, c: File | None, network: NetworkOptions, data: DataOptions, as_json: bool, **given: Any
) -> None:
    """Measure loss and accuracy on the straight path from checkpoint A to checkpoint B.

    Measured on the test split unless --split says otherwise; matched and repaired on the train split. With --match, or
    with several --matching, the path as trained stands beside the others. The plane is that of B and C in the order
    that the first of --match gives them, or as trained.
    """
    wanted = Wanted(**given)
    _check(wanted, data, c)
    files = _named(wanted.matchings)
    from ..curves import others
    from .inputs import check_device, find_symmetry, load_networks, open_both

    check_device(wanted.device)
    measured, calibration = open_both(data, wanted.device)
    networks = [file for file in (a, b, c) if file is not None]
    models = [model.to(wanted.device) for model in load_networks(network, networks, measured)]

    def ordered(model: nn.Module, methods: tuple[str, ...], files: Mapping[str, File]) -> dict[str, nn.Module]:
        def derive() -> Any:
            return find_symmetry(models[0], measured, None)

        how = (calibration.batches, derive, wanted.seed, wanted.device)
        return others(models[0], model, files, methods, *how)

    found = Found(models[0], ordered(models[1], wanted.methods or (), files), measured, calibration)
    drawn = {} if wanted.plane is None else {"plane": str(wanted.plane)}
    if wanted.plane is not None:  # first, as networks on one line have none
        corners = [list(ordered(model, (wanted.methods or ())[:1], {}).values())[-1] for model in models[1:]]
        _draw_plane(models[0], corners, measured, wanted.plane)
    content, lines = _midpoints(found, wanted) if wanted.midpoint else _paths(found, wanted, data)
    emit(as_json, content | drawn, [*lines, *(f"wrote {file}" for file in drawn.values())])


@dataclass(frozen=True)
class Wanted:
    """What was asked for."""

    matchings: tuple[str, ...]
    methods: tuple[str, ...] | None
    points: int
    repair: str | None
    interval: bool
    also_split: str | None
    midpoint: bool
    layerwise: bool
    features: bool
    plot: File | None
    plane: File | None
    device: str
    seed: int


@dataclass(frozen=True)
class Found:
    """The networks and the data: the reference, and the other one by what was done to it."""

    a: nn.Module
    others: Mapping[str, nn.Module]
    measured: Source
    calibration: Source


def _check(wanted: Wanted, data: DataOptions, c: File | None) -> None:
    check_file(wanted.plot, _PICTURES)
    check_file(wanted.plane, _PICTURES)
    for name in wanted.methods or ():
        if name not in NEEDS:
            raise click.UsageError(f"--match: there is no method {name!r}; there are {', '.join(NEEDS)}")
    if (c is None) != (wanted.plane is None):
        raise click.UsageError("a plane goes through three networks: pass A, B, C and --plane FILE, or neither")
    if wanted.also_split is not None and wanted.also_split == (data.split or "test"):
        raise click.UsageError(f"--also-split {wanted.also_split} is the split that is measured anyway")
    clash = wanted.interval or wanted.plot or wanted.also_split or wanted.layerwise or wanted.features
    if wanted.midpoint and clash:
        raise click.UsageError("--midpoint measures one place only; leave out what goes along the path or by layer")


def _named(given: tuple[str, ...]) -> dict[str, File]:
    """Give the files of matchings by the name of their curve: as written, or after the file."""
    files: dict[str, File] = {}
    for text in given:
        name, mark, path = text.partition("=")
        if not mark or File(text).is_file():
            name, path = ("matched" if len(given) == 1 else File(text).stem), text
        if name in files:
            raise click.UsageError(f"--matching: two curves are called {name!r}; name them as name=file")
        files[name] = File(path)
    return files


def _paths(found: Found, wanted: Wanted, data: DataOptions) -> tuple[dict[str, Any], list[str]]:
    from isthmus.merge import connect

    from ..curves import AS_TRAINED, barriers_table, interval
    from .inputs import open_data

    also = None
    if wanted.also_split is not None:
        source = open_data(data, wanted.also_split, wanted.device)
        also = {str(source): source.batches}
    paths = {}
    for name, model in found.others.items():
        repair = None if name == AS_TRAINED and len(found.others) > 1 else wanted.repair
        paths[name if repair is None or name == AS_TRAINED else f"{name} and repaired"] = connect(
            found.a,
            model,
            found.measured.batches,
            points=wanted.points,
            repair=repair,
            repair_data=found.calibration.batches,
            also=also,
        )
    intervals = {name: interval(path) for name, path in paths.items()} if wanted.interval else {}
    first = next(iter(paths.values()))
    content = {**first.to_dict(), **_about(found, wanted)}
    if intervals:
        content |= {"interval": next(iter(intervals.values())), "intervals": intervals}
    if len(paths) > 1:
        content["paths"] = {name: path.to_dict() for name, path in paths.items()}
    lines = _lines(first, found, wanted) if len(paths) == 1 else [*_head(found, wanted, first.samples), ""]
    if len(paths) > 1 or also is not None or intervals:
        lines += ["", barriers_table(paths, intervals)] if len(paths) == 1 else [barriers_table(paths, intervals)]
    layer_content, layer_lines = _by_layer(found, wanted)
    return content | layer_content, [*lines, *layer_lines, *_draw(paths, wanted)]


def _about(found: Found, wanted: Wanted) -> dict[str, Any]:
    repaired_on = None if wanted.repair is None else found.calibration.to_dict()
    matched_on = found.calibration.to_dict() if any(NEEDS[name] for name in wanted.methods or ()) else None
    return {
        "measured_on": found.measured.to_dict(),
        "repaired_on": repaired_on,
        "matched_on": matched_on,
        "seed": wanted.seed,
    }


def _midpoints(found: Found, wanted: Wanted) -> tuple[dict[str, Any], list[str]]:
    from isthmus.merge.paths import midpoint

    from ..plain import number, percent, table

    halfway = {
        name: midpoint(
            found.a, model, found.measured.batches, repair=wanted.repair, repair_data=found.calibration.batches
        )
        for name, model in found.others.items()
    }
    rows = [(name, number(each.loss), percent(each.metric)) for name, each in halfway.items()]
    content = {"midpoints": {name: asdict(each) for name, each in halfway.items()}, **_about(found, wanted)}
    samples = next(iter(halfway.values())).samples
    return content, [*_head(found, wanted, samples), "", table(("halfway", "loss", "accuracy"), rows)]


def _by_layer(found: Found, wanted: Wanted) -> tuple[dict[str, Any], list[str]]:
    from isthmus.merge.layerwise import feature_connectivity, layerwise_paths

    from ..curves import features_table, layerwise_table

    content: dict[str, Any] = {}
    lines: list[str] = []
    batches = found.measured.batches
    if wanted.layerwise:
        each = {name: layerwise_paths(found.a, model, batches) for name, model in found.others.items()}
        content["layerwise"] = {name: one.to_dict() for name, one in each.items()}
        lines += ["", layerwise_table(each)]
    if wanted.features:
        seen = {name: feature_connectivity(found.a, model, batches) for name, model in found.others.items()}
        content["features"] = {name: one.to_dict() for name, one in seen.items()}
        lines += ["", features_table(seen)]
    return content, lines


def _head(found: Found, wanted: Wanted, samples: int) -> list[str]:
    note = f"repaired on {found.calibration}: these networks have seen it"
    return [f"measured on {found.measured}: {samples:,} samples", *([note] if wanted.repair else [])]


def _lines(path: Path, found: Found, wanted: Wanted) -> list[str]:
    from ..plain import number, percent, table

    accuracy = path.accuracy.tolist() if path.accuracy is not None else [None] * len(path.alphas)
    rows = [
        (f"{alpha:.3f}", f"{loss:.4f}", percent(share))
        for alpha, loss, share in zip(path.alphas, path.loss, accuracy, strict=True)
    ]
    return [
        *_head(found, wanted, path.samples),
        "",
        table(("alpha", "loss", "accuracy"), rows),
        "",
        f"loss barrier      {number(path.barrier)}",
        f"accuracy barrier  {number(path.accuracy_barrier)}",
    ]


def _draw(paths: Mapping[str, Path], wanted: Wanted) -> list[str]:
    if wanted.plot is None:
        return []
    from .. import figures

    figures.save(figures.path_figure(paths, band=0.95 if wanted.interval else None), wanted.plot)
    return [f"wrote {wanted.plot}"]


def _draw_plane(a: nn.Module, corners: list[nn.Module], measured: Source, file: File) -> None:
    from isthmus.merge.paths import plane

    from .. import figures

    b, c = corners
    figures.save(figures.plane_figure(plane(a, b, c, measured.batches)), file)

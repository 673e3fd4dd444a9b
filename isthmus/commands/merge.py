"""`isthmus merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .methods import NEEDS
from .options import (
    ArgFile,
    DataOptions,
    NetworkOptions,
    Numbers,
    common_options,
    data_options,
    input_shape_option,
    network_options,
    repair_option,
)
from .outputs import check_file, check_folder, emit

if TYPE_CHECKING:
    from torch import nn

    from .inputs import Source


@click.command("merge")
@click.argument("checkpoints", type=ArgFile, nargs=-1, required=True, metavar="A B [C]...")
@network_options
@data_options
@input_shape_option
@click.option("--out", type=ArgFile, required=True, help="Checkpoint of the merged network, .safetensors or .pt.")
@click.option(
    "--align",
    type=click.Choice([*NEEDS, "none"]),
    default="weights",
    show_default=True,
    help="How to bring the units into the order of A's.",
)
@click.option("--verify/--no-verify", default=True, help="Refuse a symmetry that changes the network's outputs.")
@repair_option
@click.option("--weights", type=Numbers(float, "NUMBERS"), help="One for each network, e.g. 0.5,0.5.")
@click.option("--report", type=ArgFile, help="Folder for the report of a study of A and B.")
@common_options
def command(
    checkpoints: tuple[Path, ...],
    network: NetworkOptions,
    data: DataOptions,
    input_shape: tuple[int, ...] | None,
    out: Path,
    align: str,
    verify: bool,
    repair: str | None,
    weights: tuple[float, ...] | None,
    report: Path | None,
    device: str,
    seed: int,
    as_json: bool,
) -> None:
    """Align networks, average them, and measure the result beside its parents.

    Measured on the test split unless --split says otherwise; matched by what they do and repaired on the train split.
    Without --data nothing is measured.
    """
    check_file(out, (".safetensors", ".pt", ".pth"))
    check_folder(report)
    _check_options(checkpoints, data, align, repair, weights, report)
    from isthmus.base.files import save_state_dict

    from .inputs import check_device, find_symmetry, load_networks, open_both

    check_device(device)
    sources = None if data.data is None else open_both(data, device)
    models = load_networks(network, checkpoints, None if sources is None else sources[0])
    structure = None
    if align != "none":
        structure = find_symmetry(models[0], None if sources is None else sources[0], input_shape, verify)
    models = [model.to(device) for model in models]
    how = {"method": align, "repair": repair, "weights": weights, "seed": seed, "verify": verify, "symmetry": structure}
    if report is not None and sources is not None:
        merged, content, lines = _with_report(checkpoints, models, sources, how, report)
    else:
        merged, content, lines = _without_report(checkpoints, models, sources, how)
    save_state_dict(merged.state_dict(), out)
    emit(as_json, {**content, "out": str(out)}, [*lines, f"wrote {out}"])


def _check_options(
    checkpoints: tuple[Path, ...],
    data: DataOptions,
    align: str,
    repair: str | None,
    weights: tuple[float, ...] | None,
    report: Path | None,
) -> None:
    if len(checkpoints) < 2:
        raise click.UsageError("merging needs two checkpoints or more")
    if weights is not None and len(weights) != len(checkpoints):
        raise click.UsageError(f"--weights: {len(weights)} numbers for {len(checkpoints)} networks")
    if report is not None and (len(checkpoints) != 2 or align == "none"):
        raise click.UsageError("--report compares two networks before and after matching: pass A and B, and align them")
    needs = f"--align {align}" if NEEDS.get(align) else "--repair" if repair else "--report" if report else None
    if needs is not None and data.data is None:
        raise click.UsageError(f"{needs} needs data; pass --data")


Sources = tuple["Source", "Source"]
Outcome = tuple["nn.Module", dict[str, Any], list[str]]


def _with_report(
    checkpoints: tuple[Path, ...], models: list[nn.Module], sources: Sources, how: dict[str, Any], report: Path
) -> Outcome:
    from ..report import write_report
    from ..study import study

    measured, calibration = sources
    found = study(
        models[0],
        models[1],
        measured.batches,
        data_match=calibration.batches,
        eval_name=str(measured),
        match_name=str(calibration),
        **how,
    )
    page = write_report(found, report, files=dict(zip(("network A", "network B"), checkpoints, strict=True)))
    content = {
        "parents": [found.networks[name] for name in "AB"],
        "merged": found.networks["merged"],
        "samples": found.settings["samples"],
        "measured_on": measured.to_dict(),
        "repaired_on": calibration.to_dict() if how["repair"] else None,
        "study": found.to_dict(),
        "report": str(page),
    }
    files = {"A": str(checkpoints[0]), "B": str(checkpoints[1])}
    rows = {files.get(name, name): figures for name, figures in found.networks.items()}
    lines = [found.verdict, "", *_measured_lines(sources, how["repair"], rows), f"wrote {page}"]
    return found.merged, content, lines


def _without_report(
    checkpoints: tuple[Path, ...], models: list[nn.Module], sources: Sources | None, how: dict[str, Any]
) -> Outcome:
    from isthmus.align import match
    from isthmus.merge import merge

    measured, calibration = (None, None) if sources is None else sources
    align, symmetry = how.pop("method"), how.pop("symmetry")
    matchings = None
    if align != "none":
        batches = None if calibration is None or align == "weights" else calibration.batches
        options = {"method": align, "symmetry": symmetry, "seed": how["seed"], "verify": how["verify"]}
        matchings = [match(models[0], model, batches, **options) for model in models[1:]]
    merged = merge(
        models,
        None if measured is None else measured.batches,
        align=matchings,
        repair_data=None if calibration is None else calibration.batches,
        **how,
    )
    content = {
        **merged.report,
        "align": align,
        "measured_on": None if measured is None else measured.to_dict(),
        "repaired_on": calibration.to_dict() if calibration is not None and how["repair"] else None,
    }
    if "merged" not in merged.report or sources is None:
        why = "no --data was given" if measured is None else f"{measured} has no labels"
        return merged.model, content, [f"nothing was measured, as {why}"]
    rows = dict(zip(map(str, checkpoints), merged.report["parents"], strict=True)) | {"merged": merged.report["merged"]}
    return merged.model, content, _measured_lines(sources, how["repair"], rows)


def _measured_lines(sources: Sources, repair: str | None, rows: dict[str, Any]) -> list[str]:
    from ..plain import number, percent, table

    measured, calibration = sources
    return [
        f"measured on {measured}",
        *([f"repaired on {calibration}: the merged network has seen it"] if repair else []),
        "",
        table(
            ("network", "loss", "accuracy"),
            [(name, number(figures["loss"]), percent(figures["metric"])) for name, figures in rows.items()],
        ),
        "",
    ]

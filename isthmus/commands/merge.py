"""`isthmus merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from .methods import ALIGN, BASED, MERGING, REPAIRS, UNALIGNED
from .options import (
    ArgFile,
    DataOptions,
    JsonObject,
    NetworkOptions,
    Numbers,
    Settings,
    common_options,
    data_options,
    input_shape_option,
    network_options,
)
from .outputs import check_file, check_folder, emit

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..recipe_run import Result

# What goes with --recipe, which holds all the rest.
_BESIDE_RECIPE = {"recipe", "as_json", "debug"}


@click.command("merge")
@click.argument("checkpoints", type=ArgFile, nargs=-1, metavar="A B [C]...")
@click.option("--recipe", type=ArgFile, help="Do what this TOML file says, instead of all other options.")
@network_options(required=False)
@data_options
@input_shape_option
@click.option("--out", type=ArgFile, help="Checkpoint of the merged network, .safetensors or .pt.")
@click.option("--method", type=click.Choice(list(MERGING)), default="mean", show_default=True, help="Of merging.")
@click.option("--option", "options", type=Settings(), multiple=True, help="Of the method: NAME=VALUE, again for each.")
@click.option("--by-layer", type=JsonObject(), help='Weights of layers, of method mean: {"fc1.*": [0.7, 0.3]}.')
@click.option(
    "--base",
    "bases",
    type=ArgFile,
    multiple=True,
    help="Checkpoint that all were fine-tuned from, or again for each its own.",
)
@click.option(
    "--align",
    type=click.Choice([*ALIGN, "none"]),
    help="How to bring the units into the order of A's.  [default: weights; none where there is a base]",
)
@click.option("--verify/--no-verify", default=True, help="Refuse a symmetry that changes the network's outputs.")
@click.option(
    "--repair", type=click.Choice(REPAIRS), help="Restore activation statistics (REPAIR) on the training split."
)
@click.option("--weights", type=Numbers(float, "NUMBERS"), help="One for each network, e.g. 0.5,0.5.")
@click.option("--report", type=ArgFile, help="Folder for the report of a study of A and B.")
@click.option("--write-recipe", type=ArgFile, help="Write what is done as a recipe, .toml.")
@common_options
def command(recipe: Path | None, as_json: bool, **given: Any) -> None:
    """Align networks, merge them, and measure the result beside its parents and their ensemble.

    Measured on the test split unless --split says otherwise; matched by what they do, merged by methods that read data,
    and repaired on the train split. Without --data nothing is measured. Without --model and with
    --align none, state dicts of any class are merged as they are.

    With --recipe, paths are relative to that file; the whole of it is checked before a weight is read, and beside the
    output stands the complete recipe, which repeats the merge bit for bit.
    """
    if recipe is not None:
        _follow(recipe, as_json)
    else:
        _merge(as_json=as_json, **given)


def _follow(file: Path, as_json: bool) -> None:
    context = click.get_current_context()
    others = [
        parameter.opts[-1]
        for parameter in context.command.params
        if parameter.name not in _BESIDE_RECIPE
        and context.get_parameter_source(str(parameter.name)) not in (ParameterSource.DEFAULT, None)
    ]
    if others:
        raise click.UsageError(f"--recipe holds the whole merge; leave out {', '.join(others)}, or write it there")
    from ..recipe import load
    from ..recipe_run import follow

    recipe = load(file)
    done = follow(recipe)
    content = {"out": str(done.output), "recipe": str(done.record), "sha256": done.sha256}
    lines = _lines(recipe, done)
    emit(as_json, {**done.report, **content}, [*lines, f"wrote {done.output}", f"wrote {done.record}"])


def _merge(
    checkpoints: tuple[Path, ...],
    network: NetworkOptions | None,
    data: DataOptions,
    input_shape: tuple[int, ...] | None,
    out: Path | None,
    method: str,
    options: tuple[tuple[str, Any], ...],
    by_layer: dict[str, Any] | None,
    bases: tuple[Path, ...],
    align: str | None,
    verify: bool,
    repair: str | None,
    weights: tuple[float, ...] | None,
    report: Path | None,
    write_recipe: Path | None,
    device: str,
    seed: int,
    as_json: bool,
) -> None:
    if out is None:
        raise click.UsageError("Missing option '--out'.")
    check_file(out, (".safetensors",) if write_recipe is not None else (".safetensors", ".pt", ".pth"))
    check_file(write_recipe, (".toml",))
    check_folder(report)
    align = align or ("none" if bases or method in UNALIGNED else "weights")
    _check_options(checkpoints, network, data, method, bases, align, repair, weights, report)
    from isthmus.base.files import save_state_dict, write_atomic

    from ..recipe import Alignment, Input, Recipe
    from ..recipe_checks import check_typed
    from ..recipe_run import result
    from ..recipe_text import complete

    own = bases if len(bases) > 1 else [None] * len(checkpoints)
    shares = weights or [None] * len(checkpoints)
    recipe = Recipe(
        inputs=tuple(map(Input, checkpoints, shares, own)),
        output=out,
        method=method,
        options=dict(options) | ({} if by_layer is None else {"by_layer": by_layer}),
        base=bases[0] if len(bases) == 1 else None,
        model=network,
        data=None if data.data is None else data,
        align=Alignment(None if align == "none" else align, input_shape=input_shape, verify=verify),
        repair=repair,
        seed=seed,
        device=device,
    )
    check_typed(recipe)
    written = [path for path in (out, write_recipe) if path is not None]
    if report is not None:
        state, content, lines = _with_report(recipe, report)
    else:
        found = result(recipe)
        state, content, lines = found.state, dict(found.report), _lines(recipe, found)
    save_state_dict(state, out)
    if write_recipe is not None:
        text = complete(recipe, folder=write_recipe.parent)
        write_atomic(write_recipe, lambda path: path.write_text(text, encoding="utf-8"))
    emit(as_json, {**content, "out": str(out)}, [*lines, *(f"wrote {path}" for path in written)])


def _check_options(
    checkpoints: tuple[Path, ...],
    network: NetworkOptions | None,
    data: DataOptions,
    method: str,
    bases: tuple[Path, ...],
    align: str,
    repair: str | None,
    weights: tuple[float, ...] | None,
    report: Path | None,
) -> None:
    count = len(checkpoints)
    if count < 2 and method not in BASED:
        raise click.UsageError("merging needs two checkpoints or more, or a --recipe")
    if weights is not None and len(weights) != count:
        raise click.UsageError(f"--weights: {len(weights)} numbers for {count} networks")
    if len(bases) not in (0, 1, count):
        raise click.UsageError(f"--base: {len(bases)} of them; pass one for all, or one for each of {count} networks")
    if method in BASED and not bases:
        raise click.UsageError(f"--method {method} works on what was added to a common parent; pass --base")
    if report is not None and (count != 2 or align == "none" or method != "mean"):
        raise click.UsageError(
            "--report compares two networks before and after matching, and their means: pass A and B, align them"
        )
    runs = [
        (f"--method {method}", MERGING[method]),
        (f"--align {align}", ALIGN.get(align, "")),
        ("--repair", repair),
        ("--report", report),
    ]
    needs = next((name for name, reads in runs if reads), None)
    if needs is not None and data.data is None:
        raise click.UsageError(f"{needs} needs data; pass --data")
    if network is None and (data.data is not None or align != "none"):
        what, other = ("--data", "leave it out") if data.data is not None else (f"--align {align}", "--align none")
        why = "state dicts of any class are merged as they are, and nothing is measured"
        raise click.UsageError(f"{what} is for networks that can be run; pass --model, or {other}: {why}")


def _with_report(recipe: Recipe, folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    from ..recipe_run import open_inputs
    from ..report import write_report
    from ..study import study

    opened = open_inputs(recipe)
    measured, calibration = opened.measured, opened.calibration
    assert measured is not None
    assert calibration is not None
    found = study(
        opened.models[0],
        opened.models[1],
        measured.batches,
        data_match=calibration.batches,
        eval_name=str(measured),
        match_name=str(calibration),
        method=str(recipe.align.method),
        symmetry=opened.symmetry,
        repair=recipe.repair,
        weights=recipe.weights,
        seed=recipe.seed,
        device=recipe.device,
        verify=recipe.align.verify,
        options=recipe.options,
    )
    files = {f"network {name}": source.path for name, source in zip("AB", recipe.inputs, strict=True)}
    page = write_report(found, folder, files=files)
    content = {
        "parents": [found.networks[name] for name in "AB"],
        "merged": found.networks["merged"],
        "ensemble": found.networks["ensemble"],
        "samples": found.settings["samples"],
        "measured_on": measured.to_dict(),
        "repaired_on": calibration.to_dict() if recipe.repair else None,
        "study": found.to_dict(),
        "report": str(page),
    }
    names: dict[str, str] = {name: str(source.path) for name, source in zip("AB", recipe.inputs, strict=True)}
    rows = {names.get(name, name): figures for name, figures in found.networks.items()}
    lines = [found.verdict, "", *_table(str(measured), str(calibration), recipe.repair, rows), f"wrote {page}"]
    return found.merged.state_dict(), content, lines


def _lines(recipe: Recipe, found: Result) -> list[str]:
    report = found.report
    if "merged" not in report:
        return [f"nothing was measured, as {found.why}"]
    rows: dict[str, Any] = {
        str(source.path): parent for source, parent in zip(recipe.inputs, report["parents"], strict=True)
    }
    rows |= {name: report[name] for name in ("ensemble", "merged") if name in report}
    return _table(str(found.measured), str(found.calibration), recipe.repair, rows)


def _table(measured: str, calibration: str, repair: str | None, rows: dict[str, Any]) -> list[str]:
    from ..plain import number, percent, table

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

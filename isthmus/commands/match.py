"""`isthmus match`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .methods import NEEDS
from .options import (
    ArgFile,
    DataOptions,
    JsonObject,
    NetworkOptions,
    common_options,
    data_options,
    input_shape_option,
    network_options,
)
from .outputs import check_file, emit

if TYPE_CHECKING:
    from isthmus.align import Matching


@click.command("match")
@click.argument("a", type=ArgFile)
@click.argument("b", type=ArgFile)
@network_options
@data_options
@input_shape_option
@click.option("--method", type=click.Choice(list(NEEDS)), default="weights", show_default=True)
@click.option("--init", type=ArgFile, help="Begin at this matching or permutation, .safetensors.")
@click.option("--restarts", type=click.IntRange(1), default=2, show_default=True, help="Of weight matching.")
@click.option("--options", "extra", type=JsonObject(), default="{}", help='Of the method, such as {"steps": 100}.')
@click.option("--symmetry", type=ArgFile, help="A symmetry saved by `isthmus symmetry --save`; derived by default.")
@click.option("--verify/--no-verify", default=True, help="Refuse a symmetry that changes the network's outputs.")
@click.option("--out", type=ArgFile, help="Write the matching to this file, .safetensors.")
@click.option("--save-model", type=ArgFile, help="Write B in the order of A to this checkpoint.")
@common_options
def command(
    a: Path,
    b: Path,
    network: NetworkOptions,
    data: DataOptions,
    input_shape: tuple[int, ...] | None,
    method: str,
    init: Path | None,
    restarts: int,
    extra: dict[str, Any],
    symmetry: Path | None,
    verify: bool,
    out: Path | None,
    save_model: Path | None,
    device: str,
    seed: int,
    as_json: bool,
) -> None:
    """Bring the units of checkpoint B into the order of checkpoint A.

    weights, frank_wolfe and sinkhorn compare parameters: data serves to run the network once, and --input-shape will
    do. activations and iterated compare what units do on data; straight_through, learned and auto lower the loss
    halfway, on data with labels. All of them read the train split unless --split says otherwise.
    """
    check_file(out, (".safetensors",))
    check_file(save_model)
    reads = bool(NEEDS[method]) or extra.get("choose") == "midpoint"
    if reads and data.data is None:
        raise click.UsageError(f"--method {method} reads data; pass --data")
    from isthmus.align import match
    from isthmus.base.files import save_state_dict

    from ..plain import number, table
    from .inputs import check_device, find_symmetry, load_networks, open_data, open_order

    check_device(device)
    source = None if data.data is None else open_data(data, data.split or "train", device)
    model_a, model_b = load_networks(network, (a, b), source)
    structure = find_symmetry(model_a, source, input_shape, verify, symmetry)
    batches = source.batches if source is not None and reads else None
    begin = None if init is None else open_order(init)
    options = {"method": method, "init": begin, "restarts": restarts, "symmetry": structure, "seed": seed}
    found = match(model_a, model_b, batches, device=device, verify=verify, **options, **extra)
    if out is not None:
        found.save(out)
    if save_model is not None:
        save_state_dict(found.apply(model_b).state_dict(), save_model)
    means = {name: float(scores.nanmean()) for name, scores in found.scores.items()}
    content = {
        "method": found.method,
        "seed": seed,
        "objective": found.objective,
        "mean_scores": means,
        "bound": found.bound,
        "by_weights": found.by_weights,
        "candidates": found.candidates,
        "matched_on": source.to_dict() if batches is not None and source is not None else None,
        "out": None if out is None else str(out),
        "save_model": None if save_model is None else str(save_model),
    }
    rows = [(name, len(found.scores[name]), number(mean)) for name, mean in means.items()]
    what = found.score + (f" on {source}" if found.score == "correlation of activations" else "")
    written = [f"wrote {path}" for path in (out, save_model) if path is not None]
    title = f"{found.method}: objective {found.objective:.6g}; scores: {what}"
    compared = [*_compared(found), ""] if found.candidates else []
    emit(as_json, content, [title, "", *compared, table(("group", "units", "mean score"), rows), *written])


def _compared(found: Matching) -> list[str]:
    from ..plain import number, table

    rows = [
        (
            line["method"],
            "-" if line["loss"] is None else number(line["loss"]),
            "-" if line["accuracy"] is None else number(line["accuracy"]),
            line["reason"] or ("lowest" if found.method == f"auto: {line['method']}" else ""),
        )
        for line in found.candidates
    ]
    return [table(("method", "loss halfway", "accuracy", ""), rows)]

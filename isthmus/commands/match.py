"""`isthmus match`."""

from __future__ import annotations

from pathlib import Path

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


@click.command("match")
@click.argument("a", type=ArgFile)
@click.argument("b", type=ArgFile)
@network_options
@data_options
@input_shape_option
@click.option("--method", type=click.Choice(["weights", "activations"]), default="weights", show_default=True)
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
    symmetry: Path | None,
    verify: bool,
    out: Path | None,
    save_model: Path | None,
    device: str,
    seed: int,
    as_json: bool,
) -> None:
    """Bring the units of checkpoint B into the order of checkpoint A.

    By weights, the data serves to run the network once, and --input-shape will do. By activations, they are compared
    on the train split unless --split says otherwise.
    """
    check_file(out, (".safetensors",))
    check_file(save_model)
    if method == "activations" and data.data is None:
        raise click.UsageError("--method activations compares activations on data; pass --data")
    from isthmus.align import match
    from isthmus.base.files import save_state_dict

    from ..plain import number, table
    from .inputs import check_device, find_symmetry, load_networks, open_data

    check_device(device)
    source = None if data.data is None else open_data(data, data.split or "train", device)
    model_a, model_b = load_networks(network, (a, b), source)
    structure = find_symmetry(model_a, source, input_shape, verify, symmetry)
    batches = source.batches if source is not None and method == "activations" else None
    options = {"method": method, "symmetry": structure, "seed": seed, "verify": verify}
    found = match(model_a, model_b, batches, device=device, **options)
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
        "by_weights": found.by_weights,
        "matched_on": source.to_dict() if source is not None and method == "activations" else None,
        "out": None if out is None else str(out),
        "save_model": None if save_model is None else str(save_model),
    }
    rows = [(name, len(found.scores[name]), number(mean)) for name, mean in means.items()]
    what = "cosine similarity of weights" if method == "weights" else f"correlation of activations on {source}"
    written = [f"wrote {path}" for path in (out, save_model) if path is not None]
    title = f"objective {found.objective:.6g}; scores: {what}"
    emit(as_json, content, [title, "", table(("group", "units", "mean score"), rows), *written])

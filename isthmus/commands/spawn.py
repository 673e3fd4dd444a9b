"""`isthmus spawn`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import ArgFile, DataOptions, NetworkOptions, common_options, data_options, network_options
from .outputs import check_file, check_folder, emit

if TYPE_CHECKING:
    from isthmus.merge.spawning import Spawning


class Steps(click.ParamType):
    """Steps separated by commas."""

    name = "STEPS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Read them."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r}: expected whole numbers separated by commas, such as 0,10,100", param, ctx)


@click.command("spawn")
@network_options
@data_options
@click.option("--at", type=Steps(), help="Steps at which to fork, e.g. 0,10,100.  [default: 0,10,30,100,… to half]")
@click.option("--children", type=click.IntRange(2), default=2, show_default=True, help="Forks at each step.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the training split.")
@click.option("--lr", type=float, help="Highest learning rate.")
@click.option("--optimizer", type=click.Choice(["sgd", "adam", "adamw"]))
@click.option("--weight-decay", type=float)
@click.option("--schedule", type=click.Choice(["cosine", "constant", "step"]))
@click.option("--augment/--no-augment", default=None, help="Random crops and mirrored images.")
@click.option("--points", type=click.IntRange(3), default=25, show_default=True, help="Points on each path.")
@click.option("--folder", type=ArgFile, help="Keep each network here; the next call goes on from what is there.")
@click.option("--plot", type=ArgFile, help="Draw the barriers by step to this file, .png, .svg or .pdf.")
@common_options
def command(
    network: NetworkOptions,
    data: DataOptions,
    at: tuple[int, ...] | None,
    children: int,
    points: int,
    folder: Path | None,
    plot: Path | None,
    device: str,
    seed: int,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Find the step from which on a training is stable to its noise.

    Trains one network, forks it at some steps, trains each fork to the end with another order of the images, and
    measures the straight path between the forks on the test split. What is not given is taken from the recipe for that
    network. The seed is that of the initial weights and of the first training; forks have those that follow.
    """
    check_file(plot, (".png", ".svg", ".pdf"))
    check_folder(folder)
    import dataclasses

    from ..spawning import spawn_recipe
    from .inputs import check_device, make_network, open_data
    from .train import chosen_recipe

    check_device(device)
    if data.split is not None:
        raise click.UsageError("spawn trains on the train split and measures on the test split; --split does not fit")
    recipe = chosen_recipe(network.model, {**chosen, "batch_size": data.batch_size}, seed)
    train_set, test_set = open_data(data, "train").dataset, open_data(data, "test").dataset
    if train_set is None or test_set is None:
        raise click.UsageError("spawn needs a data set of the zoo, such as --data digits")
    model = make_network(network, train_set, seed)
    found = spawn_recipe(
        model, train_set, test_set, recipe, at=at, children=children, points=points, folder=folder, device=device
    )
    if plot is not None:
        from ..figures import save

        save(figure(found), plot)
    facts = {"model": network.model, "model_args": network.model_args, "data": train_set.name}
    measured = {"split": "test", "samples": len(test_set)}
    content = {**facts, "recipe": dataclasses.asdict(recipe), "measured_on": measured, **found.to_dict()}
    trained = f"{network.model} on {train_set.name}, {recipe.epochs} epochs of {found.total // recipe.epochs:,} steps"
    lines = [trained, *_lines(found), *([] if plot is None else [f"wrote {plot}"])]
    emit(as_json, content, lines)


def figure(found: Spawning) -> Any:
    """Draw loss barrier and instability, one above the other."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from ..figures import STYLE

    drawn = Figure(figsize=(5.4, 5.2), layout="constrained")
    with rc_context(STYLE):
        above, below = drawn.subplots(2, sharex=True)
        found.plot(above, "loss").set_xlabel("")
        found.plot(below, "instability", threshold=0.02)
    for ax in (above, below):
        ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    return drawn


def _lines(found: Spawning) -> list[str]:
    from ..plain import number, percent, table

    assert found.instability is not None
    rows = []
    for step, loss, error in zip(found.steps, found.barriers, found.instability, strict=True):
        ends = [share for path in found.paths[step] if path.accuracy is not None for share in path.accuracy[[0, -1]]]
        rows.append((f"{step:,}", number(float(loss)), percent(float(error)), percent(float(sum(ends) / len(ends)))))
    stable = found.stable_from()
    samples = found.paths[found.steps[0]][0].samples
    return [
        f"paths between {len(found.seeds)} children of each step, measured on the test split: {samples:,} samples",
        "",
        table(("parted at", "loss barrier", "instability (error)", "accuracy of children"), rows),
        "",
        "stable (instability below 2 %) at no step that was tried"
        if stable is None
        else f"stable (instability below 2 %) from step {stable:,} on",
    ]

"""`isthmus train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .options import ArgFile, DataOptions, NetworkOptions, common_options, data_options, network_options
from .outputs import check_file, check_folder, emit


@click.command("train")
@network_options
@data_options
@click.option("--out", type=ArgFile, required=True, help="Checkpoint to write, .safetensors or .pt.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the training split.")
@click.option("--lr", type=float, help="Highest learning rate.")
@click.option("--optimizer", type=click.Choice(["sgd", "adam", "adamw"]))
@click.option("--weight-decay", type=float)
@click.option("--schedule", type=click.Choice(["cosine", "constant", "step"]))
@click.option("--augment/--no-augment", default=None, help="Random crops and mirrored images.")
@click.option("--checkpoints", type=ArgFile, help="Folder for a checkpoint of each epoch, and the history.")
@common_options
def command(
    network: NetworkOptions,
    data: DataOptions,
    out: Path,
    checkpoints: Path | None,
    device: str,
    seed: int,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Train a network on a data set of the zoo.

    What is not given is taken from the recipe for that network. The seed is that of the initial weights, of the order
    of the images and of their augmentation.
    """
    check_file(out, (".safetensors", ".pt", ".pth"))
    check_folder(checkpoints)
    import dataclasses

    from isthmus.base.files import save_state_dict
    from isthmus.zoo import Dataset, train

    from ..plain import number, percent
    from .inputs import check_device, make_network, open_data

    check_device(device)
    if data.split is not None:
        raise click.UsageError("train reads the train split and tests on the test split; --split does not go with it")
    recipe = chosen_recipe(network.model, {**chosen, "batch_size": data.batch_size}, seed)
    train_set, test_set = open_data(data, "train").dataset, open_data(data, "test").dataset
    if train_set is None or test_set is None:
        raise click.UsageError("train needs a data set of the zoo, such as --data digits")
    model = make_network(network, train_set, seed)
    history = train(model, train_set, recipe, test_set=test_set, device=device, checkpoint_dir=checkpoints)
    facts = {"model": network.model, "model_args": network.model_args, "data": train_set.name}
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    save_state_dict(model.state_dict(), out, {**metadata, "recipe": json.dumps(dataclasses.asdict(recipe))})
    last = {name: values[-1] for name, values in history.to_dict().items() if values and name.startswith(("tr", "te"))}
    last["test_samples"] = len(test_set)
    result = {"out": str(out), **facts, "recipe": dataclasses.asdict(recipe), **last}
    what = "images" if isinstance(train_set, Dataset) else "windows"
    lines = [
        f"{network.model} on {train_set.name}, {len(train_set):,} {what}, {recipe.epochs} epochs, seed {seed}",
        f"test loss {number(last['test_loss'])}, test accuracy {percent(last['test_accuracy'])}, "
        f"on {len(test_set):,} {what}",
        f"wrote {out}",
    ]
    emit(as_json, result, lines)


def chosen_recipe(model: str, chosen: dict[str, Any], seed: int) -> Any:
    """Give the recipe of a network of the zoo, with what was said on the command line in place of its own values."""
    import dataclasses

    from isthmus.zoo import RECIPES, Recipe

    recipe = RECIPES.get(model, Recipe())
    given = {name: value for name, value in chosen.items() if value is not None}
    # a short training keeps the recipe, but cannot warm up for longer than it lasts
    warmup = min(recipe.warmup_epochs, given.get("epochs", recipe.epochs))
    return dataclasses.replace(recipe, seed=seed, warmup_epochs=warmup, **given)

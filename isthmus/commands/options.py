"""Options that several commands share, packed into one value each; light, for `--help` imports this."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import click

from .methods import REPAIRS

Command = Callable[..., Any]
ArgFile = click.Path(
    path_type=Path
)  # what is at the path is checked where it is read or written, with a better message


@dataclass(frozen=True)
class NetworkOptions:
    """Which architecture: a name of the zoo, or `package.module:factory`."""

    model: str
    model_args: dict[str, Any]


@dataclass(frozen=True)
class DataOptions:
    """Which data; a value that was not given is None."""

    data: str | None
    data_args: dict[str, Any] | None
    data_dir: Path | None
    split: str | None
    limit: int | None
    batch_size: int | None


class JsonObject(click.ParamType):
    """A JSON object, such as `{"widths": [64, 64]}`."""

    name = "JSON"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """Read it, or say where it is malformed."""
        if isinstance(value, dict):
            return value
        try:
            found = json.loads(value)
        except json.JSONDecodeError as error:
            self.fail(f"{value!r} is not JSON: {error}", param, ctx)
        if not isinstance(found, dict):
            self.fail(f'{value!r} is no JSON object; write {{"name": value}}', param, ctx)
        return found


class Numbers(click.ParamType):
    """Numbers separated by commas."""

    def __init__(self, kind: type[int] | type[float], name: str) -> None:
        self.kind = kind
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Read them; sizes must be positive."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self.kind(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r}: expected numbers separated by commas", param, ctx)
        if self.kind is int and min(numbers) < 1:
            self.fail(f"{value!r}: sizes must be positive", param, ctx)
        return numbers


class Names(click.ParamType):
    """Names separated by commas."""

    name = "NAMES"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Split them."""
        return value if isinstance(value, tuple) else tuple(part.strip() for part in value.split(","))


class Settings(click.ParamType):
    """A name and its value, such as `density=0.2`; the value is JSON, or else text."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        """Split it, and read the value."""
        if isinstance(value, tuple):
            return value[0], value[1]
        name, mark, text = value.partition("=")
        if not (name and mark):
            self.fail(f"{value!r}: expected name=value", param, ctx)
        try:
            return name, json.loads(text)
        except json.JSONDecodeError:
            return name, text


def debug_option(command: Command) -> Command:
    """Add `--debug`; `main` looks for it in the arguments."""
    return click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")(command)


def common_options(command: Command) -> Command:
    """Add `--device`, `--seed`, `--json` and `--debug`; passed as `device`, `seed` and `as_json`."""
    command = debug_option(command)
    command = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")(command)
    command = seed_option(command)
    return click.option("--device", default="cpu", show_default=True, help="Where to compute, e.g. cuda.")(command)


def seed_option(command: Command) -> Command:
    """Add `--seed`."""
    return click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all randomness.")(
        command
    )


@overload
def network_options(command: Command) -> Command: ...
@overload
def network_options(*, required: bool) -> Callable[[Command], Command]: ...
def network_options(command: Command | None = None, *, required: bool = True) -> Any:
    """Add `--model` and `--model-args`; passed as `network`, None where no model was named and none is required."""
    if command is None:
        return functools.partial(_network_options, required=required)
    return _network_options(command, required=required)


def _network_options(command: Command, required: bool) -> Command:
    @functools.wraps(command)
    def packed(*args: Any, model: str | None, model_args: dict[str, Any], **others: Any) -> Any:
        return command(*args, network=None if model is None else NetworkOptions(model, model_args), **others)

    wrapped = click.option(
        "--model-args", type=JsonObject(), default="{}", help="JSON object: further arguments of the network."
    )(packed)
    return click.option(
        "--model",
        required=required,
        metavar="NAME",
        help="The architecture: mlp, resnet, vgg, all_cnn, or package.module:factory.",
    )(wrapped)


def data_options(command: Command) -> Command:
    """Add `--data` and what goes with it; passed as `data`."""

    @functools.wraps(command)
    def packed(*args: Any, **options: Any) -> Any:
        names = DataOptions.__dataclass_fields__
        chosen = DataOptions(**{name: options.pop(name) for name in names})
        return command(*args, data=chosen, **options)

    for option in (
        click.option("--batch-size", type=click.IntRange(1), help="Images in a batch.  [default: 512]"),
        click.option("--limit", type=click.IntRange(1), help="Use at most this many samples of a data set."),
        click.option("--split", type=click.Choice(["train", "test"]), help="Which part of the data to work on."),
        click.option("--data-dir", type=ArgFile, help="Folder of the data set's files.  [default: $ISTHMUS_DATA]"),
        click.option("--data-args", type=JsonObject(), help="JSON object: arguments of the factory."),
        click.option(
            "--data",
            metavar="NAME",
            help="digits, mnist, fashion_mnist, cifar10, or package.module:factory, which returns batches.",
        ),
    ):
        packed = option(packed)
    return packed


def input_shape_option(command: Command) -> Command:
    """Add `--input-shape`, for what needs the network to run but no data."""
    return click.option(
        "--input-shape", type=Numbers(int, "SHAPE"), help="Shape of one batch, e.g. 1,3,32,32, where there is no data."
    )(command)


def repair_option(command: Command) -> Command:
    """Add `--repair`."""
    return click.option(
        "--repair",
        type=click.Choice(REPAIRS),
        help="Restore activation statistics (REPAIR) on the training split.",
    )(command)

"""From what a user names on the command line to networks and data, checked before any work."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from isthmus.align import Matching, Permutation, Symmetry, symmetry
from isthmus.base.architecture import check_finite, check_same_architecture
from isthmus.base.batches import Batch, Data, batches, model_device
from isthmus.base.errors import ArchitectureError, CheckpointError, DataError, nearest
from isthmus.base.files import load_state_dict
from isthmus.zoo import DATASETS, NETWORKS, TEXTS, Dataset, Text, build, load_data, load_text, loader
from isthmus.zoo.seeding import seeded

from .options import DataOptions, NetworkOptions

# Enough to see a network run, and quick in float64.
_EXAMPLES = 4


@dataclass(frozen=True)
class Source:
    """Data that a command reads.

    Attributes:
        name: As the user named it.
        split: "train" or "test"; None for a factory that knows no splits.
        batches: Batches, to be read again and again.
        example: A few inputs.
        dataset: The data set, where it is one of the zoo.
    """

    name: str
    split: str | None
    batches: Data
    example: Batch
    dataset: Dataset | Text | None = None

    def __str__(self) -> str:
        return self.name if self.split is None else f"{self.name}, {self.split} split"

    def to_dict(self) -> dict[str, Any]:
        """Say which data this is."""
        return {"data": self.name, "split": self.split, "source": None if self.dataset is None else self.dataset.source}


def open_data(options: DataOptions, split: str, device: str = "cpu") -> Source:
    """Open the data that a user named.

    Args:
        options: What was asked for.
        split: The split to open.
        device: Where a data set is held.

    Raises:
        DataError: There is no such data set, or no batch in the data.
        DataFileError: A file of the data set is missing.
        click.UsageError: An option does not go with this data, or a factory cannot be found.
    """
    if options.data is None:
        raise click.UsageError("no data was named; pass --data, such as --data digits")
    if ":" in options.data:
        return _from_factory(options, split)
    if options.data in TEXTS:
        return _text(options, split, device)
    if options.data_args is not None:
        raise click.UsageError("--data-args are arguments of a factory or a text; data sets of images take none")
    if options.data not in DATASETS:
        raise DataError(
            f"no data set {options.data!r}{nearest(options.data, (*DATASETS, *TEXTS))}; or name a function that "
            "returns batches as package.module:factory"
        )
    found = load_data(options.data, split, data_dir=options.data_dir, limit=options.limit)  # pyright: ignore[reportArgumentType]
    found = found.to(device)
    example = Batch((found.normalise(found.images[:_EXAMPLES]),))
    return Source(options.data, split, loader(found, options.batch_size or 512), example, found)


def _text(options: DataOptions, split: str, device: str) -> Source:
    arguments = {"data_dir": options.data_dir, "limit": options.limit, **(options.data_args or {})}
    text = _call(load_text, {"name": options.data, "split": split, **arguments}, str(options.data), "--data-args")
    text = text.to(device)
    return Source(text.name, split, text.batches(options.batch_size or 32), Batch((text.inputs()[:_EXAMPLES],)), text)


def open_both(options: DataOptions, device: str = "cpu") -> tuple[Source, Source]:
    """Open the data to measure on, the test split unless another was asked for, and that to match and repair on."""
    measured = open_data(options, options.split or "test", device)
    return measured, measured if measured.split is None else open_data(options, "train", device)


def _from_factory(options: DataOptions, split: str) -> Source:
    for name in ("limit", "batch_size", "data_dir"):
        if getattr(options, name) is not None:
            flag = name.replace("_", "-")
            raise click.UsageError(f"--{flag} is for data sets of the zoo; give a factory its arguments by --data-args")
    assert options.data is not None
    factory = resolve(options.data, "--data")
    arguments = dict(options.data_args or {})
    takes_split = "split" in inspect.signature(factory).parameters
    if takes_split:
        arguments.setdefault("split", split)
    elif options.split is not None:
        raise click.UsageError(f"{options.data} has no parameter 'split', which --split would set")
    found = _call(factory, arguments, options.data, "--data-args")
    if isinstance(found, Iterator):
        found = list(found)  # what can be read once is kept, to be read again
    return Source(options.data, arguments["split"] if takes_split else None, found, next(batches(found)))


def resolve(name: str, option: str) -> Callable[..., Any]:
    """Find what `package.module:factory` names; modules of the current folder can be named.

    Raises:
        click.UsageError: There is no such module or no such function in it.
    """
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # to stay: the factory may import its neighbours when it is called
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # an import within the module
        raise click.UsageError(
            f"{option} {name}: there is no module {error.name!r}, neither in {here} nor among what is installed"
        ) from error
    except ValueError as error:
        raise click.UsageError(f"{option} {name}: expected package.module:factory") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise click.UsageError(
            f"{option} {name}: {module_name} has no function {attribute!r}{nearest(attribute, known)}"
        )
    return factory


def _call(factory: Callable[..., Any], arguments: Mapping[str, Any], name: str, option: str) -> Any:
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise click.UsageError(f"{name} cannot be called with {option} {dict(arguments)}: {error}") from error
    return factory(**arguments)


def make_network(options: NetworkOptions, dataset: Dataset | Text | None, seed: int = 0) -> nn.Module:
    """Make a network by its name in the zoo, to fit a data set, or by a factory.

    Raises:
        ArchitectureError: There is no such network, its arguments are wrong, or the factory gives something else.
        click.UsageError: The factory cannot be found or called.
    """
    if ":" not in options.model:
        if options.model not in NETWORKS:
            raise ArchitectureError(
                f"no network {options.model!r}{nearest(options.model, NETWORKS)}; or name a function that makes yours "
                "as package.module:factory"
            )
        if "seed" in options.model_args:
            raise click.UsageError("--model-args: the seed is given by --seed")
        return build(options.model, dataset, seed, **options.model_args)
    factory = resolve(options.model, "--model")
    with seeded(seed):
        model = _call(factory, options.model_args, options.model, "--model-args")
    if not isinstance(model, nn.Module):
        raise ArchitectureError(f"{options.model} gave a {type(model).__name__}; expected a torch.nn.Module")
    return model


def load_networks(options: NetworkOptions, paths: Sequence[Path], source: Source | None) -> list[nn.Module]:
    """Make a network for each checkpoint and load it, strictly.

    Raises:
        CheckpointError: A file is not a readable checkpoint.
        ArchitectureError: A checkpoint is not of this architecture, or the network does not take the data.
        NotFiniteError: A checkpoint holds NaN or infinity.
    """
    states = [load_state_dict(path) for path in paths]
    models = []
    for path, state in zip(paths, states, strict=True):
        model = make_network(options, None if source is None else source.dataset)
        state = {**state, **_implied(model, state)}
        try:
            check_same_architecture(_tensors(model), state, (f"the network {options.model}", str(path)))
        except ArchitectureError as error:
            hint = "check --model-args, and --data, to which a network of the zoo is fitted"
            raise ArchitectureError(f"{error}; {hint}") from error
        check_finite(state, str(path))
        model.load_state_dict(state, strict=False)  # what is not a tensor is not in the file
        models.append(model.eval())
    if source is not None:
        check_runs(models[0], source)
    return models


def _implied(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give what a checkpoint may leave out: the further names of tied tensors, and the counters of batch norm.

    The counters, which files from before PyTorch 0.4.1 do not have, change no output.
    """
    tensors = _tensors(model)
    held: dict[int, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in state:
            held[id(tensor)] = state[name]
    implied = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in state and id(tensor) in held:
            implied[name] = held[id(tensor)]
        elif name not in state and name.endswith("num_batches_tracked"):
            implied[name] = tensors[name]
    return implied


def check_runs(model: nn.Module, source: Source) -> None:
    """Run a network on a few inputs.

    Raises:
        ArchitectureError: It does not take them.
    """
    example = source.example.to(model_device(model))
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in example.tensors())
    try:
        with torch.no_grad():
            example.call(model)
    except (RuntimeError, TypeError, IndexError) as error:
        raise ArchitectureError(
            f"the network does not take inputs of {source.name}, of shape {shapes}: {error}; check --model-args"
        ) from error


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def find_symmetry(
    model: nn.Module,
    source: Source | None,
    input_shape: tuple[int, ...] | None,
    verify: bool = True,
    saved: Path | None = None,
) -> Symmetry:
    """Derive the symmetry of a network from a few inputs, or read a saved one, and see that it is verified.

    Args:
        model: The network.
        source: Data to take inputs from, or None.
        input_shape: Shape of inputs to draw; comes before `source`.
        verify: Measure that it holds, unless that was done before.
        saved: File of a symmetry.

    Raises:
        ArchitectureError: The saved symmetry belongs to another network.
        click.UsageError: Inputs are needed, and there are none.
        SymmetryError: It cannot be read, traced or verified.
    """
    found = None if saved is None else Symmetry.load(saved)
    if found is not None:
        found.check_fits(model, "the network")
        if found.is_verified or not verify:
            return found
    if input_shape is not None:
        example = Batch((torch.randn(input_shape, generator=torch.Generator().manual_seed(0)),))
        check_runs(model, Source("--input-shape", None, (), example))
    elif source is not None:
        example = source.example
    elif saved is None:
        raise click.UsageError("the symmetry is found by running the network; pass --data, or --input-shape 1,3,32,32")
    else:
        raise click.UsageError(
            f"--symmetry: that in {saved} was never verified; pass --data or --input-shape to verify it now, or "
            "--no-verify to take it on trust"
        )
    return symmetry(model, example, verify=verify) if found is None else found.verified(model, example)


def check_device(name: str) -> str:
    """Refuse a device that is not there.

    Raises:
        click.UsageError: With the reason.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise click.UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return name


def open_order(path: Path) -> Permutation | Matching:
    """Read a saved matching or permutation."""
    try:
        return Matching.load(path)
    except CheckpointError as error:
        if "is not a file of the form" not in str(error):
            raise
        return Permutation.load(path)

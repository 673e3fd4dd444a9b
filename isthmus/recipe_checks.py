"""Whether a recipe can be followed: methods, options, files and places, before any weight is read."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from isthmus.align.nets.methods import METHODS as ALIGNMENTS
from isthmus.base.architecture import State, check_same_architecture
from isthmus.base.errors import ArchitectureError, CheckpointError, DataError, OutputError, nearest
from isthmus.base.lazy import LazyState
from isthmus.merge.methods import METHODS, rehearse
from isthmus.zoo import DATASETS, NETWORKS, TEXTS

from .commands.methods import ALIGN, REPAIRS
from .commands.outputs import check_file
from .recipe import Recipe
from .recipe_faults import Faults, file_name
from .recipe_lines import Place
from .recipe_reading import FLAG, NUMBER, TEXT, WHOLE

SPLITS = ("train", "test")
# What the command line calls the keys that its options stand for.
FLAGS: Mapping[Place, str] = {
    ("inputs",): "checkpoint",
    ("base",): "--base",
    ("model", "name"): "--model",
    ("model", "args"): "--model-args",
    ("data",): "--data",
    ("data", "name"): "--data",
    ("align",): "--align",
    ("align", "method"): "--align",
    ("merge", "method"): "--method",
    ("merge", "options"): "--option",
    ("repair", "method"): "--repair",
    ("device",): "--device",
}


def check(recipe: Recipe, faults: Faults | None = None) -> None:
    """Check all that can be checked without reading a weight.

    Args:
        recipe: The recipe.
        faults: What was found when it was read.

    Raises:
        RecipeFileError: With everything that is wrong.
    """
    faults = Faults(file_name(recipe.file), recipe.lines) if faults is None else faults
    for part in (_check_inputs, _check_output, _check_model, _check_data, _check_merge, _check_align, _check_repair):
        part(recipe, faults)
    faults.refuse()
    _check_headers(recipe, faults)  # of files that are there
    faults.refuse()


def check_typed(recipe: Recipe) -> None:
    """Check what was typed as options, whose output is checked already.

    Raises:
        RecipeFileError: With everything that is wrong.
    """
    faults = Faults("the options", flags=FLAGS)
    for part in (_check_inputs, _check_model, _check_data, _check_merge, _check_align):
        part(recipe, faults)
    faults.refuse()


def _check_inputs(recipe: Recipe, faults: Faults) -> None:
    for place, path in recipe.files.items():
        if not path.is_file():
            what = "no matching" if "matchings" in place else "no symmetry" if "symmetry" in place else "no checkpoint"
            faults.add(place, f"{what} at {path.absolute()}{', but a folder' if path.is_dir() else ''}")
    given = [found.weight for found in recipe.inputs]
    if None in given and any(weight is not None for weight in given):
        faults.add(("inputs", given.index(None), "weight"), "is missing; give each input one, or none")
    for index, weight in enumerate(given):
        if weight is not None and not (weight >= 0 and math.isfinite(weight)):
            faults.add(("inputs", index, "weight"), f"is {weight}; expected a finite number, not negative")
    if given and all(weight == 0 for weight in given):
        faults.add(("inputs",), "all weights are zero")
    own = [found.base is not None for found in recipe.inputs]
    if any(own) and not all(own):
        faults.add(("inputs", own.index(False), "base"), "is missing; give each input its base, or all one `base`")
    if any(own) and recipe.base is not None:
        faults.add(("base",), "each input has its base already; leave out one or the other")
    used = {path.resolve() for path in (*recipe.files.values(), recipe.output)}
    for path in recipe.sha256:
        if path.resolve() not in used:
            faults.add(("sha256", _as_written(recipe, path)), "is no file of this recipe")


def _as_written(recipe: Recipe, path: Path) -> str:
    folder = Path() if recipe.file is None else recipe.file.parent
    return next((str(k[1]) for k in recipe.lines or {} if len(k) == 2 and folder / str(k[1]) == path), str(path))


def _check_output(recipe: Recipe, faults: Faults) -> None:
    output, record = recipe.output, recipe.record
    try:
        check_file(output, (".safetensors",))
        check_file(record)
    except OutputError as error:
        faults.add(("output",), str(error))
        return
    for place, path in recipe.files.items():
        if path.exists() and output.resolve() == path.resolve():
            faults.add(("output",), f"is {output}, which {'.'.join(map(str, place))} reads; choose another name")
    own = recipe.file is not None and recipe.file.resolve() == record.resolve()
    if own and not recipe.versions:
        faults.add(("output",), f"the complete recipe would be written over this one, to {record}; name one otherwise")


def _check_model(recipe: Recipe, faults: Faults) -> None:
    model = recipe.model
    if model is not None and ":" not in model.model:
        if model.model not in NETWORKS:
            known = nearest(model.model, NETWORKS)
            faults.add(("model", "name"), f"no network {model.model!r}{known}; or name package.module:factory")
        else:
            _check_arguments(NETWORKS[model.model], model.model_args, faults)
    try:
        torch.empty(0, device=recipe.device)
    except (RuntimeError, AssertionError) as error:
        faults.add(("device",), f"is {recipe.device!r}: {str(error).splitlines()[0]}")


def _check_arguments(network: Callable[..., Any], arguments: Mapping[str, Any], faults: Faults) -> None:
    known = [name for name in inspect.signature(network).parameters if name != "seed"]
    for name in arguments:
        if name not in known:
            faults.add(("model", "args", name), f"no such argument{nearest(name, known)}")


def _check_data(recipe: Recipe, faults: Faults) -> None:
    data = recipe.data
    if data is None or data.data is None:
        return
    if ":" not in data.data and data.data not in (*DATASETS, *TEXTS):
        known = nearest(data.data, (*DATASETS, *TEXTS))
        faults.add(("data", "name"), f"no data set {data.data!r}{known}; or name package.module:factory")
    if data.split is not None:
        _check_choice(data.split, SPLITS, ("data", "split"), faults)
    if recipe.model is None:
        faults.add(("data",), "state dicts of any class cannot be run; name their architecture in [model]")


def _check_merge(recipe: Recipe, faults: Faults) -> None:
    _check_choice(recipe.split, SPLITS, ("merge", "split"), faults)
    if recipe.method not in METHODS:
        _check_choice(recipe.method, METHODS, ("merge", "method"), faults)
        return
    method, count = METHODS[recipe.method], len(recipe.inputs)
    if count < method.least:
        faults.add(("inputs",), f"{count} of them; {recipe.method} merges {method.least} or more")
    if method.most is not None and count > method.most:
        faults.add(("inputs",), f"{count} of them; {recipe.method} merges at most {method.most}")
    has_base = recipe.base is not None or any(found.base for found in recipe.inputs)
    if method.base and not has_base:
        faults.add(("base",), f"is missing: {recipe.method} works on what was added to a common parent")
    if method.needs and recipe.data is None:
        faults.add(("data",), f"is missing: {recipe.method} reads {_read(method.needs)}")
    if recipe.model is None and not method.on_states and not method.needs:
        faults.add(("model",), f"is missing: {recipe.method} needs networks that can be run")
    _check_options(recipe.options, method, ("merge", "options"), recipe.method, faults)


def _check_headers(recipe: Recipe, faults: Faults) -> None:
    """Check names and shapes, which safetensors files tell without their weights, and the values of options."""
    files, first = recipe.files, ("inputs", 0, "path")
    headers = {place: path for place, path in files.items() if path.suffix == ".safetensors" and "align" not in place}
    shapes = {place: _shapes(place, path, faults) for place, path in headers.items()}
    known = shapes.pop(first, None)
    if not known:
        return
    if recipe.model is None:  # a network can tell what a file may leave out
        for place, found in shapes.items():
            _check_shapes((files[first], files[place]), known, found, place, faults)
    try:
        rehearse(METHODS[recipe.method], list(known), len(recipe.inputs), recipe.options)
    except DataError as error:
        faults.add(("merge", "options"), str(error))


def _shapes(place: Place, path: Path, faults: Faults) -> Mapping[str, torch.Tensor]:
    try:
        return LazyState(path).shapes
    except CheckpointError as error:
        faults.add(place, str(error))
        return {}


def _check_shapes(files: tuple[Path, Path], known: State, found: State, place: Place, faults: Faults) -> None:
    try:
        if found:
            check_same_architecture(known, found, (str(files[0]), str(files[1])))
    except ArchitectureError as error:
        faults.add(place, str(error))


def _check_align(recipe: Recipe, faults: Faults) -> None:
    align = recipe.align
    if align.matchings:
        if align.method is not None:
            faults.add(("align", "method"), "matchings are given; leave out the method")
        if len(align.matchings) != len(recipe.inputs) - 1:
            faults.add(("align", "matchings"), f"{len(align.matchings)} of them; give one for each input but the first")
    if align.method is None:
        return
    if align.method not in ALIGN:
        _check_choice(align.method, (*ALIGN, "none"), ("align", "method"), faults)
        return
    if ALIGN[align.method] and recipe.data is None:
        faults.add(("data",), f"is missing: aligning by {align.method} reads {_read(ALIGN[align.method])}")
    if align.method in ALIGNMENTS:
        _check_options(align.options, ALIGNMENTS[align.method], ("align", "options"), align.method, faults)
    elif align.options:
        faults.add(("align", "options"), f"{align.method} takes none")
    if recipe.model is None and align.method == "weights" and align.symmetry is not None and not align.options:
        return  # from the files alone, a tensor at a time
    if recipe.model is None:
        faults.add(
            ("align", "method"),
            f"{align.method} runs the networks; name their architecture in [model], give `matchings` (or, for weights, "
            'a symmetry) or write method = "none" where their units are in one order already',
        )
    elif recipe.data is None and align.input_shape is None and align.symmetry is None:
        faults.add(("align",), "the symmetry is found by running the network; give [data], input_shape or symmetry")


def _check_repair(recipe: Recipe, faults: Faults) -> None:
    if recipe.repair is None:
        return
    _check_choice(recipe.repair, REPAIRS, ("repair", "method"), faults)
    if recipe.data is None:
        faults.add(("data",), "is missing: a repair measures statistics on it")


def _check_choice(value: str, known: Any, place: Place, faults: Faults) -> None:
    if value not in known:
        faults.add(place, f"there is no {value!r}{nearest(value, known)}")


def _read(needs: str) -> str:
    return "batches with labels" if needs == "labels" else "batches of inputs"


def _check_options(options: Mapping[str, Any], method: Any, place: Place, name: str, faults: Faults) -> None:
    parameters = inspect.signature(method.function).parameters
    for option, value in options.items():
        if option not in method.options:
            known = nearest(option, method.options) if method.options else "; it takes none"
            faults.add((*place, option), f"{name} has no such option{known}")
        elif option in parameters and (expected := misfit(parameters[option].annotation, value)):
            faults.add((*place, option), f"is {value!r}; expected {expected}")


_KINDS = {"float": NUMBER, "int": WHOLE, "bool": FLAG, "str": TEXT}


def misfit(annotation: Any, value: Any) -> str | None:
    """Say what was expected where a value does not fit an annotation made of plain types; others pass.

    >>> misfit("float | None", 2), misfit("int", 0.5)
    (None, 'a whole number')
    """
    names = [name for name in str(getattr(annotation, "__name__", annotation)).split(" | ") if name != "None"]
    if any("Data" in name for name in names):
        return "data, which only a call of isthmus.merge can be given"
    kinds = [_KINDS.get(name) for name in names]
    if any(kind is None or kind.holds(value) for kind in kinds):
        return None
    return " or ".join(kind.name for kind in kinds if kind is not None)


def option_defaults(method: Any) -> dict[str, Any]:
    """Give the options of a method that have a default which can be written down."""
    parameters = inspect.signature(method.function).parameters
    defaults = {name: parameters[name].default for name in method.options if name in parameters}
    return {name: value for name, value in defaults.items() if isinstance(value, (bool, int, float, str))}

"""Following a recipe: read, align, merge, repair, measure, write."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from torch import Tensor, nn

from isthmus.align import Matching, Symmetry, match
from isthmus.align.nets import match_checkpoints
from isthmus.base.architecture import check_finite
from isthmus.base.errors import SymmetryError
from isthmus.base.files import load_state_dict, save_state_dict, sha256, write_atomic
from isthmus.merge import Merged, merge
from isthmus.merge.merging import merge_states
from isthmus.merge.methods import METHODS

from .commands.inputs import Source, find_symmetry, load_networks, open_both, open_data
from .commands.methods import ALIGN
from .provenance import versions
from .recipe import Recipe
from .recipe_faults import Faults, RecipeFileError, file_name
from .recipe_text import complete

if TYPE_CHECKING:
    from isthmus.align.nets import ManyMatching


@dataclass(frozen=True, eq=False)
class Result:
    """What a recipe gives.

    Attributes:
        model: The merged network; None where the recipe names no architecture.
        state: Its state dict.
        report: How it was made and, where there are labels, what was measured.
        measured: The data it was measured on.
        calibration: The data it was aligned and repaired on.
    """

    model: nn.Module | None
    state: Mapping[str, Tensor]
    report: Mapping[str, Any]
    measured: Source | None = None
    calibration: Source | None = None

    @property
    def why(self) -> str:
        """Why nothing was measured."""
        return "no --data was given" if self.measured is None else f"{self.measured} has no labels"


@dataclass(frozen=True, eq=False)
class Finished(Result):
    """A result that has been written.

    Attributes:
        output: Where.
        record: Where the complete recipe was written.
        sha256: Of the output.
    """

    output: Path = field(kw_only=True)
    record: Path = field(kw_only=True)
    sha256: str = field(kw_only=True)


@dataclass(frozen=True, eq=False)
class Opened:
    """What a recipe names, read and checked.

    Attributes:
        models: The networks.
        base: Their common parent, or one for each; None: none.
        measured: The data to measure on.
        calibration: The data to align and repair on.
        reading: The data that the method reads.
        symmetry: Of the architecture, where networks are to be aligned.
    """

    models: Sequence[nn.Module]
    base: nn.Module | Sequence[nn.Module] | None
    measured: Source | None
    calibration: Source | None
    reading: Source | None
    symmetry: Symmetry | None


def follow(recipe: Recipe, progress: bool | None = None) -> Finished:
    """Follow a recipe that has been checked; see `recipe.run`."""
    hashes = verified_hashes(recipe)
    try:
        found = result(recipe, progress)
    except click.UsageError as error:  # of what a command line would be told
        raise RecipeFileError(f"{file_name(recipe.file)}: {error.format_message()}") from error
    digest = write(recipe, found.state, hashes, found.report["repair"])
    return Finished(**vars(found), output=recipe.output, record=recipe.record, sha256=digest)


def result(recipe: Recipe, progress: bool | None = None) -> Result:
    """Give what a recipe that has been checked says, without writing it."""
    if recipe.model is None:
        state, report = _merge_states(recipe)
        return Result(None, state, report)
    opened = open_inputs(recipe)
    merged = combine(recipe, opened, progress)
    measured, calibration = opened.measured, opened.calibration
    report = {
        **merged.report,
        "align": "given" if recipe.align.matchings else recipe.align.method or "none",
        "measured_on": None if measured is None else measured.to_dict(),
        "repaired_on": calibration.to_dict() if calibration is not None and recipe.repair else None,
    }
    return Result(merged.model, merged.model.state_dict(), report, measured, calibration)


def verified_hashes(recipe: Recipe) -> dict[Path, str]:
    """Give the SHA-256 of each file that a recipe reads, and refuse those that are not the ones it was written for.

    Raises:
        RecipeFileError: With every such file and both hashes.
    """
    faults = Faults(file_name(recipe.file), recipe.lines)
    expected = {path.resolve(): digest for path, digest in recipe.sha256.items()}
    found = {}
    for place, path in recipe.files.items():
        found[path] = sha256(path)
        wanted = expected.get(path.resolve())
        if wanted is not None and found[path] != wanted.lower():
            faults.add(
                place, f"{path} is not the file that this recipe was written for: SHA-256 {found[path]}, not {wanted}"
            )
    faults.refuse()
    return found


def open_inputs(recipe: Recipe) -> Opened:
    """Read the networks of a recipe and open its data.

    Raises:
        ArchitectureError: A checkpoint is not of the architecture, or the network does not take the data.
        CheckpointError: A file is not a readable checkpoint.
        NotFiniteError: A checkpoint holds NaN or infinity.
        SymmetryError: The symmetry cannot be derived, or fails when it is verified.
    """
    assert recipe.model is not None
    measured, calibration = (None, None) if recipe.data is None else open_both(recipe.data, recipe.device)
    reading = calibration
    if recipe.data is not None and calibration is not None and calibration.split not in (None, recipe.split):
        reading = open_data(recipe.data, recipe.split, recipe.device)
    paths = [found.path for found in recipe.inputs]
    own = [found.base for found in recipe.inputs if found.base is not None]
    parents = [recipe.base] if recipe.base is not None else own
    loaded = load_networks(recipe.model, [*paths, *parents], measured)
    align, symmetry = recipe.align, None
    if align.method is not None:
        symmetry = find_symmetry(loaded[0], measured, align.input_shape, align.verify, align.symmetry)
    loaded = [model.to(recipe.device) for model in loaded]
    models, bases = loaded[: len(paths)], loaded[len(paths) :]
    base = bases[0] if recipe.base is not None else bases or None
    return Opened(models, base, measured, calibration, reading, symmetry)


def combine(recipe: Recipe, opened: Opened, progress: bool | None = None) -> Merged:
    """Align, merge, repair and measure the networks of a recipe."""
    measured, calibration = opened.measured, opened.calibration
    reading = opened.reading if METHODS[recipe.method].needs else calibration
    return merge(
        opened.models,
        None if measured is None else measured.batches,
        method=recipe.method,
        weights=recipe.weights,
        align=align_networks(recipe, opened, progress),
        repair=recipe.repair,
        repair_data=None if calibration is None else calibration.batches,
        fit_data=None if reading is None else reading.batches,
        base=opened.base,
        seed=recipe.seed,
        device=recipe.device,
        verify=recipe.align.verify,
        **recipe.options,
    )


def align_networks(
    recipe: Recipe, opened: Opened, progress: bool | None = None
) -> Sequence[Matching] | ManyMatching | None:
    """Bring the networks of a recipe into the order of the first, on the data to align on.

    Returns:
        What `merge` takes for `align`; None where they stay as they are.
    """
    align = recipe.align
    if align.matchings:
        return [Matching.load(path) for path in align.matchings]
    if align.method is None:
        return None
    reads = bool(ALIGN[align.method]) or align.options.get("choose") == "midpoint"
    batches = opened.calibration.batches if reads and opened.calibration is not None else None
    common = {"symmetry": opened.symmetry, "seed": recipe.seed, "verify": align.verify, "progress": progress}
    if align.method == "universe":
        from isthmus.align.nets import match_many

        return match_many(opened.models, batches, **common, **align.options)
    options = {"method": align.method, "restarts": align.restarts, "device": recipe.device, **common, **align.options}
    first, *others = opened.models
    return [match(first, model, batches, **options) for model in others]


def _merge_states(recipe: Recipe) -> tuple[dict[str, Tensor], dict[str, Any]]:
    paths = [found.path for found in recipe.inputs]
    states, matchings = [_finite(path) for path in paths], _order_states(recipe)
    bases = [_finite(found.base) for found in recipe.inputs if found.base is not None]
    if matchings:
        states[1:] = [matching.apply(state) for matching, state in zip(matchings, states[1:], strict=True)]
        bases[1:] = [matching.apply(state) for matching, state in zip(matchings, bases[1:], strict=False)]
    base = _finite(recipe.base) if recipe.base is not None else bases or None
    options = {"weights": recipe.weights, "base": base, "seed": recipe.seed, **recipe.options}
    report = {
        "method": recipe.method,
        "weights": recipe.weights,
        "align": recipe.align.method or ("given" if matchings else None),
        "objective": [matching.objective for matching in matchings],
        "repair": None,
        "repaired_on": None,
    }
    return merge_states(states, recipe.method, **options), report


def _finite(path: Path) -> dict[str, Tensor]:
    state = load_state_dict(path)
    check_finite({name: value for name, value in state.items() if not value.isinf().any()}, str(path))
    return state


def _order_states(recipe: Recipe) -> list[Matching]:
    align = recipe.align
    if align.matchings:
        return [Matching.load(path) for path in align.matchings]
    if align.method is None or align.symmetry is None:
        return []
    symmetry = Symmetry.load(align.symmetry)
    if align.verify and not symmetry.is_verified:
        raise SymmetryError(
            f"the symmetry in {align.symmetry} was never verified; name the architecture in [model] to verify it, or "
            "take it on trust by align.verify = false"
        )
    first, *others = (found.path for found in recipe.inputs)
    options = {"restarts": align.restarts, "seed": recipe.seed, "device": recipe.device}
    return [match_checkpoints(first, path, symmetry, **options) for path in others]


def write(recipe: Recipe, state: Mapping[str, Tensor], hashes: Mapping[Path, str], repair: str | None = None) -> str:
    """Write a result and, beside it, the complete recipe; both whole, or as they were.

    Args:
        recipe: What was followed.
        state: The result.
        hashes: SHA-256 of each file that was read.
        repair: How it was repaired.

    Returns:
        The SHA-256 of the result.

    Raises:
        OutputError: It cannot be written.
    """
    digests = dict(hashes)

    def fill(temporary: Path) -> None:
        save_state_dict(state, recipe.output)
        digests[recipe.output] = sha256(recipe.output)
        temporary.write_text(complete(recipe, repair, digests), encoding="utf-8")

    write_atomic(recipe.record, fill)
    known = {path.resolve(): digest for path, digest in recipe.sha256.items()}
    if known.get(recipe.output.resolve(), digests[recipe.output]) != digests[recipe.output]:
        _warn_of_another_result(recipe)
    return digests[recipe.output]


def _warn_of_another_result(recipe: Recipe) -> None:
    now = versions()
    other = [
        f"{name} {recipe.versions[name]}, now {now[name]}"
        for name in now
        if recipe.versions.get(name, now[name]) != now[name]
    ]
    why = f"made with {'; '.join(other)}" if other else "by the same versions; on another machine or other data?"
    warnings.warn(f"{recipe.output.name} is not what it was when this recipe was written, {why}", stacklevel=4)

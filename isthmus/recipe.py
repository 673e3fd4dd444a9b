"""Recipes: a merge written down, read and checked whole before any weight is read, and run so that it can be repeated.

A recipe is a TOML file, all of whose paths are relative to it:

    output = "merged.safetensors"     # beside it: merged.safetensors.recipe.toml, the complete recipe
    seed = 0

    [[inputs]]
    path = "a.safetensors"            # weight = 0.5, one for each input or for none

    [[inputs]]
    path = "b.safetensors"

    [model]                           # left out: state dicts of any class, for methods that need no data
    name = "mlp"                      # a network of the zoo, or package.module:factory
    args = { widths = [512, 512, 512] }

    [data]                            # measured on the test split; aligned, merged and repaired on the train split
    name = "mnist"

    [align]
    method = "weights"                # a method of `match`, or "none"

    [merge]
    method = "mean"
    options = { by_layer = { "fc4.*" = [1, 0] } }

    [repair]
    method = "rescale"
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isthmus.base.files import PathLike

from .commands.options import DataOptions, NetworkOptions
from .recipe_lines import Place

if TYPE_CHECKING:
    from .recipe_run import Finished

SUFFIX = ".recipe.toml"


@dataclass(frozen=True)
class Input:
    """A network to be merged.

    Attributes:
        path: Its checkpoint.
        weight: Its share, before division by the sum of all; None: equal shares.
        base: Checkpoint of the network that it was fine-tuned from, where each has its own.
    """

    path: Path
    weight: float | None = None
    base: Path | None = None


@dataclass(frozen=True)
class Alignment:
    """How the networks are brought into the order of the first.

    Attributes:
        method: A method of `match`; None: they stay as they are, or `matchings` say how.
        options: Of the method.
        restarts: Of weight matching.
        matchings: Files of `Matching.save`, one for each input but the first.
        symmetry: File of a symmetry; derived by default.
        input_shape: Shape of one batch to derive it with, where there is no data.
        verify: Refuse a symmetry of which it has not been measured that it holds.
    """

    method: str | None = "weights"
    options: Mapping[str, Any] = field(default_factory=dict)
    restarts: int = 2
    matchings: tuple[Path, ...] = ()
    symmetry: Path | None = None
    input_shape: tuple[int, ...] | None = None
    verify: bool = True


@dataclass(frozen=True)
class Recipe:
    """A merge, written down.

    Attributes:
        inputs: Two networks or more, or one and a base.
        output: The checkpoint to be written, `.safetensors`.
        method: A method of `merge`.
        options: Of the method.
        split: What the method reads, "train" or "test", where it needs data.
        base: Checkpoint of the common parent of fine-tuned networks.
        model: Their architecture; None: state dicts of any class.
        data: What to measure, align and repair on; None: nothing.
        align: How they are brought into one order.
        repair: None, or a method of `repair`.
        seed: Of all randomness.
        device: Where to compute.
        sha256: Of files, where they are known: another content is refused.
        versions: What computed `sha256`'s output, where that is known.
        file: Where this was read.
        lines: On which line of it each key stands.
    """

    inputs: tuple[Input, ...]
    output: Path
    method: str = "mean"
    options: Mapping[str, Any] = field(default_factory=dict)
    split: str = "train"
    base: Path | None = None
    model: NetworkOptions | None = None
    data: DataOptions | None = None
    align: Alignment = field(default_factory=Alignment)
    repair: str | None = None
    seed: int = 0
    device: str = "cpu"
    sha256: Mapping[Path, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    file: Path | None = None
    lines: Mapping[Place, int] | None = field(default=None, repr=False, compare=False)

    @property
    def weights(self) -> list[float] | None:
        """One for each input, or None where they are equal."""
        given = [found.weight for found in self.inputs if found.weight is not None]
        return given or None

    @property
    def files(self) -> dict[Place, Path]:
        """Every file that is read, by the key that names it."""
        found: dict[Place, Path] = {}
        for index, source in enumerate(self.inputs):
            found["inputs", index, "path"] = source.path
            if source.base is not None:
                found["inputs", index, "base"] = source.base
        if self.base is not None:
            found["base",] = self.base
        found |= {("align", "matchings", index): path for index, path in enumerate(self.align.matchings)}
        if self.align.symmetry is not None:
            found["align", "symmetry"] = self.align.symmetry
        return found

    @property
    def record(self) -> Path:
        """Where the complete recipe is written: beside the output."""
        return self.output.with_name(self.output.name + SUFFIX)


def load(path: PathLike) -> Recipe:
    """Read a recipe and check all of it, short of the contents of the files that it names.

    Args:
        path: A TOML file; paths in it are relative to its folder.

    Raises:
        RecipeFileError: With every unknown key, wrong type, unknown method or option, missing file or place that
            cannot be written, each with its line.
    """
    from .recipe_checks import check
    from .recipe_reading import read

    recipe, faults = read(Path(path))
    check(recipe, faults)
    return recipe


def run(recipe: Recipe | PathLike, progress: bool | None = None) -> Finished:
    """Follow a recipe: align, merge, repair, measure, write the result and, beside it, the complete recipe.

    The complete recipe holds every default, the SHA-256 of every file and the versions of what computed it. Running it
    again on the same kind of machine repeats the merge bit for bit, and refuses an input that is no longer the same.

    Args:
        recipe: A recipe, or its file.
        progress: Show bars; None: on a terminal.

    Returns:
        The merged network or state, the report, and what was written where.

    Raises:
        RecipeFileError: The recipe cannot be followed, or an input is not the one that it was written for.
        ArchitectureError: The inputs differ in a name or shape.
        CheckpointError: An input is not a readable checkpoint.
        NotFiniteError: An input holds NaN or infinity.
        OutputError: The output cannot be written; what stood there is left.

    >>> import tempfile, torch
    >>> from isthmus.base.files import load_state_dict, save_state_dict
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name, value in (("a", 1.0), ("b", 3.0)):
    ...     _ = save_state_dict({"w": torch.tensor([value])}, folder / f"{name}.safetensors")
    >>> _ = (folder / "mean.toml").write_text('''
    ...     output = "m.safetensors"
    ...     inputs = [{ path = "a.safetensors" }, { path = "b.safetensors" }]
    ...     align.method = "none"
    ... ''')
    >>> run(folder / "mean.toml").output.name, load_state_dict(folder / "m.safetensors")
    ('m.safetensors', {'w': tensor([2.])})
    """
    from .recipe_checks import check
    from .recipe_run import follow

    if isinstance(recipe, Recipe):
        check(recipe)
    else:
        recipe = load(recipe)
    return follow(recipe, progress)

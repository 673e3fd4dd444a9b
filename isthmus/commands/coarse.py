"""`--coarse`: networks that were trained on groups of the classes of a data set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import Command, DataOptions

if TYPE_CHECKING:
    from torch import Tensor

    from .inputs import Source

Groups = tuple[tuple[int, ...], ...]

_KNOWN = ("neighbours", "random", "similar", "dissimilar", "superclasses")


class CoarseLabels(click.ParamType):
    """Groups of classes: a name, a file, or JSON."""

    name = "GROUPS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | Groups:
        """Read groups from a file or JSON; a name is left to the data set."""
        if isinstance(value, tuple) or value in _KNOWN:
            return value
        if value == "pairs":
            return "neighbours"
        text, where = value, "it"
        if not value.startswith("["):
            path, where = Path(value), value
            if not path.is_file():
                self.fail(f"{value!r} is no file, and none of {', '.join(_KNOWN)}", param, ctx)
            text = path.read_text(encoding="utf-8")
        try:
            groups = json.loads(text)
        except json.JSONDecodeError as error:
            self.fail(f"{where} is not JSON: {error}", param, ctx)
        if not _are_groups(groups):
            self.fail(f"{where} holds no groups of class numbers; write [[0, 1], [2, 3]]", param, ctx)
        return tuple(map(tuple, groups))


def _are_groups(found: Any) -> bool:
    return isinstance(found, list) and all(
        isinstance(group, list) and all(type(label) is int for label in group) for group in found
    )


def coarse_option(command: Command) -> Command:
    """Add `--coarse`; a name, or groups, or None."""
    return click.option(
        "--coarse",
        type=CoarseLabels(),
        help=f"The network was trained on groups of classes: pairs, {', '.join(_KNOWN)}; or a JSON file or text such "
        "as [[0,1],[2,3]].",
    )(command)


def embedding_option(command: Command) -> Command:
    """Add `--embedding`."""
    return click.option(
        "--embedding",
        type=click.Choice(["tsne", "umap"]),
        default="tsne",
        show_default=True,
        help="How the report places features in the plane; umap needs the package umap-learn.",
    )(command)


def check_embedding(name: str) -> None:
    """Refuse an embedding whose package is missing, before any work.

    Raises:
        click.UsageError: It is.
    """
    if name == "umap" and find_spec("umap") is None:
        raise click.UsageError("--embedding umap needs the package umap-learn: pip install 'isthmus[umap]'")


@dataclass(frozen=True)
class Labelled:
    """Data with the labels that a network was trained on.

    Attributes:
        source: Batches with these labels.
        fine: The same samples with the labels of the data set.
        groups: The fine labels in each class; None where there is nothing finer.
        class_names: Name of each class; None where they have none.
        fine_names: Name of each fine label; None where they have none.
    """

    source: Source
    fine: Source
    groups: Groups | None
    class_names: tuple[str, ...] | None
    fine_names: tuple[str, ...] | None


def open_labelled(
    options: DataOptions, coarse: str | Groups | None, split: str, device: str = "cpu", seed: int = 0
) -> Labelled:
    """Open data whose classes were merged for training, or not.

    Args:
        options: What was asked for.
        coarse: The groups, or how to find them, always on the training split.
        split: The split to open.
        device: Where a data set is held.
        seed: Of random groups.

    Raises:
        DataError: The groups do not fit the data.
        click.UsageError: The data has no classes to group.
    """
    from isthmus.zoo import Dataset, coarsen

    from .inputs import open_data

    fine = open_data(options, split, device)
    dataset = fine.dataset
    if dataset is not None and not isinstance(dataset, Dataset):
        raise click.UsageError(f"--data {fine.name}: a text has no classes; name a data set of images, or a factory")
    names = None if dataset is None else dataset.classes
    if coarse is None:
        return Labelled(fine, fine, None, names, names)
    if isinstance(coarse, str):
        coarse = _named_groups(options, coarse, fine, device, seed)
    if dataset is None:
        from ..subclass_study import coarse_map

        return Labelled(replace(fine, batches=Regrouped(fine.batches, coarse_map(coarse))), fine, coarse, None, None)
    merged = coarsen(dataset, coarse).dataset
    source = replace(fine, dataset=merged, batches=_loader(options, merged))
    return Labelled(source, fine, coarse, merged.classes, names)


def _named_groups(options: DataOptions, name: str, fine: Source, device: str, seed: int) -> Groups:
    from isthmus.zoo import Dataset, coarsen

    from .inputs import open_data

    if not isinstance(fine.dataset, Dataset):
        raise click.UsageError(
            f"--coarse {name} is for data sets of the zoo; of {fine.name} give the groups as JSON, [[0,1],[2,3]] say"
        )
    # Those that the network was trained on: the test images, or a part of all, could be paired otherwise.
    whole = fine.split == "train" and options.limit is None
    found = fine.dataset if whole else open_data(replace(options, limit=None), "train", device).dataset
    assert isinstance(found, Dataset)
    return coarsen(found, name, seed=seed).groups


def _loader(options: DataOptions, dataset: Any) -> Any:
    from isthmus.zoo import loader

    return loader(dataset, options.batch_size or 512)


class Regrouped:
    """Batches whose labels are replaced by the class that each belongs to; read again as often as the batches are."""

    def __init__(self, batches: Any, to_class: Tensor) -> None:
        self._batches, self._to_class = batches, to_class

    def __iter__(self) -> Iterator[Any]:
        from isthmus.base.batches import batches

        from ..subclass_study import coarse_labels

        for batch in batches(self._batches):
            if batch.targets is not None:
                batch = replace(batch, targets=coarse_labels(batch.targets, self._to_class))
            yield batch

"""`isthmus subclasses`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .coarse import Groups, Labelled, check_embedding, coarse_option, embedding_option, open_labelled
from .options import ArgFile, DataOptions, NetworkOptions, common_options, data_options, network_options
from .outputs import check_folder, emit

if TYPE_CHECKING:
    from torch import nn

    from ..collapse_figures import Embedding
    from ..subclass_study import SubclassStudy

_CRITERIA = ("silhouette", "gap", "bic", "eigengap")


class Count(click.ParamType):
    """How many clusters a class has: a number, or the criterion that finds it."""

    name = "COUNT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Read it."""
        if value in _CRITERIA or isinstance(value, int):
            return value
        if not value.isdecimal() or int(value) < 1:
            self.fail(f"{value!r}: expected a number of clusters, or one of {', '.join(_CRITERIA)}", param, ctx)
        return int(value)


@click.command("subclasses")
@click.argument("net", type=ArgFile)
@network_options
@data_options
@coarse_option
@click.option("--layer", help="Layer to read.  [default: what goes into the classifier]")
@click.option("--classifier", metavar="LAYER", help="The last linear layer; found by default.")
@click.option(
    "--method",
    type=click.Choice(["kmeans", "spectral", "mixture", "hdbscan"]),
    default="kmeans",
    show_default=True,
    help="How to cluster.",
)
@click.option("--count", type=Count(), help=f"Clusters in each class, or {', '.join(_CRITERIA)}; by default as found.")
@click.option(
    "--project",
    type=click.Choice(["tsne", "pca", "whiten", "none"]),
    default="tsne",
    show_default=True,
    help="Where to cluster.",
)
@click.option(
    "--per-class",
    type=click.IntRange(3),
    default=2000,
    show_default=True,
    help="Cluster so many samples of a class at most; the others go with their neighbours.",
)
@click.option("--second", metavar="NET", type=ArgFile, help="Another network, whose clusters to compare.")
@click.option("--untrained", is_flag=True, help="Cluster the features of an untrained network, too.")
@click.option("--inputs/--no-inputs", default=True, help="Cluster the raw inputs, too, where fine labels are known.")
@click.option("--report", type=ArgFile, help="Folder for a page with pictures and tables, and all values as files.")
@embedding_option
@common_options
def command(
    net: Path,
    network: NetworkOptions,
    data: DataOptions,
    coarse: str | Groups | None,
    per_class: int,
    second: Path | None,
    untrained: bool,
    report: Path | None,
    embedding: Embedding,
    device: str,
    seed: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Find clusters inside the classes of a network; with --coarse, hold them against the labels it never saw.

    Clusters are found on the train split, or on --split; a probe of them is tested on the test split.
    """
    check_folder(report)
    check_embedding(embedding)
    if untrained and coarse is None:
        raise click.UsageError("--untrained is held against fine labels; say by --coarse which ones a class holds")
    from ..subclass_study import subclass_study
    from .inputs import check_device

    check_device(device)
    labelled = open_labelled(data, coarse, data.split or "train", device, seed)
    test = None
    if labelled.groups is not None and labelled.fine.split == "train":
        test = open_labelled(data, labelled.groups, "test", device)
    models = _networks(network, (net,) if second is None else (net, second), labelled, device)
    study = subclass_study(
        models[0],
        labelled.fine.batches,
        None if test is None else test.fine.batches,
        groups=labelled.groups,
        class_names=labelled.class_names,
        fine_names=labelled.fine_names if labelled.groups is not None else None,
        second=models[1] if second is not None else None,
        others={"an untrained network": _untrained(network, labelled, seed, device)} if untrained else None,
        limit=per_class,
        seed=seed,
        **options,
    )
    files = {"the network": net} | ({} if second is None else {"the second network": second})
    written = [] if report is None else [_write(study, labelled, test, files, report, embedding)]
    content = {**study.to_dict(), "measured_on": labelled.source.to_dict()}
    content["tested_on"] = None if test is None else test.source.to_dict()
    emit(as_json, content, [*_lines(study, labelled, test), *written])


def _networks(options: NetworkOptions, paths: tuple[Path, ...], labelled: Labelled, device: str) -> list[nn.Module]:
    from .inputs import load_networks

    return [model.to(device) for model in load_networks(options, paths, labelled.source)]


def _untrained(options: NetworkOptions, labelled: Labelled, seed: int, device: str) -> nn.Module:
    from .inputs import make_network

    return make_network(options, labelled.source.dataset, seed).to(device)


def _lines(study: SubclassStudy, labelled: Labelled, test: Labelled | None) -> list[str]:
    from ..plain import number, percent, table
    from ..subclasses_report import agreement_table, class_table

    lines = [
        f"{study.features.layer} on {labelled.fine}: {len(study.features):,} samples, NC1 {number(study.collapse.nc1)}",
        study.found.method,
        "",
        table(*class_table(study)),
        "",
    ]
    if study.caution is not None:
        lines += [f"caution: {study.caution}", ""]
    if study.agreements:
        lines += [table(*agreement_table(study)), ""]
    if study.probe is not None and test is not None:
        figures = f"{percent(study.probe.accuracy)}, of one of fine labels {percent(study.probe.oracle)}"
        lines.append(f"accuracy of a probe of the clusters on {test.fine}: {figures}")
    if study.matching is not None:
        found = study.matching
        chance = f"by chance {percent(found.null_overlap)} (p {number(found.p_value)})"
        lines.append(f"samples in partner clusters of the second network: {percent(found.overlap)}, {chance}")
    return lines


def _write(
    study: SubclassStudy, labelled: Labelled, test: Labelled | None, files: Mapping[str, Path], folder: Path,
    embedding: Embedding,
) -> str:  # fmt: skip
    from ..subclasses_report import write_subclasses

    where = {"measured_on": str(labelled.fine)} | ({} if test is None else {"tested_on": str(test.fine)})
    return f"wrote {write_subclasses(study, folder, files=files, embedding=embedding, **where)}"

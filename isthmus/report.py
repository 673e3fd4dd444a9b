"""The report of a study: one self-contained page, and the data of its figures and tables beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

from isthmus.align.nets.methods import METHODS
from isthmus.base.files import PathLike, make_folder, write_atomic
from isthmus.merge import Path

from . import elements, figures
from .page import page
from .plain import dumps, number, percent
from .provenance import describe_files, versions
from .report_captions import layer_captions
from .study import Study

# How each method of matching finds the order.
HOW = {
    "weights": "their weights",
    "frank_wolfe": "their weights",
    "sinkhorn": "their weights",
    "activations": "their activations",
    "iterated": "their activations and weights",
    "straight_through": "the loss halfway",
    "learned": "the loss halfway",
    "identity": "no change, which was best",
}


def write_report(study: Study, folder: PathLike, *, files: Mapping[str, PathLike] | None = None) -> File:
    """Write `report.html` and, with the data of every figure and table, `report.json`.

    The page fetches nothing: figures are inline SVG. The same study gives the same files, byte for byte.

    Args:
        study: What to report.
        folder: Made if it is missing.
        files: The files that were read, by what they are ("network A", …); their names, sizes and SHA-256 are recorded.

    Returns:
        The path of the page.

    Raises:
        OutputError: The folder cannot be written.

    >>> import tempfile
    >>> from isthmus.study import study
    >>> from isthmus.zoo import load_data, loader, mlp
    >>> found = study(mlp(64, (8,), seed=0), mlp(64, (8,), seed=1), loader(load_data("digits", "test")), points=3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_report(found, folder).name
    'report.html'
    """
    folder = make_folder(folder)
    content = study.to_dict() | {"files": describe_files(files or {}), "versions": versions()}
    sections = [
        elements.figures_section(_figures(study)),
        elements.headed("Networks", _networks(study)),
        elements.headed("Barriers and midpoints", _barriers(study)),
        elements.columns_section(
            {
                "Units matched": _groups(study),
                "Files": elements.file_list(content["files"]),
                "Settings": elements.pairs(_settings(study)),
                "Versions": elements.pairs(content["versions"]),
            },
            small=True,
        ),
    ]
    html = page(study.verdict, _lead(study), _tiles(study), sections)
    write_atomic(folder / "report.json", lambda path: path.write_text(dumps(content, indent=1), encoding="utf-8"))
    return write_atomic(folder / "report.html", lambda path: path.write_text(html, encoding="utf-8"))


def _lead(study: Study) -> str:
    settings = study.settings
    how = HOW[study.matching.method.removeprefix("auto: ")]
    if METHODS[settings["method"]].needs:  # a repair reads data too, and says so itself
        how = f"{how} on {settings['match_data']}"
    return (
        f"Two networks, A and B ({settings['architecture']}, {settings['parameters']:,} parameters each), were "
        f"measured on {settings['eval_data']} ({settings['samples']:,} samples), at {settings['points']} points of the "
        f"straight line between them: with B as trained, and with its units brought into the order of A's by {how}. "
        "The merged network is the average after matching."
    )


def _repair_note(study: Study) -> str:
    if study.repaired is None:
        return ""
    return (
        f" Repaired networks have seen {study.settings['match_data']}, on which the statistics of their units were "
        "measured; the naive ones have not."
    )


def _lines_note(study: Study) -> str:
    others = list(study.naive.also)
    also = f" Dotted: on {', '.join(others)}." if others else ""
    return " Shaded: 95 % intervals over the choice of samples." * (study.naive.contributions is not None) + also


def _tiles(study: Study) -> list[tuple[str, str]]:
    return [
        ("Loss barrier, B as trained", number(study.naive.barrier)),
        ("Loss barrier, B matched", number(study.matched.barrier)),
        ("Accuracy of the naive average", percent(study.networks["naive average"]["metric"])),
        ("Accuracy of the merged network", percent(study.networks["merged"]["metric"])),
    ]


def _figures(study: Study) -> list[str]:
    drawn = figures.study_figures(study)
    said = {**_captions(study), **layer_captions(study)}
    return [
        elements.figure(figures.svg(drawn[name], name, alt), heading, caption)
        for name, (heading, caption, alt) in said.items()
        if name in drawn
    ]


def _captions(study: Study) -> dict[str, tuple[str, str, str]]:
    """Give for each figure its heading, its caption and its text for those who do not see it."""
    settings, convention = study.settings, study.similarity.convention
    where = f"{settings['samples']:,} samples of {settings['eval_data']}"
    barriers = "; ".join(f"{name} {number(path.barrier)}" for name, path in study.paths.items())
    middles = "; ".join(f"{name} {percent(path.midpoint_accuracy)}" for name, path in study.paths.items())
    means = ", ".join(f"{name} {number(mean)}" for name, mean in study.mean_scores.items())
    score = "Cosine similarity of all weights of a unit of A with those of its match in B"
    if study.matching.score == "correlation of activations":
        score = f"Correlation of the activations of a unit of A and its match in B on {settings['match_data']}"
    return {
        "loss": (
            "Loss on the path",
            f"Loss on {where}. The barrier is the greatest height of a curve above the straight line between its ends."
            + _lines_note(study)
            + _repair_note(study),
            f"Loss against place on the line between the networks. Loss barriers: {barriers}.",
        ),
        "accuracy": (
            "Accuracy on the path",
            f"Accuracy on {where}." + _lines_note(study) + _repair_note(study),
            f"Accuracy against place on the line between the networks. At the midpoint: {middles}.",
        ),
        "scores": (
            "How well units match",
            f"{score}; 1 is a perfect match.",
            f"Match scores of units, sorted, one curve for each group. Means: {means}.",
        ),
        "similarity": (
            "Similarity of layers",
            f"{study.similarity.index.upper()} of each layer of A with each layer of B on {where}: "
            f"{convention['estimator']}; places of a feature map: {_POSITIONS[convention['positions']]}. The order of "
            "units does not matter to it.",
            f"Map of {study.similarity.index.upper()} between {len(study.similarity.layers_a)} layers of A and "
            f"{len(study.similarity.layers_b)} of B.",
        ),
    }


_POSITIONS = {"mean": "averaged", "samples": "counted as samples", "features": "counted as features"}


def _networks(study: Study) -> str:
    names = {
        **{"A": "network A", "B": "network B", "naive average": "average as trained"},
        **{"ensemble": "ensemble of A and B", "merged": "merged"},
    }
    repaired = f", repaired ({study.settings['repair']})" if study.settings["repair"] else ""
    rows = [
        (names[name] + (repaired if name == "merged" else ""), number(found["loss"]), percent(found["metric"]))
        for name, found in study.networks.items()
    ]
    return elements.table(("network", "loss", "accuracy"), rows)


def _barriers(study: Study) -> str:
    rows = []
    for name, path in study.paths.items():
        rows.append(_barrier(name, path, study.intervals[name]))
        rows.extend(_barrier(f"{name}, on {where}", other, None) for where, other in path.also.items())
    headers = (
        "path to B",
        "loss barrier",
        "95\u00a0% interval",
        "accuracy barrier",
        "loss at\u00a0½",
        "accuracy at\u00a0½",
    )
    return elements.table(headers, rows)


def _barrier(name: str, path: Path, interval: tuple[float, float] | None) -> tuple[str, ...]:
    return (
        name,
        number(path.barrier),
        "–" if interval is None else f"{number(interval[0])} to {number(interval[1])}",
        number(path.accuracy_barrier),
        number(path.midpoint_loss),
        percent(path.midpoint_accuracy),
    )


def _groups(study: Study) -> str:
    rows = []
    for name, scores in study.matching.scores.items():
        missing = int(scores.isnan().sum())
        note = f" ({missing} without a score)" if missing else " (by weights)" if _fell_back(study, name) else ""
        rows.append((name + note, str(len(scores)), number(study.mean_scores[name])))
    return elements.table(("group", "units", "mean score"), rows)


def _fell_back(study: Study, group: str) -> bool:
    return group in study.matching.by_weights


def _settings(study: Study) -> dict[str, Any]:
    settings = study.settings
    return {
        "matching": settings["method"],
        "repair": settings["repair"] or "none",
        "weights of A and B": ", ".join(f"{weight:g}" for weight in settings["weights"]),
        "points": settings["points"],
        "seed": settings["seed"],
        "device": settings["device"],
        "measured on": settings["eval_data"],
        "matched or repaired on": settings["match_data"] or "no data",
    }

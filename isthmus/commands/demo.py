"""`isthmus demo`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from .options import ArgFile, debug_option
from .outputs import check_folder, emit

# Long enough, at a rate high enough, that two seeds end in basins that are clearly apart.
_WIDTHS = [128, 128, 128]
_RATE, _DECAY = 0.2, 2e-3


@click.command("demo")
@click.option("--out", type=ArgFile, default="isthmus-demo", show_default=True, help="Folder for all results.")
@click.option("--epochs", type=click.IntRange(1), default=20, hidden=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@debug_option
def command(out: Path, epochs: int, as_json: bool) -> None:
    """Train two networks on embedded digits from two seeds, match and merge them, and write a report.

    Needs no file and no network connection, and takes seconds.
    """
    check_folder(out)
    from isthmus.base.files import make_folder, save_state_dict
    from isthmus.zoo import Recipe, build, load_data, loader, train

    from ..figures import save, study_figures
    from ..plain import number, percent, table
    from ..report import write_report
    from ..study import study

    make_folder(out)
    train_set, test_set = load_data("digits", "train"), load_data("digits", "test")
    models = []
    with _one_thread():
        for seed, name in enumerate("ab"):
            model = build("mlp", train_set, seed=seed, widths=_WIDTHS)
            warmup = min(1.0, epochs / 2)
            recipe = Recipe(epochs=epochs, lr=_RATE, weight_decay=_DECAY, warmup_epochs=warmup, seed=seed)
            train(model, train_set, recipe)
            save_state_dict(model.state_dict(), out / f"{name}.safetensors")
            models.append(model.eval())
        found = study(
            models[0],
            models[1],
            loader(test_set),
            data_match=loader(train_set),
            eval_name="digits, test split",
            match_name="digits, train split",
        )
    found.matching.save(out / "matching.safetensors")
    save_state_dict(found.merged.state_dict(), out / "merged.safetensors")
    save(study_figures(found)["loss"], out / "path.png")
    page = write_report(found, out, files={f"network {name.upper()}": out / f"{name}.safetensors" for name in "ab"})
    rows = [(name, number(figures["loss"]), percent(figures["metric"])) for name, figures in found.networks.items()]
    lines = [
        found.verdict,
        f"measured on digits, test split: {found.settings['samples']} samples",
        "",
        table(("network", "loss", "accuracy"), rows),
        "",
        f"report: {page.absolute()}",
    ]
    emit(as_json, {**found.to_dict(), "report": str(page), "widths": _WIDTHS}, lines)


@contextmanager
def _one_thread() -> Iterator[None]:
    # Networks this small run no faster on several threads, and on a busy machine many times slower.
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

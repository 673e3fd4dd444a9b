"""The notebooks run as committed, and were committed with their results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(
    path: Path, run_code: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every cell, on small networks of the embedded data; modules beside a notebook are found as they are by a kernel.
    monkeypatch.setenv("ISTHMUS_QUICK", "1")
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(path.parent))
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells), "commit it executed: make notebooks"
    code = "import matplotlib\nmatplotlib.use('Agg')\n" + "\n".join("".join(cell["source"]) for cell in cells)
    run_code(code)


def test_there_is_a_notebook() -> None:
    assert NOTEBOOKS

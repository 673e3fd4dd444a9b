"""What the README shows runs as printed."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def test_python_examples_run_as_printed(run_code: Callable[[str], str]) -> None:
    # One after the other, as a reader would try them: later ones ask about the networks of the first.
    printed = run_code("import matplotlib\nmatplotlib.use('Agg')\n" + "\n".join(blocks("python")))
    barriers = re.search(r"^barrier (\S+) matched (\S+)$", printed, re.MULTILINE)
    assert barriers, printed
    naive, matched = map(float, barriers.groups())
    assert naive > 0.3
    assert matched < naive / 3
    assert re.search(r"^\d+\.\d+ \[\('fc1', \d+, 'free'\), .*\] \(\)$", printed, re.MULTILINE), printed
    assert "('fc1', 'relu1', 'fc2'" in printed
    for index in ("cka", "svcca", "procrustes", "rsa"):
        assert re.search(rf"^{index} \[", printed, re.MULTILINE), printed
    for layer in ("relu1", "relu2"):
        found = re.search(rf"^{layer} (\{{.*\}})$", printed, re.MULTILINE)
        assert found, printed
        figures = ast.literal_eval(found[1])
        assert figures["semi"] >= figures["one_to_one"] > figures["null"] + 0.2


def test_table_of_invariances_is_that_of_the_indices() -> None:
    from isthmus.metrics import INDICES

    columns = ("orthogonal", "scaling", "linear", "permutation", "translation")
    rows = re.findall(r"^\| `(\w+)`([^|]*)\|((?: (?:yes|no) \|){5})$", README.read_text(), re.MULTILINE)
    assert {name for name, _, _ in rows} == set(INDICES)
    for name, which, cells in rows:
        index = INDICES[name]()
        found = index.invariances_y if "predicted" in which else index.invariances
        assert found is not None
        stated = [cell.strip() == "yes" for cell in cells.strip(" |").split("|")]
        assert stated == [getattr(found, column) for column in columns], (name, which)


def test_local_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README.read_text()):
        assert (README.parent / target).exists(), target


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", README.read_text(), re.MULTILINE))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (README.parent / "Makefile").read_text(), re.MULTILINE)

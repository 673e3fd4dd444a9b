"""What the README shows runs as printed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def test_python_example_opens_the_path(run_code: Callable[[str], str]) -> None:
    (code,) = blocks("python")
    printed = run_code(code)
    barriers = re.search(r"barrier (\S+) matched (\S+)", printed)
    assert barriers, printed
    naive, matched = map(float, barriers.groups())
    assert naive > 0.3
    assert matched < naive / 3


def test_local_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README.read_text()):
        assert (README.parent / target).exists(), target


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", README.read_text(), re.MULTILINE))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (README.parent / "Makefile").read_text(), re.MULTILINE)

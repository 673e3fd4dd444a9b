import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize(
    "name",
    [
        "isthmus",
        "isthmus.cli",
        "isthmus.plain",
        "isthmus.distillation",
        "isthmus.recipe",
        "isthmus.recipe_lines",
        "isthmus.recipe_text",
        "isthmus.spawning",
        "isthmus.study",
        "isthmus.report",
    ],
)
def test_examples_in_docstrings(name):
    results = doctest.testmod(import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 0
    assert results.failed == 0

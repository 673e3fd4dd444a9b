"""The examples in the docstrings hold."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    [
        "checks",
        "cifar",
        "coarse",
        "data",
        "distillation",
        "idx",
        "networks",
        "norms",
        "recipe",
        "resnet",
        "resuming",
        "seeding",
        "subset",
        "training",
    ],
)
def test_examples(name: str):
    assert doctest.testmod(importlib.import_module(f"isthmus.zoo.{name}")).failed == 0

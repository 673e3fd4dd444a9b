"""The symmetry of common architectures: nothing missing from what was derived by hand, and nothing too much."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus.align import Symmetry, symmetry


def _load() -> Any:
    name = "isthmus_test_architectures"
    folder = Path(__file__).parent / "architectures"
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    package = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


known = _load()


@cache
def found_for(name: str) -> Symmetry:
    architecture = known.ARCHITECTURES[name]
    return symmetry(architecture.model(), architecture.data(), verify=False)


def run(model: nn.Module, data: Any) -> list[Tensor]:
    with torch.no_grad():
        if isinstance(data, Mapping):
            output = model(**data)
        else:
            output = model(*data) if isinstance(data, tuple) else model(data)
    output = output["logits"] if isinstance(output, Mapping) else output
    output = [output] if isinstance(output, Tensor) else list(output)
    return [tensor for tensor in output if isinstance(tensor, Tensor) and tensor.is_floating_point()]


def change(before: list[Tensor], after: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", known.ARCHITECTURES)
def test_groups_are_those_derived_by_hand(name: str) -> None:
    expected = known.ARCHITECTURES[name]
    found = found_for(name)
    assert known.multiset(found) == known.multiset(found, expected)
    assert known.matched(found, expected) == []


@pytest.mark.parametrize("name", known.ARCHITECTURES)
def test_planted_permutations_change_nothing(name: str) -> None:
    """Outputs in double precision stay, while the parameters of every group do not."""
    architecture = known.ARCHITECTURES[name]
    model, data = architecture.model(), architecture.data()
    found = found_for(name)
    before = run(model, data)
    assert change(before, run(model, architecture.data(1))) > 1e-3
    for seed in range(3):
        permuted = found.random(torch.Generator().manual_seed(seed)).apply(model)
        assert change(before, run(permuted, data)) < architecture.tolerance
    assert sum(group.size for group in found.groups) > 0


@pytest.mark.parametrize("name", known.ARCHITECTURES)
def test_the_symmetry_verifies(name: str) -> None:
    architecture = known.ARCHITECTURES[name]
    assert found_for(name).verify(architecture.model(), architecture.data()).check().passed

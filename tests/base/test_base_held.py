"""Batches that are kept: read once, joined only where samples stand alone, within a bound on memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from isthmus.base.errors import DataError
from isthmus.base.held import Held


class Counting:
    def __init__(self, *batches: Tensor | dict[str, Tensor]) -> None:
        self.batches, self.readings = batches, 0

    def __iter__(self):
        self.readings += 1
        yield from self.batches


def parts(*sizes: int, units: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, units, generator=generator) for size in sizes]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 2))


def test_what_fits_is_read_once_and_what_does_not_is_read_again() -> None:
    data = Counting(*parts(3, 2))
    held = Held(data)
    for _ in range(3):
        assert [len(batch) for batch in held] == [3, 2]
    assert (data.readings, held.count) == (1, 2)
    large = Held(data, memory=3 * 4 * 4)
    for _ in range(2):
        assert [len(batch) for batch in large] == [3, 2]
    assert (data.readings, large.count) == (3, 2)
    assert list(large.groups(network())) != large.kept
    with pytest.raises(DataError, match="is an iterator, which can be read once, but it is read again"):
        list(Held(iter(parts(3, 2)), memory=50))


def test_a_reading_that_was_broken_off_is_not_kept() -> None:
    held = Held(parts(3, 2, 5))
    next(iter(held))
    assert held.kept is None
    assert [len(batch) for batch in held] == [3, 2, 5]


def test_batches_are_joined_in_order() -> None:
    given = parts(3, 2, 5)
    (whole,) = Held(given).groups(network())
    assert torch.equal(whole.args[0], torch.cat(given))
    (named,) = Held([{"input": part, "y": torch.zeros(len(part))} for part in given]).groups(network())
    assert torch.equal(named.kwargs["input"], torch.cat(given))
    (one,) = Held(given[0]).groups(network())
    assert one.args[0] is given[0]


def test_activations_stay_within_the_memory() -> None:
    given = parts(*[10] * 8)
    # two layers of 100 float32 units and four inputs are alive at a time; half as much again for what repairs them
    sample = (2 * 100 + 4) * 4 * 1.5
    for count in (1, 2, 4, 8):
        groups = list(Held(given, memory=int(sample * 80 / count)).groups(network()))
        assert len(groups) == count
        assert {len(group) for group in groups} == {80 // count}
    assert len(list(Held(given, memory=8 * 160).groups(network()))) == 8


class Related(nn.Module):
    """Outputs that depend on the whole batch, or have no rows."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.linear = how, nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor | dict[str, Tensor] | str:
        y = self.linear(x) * scale
        return {"mean": y - y.mean(0), "sum": y.sum(0), "text": "nothing", "dict": {"y": y}}[self.how]


@pytest.mark.parametrize(("how", "joined"), [("mean", False), ("sum", False), ("text", False), ("dict", True)])
def test_batches_are_joined_only_where_each_sample_stands_alone(how: str, joined: bool) -> None:
    held = Held(parts(4, 4))
    assert len(list(held.groups(Related(how)))) == (1 if joined else 2)


def test_batches_that_do_not_fit_together_are_left() -> None:
    one, other = parts(3)[0], parts(3, units=5)[0]
    assert len(list(Held([one, other]).groups(network()))) == 2
    assert len(list(Held([one[:1], one]).groups(network()))) == 2  # one sample tells nothing
    model = Related("dict")
    scaled = [{"x": one, "scale": 2.0}, {"x": one, "scale": 2.0}, {"x": one, "scale": 3.0}]
    assert len(list(Held(scaled[:2]).groups(model))) == 1
    assert len(list(Held(scaled).groups(model))) == 3

"""Receptive fields: against their arithmetic, and against changing the input pixel by pixel."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from isthmus.align.units.receptive_field import ReceptiveField, receptive_field
from isthmus.base.errors import DataError, LayerNotFoundError


@st.composite
def windows(draw: st.DrawFn) -> tuple[str, int, int, int, int]:
    """Kind, kernel, stride, padding, dilation of a layer whose every window sees something but padding."""
    kind = draw(st.sampled_from(["conv", "conv", "max", "average"]))
    kernel = draw(st.integers(1, 4))
    dilation = draw(st.integers(1, 3)) if kind in ("conv", "max") else 1
    most = kernel // 2 if kind != "conv" else dilation * (kernel - 1) // 2
    return kind, kernel, draw(st.integers(1, 3)), draw(st.integers(0, most)), dilation


def stack(plan: list[tuple[str, int, int, int, int]]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for kind, kernel, stride, padding, dilation in plan:
        if kind == "conv":
            layers += [nn.Conv2d(2, 2, kernel, stride, padding, dilation), nn.BatchNorm2d(2), nn.ReLU(inplace=True)]
        elif kind == "max":
            layers.append(nn.MaxPool2d(kernel, stride, padding, dilation))
        else:
            layers.append(nn.AvgPool2d(kernel, stride, padding))
    return nn.Sequential(*layers)


def arithmetic(plan: list[tuple[str, int, int, int, int]], place: int) -> tuple[int, int]:
    """First and last row that a place sees, from the last layer down (Araujo et al. 2019, section 2)."""
    first = last = place
    for _, kernel, stride, padding, dilation in reversed(plan):
        first, last = first * stride - padding, last * stride - padding + dilation * (kernel - 1)
    return first, last


def taps(plan: list[tuple[str, int, int, int, int]], place: int, size: int) -> set[int]:
    """Every row that a place sees, without those that fall into the padding of some layer."""
    sizes = [lengths(plan[:depth], size) for depth in range(len(plan))]
    seen = {place}
    for (_, kernel, stride, padding, dilation), length in zip(reversed(plan), reversed(sizes), strict=True):
        seen = {p * stride - padding + dilation * k for p in seen for k in range(kernel)}
        seen = {p for p in seen if 0 <= p < length}
    return seen


def lengths(plan: list[tuple[str, int, int, int, int]], size: int) -> int:
    for _, kernel, stride, padding, dilation in plan:
        size = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    return size


@settings(max_examples=30, deadline=None)
@given(plan=st.lists(windows(), min_size=1, max_size=4), data=st.data())
def test_equals_the_arithmetic_of_kernel_stride_padding_dilation(
    plan: list[tuple[str, int, int, int, int]], data: st.DataObject
) -> None:
    sizes, model = (26, 21), stack(plan)
    places = [lengths(plan, size) for size in sizes]
    if min(lengths(plan[:depth], size) for size in sizes for depth in range(1, len(plan) + 1)) < 1:
        return
    position = tuple(data.draw(st.integers(0, count - 1)) for count in places)
    field = receptive_field(model, str(len(model) - 1), (2, *sizes), position)
    assert field.traced
    gaps = any(dilation > 1 or stride > kernel for _, kernel, stride, _, dilation in plan)
    for axis, (size, place) in enumerate(zip(sizes, position, strict=True)):
        first, last = arithmetic(plan, place)
        span = field.clipped[axis], field.clipped[axis] + field.clipped[axis + 2]
        seen = sorted(taps(plan, place, size))
        before, after = field.padding[axis]
        known = field.axes[axis]
        assert span == (seen[0], seen[-1] + 1)
        assert field.box[axis] + before <= seen[0] <= seen[-1] < sum(field.box[axis::2]) - after
        if not gaps and places[axis] > 4:  # else fields at the border can look like others
            assert before in (max(0, -first), 0)
            assert after in (max(0, last + 1 - size), 0)
            if known.jump is not None and known.start is not None and known.stop is not None:
                assert (field.box[axis], field.box[axis + 2]) == (first, last + 1 - first)


@pytest.mark.parametrize(
    ("plan", "places"),
    [
        ([("conv", 5, 1, 2, 1), ("max", 2, 2, 0, 1), ("conv", 3, 1, 1, 1), ("max", 3, 2, 1, 1)], 7),
        ([("conv", 3, 1, 2, 2), ("average", 2, 2, 0, 1), ("conv", 3, 1, 3, 3)], 14),
    ],
)
def test_the_rule_is_known_wherever_some_fields_lie_inside(
    plan: list[tuple[str, int, int, int, int]], places: int
) -> None:
    model = stack(plan)
    field = receptive_field(model, str(len(model) - 1), (2, 28, 28), (0, places - 1))
    for position in product(range(places), range(places)):
        spans = [arithmetic(plan, place) for place in position]
        box = (*(first for first, _ in spans), *(last + 1 - first for first, last in spans))
        assert field.at(position).box == box == field.at(torch.tensor(position)).box
    assert {axis.jump for axis in field.axes} == {28 // places}


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 5, padding=2)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(torch.cat([self.small(x), self.large(x)], 1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 1, 3, 2, 1), nn.Conv2d(1, 1, 3, 1, 1)
        self.short, self.out = nn.Conv2d(1, 1, 1, 2), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x).relu_()) + self.short(x))


def changed(model: nn.Module, size: tuple[int, int], trials: int = 12) -> Tensor:
    """Tell which pixels, (height, width), change which outputs, (units, rows, columns), by changing each one."""
    generator = torch.Generator().manual_seed(0)
    model = model.double().eval()
    found = torch.zeros(())
    with torch.no_grad():
        for trial in range(trials):
            x = torch.rand(1, 1, *size, generator=generator, dtype=torch.float64)
            each = x.repeat(size[0] * size[1], 1, 1, 1)
            places = torch.arange(len(each))
            each[places, 0, places // size[1], places % size[1]] += 10.0 if trial % 2 else -10.0
            found = ((model(each) - model(x)).abs() > 1e-9) | (found > 0)
    model.float()
    return found.movedim(0, -1).unflatten(-1, size)


def bounding(pixels: Tensor) -> tuple[int, int, int, int]:
    rows, columns = pixels.any(1).nonzero().flatten().tolist(), pixels.any(0).nonzero().flatten().tolist()
    return rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(3, 2, 2)),
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3, dilation=2, padding=2), nn.MaxPool2d(2, ceil_mode=True)),
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.AdaptiveAvgPool2d((4, 3))),
        lambda: nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(1, 2, 3), nn.Upsample(scale_factor=3)),
        lambda: nn.Sequential(nn.Conv2d(1, 1, 2, 2), nn.ConvTranspose2d(1, 2, 3, 2)),
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4)),
        Inception,
        Residual,
    ],
)
def test_equals_the_box_of_the_pixels_that_change_something(make: Any) -> None:
    torch.manual_seed(0)
    model, size = make(), (11, 13)
    with torch.no_grad():
        for weight in model.parameters():
            weight.abs_()  # then every pixel can win a pooling, and no rectifier is shut
    found = changed(model, size)
    for position in product(range(found.shape[1]), range(found.shape[2])):
        field = receptive_field(model, "", (1, *size), position)
        assert field.clipped == bounding(found[:, position[0], position[1]].any(0)), position
    own = receptive_field(model, "", (1, *size), (1, 2), unit=0)
    assert own.clipped == bounding(found[0, 1, 2])


def test_weights_of_zero_and_shut_rectifiers_count() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 3))
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model[0].bias.fill_(-1.0)  # pyright: ignore[reportOptionalMemberAccess, reportCallIssue]
    assert receptive_field(model, "2", (1, 9, 9)).clipped == (2, 2, 5, 5)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_never_smaller_than_what_changes_something(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 2, 2))
    found = changed(model, (7, 6), 4)
    for position in product(range(found.shape[1]), range(found.shape[2])):
        top, left, height, width = receptive_field(model, "3", (1, 7, 6), position).clipped
        outside = found[:, position[0], position[1]].any(0).clone()
        outside[top : top + height, left : left + width] = False
        assert not outside.any()


class Gate(nn.Module):
    """A rectifier that gives 0 for NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, torch.zeros_like(x))


class Beside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.gate = nn.Conv2d(1, 1, 5, padding=2), Gate()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate(self.wide(x))


class Patches(nn.Module):
    """Tokens of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(1, 4, 4, 4)
        self.mix = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.cut(x).flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3)), "2"),
        (Patches(), "mix"),
        (Patches(), "mix.linear1"),
        (Gate(), ""),
        (Beside(), ""),  # NaN passes, though not through the gate: only running it shows
    ],
)
def test_what_cannot_be_traced_has_the_whole_input(model: nn.Module, layer: str) -> None:
    field = receptive_field(model, layer, (1, 8, 8))
    assert not field.traced
    assert field.whole
    assert field.box == field.clipped == field.at((0,)).box == (0, 0, 8, 8)
    assert field.padding == ((0, 0), (0, 0))
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(field.crop(images), images)


def test_global_layers_have_the_whole_input() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1))
    field = receptive_field(model, "1", (1, 20, 20))
    assert field.traced
    assert field.whole
    assert not receptive_field(model, "0", (1, 20, 20)).whole


def test_inputs_without_places() -> None:
    for model, example in ((nn.Linear(3, 2), (3,)), (nn.Embedding(7, 4), torch.zeros(2, 5, dtype=torch.int64))):
        field = receptive_field(model, "", example)
        assert (field.traced, field.box) == (False, ())
        assert torch.equal(field.crop(torch.ones(2, 3)), torch.ones(2, 3))


class Lookup(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def test_whole_numbers_cannot_be_missing() -> None:
    field = receptive_field(Lookup(), "", torch.zeros(1, 2, 4, 6, dtype=torch.uint8))
    assert (field.traced, field.box) == (False, (0, 0, 4, 6))


def test_one_and_three_axes() -> None:
    field = receptive_field(nn.Conv1d(2, 2, 3, 2, 1), "", (2, 16), (0,))
    assert (field.box, field.clipped, field.padding) == ((-1, 3), (0, 2), ((1, 0),))
    box = receptive_field(nn.Conv3d(1, 1, (1, 2, 3)), "", (1, 4, 5, 6), (3, 0, 1)).box
    assert box == (3, 0, 1, 1, 2, 3)


def test_places_that_see_only_padding() -> None:
    model = nn.Conv2d(1, 1, 1, padding=2)
    field = receptive_field(model, "", (1, 8, 8), (4, 4))
    assert field.box == (2, 2, 1, 1)
    corner = field.at((0, 11))
    assert (corner.box, corner.clipped[2:]) == ((-2, 9, 1, 1), (0, 0))
    assert torch.equal(corner.crop(torch.ones(1, 8, 8), 5.0), torch.full((1, 1, 1), 5.0))
    assert not receptive_field(model, "", (1, 8, 8), (0, 0)).traced


def test_crops_are_the_pixels_of_the_box() -> None:
    images, model = torch.rand(4, 3, 12, 10), nn.Conv2d(3, 2, 5, 2, 2)
    around = nn.functional.pad(images, (4,) * 4, value=-7.0)
    field = receptive_field(model, "", images)
    for position in product(range(6), range(5)):
        top, left, height, width = field.at(position).box
        assert (height, width) == (5, 5)
        expected = around[:, :, top + 4 : top + 9, left + 4 : left + 9]
        assert torch.equal(field.at(position).crop(images, -7.0), expected)
        assert torch.equal(field.at(position).crop(images[0], -7.0), expected[0])
    with pytest.raises(DataError, match=r"inputs of shape \(2, 12, 11\); expected"):
        field.crop(torch.zeros(2, 12, 11))


def test_crops_give_the_activation_back() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2))
    images = torch.randn(5, 1, 16, 16)
    with torch.no_grad():
        field, every = receptive_field(model, "3", images, (2, 4)), model(images)
        torch.testing.assert_close(model(field.crop(images))[..., 0, 0], every[:, :, 2, 4])


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kernels = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.backends.mha.get_fastpath_enabled()
    receptive_field(model, "1", (1, 9, 9))
    with pytest.raises(DataError):
        receptive_field(model, "1", (1, 9, 9), (9, 0))
    assert kernels == (
        torch.backends.mkldnn.enabled,
        torch.backends.cudnn.enabled,
        torch.backends.mha.get_fastpath_enabled(),
    )
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"layer": "1"}, LayerNotFoundError, "no layer '1'"),
        ({"position": (7, 0)}, DataError, r"no place \(7, 0\) in layer '0' with places of shape \(7, 7\)"),
        ({"position": (0,)}, DataError, "no place"),
        ({"position": (0, -1)}, DataError, "no place"),
        ({"position": (0, 0.0)}, DataError, "no place"),
        ({"unit": 2}, DataError, "no unit 2: layer '0' has units 0 to 1"),
    ],
)
def test_wrong_use(wrong: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        receptive_field(nn.Sequential(nn.Conv2d(1, 2, 3)), **{"layer": "0", "example": (1, 9, 9)} | wrong)
    field: ReceptiveField = receptive_field(nn.Conv2d(1, 2, 3), "", (1, 9, 9))
    with pytest.raises(DataError, match="no place"):
        field.at((0, 7))

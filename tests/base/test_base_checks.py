"""Checks on parameters, the errors themselves, and progress."""

from __future__ import annotations

import io
import math
import sys

import pytest
import torch
from torch import nn

from isthmus.base import errors
from isthmus.base.architecture import check_finite, check_same_architecture, full_state
from isthmus.base.errors import ArchitectureError, IsthmusError, LayerNotFoundError, NotFiniteError, nearest
from isthmus.base.finite import all_finite
from isthmus.base.progress import progress

# Architecture


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight
        self.register_buffer("kept", torch.zeros(3))
        self.register_buffer("unsaved", torch.ones(4), persistent=False)


def test_the_full_state_has_tied_names_and_unsaved_buffers() -> None:
    model = Tied()
    state = full_state(model)
    assert set(state) == {"a.weight", "a.bias", "b.weight", "kept", "unsaved"}
    assert not any(tensor.requires_grad for tensor in state.values())
    assert state["b.weight"].data_ptr() == model.a.weight.data_ptr()


def states(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def test_equal_architectures_pass_whatever_the_values() -> None:
    a, b = full_state(nn.Linear(2, 3)), full_state(nn.Linear(2, 3))
    check_same_architecture(a, b)


def test_names_and_shapes_that_differ_are_all_told() -> None:
    a, b = states(w=(2, 3), v=(4,), only=(1,)), states(w=(3, 2), v=(4,), extra=(1,), more=(2,))
    with pytest.raises(ArchitectureError) as caught:
        check_same_architecture(a, b, ("the first", "the second"))
    message = str(caught.value)
    assert message.startswith("the first and the second are not the same architecture: ")
    assert "only the first has only" in message
    assert "only the second has extra, more" in message
    assert "shapes differ: w: (2, 3) in the first, (3, 2) in the second" in message
    assert message.endswith("Pass two networks made by the same constructor with the same arguments")


def test_a_misspelt_name_is_shown_beside_its_like() -> None:
    with pytest.raises(ArchitectureError, match=r"only a has layer\.wieght; did you mean layer\.weight"):
        check_same_architecture({"layer.wieght": torch.zeros(1)}, {"layer.weight": torch.zeros(1)})


def test_long_lists_are_cut() -> None:
    a = {f"w{i}": torch.zeros(2) for i in range(9)}
    b = {f"w{i}": torch.zeros(3) for i in range(9)}
    with pytest.raises(ArchitectureError, match=r"w4: \(2,\) in a, \(3,\) in b and 4 more\. "):
        check_same_architecture(a, b)
    with pytest.raises(ArchitectureError, match="only a has w0, w1, w2, w3, w4 and 4 more"):
        check_same_architecture(a, {})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_parameters_that_are_not_finite_are_counted(bad: float, dtype: torch.dtype) -> None:
    state = {"fine": torch.ones(2), "index": torch.arange(3), "w": torch.ones(2, 3, dtype=dtype)}
    check_finite(state, "net")
    state["w"][1] = bad
    with pytest.raises(NotFiniteError, match=r"net: w of shape \(2, 3\) holds 3 entries that are NaN or infinite"):
        check_finite(state, "net")


# Errors

KINDS = {
    "ArchitectureError": ValueError,
    "CheckpointError": ValueError,
    "DataError": ValueError,
    "DataFileError": FileNotFoundError,
    "DivergedError": ValueError,
    "NotFiniteError": ValueError,
    "LayerNotFoundError": KeyError,
    "SymmetryError": ValueError,
    "OutputError": OSError,
}


@pytest.mark.parametrize(("name", "builtin"), KINDS.items())
def test_every_error_is_one_of_ours_and_the_builtin_that_fits(name: str, builtin: type[Exception]) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, IsthmusError)
    assert issubclass(kind, builtin)
    assert str(kind("what is wrong; what to do")) == "what is wrong; what to do"
    assert str(kind()) == ""
    with pytest.raises(builtin, match="what is wrong"):
        raise kind("what is wrong")


def test_no_error_is_left_out_above() -> None:
    defined = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, IsthmusError)}
    assert defined == {*KINDS, "IsthmusError"}


def test_a_missing_layer_is_told_without_quotes() -> None:
    assert str(LayerNotFoundError("no layer 'fc'")) == "no layer 'fc'"


def test_near_names_are_told_nearest_first_else_what_is_known() -> None:
    assert nearest("layer2.conv", ["fc", "layer1.conv", "layer2.conv1"]) == "; did you mean layer2.conv1, layer1.conv?"
    assert nearest("zzz", ["a", "b"]) == "; known: a, b"
    assert nearest("zzz", map(str, range(20))) == f"; known: {', '.join(map(str, range(12)))}, …"
    assert nearest("zzz", iter(())) == ""


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, show: bool | None) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress([1, 2, 3], "counting", show=show)) == [1, 2, 3]
    return stream.getvalue()


def test_progress_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, io.StringIO(), None) == ""
    assert "counting" in shown(monkeypatch, Terminal(), None)
    assert "counting" in shown(monkeypatch, io.StringIO(), True)
    assert shown(monkeypatch, Terminal(), False) == ""


def test_progress_takes_a_total_and_writes_nothing_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress(iter([1, 2]), "counting", total=2, show=True)
    assert bar.total == 2
    assert list(bar) == [1, 2]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_all_finite_finds_what_is_no_number(dtype: torch.dtype, bad: float) -> None:
    x = torch.arange(-6, 6, dtype=torch.float32).view(3, 4).to(dtype)
    assert all_finite(x)
    assert all_finite(x[:0])
    x[1, 2] = bad
    assert not all_finite(x)
    assert not all_finite(torch.full((1,), bad, dtype=dtype))
    assert all_finite(torch.arange(5))

"""Batches: every form that data may come in, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from isthmus.base.batches import TARGET_KEYS, Batch, as_batch, batches, model_device, require_repeatable
from isthmus.base.errors import DataError, NotFiniteError

X = torch.arange(12.0).reshape(4, 3)
Y = torch.arange(4)


@pytest.mark.parametrize(
    ("item", "targets"),
    [(X, None), ((X,), None), ((X, Y), Y), ([X, Y], Y), (Batch((X,), targets=Y), Y)],
    ids=["x", "(x,)", "(x, y)", "[x, y]", "batch"],
)
def test_a_batch_by_position(item: Any, targets: Tensor | None) -> None:
    batch = as_batch(item)
    (x,) = batch.args
    assert x is X
    assert batch.targets is targets
    assert dict(batch.kwargs) == {}
    assert len(batch) == 4


@pytest.mark.parametrize("key", TARGET_KEYS)
def test_a_batch_by_keyword_gives_its_labels_up(key: str) -> None:
    batch = as_batch({"pixels": X, "mask": Y, "scale": 2.0, key: Y})
    assert batch.args == ()
    assert list(batch.kwargs) == ["pixels", "mask", "scale"]
    assert batch.targets is Y
    assert batch.tensors() == [X, Y] or all(a is b for a, b in zip(batch.tensors(), [X, Y], strict=True))


def test_a_mapping_without_labels_is_all_inputs() -> None:
    batch = as_batch({"x": X})
    assert batch.targets is None
    assert batch.kwargs["x"] is X


@pytest.mark.parametrize(
    ("item", "what"),
    [
        ("text", "str"),
        (3, "int"),
        (None, "NoneType"),
        ((), "tuple of nothing"),
        ((X, Y, Y), "tuple of Tensor, Tensor, Tensor"),
        ((X, "y"), "tuple of Tensor, str"),
        ([[1, 2]], "list of list"),
    ],
)
def test_what_is_no_batch_is_described(item: Any, what: str) -> None:
    with pytest.raises(DataError, match=rf"batch 7 is a {what}; expected x, \(x, y\) or a mapping"):
        as_batch(item, 7)


@pytest.mark.parametrize("item", [torch.tensor(1.0), {"x": 3}, {}, {"labels": Y}])
def test_a_batch_needs_a_tensor_with_a_batch_axis(item: Any) -> None:
    with pytest.raises(DataError, match="batch 0 holds no input tensor with a batch axis"):
        as_batch(item)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite_are_refused(bad: float) -> None:
    x = X.clone()
    x[2, 1] = bad
    for item in (x, (x, Y), {"a": X, "b": x}):
        with pytest.raises(NotFiniteError, match=r"batch 3: an input of shape \(4, 3\) holds NaN or infinity"):
            as_batch(item, 3)


@pytest.mark.parametrize("targets", [torch.zeros(3), torch.zeros(()), torch.zeros(5, 4)])
def test_targets_of_another_length_are_refused_with_both_shapes(targets: Tensor) -> None:
    shape = str(tuple(targets.shape)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(DataError, match=rf"4 inputs of shape \(4, 3\) beside targets of shape {shape}"):
        as_batch((X, targets))


# Data


@pytest.mark.parametrize(
    ("data", "lengths"),
    [
        (X, [4]),
        ((X, Y), [4]),
        ((X,), [4]),
        ({"x": X, "y": Y}, [4]),
        (Batch((X,)), [4]),
        ([X, X[:2]], [4, 2]),
        ([(X, Y), {"x": X}], [4, 4]),
        ((X, X, X), [4, 4, 4]),
        (iter([X, X[:1]]), [4, 1]),
        ((batch for batch in (X, (X, Y))), [4, 4]),
        (DataLoader(TensorDataset(X, Y), batch_size=3), [3, 1]),
        ([X[:0], X], [4]),
    ],
)
def test_data_in_every_form(data: Any, lengths: list[int]) -> None:
    assert [len(batch) for batch in batches(data)] == lengths


def test_batches_hold_what_was_given() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=3)
    found = list(batches(loader))
    assert torch.equal(torch.cat([batch.args[0] for batch in found]), X)
    assert torch.equal(torch.cat([batch.targets for batch in found if batch.targets is not None]), Y)


@pytest.mark.parametrize("data", [[], (), iter([]), X[:0], [X[:0], (X[:0], Y[:0])]])
def test_data_without_a_batch_are_refused(data: Any) -> None:
    with pytest.raises(DataError, match="the data holds no batch"):
        list(batches(data))


def test_an_iterator_that_was_used_up_is_refused() -> None:
    data = iter([X])
    assert len(list(batches(data))) == 1
    with pytest.raises(DataError, match="a loader that was used up"):
        list(batches(data))


@pytest.mark.parametrize("data", ["path", b"bytes", 3, None, nn.Linear(2, 2)])
def test_what_cannot_be_iterated_is_refused(data: Any) -> None:
    with pytest.raises(DataError, match=f"data is a {type(data).__name__}; expected an iterable of batches"):
        list(batches(data))


def test_a_bad_batch_is_named_by_its_number() -> None:
    stream = batches([X, "no"])
    assert len(next(stream)) == 4
    with pytest.raises(DataError, match="batch 1 is a str"):
        next(stream)


def test_only_iterators_are_not_repeatable() -> None:
    for data in (X, [X], DataLoader(TensorDataset(X))):
        require_repeatable(data, "two networks read it")
    for data in (iter([X]), (x for x in [X])):
        with pytest.raises(DataError, match=r"can be read once, but two networks read it; pass a list"):
            require_repeatable(data, "two networks read it")


# Moving and calling


def test_types_change_for_floating_inputs_only() -> None:
    batch = Batch((X, 3), {"index": Y, "scale": X}, Y).to("cpu", torch.float64)
    assert batch.args[0].dtype == batch.kwargs["scale"].dtype == torch.float64
    assert batch.kwargs["index"].dtype == torch.int64
    assert batch.args[1] == 3
    assert batch.targets is not None
    assert batch.targets.dtype == torch.int64
    assert torch.equal(batch.args[0], X.double())


def test_batches_are_moved() -> None:
    for batch in batches([(X, Y), {"x": X}], device="meta"):
        assert {tensor.device.type for tensor in batch.tensors()} == {"meta"}
        assert batch.targets is None or batch.targets.device.type == "meta"
    assert next(batches(X)).args[0] is X


def test_a_batch_calls_the_model_with_its_inputs() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return scale * x

    assert torch.equal(Batch((X,)).call(Scaled()), X)
    assert torch.equal(Batch((X,), {"scale": 3.0}, Y).call(Scaled()), 3 * X)
    assert torch.equal(Batch((), {"x": X, "scale": 2.0}).call(Scaled()), 2 * X)


def test_the_length_is_that_of_the_first_tensor_with_an_axis() -> None:
    assert len(Batch((torch.tensor(2.0), X[:3]), {"x": X})) == 3


def test_a_model_is_where_its_first_tensor_is() -> None:
    assert model_device(nn.Linear(2, 2, device="meta")).type == "meta"
    assert model_device(nn.BatchNorm1d(2, affine=False, device="meta")).type == "meta"
    assert model_device(nn.ReLU()).type == "cpu"


def test_two_equal_parts_of_a_split_are_not_taken_for_inputs_and_targets():
    x = torch.arange(24.0).view(6, 4)
    with pytest.raises(DataError, match=r"two tensors of shape \(3, 4\).*or a list"):
        next(batches(x.split(3)))
    assert [len(batch) for batch in batches(list(x.split(3)))] == [3, 3]
    target = next(batches([(x, x)])).targets
    assert target is not None
    assert torch.equal(target, x)

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import isthmus
from isthmus.base.errors import ArchitectureError, DataError, DataFileError
from isthmus.zoo import RECIPES, Recipe, RecipeError, Text, evaluate, load_data, load_text, mlp, train, transformer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
WORDS = "to be, or not to be: that is the question.\n" * 40


def text(tokens: Tensor, context: int = 4, classes: int = 10) -> Text:
    return Text("mine", "train", tokens, context, tuple(map(chr, range(97, 97 + classes))), "made up")


def sample(length: int = 50, context: int = 4, seed: int = 0) -> Text:
    return text(torch.randint(10, (length,), generator=torch.Generator().manual_seed(seed)), context)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text(WORDS, encoding="utf-8")
    return tmp_path


# Windows


@settings(deadline=None, max_examples=30)
@given(length=st.integers(2, 60), context=st.integers(1, 20), batch_size=st.integers(1, 9), shuffle=st.booleans())
def test_windows_are_pieces_of_the_text(length: int, context: int, batch_size: int, shuffle: bool):
    # every token its own position: a window says where it was cut
    data = text(torch.arange(length), min(context, length - 1), 60)
    loader = data.batches(batch_size, shuffle=shuffle)
    for _ in range(2):
        found = list(loader)
        assert len(found) == len(loader)
        assert [len(x) for x, _ in found[:-1]] == [batch_size] * (len(found) - 1)
        seen = torch.cat([x for x, _ in found])
        for x, y in found:
            assert x.shape == y.shape == (len(x), data.context)
            assert torch.equal(y, x + 1)
            assert torch.equal(x, x[:, :1] + torch.arange(data.context))
        assert len(seen.unique()) == seen.numel()
        if not shuffle:
            assert torch.equal(seen.flatten(), torch.arange(len(data) * data.context))


def test_every_start_is_drawn_and_all_but_one_window_used():
    data = text(torch.arange(41), context=4, classes=100)
    loader = data.batches(100, shuffle=True)
    starts = set()
    for _ in range(60):
        [(x, _)] = loader
        assert len(x) == 9
        starts.add(int(x.min() % 4))
    assert starts == {0, 1, 2, 3}


def test_the_generator_decides():
    data = sample()
    runs = [list(data.batches(3, shuffle=True, generator=torch.Generator().manual_seed(seed))) for seed in (0, 0, 1)]
    assert all(
        torch.equal(x, y) for one, two in zip(runs[0], runs[1], strict=True) for x, y in zip(one, two, strict=True)
    )
    assert not torch.equal(runs[0][0][0], runs[2][0][0])
    default = list(data.batches(3, shuffle=True))
    assert torch.equal(default[0][0], runs[0][0][0])


def test_one_window_only():
    [(x, y)] = sample(length=6, context=5).batches(2, shuffle=True)
    assert x.shape == y.shape == (1, 5)


def test_moving_and_reading():
    data = sample()
    moved = data.to(torch.device("cpu"))
    assert torch.equal(moved.tokens, data.tokens)
    assert (moved.name, moved.context, len(moved)) == ("mine", 4, len(data))
    assert data.inputs().shape == (12, 4)
    assert data.decode(torch.tensor([1, 0, 3])) == "bad"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(3, 3, dtype=torch.int64)}, r"tokens of shape \(3, 3\) and type torch\.int64"),
        ({"tokens": torch.zeros(9)}, r"expected \(n,\) torch\.int64"),
        ({"context": 0}, "context is 0 for 50 tokens; pass an integer from 1 to 49"),
        ({"context": 50}, "context is 50"),
        ({"context": 2.0}, r"context is 2\.0"),
        ({"classes": ("a", "b")}, "tokens from 0 to 9 for 2 classes"),
    ],
)
def test_texts_that_do_not_fit(change: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        dataclasses.replace(sample(), **change)


def test_batch_size():
    with pytest.raises(DataError, match="batch_size is 0"):
        sample().batches(0)


# Files


def test_splits_by_position(folder: Path):
    train_text, test_text = (
        load_text("tinyshakespeare", split, context=10, data_dir=folder) for split in ("train", "test")
    )
    assert train_text.classes == test_text.classes == tuple(sorted(set(WORDS)))
    assert train_text.decode(train_text.tokens) + test_text.decode(test_text.tokens) == WORDS
    assert len(train_text.tokens) == int(0.9 * len(WORDS))
    assert train_text.source == str(folder / "tinyshakespeare" / "input.txt")


def test_location_and_limit(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ISTHMUS_DATA", str(folder / "tinyshakespeare"))
    few = load_text("tinyshakespeare", "test", context=8, limit=3)
    assert len(few) == 3
    whole = load_text("tinyshakespeare", "test", context=8)
    assert torch.equal(few.inputs(), whole.inputs()[:3])
    monkeypatch.delenv("ISTHMUS_DATA")
    with pytest.raises(DataFileError, match=r"tinyshakespeare: no data folder is known.*input\.txt"):
        load_text("tinyshakespeare")


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty; fetch it again"), (b"\xff\xfe\xff", "is no text in UTF-8")]
)
def test_damaged_files(folder: Path, content: bytes, message: str):
    (folder / "tinyshakespeare" / "input.txt").write_bytes(content)
    with pytest.raises(DataFileError, match=message):
        load_text("tinyshakespeare", data_dir=folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "tinyshakespear"}, "no text 'tinyshakespear'; did you mean tinyshakespeare"),
        ({"split": "valid"}, "no split 'valid'"),
        ({"limit": 0}, "limit is 0"),
        ({"context": 10**9}, "context is 1000000000"),
    ],
)
def test_wrong_arguments(folder: Path, arguments: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        load_text(**{"name": "tinyshakespeare", "data_dir": folder, **arguments})


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(DataFileError, match=r"no input\.txt; looked in"):
        load_text("tinyshakespeare", data_dir=tmp_path)


# Training


def small(seed: int = 0, **options: Any) -> nn.Module:
    return transformer(**{"vocabulary": 17, "width": 16, "layers": 1, "heads": 2, "context": 8, **options}, seed=seed)


RECIPE = Recipe(epochs=2, batch_size=8, optimizer="adamw", lr=1e-2, weight_decay=0.0, clip=1.0)


def test_a_transformer_learns_a_text(folder: Path):
    data, test = (load_text("tinyshakespeare", split, context=8, data_dir=folder) for split in ("train", "test"))
    model = small()
    history = train(model, data, dataclasses.replace(RECIPE, epochs=4), test_set=test)
    assert history.train_loss[0] > history.train_loss[-1]
    # half of what the frequencies of the characters alone would give; a period of 43 meets windows of 8 at every place
    counts = np.bincount(data.tokens.numpy()) / len(data.tokens)
    assert history.test_loss[-1] < -(counts * np.log(counts)).sum() / 2
    assert history.test_accuracy[-1] > 0.6
    assert (history.test_loss[-1], history.test_accuracy[-1]) == evaluate(model, test)


def test_evaluate_against_a_sum_over_characters(folder: Path):
    data = load_text("tinyshakespeare", "test", context=8, data_dir=folder)
    model = small(3).eval()
    losses, hits = [], []
    for start in range(0, len(data) * 8, 8):
        window = data.tokens[start : start + 9]
        for at, scores in enumerate(model(window[None, :-1])[0].detach().double()):
            losses.append(float(scores.logsumexp(0) - scores[window[at + 1]]))
            hits.append(int(scores.argmax()) == int(window[at + 1]))
    loss, accuracy = evaluate(model, data, batch_size=48)
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert accuracy == np.mean(hits)
    # the front door's data convention reads the same batches
    path = isthmus.connect(model, model, data.batches(5), points=3)
    assert path.midpoint_loss == pytest.approx(loss, rel=1e-5)


def test_training_repeats_bit_for_bit(folder: Path):
    data = load_text("tinyshakespeare", context=8, data_dir=folder)
    runs = []
    for seed in (0, 0, 1):
        model = small(dropout=0.1)
        train(model, data, dataclasses.replace(RECIPE, epochs=1, seed=seed))
        runs.append(model.state_dict()["head.weight"])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_bfloat16(folder: Path):
    data = load_text("tinyshakespeare", context=8, data_dir=folder)
    losses = {}
    for precision in ("float32", "bfloat16"):
        history = train(small(), data, dataclasses.replace(RECIPE, epochs=1, precision=precision))
        losses[precision] = history.train_loss[-1]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)


def test_clipping_shortens_the_gradient():
    """One step of plain SGD moves the weights by rate times gradient, clipped or not."""
    data = load_data("digits")
    moved = {}
    for clip in (float("inf"), 1e-3):
        model = mlp(64, (8,), seed=0)
        before = torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])
        recipe = Recipe(
            1, len(data), lr=0.1, momentum=0.0, weight_decay=0.0, warmup_epochs=0, schedule="constant", clip=clip
        )
        train(model, data, recipe)
        moved[clip] = before - torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    model = mlp(64, (8,), seed=0)
    F.cross_entropy(model(data.inputs()), data.labels).backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    torch.testing.assert_close(moved[float("inf")], 0.1 * gradient, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(moved[1e-3], 1e-4 * gradient / gradient.norm(), rtol=1e-2, atol=1e-7)
    with pytest.raises(RecipeError, match="clip is 0; expected a number above zero"):
        Recipe(clip=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(context=4), "8 tokens in a row"),
        (lambda: small(vocabulary=5), r"does not take tinyshakespeare windows of shape \(2, 8\): .*index"),
        (
            lambda: nn.Sequential(nn.Embedding(17, 4), nn.Flatten(), nn.Linear(32, 17)),
            r"gives \(2, 17\) for 2 windows; expected class scores \(2, 8, characters\)",
        ),
        (lambda: nn.Embedding(17, 4), "has 4 outputs but tinyshakespeare has 17 classes; make it with vocabulary=17"),
    ],
)
def test_networks_that_do_not_fit_a_text(folder: Path, make: Any, message: str):
    with pytest.raises(ArchitectureError, match=message):
        train(make(), load_text("tinyshakespeare", context=8, data_dir=folder), RECIPE)


def test_no_augmentation_of_texts(folder: Path):
    data = load_text("tinyshakespeare", context=8, data_dir=folder)
    with pytest.raises(RecipeError, match="augment is for images, but tinyshakespeare is a text"):
        train(small(), data, Recipe(1, augment=True))


@pytest.mark.skipif(not (SHARED / "tinyshakespeare").is_dir(), reason=f"no tinyshakespeare in {SHARED}")
def test_tiny_shakespeare():
    data = load_text("tinyshakespeare", context=64, data_dir=SHARED)
    test = load_text("tinyshakespeare", "test", context=64, data_dir=SHARED)
    assert len(data.classes) == 65
    assert len(data.tokens) + len(test.tokens) == 1_115_394
    assert data.decode(data.tokens[:14]) == "First Citizen:"
    few = load_text("tinyshakespeare", context=64, data_dir=SHARED, limit=600)
    model = transformer(width=32, layers=1, context=64, seed=0)
    history = train(
        model, few, dataclasses.replace(RECIPES["transformer"], epochs=2, batch_size=8, lr=1e-2, warmup_epochs=0.1)
    )
    # below the 3.3 nats of the letters' frequencies
    assert history.train_loss[-1] < 2.7

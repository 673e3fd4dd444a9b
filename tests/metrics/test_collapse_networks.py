"""Neural collapse of networks: what is read and found, against the features taken out by hand."""

from __future__ import annotations

import matplotlib as mpl

mpl.use("Agg")

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isthmus.base.batches import Batch
from isthmus.base.errors import (
    ArchitectureError,
    CheckpointError,
    DataError,
    IsthmusError,
    LayerNotFoundError,
    NotFiniteError,
)
from isthmus.base.files import save_state_dict
from isthmus.metrics.collapse import collapse, collapse_over, collapse_values, find_classifier
from isthmus.zoo import all_cnn


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


def mlp(seed: int = 0, classes: int = 4, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, classes, bias=bias)
    ).eval()


def data(n: int = 90, classes: int = 4, shape: tuple[int, ...] = (6,), seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=generator), torch.randint(classes, (n,), generator=generator)


def batched(x: Tensor, y: Tensor, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def same(first: dict[str, Any], second: dict[str, Any], rel: float = 1e-6) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value == pytest.approx(second[name], rel=rel, abs=rel), name


def test_the_features_before_the_classifier() -> None:
    model, (x, y) = mlp(), data()
    found = collapse(model, batched(x, y))
    with torch.no_grad():
        features = model[:5](x)
    last = model[5]
    assert isinstance(last, nn.Linear)
    truth = collapse_values(features, y, weight=last.weight, bias=last.bias)
    assert (found.layers, found.classifier) == (("5.input",), "5")
    same(found.last.to_dict(), truth.to_dict())
    with torch.no_grad():
        assert found.last.accuracy == pytest.approx(float((model(x).argmax(1) == y).float().mean()))
    assert found.convention == {"positions": "mean", "mask": None, "samples": 90, "classes": 4, "weighted": False}
    np.testing.assert_allclose(found.moments["5.input"].means[2], features[y == 2].double().mean(0), rtol=1e-6)


def test_all_layers_on_the_way_in_one_pass() -> None:
    model, (x, y) = mlp(), data()
    found = collapse(model, iter(batched(x, y)), layers="all", progress=False)
    assert found.layers == ("0", "1", "2", "3", "4", "5", "5.input")
    with torch.no_grad():
        for depth in range(6):
            truth = collapse_values(model[: depth + 1](x), y).to_dict()
            same(found.values[str(depth)].to_dict(), truth, rel=1e-5)
    assert found.values["4"].nc1 == pytest.approx(found.last.nc1)
    assert found.values["4"].nc3 is None
    assert found.curve("ncm_accuracy") == [found.values[name].ncm_accuracy for name in found.layers]
    json.dumps(found.to_dict(), allow_nan=False)
    some = collapse(model, batched(x, y), layers=["2"], weighted=True, margin=True)
    assert some.layers == ("2", "5.input")
    assert some.last.weighted
    assert some.last.margin is not None


def test_features_that_find_no_room_go_to_a_file() -> None:
    model, (x, y) = mlp().double(), data()
    batches = batched(x.double(), y)
    whole, spilled = (collapse(model, batches, layers="all", max_bytes=size).to_dict() for size in (1 << 30, 0))
    assert whole == spilled


def test_the_network_comes_back_as_it_was() -> None:
    model, (x, y) = mlp().train(), data()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model[2].eval()
    modes = [module.training for module in model.modules()]
    collapse(model, batched(x, y), layers="all")
    with pytest.raises(DataError, match="batch 1 has no labels"):
        collapse(model, [(x, y), x], layers="all")
    with pytest.raises(DataError, match="label 7 does not fit 4 classes"):
        collapse(model, (x, y + 4))
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("positions", ["mean", "features", "samples"])
def test_feature_maps(positions: Any) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))
    x, y = data(40, 3, (2, 6, 6))
    found = collapse(model, batched(x, y, 15), layers=["1"], positions=positions)
    with torch.no_grad():
        maps = model[:2](x)
    rows, labels = {
        "mean": (maps.mean((2, 3)), y),
        "features": (maps.flatten(1), y),
        "samples": (maps.movedim(1, -1).reshape(-1, 5), y.repeat_interleave(16)),
    }[positions]
    same(found.values["1"].to_dict(), collapse_values(rows, labels).to_dict(), rel=1e-5)
    assert found.convention["samples"] == 40
    assert found.convention["positions"] == positions


def test_a_convolution_that_classifies() -> None:
    model = all_cnn(in_channels=1, classes=3, width=4, norm="batch", seed=0).eval()
    x, y = data(30, 3, (1, 8, 8))
    found = collapse(model, batched(x, y))
    assert (found.classifier, found.layers) == ("classifier", ("classifier.input",))
    with torch.no_grad():
        assert found.last.accuracy == pytest.approx(float((model(x).argmax(1) == y).float().mean()))
        features = nn.Sequential(*list(model)[:-3])(x).mean((2, 3))
    assert found.last.nc1 == pytest.approx(collapse_values(features, y).nc1, rel=1e-5)


class Tokens(nn.Module):
    """A tiny network with logits for each token, or for each sequence."""

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        self.embed, self.mix, self.head, self.whole = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 3), whole

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        h = self.mix(self.embed(input_ids)).tanh()
        logits = self.head(h)
        return SimpleNamespace(logits=logits.mean(1) if self.whole else logits)


def test_labels_of_tokens() -> None:
    torch.manual_seed(0)
    model = Tokens()
    ids, labels = torch.randint(9, (20, 5)), torch.randint(3, (20, 5))
    labels[:4] = -100
    batches = [{"input_ids": ids[i : i + 4], "labels": labels[i : i + 4]} for i in range(0, 20, 4)]
    found = collapse(model, batches, layers=["mix"], positions="samples")
    with torch.no_grad():
        mixed = model.mix(model.embed(ids))
    counted = labels != -100
    assert found.classifier == "head"
    same(found.values["mix"].to_dict(), collapse_values(mixed[counted], labels[counted]).to_dict(), rel=1e-5)
    last = collapse_values(mixed.tanh()[counted], labels[counted], weight=model.head.weight, bias=model.head.bias)
    same(found.last.to_dict(), last.to_dict(), rel=1e-5)
    assert found.convention["samples"] == 80
    with pytest.raises(DataError, match=r"'mix' gives 4 rows for labels of shape \(4, 5\); read tokens that have"):
        collapse(model, batches, layers=["mix"])
    whole = [{"input_ids": ids, "labels": labels[:, 0].clamp(min=0)}]
    with pytest.raises(LayerNotFoundError, match="no linear layer gives the network's outputs"):
        collapse(Tokens(whole=True), whole)
    with pytest.raises(DataError, match=r"'head' reads features of shape \(20, 5, 8\) beside labels of shape \(20,\)"):
        collapse(model, whole, classifier="head")


def test_no_label_counts() -> None:
    model, (x, y) = mlp(), data()
    batches = batched(x, y)
    assert collapse(model, [(x[:9], y[:9] * 0 - 100), *batches]).to_dict() == collapse(model, batches).to_dict()
    with pytest.raises(DataError, match="no label of the data counts"):
        collapse(model, (x, y * 0 - 100))


class Odd(nn.Module):
    """A network whose outputs no linear layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu()).softmax(1)


def test_a_classifier_that_is_not_found_is_asked_for() -> None:
    model, (x, y) = Odd(), data()
    with pytest.raises(LayerNotFoundError, match=r"name it with classifier=.* Linear layers: body, head$"):
        collapse(model, (x, y))
    with pytest.raises(LayerNotFoundError, match="its classifier is not known"):
        collapse(model, (x, y), layers="all")  # the number of classes is not known either
    named = collapse(model, (x, y), classifier="head")
    assert named.layers == ("head.input",)
    without = collapse(model, (x, y), layers=["body"], classes=4)
    assert (without.layers, without.classifier, without.last.nc3) == (("body",), None, None)
    with pytest.raises(LayerNotFoundError, match="Linear layers: none"):
        find_classifier(nn.ReLU(), Batch((x,)))
    with pytest.raises(LayerNotFoundError, match="no linear layer"):
        find_classifier(_wrapped(nn.Linear(6, 4)), Batch((x,)))


def _wrapped(layer: nn.Module) -> nn.Module:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.layer(x)]

    return Wrapped()


def test_which_classifier_is_found() -> None:
    x, _ = data()
    assert find_classifier(nn.Linear(6, 4), Batch((x,))).name == ""
    assert collapse(nn.Linear(6, 4), data()).layers == ("input",)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Dropout())
    head = find_classifier(model.eval(), Batch((x,)))
    assert (head.name, head.pooled) == ("1", False)
    assert head.bias is not None
    wide = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5, bias=False))
    assert find_classifier(wide, Batch((x,))).bias is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"classifier": "6"}, LayerNotFoundError, r"Sequential has no layer '6'; (known|did you mean)"),
        ({"classifier": "2"}, DataError, "layer '2' is a ReLU without a weight of classes x units; name the linear"),
        ({"classifier": "1"}, DataError, "layer '1' is a BatchNorm1d without a weight"),
        ({"layers": ["9"]}, LayerNotFoundError, "has no layer '9'"),
        ({"positions": "all", "layers": "all"}, DataError, "unknown positions 'all'"),
        ({"classes": 5}, DataError, "classes is 5, but the classifier '5' has 4 outputs; leave classes out"),
        ({"classes": 1, "classifier": "5"}, DataError, "classes is 1, but the classifier '5' has 4 outputs"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[IsthmusError], message: str) -> None:
    with pytest.raises(error, match=message):
        collapse(mlp(), data(), **options)


def test_bad_data() -> None:
    model, (x, y) = mlp(), data()
    with pytest.raises(DataError, match="the data holds no batch"):
        collapse(model, [])
    with pytest.raises(DataError, match="batch 0 has no labels"):
        collapse(model, x)
    with pytest.raises(DataError, match=r"batch 0: labels of shape \(90,\) are torch.float32; expected integers"):
        collapse(model, (x, y.float()))
    with pytest.raises(NotFiniteError, match="holds NaN or infinity"):
        collapse(model, (x / 0, y))
    broken = mlp()
    broken.state_dict()["0.bias"][3] = torch.nan  # which shares its memory
    with pytest.raises(NotFiniteError, match=r"Sequential: outputs of shape \(90, 4\) hold NaN or infinity"):
        collapse(broken, (x, y))
    with pytest.raises(NotFiniteError, match=r"5\.input of shape \(90, 12\) holds NaN"):
        collapse(broken, (x, y), classifier="5")


@pytest.mark.parametrize("kind", ["modules", "states", "files", "mapping"])
def test_over_checkpoints(tmp_path: Path, kind: str) -> None:
    models, batches = [mlp(seed) for seed in (1, 2, 3)], batched(*data())
    states = [model.state_dict() for model in models]
    networks = {
        "modules": lambda: models,
        "states": lambda: iter(states),
        "files": lambda: [save_state_dict(state, tmp_path / f"{i}.pt") for i, state in enumerate(states)],
        "mapping": lambda: dict(zip((1, 10, 20), states, strict=True)),
    }[kind]()
    frame = mlp(9)
    before = frame.state_dict()["0.weight"].clone()
    curves = collapse_over(networks, batches, model=None if kind == "modules" else frame, layers=["4"])
    assert torch.equal(before, frame.state_dict()["0.weight"])
    assert curves.steps == ((1, 10, 20) if kind == "mapping" else (0, 1, 2))
    each = [collapse(model, batches) for model in models]
    assert curves.curve("nc1") == pytest.approx([found.last.nc1 for found in each], rel=1e-6)
    assert curves.curve("nc1", "4") == pytest.approx(curves.curve("nc1"))
    json.dumps(curves.to_dict(), allow_nan=False)


def test_over_checkpoints_that_cannot_be_used(tmp_path: Path) -> None:
    batches, model = batched(*data()), mlp()
    with pytest.raises(DataError, match="the data is an iterator, which can be read once, but each network runs"):
        collapse_over([model], iter(batches))
    with pytest.raises(DataError, match="networks is one state dict; pass a list"):
        collapse_over(model.state_dict(), batches, model=model)
    with pytest.raises(DataError, match="0 steps for 0 networks"):
        collapse_over([], batches)
    with pytest.raises(DataError, match="3 steps for 1 networks"):
        collapse_over([model], batches, steps=[1, 2, 3])
    with pytest.raises(DataError, match="some networks are checkpoints; pass a network of their architecture"):
        collapse_over([model.state_dict()], batches)
    with pytest.raises(ArchitectureError, match="model and the checkpoint are not the same architecture"):
        collapse_over([mlp(classes=5).state_dict()], batches, model=model)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        collapse_over([tmp_path / "none.pt"], batches, model=model)
    curves = collapse_over([model], batches)
    with pytest.raises(DataError, match=r"layer '5\.output' was not measured; did you mean 5\.input"):
        curves.curve("nc1", "5.output")
    for holder in (curves, curves.collapses[0]):
        with pytest.raises(DataError, match="no value 'nc11' of collapse; did you mean nc1"):
            holder.curve("nc11")


def test_pictures() -> None:
    model, batches = mlp(), batched(*data())
    curves = collapse_over([model, mlp(1)], batches, steps=[3, 30], layers="all")
    ax = curves.plot(names=["nc1", "nc4", "uniformity"])
    lines = {str(line.get_label()): line for line in ax.get_lines()}
    np.testing.assert_array_equal(lines["NC1: tr(Σ_W Σ_B⁺) / K"].get_xdata(), [3, 30])
    np.testing.assert_allclose(np.asarray(lines["NC1: tr(Σ_W Σ_B⁺) / K"].get_ydata()), np.array(curves.curve("nc1")))
    missing = [1 - (value or 0) for value in curves.curve("nc4")]
    np.testing.assert_allclose(np.asarray(lines["1 - NC4: decisions unlike the nearest mean"].get_ydata()), missing)
    assert np.isnan(np.asarray(lines["uniformity"].get_ydata(), dtype=float)).all()  # negative: no place on the axis
    assert ax.get_yscale() == "log"
    found = curves.collapses[0]
    depth = found.plot(plt.subplots()[1])
    assert [text.get_text() for text in depth.get_xticklabels()] == list(found.layers)
    assert len(depth.get_lines()) == 4
    named = collapse_over([model, mlp(1)], batches, steps=["first", "last"]).plot(names=["uniformity"])
    assert [text.get_text() for text in named.get_xticklabels()] == ["first", "last"]
    assert named.get_yscale() == "linear"
    assert len(curves.plot().get_lines()) == 4

"""Reference networks: sizes that are published, seeds, fit to data sets, checkpoints of others."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from isthmus.base.errors import ArchitectureError
from isthmus.base.files import load_state_dict
from isthmus.zoo import NETWORKS, Dataset, Text, all_cnn, build, evaluate, load_data, loader, mlp, resnet, vgg
from isthmus.zoo.norms import norm_layer

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
CHECKPOINTS = sorted((SHARED / "resnet_cifar10").glob("*.th"))

SMALL: dict[str, Callable[..., nn.Module]] = {
    "mlp": lambda **kwargs: mlp(192, (16,), **kwargs),
    "all_cnn": lambda **kwargs: all_cnn(width=4, **kwargs),
    "vgg": lambda **kwargs: vgg(11, width_multiplier=0.125, image_size=8, **kwargs),
    "resnet": lambda **kwargs: resnet(8, **kwargs),
}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def images(count: int, channels: int, size: int) -> torch.Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("make", "published"),
    [
        (lambda: mlp(), 784 * 512 + 512 + 2 * (512 * 512 + 512) + 512 * 10 + 10),
        (lambda: all_cnn(), 1_369_738),
        # the convolutions of the ImageNet networks, beside a classifier of 512 x 10
        (lambda: vgg(11), 9_220_480 + 5130),
        (lambda: vgg(13), 9_404_992 + 5130),
        (lambda: vgg(16), 14_714_688 + 5130),
        (lambda: vgg(19), 20_024_384 + 5130),
        (lambda: resnet(20, shortcut="pad"), 269_722),
        (lambda: resnet(32, shortcut="pad"), 464_154),
        (lambda: resnet(56, shortcut="pad"), 853_018),
        (lambda: resnet(110, shortcut="pad"), 1_727_962),
        (lambda: resnet(20), 269_722 + (16 * 32 + 64) + (32 * 64 + 128)),
    ],
)
def test_number_of_parameters(make: Callable[[], nn.Module], published: int):
    with torch.device("meta"):
        assert parameters(make()) == published


def test_mlp_by_hand():
    model = mlp(12, (7, 5), 3, seed=1)
    x = images(4, 3, 2)
    hidden = x.numpy().reshape(4, 12).astype(np.float64)
    weights = [value.numpy().astype(np.float64) for value in model.state_dict().values()]
    for i in (0, 2):
        hidden = np.maximum(hidden @ weights[i].T + weights[i + 1], 0)
    np.testing.assert_allclose(model(x).detach(), hidden @ weights[4].T + weights[5], atol=1e-6)


def test_repeated_layers_of_all_cnn_keep_the_shapes():
    once, thrice = all_cnn(width=4, seed=0), all_cnn(width=4, repeat=3, seed=0)
    x, shapes = torch.zeros(1, 3, 32, 32), {}
    for network, repeat in ((once, 1), (thrice, 3)):
        convolutions = [module for module in network if isinstance(module, nn.Conv2d)]
        assert len(convolutions) == 8 * repeat + 1
        shapes[repeat] = [tuple(network[: 2 * repeat * i](x).shape) for i in range(1, 9)]
        assert sum(module.stride == (2, 2) for module in convolutions) == 2
    assert shapes[1] == shapes[3]


def test_shapes_of_feature_maps_of_all_cnn():
    sizes = []
    model = all_cnn(width=4, seed=0)
    for module in model:
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out.shape[1:])))
    model(images(1, 3, 32))
    assert [size[1] for size in sizes] == [32, 32, 16, 16, 16, 8, 8, 8, 8]
    assert [size[0] for size in sizes] == [4, 4, 4, 8, 8, 8, 8, 8, 10]


@pytest.mark.parametrize(
    ("size", "left", "pools"), [(32, 1, 5), (64, 2, 5), (28, 7, 2), (16, 1, 4), (8, 1, 3), (1, 1, 0), (9, 9, 0)]
)
def test_vgg_halves_even_sizes_only(size: int, left: int, pools: int):
    model = vgg(11, 1, width_multiplier=0.0625, image_size=size, seed=0)
    assert sum(isinstance(module, nn.MaxPool2d) for module in model) == pools
    assert model.get_submodule("classifier").get_parameter("weight").shape == (10, 32 * left**2)
    assert model(images(2, 1, size)).shape == (2, 10)


@pytest.mark.parametrize("size", [8, 28, 32])
@pytest.mark.parametrize("depth", [11, 19])
def test_vgg_without_norms_starts_with_a_signal(size: int, depth: int):
    model = vgg(depth, 1, width_multiplier=0.25, image_size=size, seed=0)  # pyright: ignore[reportArgumentType]
    spread = model(images(20, 1, size)).detach().std(0).mean()
    assert 0.02 < spread < 5


@pytest.mark.parametrize("norm", ["batch", "layer", "group"])
@pytest.mark.parametrize("name", ["all_cnn", "vgg", "resnet"])
def test_norms(name: str, norm: str):
    model = SMALL[name](norm=norm, seed=0)
    kinds = {type(module) for module in model.modules()} & {nn.BatchNorm2d, nn.GroupNorm}
    assert kinds == {nn.BatchNorm2d if norm == "batch" else nn.GroupNorm}
    out = model(images(3, 3, 8))
    assert out.shape == (3, 10)
    assert out.std(0).min() > 1e-3


def test_layer_norm_is_over_channels_and_positions():
    x = 3 * images(4, 6, 5) + 2
    out = norm_layer("layer", 6)(x).detach()
    expected = (x - x.mean((1, 2, 3), keepdim=True)) / x.var((1, 2, 3), unbiased=False, keepdim=True).sqrt()
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("channels", "groups"), [(64, 8), (16, 8), (12, 6), (10, 5), (4, 2), (3, 1), (1, 1)])
def test_groups_of_at_least_two_channels(channels: int, groups: int):
    layer = norm_layer("group", channels)
    assert isinstance(layer, nn.GroupNorm)
    assert layer.num_groups == groups


def test_pad_shortcut_by_hand():
    block = resnet(8, shortcut="pad", seed=0).get_submodule("layer2.0")
    x = images(2, 16, 6)
    shortcut = block.get_submodule("shortcut")(x)
    assert shortcut.shape == (2, 32, 3, 3)
    for channel in range(32):
        expected = x[:, channel - 8, ::2, ::2] if 8 <= channel < 24 else torch.zeros(2, 3, 3)
        assert torch.equal(shortcut[:, channel], expected)


def test_residual_block_adds_its_input():
    block = resnet(8, seed=0).eval().get_submodule("layer1.0")
    x = images(2, 16, 6)
    nn.init.zeros_(block.get_submodule("bn2").get_parameter("weight"))
    assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize("name", SMALL)
def test_seed_decides_the_weights_and_leaves_the_callers_generator(name: str):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second, other = (SMALL[name](seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], second[key]) for key in first)
    weight = next(key for key in first if first[key].ndim > 1)
    assert not torch.equal(first[weight], other[weight])


def test_without_a_seed_the_global_generator_decides():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first, second = mlp(4, (3,)), mlp(4, (3,))
        torch.manual_seed(3)
        again = mlp(4, (3,))
    assert torch.equal(first.get_parameter("fc1.weight"), again.get_parameter("fc1.weight"))
    assert not torch.equal(first.get_parameter("fc1.weight"), second.get_parameter("fc1.weight"))


def test_seed_is_restored_when_construction_fails():
    state = torch.get_rng_state()
    with pytest.raises(ArchitectureError, match="norm is 'instance'"):
        resnet(8, norm="instance", seed=0)  # pyright: ignore[reportArgumentType]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "transformer"])
@pytest.mark.parametrize(("channels", "size", "classes"), [(1, 8, 10), (3, 16, 4)])
def test_build_fits_the_data_set(name: str, channels: int, size: int, classes: int):
    data = Dataset(
        "mine",
        "train",
        images(6, channels, size),
        torch.arange(6) % classes,
        tuple(map(str, range(classes))),
        (0.0,) * channels,
        (1.0,) * channels,
        "-",
    )
    smaller = {
        "mlp": {"widths": [8]},
        "all_cnn": {"width": 4},
        "vgg": {"width_multiplier": 0.1},
        "resnet": {"depth": 8},
        "vit": {"width": 16, "layers": 1, "heads": 2},
    }
    model = build(name, data, 0, **smaller[name])
    assert model(data.inputs()).shape == (6, classes)
    assert build(name, data, 0, **smaller[name], classes=7)(data.inputs()).shape == (6, 7)


def test_build_fits_a_text() -> None:
    text = Text("mine", "train", torch.arange(20) % 3, 4, ("a", "b", "c"), "-")
    model = build("transformer", text, 0, width=8, layers=1, heads=2)
    x, y = next(iter(loader(text, 2)))
    assert model(x).shape == (*y.shape, 3) == (2, 4, 3)
    with pytest.raises(ArchitectureError, match="context"):
        build("transformer", text, 0, width=8, layers=1, heads=2, context=0)


def test_build_without_a_data_set_uses_the_defaults():
    assert build("mlp", seed=0)(torch.zeros(1, 784)).shape == (1, 10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build("resnt"), "did you mean resnet"),
        (lambda: build("vgg", dpth=11), "no argument 'dpth'; did you mean depth"),
        (lambda: build("mlp", wide_set()), "images of 4x8"),
        (lambda: mlp(0), "in_features is 0"),
        (lambda: mlp(widths=(4, -1)), r"widths\[1\] is -1"),
        (lambda: mlp(widths=(4.5,)), r"widths\[0\] is 4.5"),  # pyright: ignore[reportArgumentType]
        (lambda: all_cnn(classes=0), "classes is 0"),
        (lambda: all_cnn(repeat=0), "repeat is 0"),
        (lambda: all_cnn(norm="instance"), "choose from 'batch', 'layer', 'group'"),  # pyright: ignore[reportArgumentType]
        (lambda: vgg(12), "depth is 12; choose from 11, 13, 16, 19"),  # pyright: ignore[reportArgumentType]
        (lambda: vgg(11, width_multiplier=0), "width_multiplier is 0"),
        (lambda: vgg(11, width_multiplier=float("nan")), "width_multiplier is nan"),
        (lambda: vgg(11, image_size=0), "image_size is 0"),
        (lambda: resnet(18), "depth is 18; it must be 6n"),
        (lambda: resnet(2), "depth is 2"),
        (lambda: resnet(20, width=True), "width is True"),
        (lambda: resnet(20, norm=None), "norm is None"),  # pyright: ignore[reportArgumentType]
        (lambda: resnet(20, shortcut="none"), "shortcut is 'none'"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_wrong_arguments(call: Callable[[], nn.Module], message: str):
    with pytest.raises(ArchitectureError, match=message):
        call()


def wide_set() -> Dataset:
    return Dataset(
        "wide", "train", torch.zeros(2, 1, 4, 8), torch.zeros(2, dtype=torch.int64), ("a",), (0.0,), (1.0,), "-"
    )


@pytest.mark.skipif(not CHECKPOINTS, reason=f"no trained networks in {SHARED}")
@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: path.stem)
def test_published_checkpoints_fit(path: Path):
    model = resnet(int(path.stem.removeprefix("resnet").split("-")[0]), shortcut="pad", seed=0)
    state = load_state_dict(path)
    model.load_state_dict(state, strict=True)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


@pytest.mark.skipif(not CHECKPOINTS or not (SHARED / "cifar10").is_dir(), reason=f"no CIFAR-10 in {SHARED}")
def test_published_resnet20_classifies():
    model = resnet(20, shortcut="pad", seed=0)
    model.load_state_dict(load_state_dict(CHECKPOINTS[0]), strict=True)
    data = load_data("cifar10", "test", data_dir=SHARED, limit=1000)
    data = dataclasses.replace(data, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert 0.78 < evaluate(model, data)[1] < 0.85


def test_he_initialisation_keeps_the_size_of_the_signal() -> None:
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    deep = (128,) * 12
    he, default = (mlp(64, deep, 10, init, seed=0)(x).std() for init in ("he", "torch"))
    assert 0.3 < he < 3.0
    assert default < 0.1 * he
    with pytest.raises(ArchitectureError, match="init is 'xavier'; choose from 'torch', 'he'"):
        mlp(init="xavier")  # pyright: ignore[reportArgumentType]

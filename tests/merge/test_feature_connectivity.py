import copy
import json
import math
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from isthmus.base.errors import ArchitectureError, DataError, LayerNotFoundError, NotFiniteError
from isthmus.merge import interpolate
from isthmus.merge.layerwise import commutativity, feature_connectivity, feature_distance, weak_additivity
from isthmus.merge.layerwise.cosines import Overlap, cosine_distances

mpl.use("Agg")


class Mixed(nn.Module):
    """Convolutions, norms, an activation in place that is called twice, a sum, a flattening, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.drop = nn.Dropout(0.5)
        self.gelu = nn.GELU()
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x):
        out = self.relu(self.norm(self.conv1(x)))
        out = self.relu(self.conv2(out) + out)
        return self.head(self.gelu(self.drop(out)).flatten(1))


class Tokens(nn.Module):
    """Tokens with padding, by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 5)
        self.act = nn.Tanh()
        self.outer = nn.Linear(5, 2)

    def forward(self, x, attention_mask=None):
        return self.outer(self.act(self.inner(x)))


def made(kind, seed, dtype=torch.float64, **options) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(**options).to(dtype)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        return model


def mlp(bias=True):
    return nn.Sequential(nn.Linear(4, 6, bias=bias), nn.ReLU(), nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3))


def images(count=3, size=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 2, 4, 4, generator=generator, dtype=dtype) for _ in range(count)]


def vectors(size=12, seed=0, features=4):
    return torch.randn(size, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def snapshot(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [module.training for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    )


def assert_untouched(model, before):
    after = snapshot(model)
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
    assert after[1:] == before[1:]


def one_minus_cos(x, y):
    x, y = np.asarray(x, np.float64).ravel(), np.asarray(y, np.float64).ravel()
    return 1 - float(x @ y) / math.sqrt(float(x @ x) * float(y @ y))


def by_hand(model, x):
    """Features of `Mixed`, and what went into each layer, written out without a hook."""
    model = copy.deepcopy(model).eval()
    found, into = {}, {"conv1": x}
    with torch.no_grad():
        found["conv1"] = model.conv1(x)
        found["norm"] = into["relu"] = model.norm(found["conv1"])
        found["relu"] = into["conv2"] = found["norm"].clamp(min=0)
        found["conv2"] = model.conv2(found["relu"])
        into["relu#2"] = found["conv2"] + found["relu"]
        found["relu#2"] = into["gelu"] = into["relu#2"].clamp(min=0)
        found["gelu"] = into["head"] = nn.functional.gelu(found["relu#2"])
        into["head"] = found["gelu"].flatten(1)
        found["head"] = model.head(into["head"])
    return found, into


def sample_means(pairs):
    return float(np.mean([one_minus_cos(x, y) for x, y in pairs]))


@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_every_number_is_that_of_a_plain_loop(alpha):
    a, b = made(Mixed, 0), made(Mixed, 1)
    between = made(Mixed, 2)
    between.load_state_dict(interpolate(a.state_dict(), b.state_dict(), alpha))
    data = images()
    x = torch.cat(data)
    (f_a, h_a), (f_b, h_b), (f_alpha, _) = by_hand(a, x), by_hand(b, x), by_hand(between, x)
    found = feature_connectivity(a, b, data, alpha=alpha)
    assert found.layers == ("conv1", "norm", "relu", "conv2", "relu#2", "gelu", "head")
    assert (found.samples, found.alpha, found.positions, found.repair) == (15, alpha, "features", None)
    sigma = {"relu": torch.relu, "relu#2": torch.relu, "gelu": nn.functional.gelu}
    for place, name in enumerate(found.layers):
        mixture = (1 - alpha) * f_a[name] + alpha * f_b[name]
        expected = {
            "cosine_distance": sample_means(zip(f_alpha[name], mixture, strict=True)),
            "endpoint_distance": sample_means(zip(f_a[name], f_b[name], strict=True)),
            "coefficient": float((f_alpha[name] * mixture).sum() / f_alpha[name].square().sum()),
            "relative_error": float((f_alpha[name] - mixture).norm() / mixture.norm()),
        }
        if name in sigma:
            inside = sigma[name]((1 - alpha) * h_a[name] + alpha * h_b[name])
            expected["weak_additivity"] = sample_means(zip(inside, mixture, strict=True))
        if name in ("conv1", "conv2", "head"):

            def product(model, inputs, name=name):
                layer = copy.deepcopy(model.get_submodule(name))
                layer.bias = None
                with torch.no_grad():
                    return layer(inputs)

            same = product(a, h_a[name]) + product(b, h_b[name])
            crossed = product(a, h_b[name]) + product(b, h_a[name])
            weights = [model.get_submodule(name).weight.detach() for model in (a, b)]
            expected["commutativity"] = one_minus_cos(same, crossed)
            expected["weight_distance"] = one_minus_cos(*weights)
            expected["input_distance"] = one_minus_cos(h_a[name], h_b[name])
        for key in (*expected, "weak_additivity", "commutativity", "weight_distance", "input_distance"):
            value = getattr(found, key)[place]
            wanted = expected.get(key, math.nan)
            assert value == pytest.approx(wanted, rel=1e-9, abs=1e-12, nan_ok=True), (name, key)


def test_single_precision_agrees_with_double():
    a, b = made(Mixed, 0), made(Mixed, 1)
    exact = feature_connectivity(a, b, images())
    rounded = feature_connectivity(a.float(), b.float(), [x.float() for x in images()])
    for key in ("cosine_distance", "endpoint_distance", "weak_additivity", "commutativity", "relative_error"):
        np.testing.assert_allclose(getattr(rounded, key), getattr(exact, key), rtol=2e-4, atol=1e-6)


def test_half_precision_is_summed_in_single():
    a, b = made(mlp, 0, torch.bfloat16), made(mlp, 1, torch.bfloat16)
    found = feature_connectivity(a, b, vectors().bfloat16())
    assert np.isfinite(found.cosine_distance).all()
    assert found.cosine_distance[0] < 1e-4


def test_a_network_beside_itself_is_exactly_linear():
    model = made(Mixed, 0)
    for other in (model, copy.deepcopy(model)):
        found = feature_connectivity(model, other, images(), alpha=(0.25, 0.5))
        assert found.cosine_distance.shape == (2, 7)
        assert not found.cosine_distance.any()
        assert not found.relative_error.any()
        assert not found.endpoint_distance.any()
        for key in ("weak_additivity", "commutativity", "weight_distance", "input_distance"):
            assert not np.nan_to_num(getattr(found, key)).any()
        np.testing.assert_allclose(found.coefficient, 1, rtol=1e-12)


def test_one_layer_is_linear_in_its_weights_and_a_deep_linear_network_is_not():
    a, b = (made(lambda: nn.Sequential(nn.Linear(4, 5)), seed) for seed in (0, 1))
    found = feature_connectivity(a, b, vectors())
    assert found.cosine_distance[0] < 1e-15
    assert found.relative_error[0] < 1e-14
    assert found.commutativity[0] == 0  # both see the same input
    a, b = (made(lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), seed) for seed in (0, 1))
    found = feature_connectivity(a, b, vectors())
    assert found.cosine_distance[1] > 1e-3
    assert found.commutativity[1] > 1e-3


def test_both_conditions_give_features_that_are_linear():
    # Theorem 1: the second network changes only units whose weights commute, and no sign of a preactivation
    a, b = made(mlp, 0, bias=False), made(mlp, 1, bias=False)
    with torch.no_grad():
        for model, scale in ((a, 1.0), (b, 3.0)):
            model[0].weight.copy_(scale * torch.ones(6, 4))
            model[2].weight.copy_(torch.ones(5, 6))
            model[3] = nn.ReLU()
            model[4].weight.copy_(torch.ones(3, 5))
            model[4].bias.zero_()
    found = feature_connectivity(a, b, vectors().abs())
    assert found.weak_additivity[[1, 3]].max() < 1e-15
    assert found.commutativity[[0, 2, 4]].max() < 1e-15
    assert found.relative_error.max() < 1e-14


def test_two_units_by_hand():
    # preactivations (2, -2) and (-2, 2); halfway (0, 0)
    def make():
        return nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))

    a, b = made(make, 0, torch.float32), made(make, 1, torch.float32)
    with torch.no_grad():
        a[0].weight.copy_(torch.tensor([[2.0], [-2.0]]))
        b[0].weight.copy_(torch.tensor([[-2.0], [2.0]]))
        a[2].weight.copy_(torch.tensor([[1.0, 0.0]]))
        b[2].weight.copy_(torch.tensor([[0.0, 1.0]]))
    found = feature_connectivity(a, b, torch.ones(1, 1), alpha=[0.5, 0.25])
    # halfway all features are zero, and stay so; the mean of the features is zero, then (1, 1), then 2
    assert found.cosine_distance[0].tolist() == [0, 1, 1]
    assert found.relative_error[0].tolist() == [0, 1, 1]
    assert np.isnan(found.coefficient[0]).all()
    # at a quarter: (1, -1), its activation (1, 0) beside (1.5, 0.5), and 0.75 beside 2
    assert found.cosine_distance[1] == pytest.approx([0, 1 - 3 / math.sqrt(10), 0], abs=1e-6)
    assert found.coefficient[1] == pytest.approx([1, 1.5, 2 / 0.75])
    assert found.relative_error[1] == pytest.approx([0, math.sqrt(0.2), 1.25 / 2])
    assert found.endpoint_distance == pytest.approx([2, 1, 0])
    assert found.weak_additivity[:, 1] == pytest.approx([1, 1 - 3 / math.sqrt(10)])
    # W_a H_a + W_b H_b = 2 + 2, W_a H_b + W_b H_a = 0 + 0: one vector is zero
    assert found.commutativity[2] == 1
    assert found.input_distance[2] == pytest.approx(1)
    assert found.weight_distance[2] == pytest.approx(1)


def test_scaling_the_first_layer_of_one_network_changes_no_cosine_of_its_ends():
    a, b = made(mlp, 0), made(mlp, 1)
    scaled = copy.deepcopy(b)
    with torch.no_grad():
        for parameter in scaled[0].parameters():
            parameter.mul_(8)
    before, after = (feature_connectivity(a, other, vectors(), alpha=1.0) for other in (b, scaled))
    assert after.endpoint_distance[:2] == pytest.approx(before.endpoint_distance[:2], abs=1e-14)
    assert not after.cosine_distance.any()  # at 1 it is the second network


def test_a_common_factor_changes_nothing_but_is_in_the_products():
    a, b = made(mlp, 0, bias=False), made(mlp, 1, bias=False)
    found = feature_connectivity(a, b, vectors(), layers=["0", "1", "2"])
    larger = feature_connectivity(a, b, 4 * vectors(), layers=["0", "1", "2"])
    for key in ("cosine_distance", "relative_error", "coefficient", "endpoint_distance", "commutativity"):
        np.testing.assert_allclose(getattr(larger, key), getattr(found, key), atol=1e-14)


def test_batches_do_not_matter_and_an_iterator_will_do():
    a, b = made(Mixed, 0), made(Mixed, 1)
    whole = feature_connectivity(a, b, torch.cat(images()))
    parts = feature_connectivity(a, b, iter(images()))
    again = feature_connectivity(a, b, images())
    for key in ("cosine_distance", "relative_error", "weak_additivity", "commutativity", "input_distance"):
        np.testing.assert_allclose(getattr(parts, key), getattr(whole, key), rtol=1e-12)
        np.testing.assert_array_equal(getattr(parts, key), getattr(again, key))


def test_several_alphas_are_the_single_ones():
    a, b = made(Mixed, 0), made(Mixed, 1)
    found = feature_connectivity(a, b, images(), alpha=(0.25, 0.75))
    assert found.alpha == (0.25, 0.75)
    for row, alpha in enumerate((0.25, 0.75)):
        single = feature_connectivity(a, b, images(), alpha=alpha)
        for key in ("cosine_distance", "coefficient", "relative_error", "weak_additivity"):
            np.testing.assert_array_equal(getattr(found, key)[row], getattr(single, key))
        np.testing.assert_array_equal(found.commutativity, single.commutativity)


def test_the_networks_are_as_before_also_after_an_error():
    a, b = made(Mixed, 0).train(), made(Mixed, 1)
    b.norm.eval()
    before = snapshot(a), snapshot(b)
    data = images()
    kept = [x.clone() for x in data]
    feature_connectivity(a, b, data)
    broken = [data[0], torch.zeros(2, 2, 4, 4)]  # of another type
    with pytest.raises(RuntimeError):
        feature_connectivity(a, b, broken)
    with pytest.raises(LayerNotFoundError, match="conv9"):
        feature_connectivity(a, b, data, layers=["conv9"])
    assert_untouched(a, before[0])
    assert_untouched(b, before[1])
    assert all(torch.equal(x, y) for x, y in zip(data, kept, strict=True))


def test_a_module_that_both_networks_hold():
    first, a, b = made(lambda: nn.Linear(4, 6), 5), made(mlp, 0), made(mlp, 1)
    a[0] = b[0] = first
    apart = copy.deepcopy(b)
    apart[0] = copy.deepcopy(first)
    shared, separate = feature_connectivity(a, b, vectors()), feature_connectivity(a, apart, vectors())
    assert shared.layers == separate.layers
    np.testing.assert_array_equal(shared.cosine_distance, separate.cosine_distance)
    np.testing.assert_array_equal(shared.commutativity, separate.commutativity)
    assert shared.endpoint_distance[0] == 0


def test_chosen_layers_and_positions():
    a, b = made(Mixed, 0), made(Mixed, 1)
    x = torch.cat(images())
    (f_a, _), (f_b, _) = by_hand(a, x), by_hand(b, x)
    found = feature_connectivity(a, b, x, layers=["relu#2", "conv2"], positions="samples")
    assert found.layers == ("conv2", "relu#2")
    rows_a, rows_b = (f["conv2"].movedim(1, -1).reshape(-1, 4) for f in (f_a, f_b))
    assert found.endpoint_distance[0] == pytest.approx(sample_means(zip(rows_a, rows_b, strict=True)))
    means = feature_connectivity(a, b, x, layers="conv2", positions="mean")
    pooled = zip(f_a["conv2"].mean((2, 3)), f_b["conv2"].mean((2, 3)), strict=True)
    assert means.endpoint_distance[0] == pytest.approx(sample_means(pooled))
    # over all samples at once positions are the same
    whole = feature_connectivity(a, b, x, layers=["relu#2", "conv2"])
    np.testing.assert_allclose(found.commutativity, whole.commutativity, rtol=1e-12)
    np.testing.assert_allclose(found.relative_error, whole.relative_error, rtol=1e-12)


def test_a_block_has_features_and_no_condition():
    a, b = (made(lambda: nn.Sequential(mlp(), nn.Flatten()), seed) for seed in (0, 1))
    found = feature_connectivity(a, b, vectors(), layers="0")
    assert found.layers == ("0",)
    assert np.isnan(found.weak_additivity).all()
    assert np.isnan(found.commutativity).all()
    assert set(found.to_dict()["layers"][0]) == {
        *("layer", "cosine_distance", "coefficient", "relative_error", "endpoint_distance")
    }


def test_padding_is_left_out_of_everything():
    a, b = made(Tokens, 0), made(Tokens, 1)
    x = vectors(24, features=3).view(4, 6, 3)
    mask = (torch.arange(6) < torch.tensor([[6], [4], [2], [1]])).long()
    padded = x.masked_fill(mask[..., None] == 0, 1e3)
    found = feature_connectivity(a, b, {"x": padded, "attention_mask": mask}, positions="samples")
    plain = feature_connectivity(a, b, x[mask.bool()])
    for key in ("cosine_distance", "relative_error", "endpoint_distance", "commutativity", "input_distance"):
        np.testing.assert_allclose(getattr(found, key), getattr(plain, key), rtol=1e-10, atol=1e-15)
    np.testing.assert_allclose(found.weak_additivity[1], plain.weak_additivity[1], rtol=1e-10)
    with pytest.raises(DataError, match="cannot be flattened"):
        feature_connectivity(a, b, {"x": padded, "attention_mask": mask})
    counted = feature_connectivity(a, b, {"x": padded, "attention_mask": mask}, positions="samples", mask=None)
    assert counted.endpoint_distance[0] != found.endpoint_distance[0]


def test_recurrent_layers_give_their_first_output():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    a, b = made(Recurrent, 0), made(Recurrent, 1)
    x = vectors(10, features=3).view(2, 5, 3)
    assert feature_connectivity(a, b, x).layers == ("lstm[0]", "head")
    assert feature_connectivity(a, b, x, layers="lstm[0]").layers == ("lstm[0]",)
    with pytest.raises(DataError, match=r"lstm\[1\]\[0\] has shape \(1, 2, 4\) for 2 samples"):
        feature_connectivity(a, b, x, layers=["lstm[1][0]"])
    with pytest.raises(LayerNotFoundError, match="several outputs"):
        feature_connectivity(a, b, x, layers=["lstm"])


def test_repair_is_done_to_the_networks_between_alone():
    a, b = made(Mixed, 0), made(Mixed, 1)
    data, calibration = images(), images(seed=5)
    plain = feature_connectivity(a, b, data, alpha=[0, 0.5])
    found = feature_connectivity(a, b, data, alpha=[0, 0.5], repair="reset", repair_data=calibration)
    assert found.repair == "reset"
    np.testing.assert_array_equal(found.cosine_distance[0], plain.cosine_distance[0])
    np.testing.assert_array_equal(found.endpoint_distance, plain.endpoint_distance)
    between = made(Mixed, 2)
    between.load_state_dict(interpolate(a.state_dict(), b.state_dict(), 0.5))
    with torch.no_grad():
        out = torch.cat([between.conv1(x) for x in calibration])
    between.norm.running_mean.copy_(out.mean((0, 2, 3)))
    between.norm.running_var.copy_(out.var((0, 2, 3), unbiased=True))
    x = torch.cat(data)
    (f_a, _), (f_b, _), (f_alpha, _) = by_hand(a, x), by_hand(b, x), by_hand(between, x)
    expected = sample_means(zip(f_alpha["norm"], (f_a["norm"] + f_b["norm"]) / 2, strict=True))
    assert found.cosine_distance[1, 1] == pytest.approx(expected, rel=0.02)
    assert found.cosine_distance[1, 1] != pytest.approx(plain.cosine_distance[1, 1], rel=0.02)
    with pytest.raises(DataError, match="iterator"):
        feature_connectivity(a, b, iter(data), repair="reset")


def test_refuses_what_cannot_be_measured():
    a, b = made(mlp, 0), made(mlp, 1)
    x = vectors()
    for alpha in (-0.1, 1.1, math.nan, "half", True, [0.5, 2.0], ()):
        with pytest.raises(DataError, match="alpha"):
            feature_connectivity(a, b, x, alpha=alpha)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="positions"):
        feature_connectivity(a, b, x, positions="all")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="no batch"):
        feature_connectivity(a, b, [])
    with pytest.raises(NotFiniteError, match="input"):
        feature_connectivity(a, b, torch.full((2, 4), math.nan, dtype=torch.float64))
    wider = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with pytest.raises(ArchitectureError, match=r"0\.weight"):
        feature_connectivity(a, wider, x)
    with pytest.raises(NotFiniteError, match="overflow"):
        feature_connectivity(a.float(), b.float(), 1e30 * x.float())
    with pytest.raises(LayerNotFoundError, match="no layer"):
        feature_connectivity(nn.Sequential(nn.Flatten()), nn.Sequential(nn.Flatten()), x)


def test_to_dict_repr_and_plot():
    a, b = made(Mixed, 0), made(Mixed, 1)
    found = feature_connectivity(a, b, images(), alpha=(0.25, 0.5))
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["alpha"] == [0.25, 0.5]
    relu = content["layers"][2]
    assert relu["layer"] == "relu"
    assert "commutativity" not in relu
    assert relu["weak_additivity"] == found.weak_additivity[:, 2].tolist()
    assert "7 layers, 15 samples, alpha (0.25, 0.5)" in repr(found)
    ax = found.plot()
    labels = ax.get_legend_handles_labels()[1]
    assert "from the mean of the features, 0.25" in labels
    assert "commutativity" in labels
    assert ax.get_yscale() == "log"
    assert [label.get_text() for label in ax.get_xticklabels()] == list(found.layers)
    single = feature_connectivity(a, a, images())
    assert single.to_dict()["alpha"] == 0.5
    drawn = single.plot(ax)
    assert drawn is ax
    assert feature_connectivity(a, a, images()).plot().get_yscale() == "linear"  # nothing above zero
    mpl.pyplot.close("all")  # pyright: ignore[reportAttributeAccessIssue]


# Plain tensors


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), alpha=st.floats(0, 1), scale=st.floats(1e-3, 1e3))
def test_distances_are_those_of_the_definitions_and_know_no_scale(seed, alpha, scale):
    generator = torch.Generator().manual_seed(seed)
    f, a, b = torch.randn(3, 6, 2, 2, generator=generator, dtype=torch.float64)
    mixture = (1 - alpha) * a + alpha * b
    found = feature_distance(f, a, b, alpha)
    assert found == pytest.approx(sample_means(zip(f, mixture, strict=True)), abs=1e-13)
    assert feature_distance(scale * f, a, b, alpha) == pytest.approx(found, abs=1e-13)
    assert feature_distance(scale * mixture, a, b, alpha) == pytest.approx(0, abs=1e-13)
    outside = (1 - alpha) * a.clamp(min=0) + alpha * b.clamp(min=0)
    pairs = [(x, y) for x, y in zip(mixture.clamp(min=0), outside, strict=True) if x.any() and y.any()]
    if len(pairs) == len(a):
        assert weak_additivity(a, b, alpha) == pytest.approx(sample_means(pairs), abs=1e-13)
    assert weak_additivity(a, b, alpha, torch.nn.Identity()) == pytest.approx(0, abs=1e-13)
    assert weak_additivity(scale * a, scale * b, alpha) == pytest.approx(weak_additivity(a, b, alpha), abs=1e-13)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_commutativity_is_that_of_the_definition(seed):
    generator = torch.Generator().manual_seed(seed)
    w_a, w_b = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    h_a, h_b = torch.randn(2, 7, 4, generator=generator, dtype=torch.float64)
    same, crossed = w_a @ h_a.T + w_b @ h_b.T, w_a @ h_b.T + w_b @ h_a.T
    assert commutativity(w_a, w_b, h_a, h_b) == pytest.approx(one_minus_cos(same, crossed), abs=1e-12)
    assert commutativity(w_b, w_a, h_b, h_a) == pytest.approx(commutativity(w_a, w_b, h_a, h_b), abs=1e-13)
    assert commutativity(w_a, w_a, h_a, h_b) == 0
    assert commutativity(w_a, w_b, h_a, h_a) == 0


def test_small_distances_keep_their_digits():
    # 1 - cos of the angle t is t²/2 - t⁴/24: below what 1 - x·y can tell in double precision
    t = 1e-9
    x, y = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([[1.0, t]], dtype=torch.float64)
    assert float(cosine_distances(x, 3 * y)) == pytest.approx(t * t / 2, rel=1e-6)
    overlap = Overlap()
    overlap.add(x, y, "piece")
    assert overlap.distance == pytest.approx(t * t / 2, rel=1e-6)
    single = cosine_distances(x.float(), torch.tensor([[1.0, 1e-5]]))
    assert float(single) == pytest.approx(5e-11, rel=1e-5)


def test_vectors_of_zeros():
    zero, one = torch.zeros(1, 2), torch.ones(1, 2)
    assert feature_distance(zero, zero, zero) == 0
    assert feature_distance(zero, one, one) == 1
    assert feature_distance(one, zero, zero) == 1
    assert Overlap().distance == 0
    assert Overlap().relative_error == 0
    assert math.isnan(Overlap().coefficient)
    half = Overlap()
    half.add(one, zero, "x")
    assert (half.distance, half.relative_error) == (1, math.inf)


def test_an_activation_in_place_leaves_the_tensors_alone():
    h_a, h_b = torch.tensor([[1.0, -1.0]]), torch.tensor([[-2.0, 2.0]])
    found = weak_additivity(h_a, h_b, activation=nn.ReLU(inplace=True))
    assert found == weak_additivity(h_a, h_b)
    assert h_a.tolist() == [[1, -1]]
    assert h_b.tolist() == [[-2, 2]]


def test_plain_tensors_that_do_not_fit():
    x = torch.ones(3, 2)
    with pytest.raises(DataError, match=r"between \(2, 2\), features_a \(3, 2\)"):
        feature_distance(x[:2], x, x)
    with pytest.raises(DataError, match=r"before_a has shape \(0, 2\)"):
        weak_additivity(x[:0], x[:0])
    with pytest.raises(DataError, match=r"weights of shape \(3, 2\) beside inputs of shape \(3, 3\)"):
        commutativity(x, x, torch.ones(3, 3), torch.ones(3, 3))
    for function in (lambda y: feature_distance(y, x, x), lambda y: commutativity(x, x, y, y)):
        with pytest.raises(NotFiniteError):
            function(torch.full((3, 2), math.inf))

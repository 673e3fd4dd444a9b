from __future__ import annotations

import json
import math
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch import nn

import isthmus.metrics
from isthmus.base.errors import DataError, LayerNotFoundError, NotFiniteError
from isthmus.metrics import CKA, INDICES, MinibatchHSIC, Similarity, cka, collect, compare, similarity


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(make, seed):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return make()


def mlp(widths=(6, 10, 8, 3), seed=0):
    def make():
        layers = [part for p, q in pairwise(widths) for part in (nn.Linear(p, q), nn.ReLU())]
        return nn.Sequential(*layers[:-1])

    return seeded(make, seed)


def outputs(model, x):
    """Outputs of the parts of a sequential network, each from a call of its own."""
    values = {}
    with torch.no_grad():
        for name, part in model.named_children():
            x = part(x.clone())
            values[name] = x.clone()
    return values


def as_rows(x, positions="samples"):
    x = x.flatten(2).transpose(1, 2)
    return {"samples": x.flatten(0, 1), "features": x.flatten(1), "mean": x.mean(1)}[positions]


def table(a, b):
    return np.array([[cka(x.double(), y.double()) for y in b] for x in a])


class Swapped(nn.Module):
    """Registers its modules in another order than it runs them."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.act = nn.ReLU(inplace=True)
        self.stem = nn.Linear(6, 8)

    def forward(self, x):
        return self.head(self.act(self.stem(x)))


def test_matrix_equals_cka_of_all_samples_at_once():
    a, b = mlp(seed=1), mlp((6, 7, 9, 5, 4), seed=2)
    x = randn(110, 6)
    similarity = compare(a, b, list(x.split(30)), precision="float64")
    truth = table(outputs(a, x).values(), outputs(b, x).values())
    np.testing.assert_allclose(similarity.values, truth, rtol=1e-6)
    assert similarity.values.dtype == np.float64
    assert similarity.layers_a == ("0", "1", "2", "3", "4")
    assert similarity.layers_b == ("0", "1", "2", "3", "4", "5", "6")
    assert similarity.index == "cka"
    assert similarity.convention == {
        "positions": "samples",
        "mask": None,
        "subsample": None,
        "samples": 110,
        "estimator": "biased, linear kernel",
        "kept": "moments",
    }
    assert np.ptp(truth) > 0.1


def test_an_in_place_relu_does_not_reach_back_into_batch_norm():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)).train(), seed=0)
    x = randn(40, 3, 8, 8)
    model(x)  # moves the running statistics
    model.eval()
    truth = table(*[[as_rows(value) for value in outputs(model, x).values()]] * 2)
    similarity = compare(model, model, [x[:25], x[25:]])
    np.testing.assert_allclose(similarity.values, truth, atol=1e-6)
    assert similarity.values[1, 2] < 0.95


def test_labels_and_values_are_both_in_execution_order():
    model = seeded(Swapped, 0)
    x = randn(60, 6)
    similarity = compare(model, mlp(), x)
    assert similarity.layers_a == ("stem", "act", "head")
    with torch.no_grad():
        stem = model.stem(x)
        parts = [stem, stem.relu(), model.head(stem.relu())]
    np.testing.assert_allclose(similarity.values, table(parts, outputs(mlp(), x).values()), atol=1e-6)


def test_every_batch_counts():
    a, b = mlp(seed=1), mlp(seed=2)
    x = randn(90, 6)
    whole = compare(a, b, x).values
    np.testing.assert_allclose(compare(a, b, x.split(20)).values, whole, atol=1e-6)
    assert np.abs(compare(a, b, x[80:]).values - whole).max() > 0.01


@pytest.mark.parametrize("positions", ["samples", "features", "mean"])
def test_positions_of_feature_maps(positions):
    def make():
        return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3, padding=1))

    a, b = seeded(make, 0), seeded(make, 1)
    x = randn(30, 2, 6, 5)
    similarity = compare(a, b, x.split(12), positions=positions)
    parts = [[as_rows(value, positions) for value in outputs(model, x).values()] for model in (a, b)]
    np.testing.assert_allclose(similarity.values, table(*parts), atol=1e-6)
    assert similarity.convention["samples"] == {"samples": 900}.get(positions, 30)


def test_units_are_found_on_axis_one_of_one_dimensional_convolutions():
    model = seeded(lambda: nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 5, 1)), 0)
    x = randn(20, 2, 7)
    truth = table(*[[as_rows(value) for value in outputs(model, x).values()]] * 2)
    np.testing.assert_allclose(compare(model, model, x).values, truth, atol=1e-6)
    chosen = compare(model, model, x, layers=["1"], unit_axis=1)
    np.testing.assert_allclose(chosen.values, [[1]], atol=1e-6)
    assert chosen.convention["samples"] == 140


def test_units_are_found_on_the_last_axis_of_linear_layers_over_a_grid():
    model = seeded(lambda: nn.Sequential(nn.Linear(2, 4), nn.GELU(), nn.Linear(4, 3)), 0)
    x = randn(5, 6, 7, 2)
    truth = table(*[[value.flatten(0, 2) for value in outputs(model, x).values()]] * 2)
    np.testing.assert_allclose(compare(model, model, x).values, truth, atol=1e-6)


def test_layers_that_pass_data_on_are_left_out():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Identity(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8, 3))
    assert compare(model, model, randn(9, 1, 4, 4), positions="mean").layers_a == ("0", "4")
    assert compare(model, model, randn(9, 1, 4, 4), layers=["3", "4"]).layers_a == ("3", "4")


def test_chosen_layers_for_both_or_for_each():
    a, b = mlp(seed=1), seeded(Swapped, 2)
    x = randn(40, 6)
    similarity = compare(a, b, x, layers=(["4", "0"], ["act"]))
    assert (similarity.layers_a, similarity.layers_b) == (("0", "4"), ("act",))
    full = compare(a, b, x)
    np.testing.assert_allclose(similarity.values, full.values[[0, 4], 1:2], atol=1e-6)
    both = compare(a, mlp(seed=3), x, layers=(name for name in ("0", "2")))
    assert both.layers_a == both.layers_b == ("0", "2")
    assert compare(a, a, x, layers="2").layers_a == ("2",)
    half = compare(a, b, x, layers=(None, ("head",)))
    np.testing.assert_allclose(half.values, full.values[:, 2:], atol=1e-6)


def test_one_model_runs_once_for_two_lists_of_layers():
    model = mlp()
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    x = randn(40, 6)
    similarity = compare(model, model, x.split(10), layers=(["0", "1"], ["1", "2"]))
    assert len(seen) == 4
    values = list(outputs(model, x).values())
    np.testing.assert_allclose(similarity.values, table(values[:2], values[1:3]), atol=1e-6)


def test_the_first_of_several_outputs_is_taken_unless_another_is_named():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 4, batch_first=True)

        def forward(self, x):
            return self.lstm(x)[0]

    model = seeded(Recurrent, 0)
    x = randn(10, 6, 3)
    similarity = compare(model, model, x)
    assert similarity.layers_a == ("lstm[0]",)
    assert similarity.convention["samples"] == 60
    assert compare(model, model, x, layers=["lstm"]).layers_a == ("lstm[0]",)
    states = compare(model, model, x, layers=["lstm[1][0]", "lstm[1][1]"])
    assert states.layers_a == ("lstm[1][0]", "lstm[1][1]")
    with torch.no_grad():
        h, c = model.lstm(x)[1]
    np.testing.assert_allclose(states.values, table(*[[h[0], c[0]]] * 2), atol=1e-6)


def test_outputs_without_units_are_left_out_by_default():
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.loss = nn.Linear(3, 2), nn.MSELoss()

        def forward(self, x):
            y = self.linear(x)
            self.loss(y, torch.zeros_like(y))
            return y

    model = Scores()
    assert compare(model, model, randn(8, 3)).layers_a == ("linear",)
    with pytest.raises(DataError, match=r"loss has shape \(\)"):
        compare(model, model, randn(8, 3), layers=["loss"])
    only_loss = nn.Sequential(nn.Identity())
    with pytest.raises(LayerNotFoundError, match="Sequential: no layer with samples x units ran"):
        compare(only_loss, only_loss, randn(8, 3))


def test_keyword_inputs_and_labels():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, *, x):
            return self.linear(x)

    model = Keyword()
    data = [{"x": randn(8, 3, seed=seed), "labels": torch.zeros(8)} for seed in range(3)]
    assert compare(model, model, data).convention["samples"] == 24
    assert compare(mlp(), mlp(), (randn(8, 6), torch.zeros(8))).convention["samples"] == 8


def test_a_subsample_and_a_mask_are_on_record():
    a, b, x = mlp(seed=1), mlp(seed=2), randn(400, 6)
    drawn = compare(a, b, x, subsample=0.5, seed=4)
    assert drawn.convention["samples"] == 200
    assert (drawn.convention["subsample"], drawn.convention["seed"]) == (0.5, 4)
    assert np.array_equal(drawn.values, compare(a, b, x, subsample=0.5, seed=4).values)
    assert not np.array_equal(drawn.values, compare(a, b, x, subsample=0.5, seed=5).values)
    np.testing.assert_allclose(drawn.values, compare(a, b, x).values, atol=0.1)

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x, attention_mask):
            return self.linear(x)

    model, mask = Masked(), torch.tensor([[1, 1, 0], [1, 0, 0]])
    masked = compare(model, model, {"x": randn(2, 3, 3), "attention_mask": mask})
    assert (masked.convention["samples"], masked.convention["mask"]) == (3, "attention_mask")
    with pytest.raises(DataError, match="has no mask 'real'"):
        compare(model, model, {"x": randn(2, 3, 3), "attention_mask": mask}, mask="real")


def test_models_and_data_come_back_as_they_were():
    a = nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).train()
    a[1].eval()
    b = nn.Sequential(nn.Linear(6, 3))
    x = randn(50, 6)
    before = {name: value.clone() for name, value in a.state_dict().items()}, x.clone()
    similarity = compare(a, b, x, layers=(["3"], ["0"]))
    with torch.no_grad():
        truth = cka(a[3](a[1](x.relu())), b(x))
    assert similarity.values.item() == pytest.approx(truth, abs=1e-6)
    with pytest.raises(RuntimeError):
        compare(a, b, [x, randn(50, 7)])
    assert [module.training for module in a] == [True, False, True, True]
    assert torch.equal(x, before[1])
    assert all(torch.equal(value, before[0][name]) for name, value in a.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in (*a.modules(), *b.modules()))


def test_differing_sample_counts_are_refused_on_the_first_batch():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    read = []

    def data():
        for seed in range(5):
            read.append(seed)
            yield randn(4, 1, 6, 6, seed=seed)

    message = r"'model_a\.0' and 'model_b\.1' have 64 and 16 samples.*positions='mean' or positions='features'"
    with pytest.raises(DataError, match=message):
        compare(model, nn.Sequential(*model), data())
    assert read == [0]
    assert compare(model, model, data(), positions="features").layers_a == ("0", "1", "3")


def test_what_is_too_large_for_moments_is_compared_by_its_samples():
    a, b = (seeded(lambda: nn.Sequential(nn.Conv2d(1, 64, 3, padding=1)), seed) for seed in range(2))
    x = randn(5, 1, 32, 32)
    found = compare(a, b, x, positions="features")
    assert found.convention["kept"] == "samples"
    truth = table(*([y.flatten(1) for y in outputs(model, x).values()] for model in (a, b)))
    np.testing.assert_allclose(found.values, truth, rtol=1e-5)

    bytes_needed = 8 * (10 * 10 + 3 * 3 + 10 * 3)
    kept = [
        compare(mlp(), mlp(seed=1), iter([randn(8, 6)]), layers=(["0"], ["4"]), max_bytes=limit).convention["kept"]
        for limit in (max(bytes_needed, 1 << 16), 1 << 16)
    ]
    assert kept == ["moments", "moments"]


def test_nan_is_refused_with_the_name_of_the_layer_and_its_network():
    a, b = mlp(seed=0), mlp(seed=1)
    with torch.no_grad():
        b.get_parameter("2.weight")[0, 0] = math.nan
    with pytest.raises(NotFiniteError, match=r"model_b\.2 of shape \(9, 8\) holds NaN"):
        compare(a, b, randn(9, 6))


def test_a_dead_layer_is_nan_with_a_warning_and_none_in_json():
    a, b = mlp(seed=0), mlp(seed=1)
    with torch.no_grad():
        a.get_parameter("2.bias").fill_(-1e6)
    with pytest.warns(UserWarning, match=r"'model_a\.3' does not vary"):
        similarity = compare(a, b, randn(30, 6), layers=["2", "3"])
    assert np.isnan(similarity.values).tolist() == [[False, False], [True, True]]
    content = json.loads(json.dumps(similarity.to_dict(), allow_nan=False))
    assert content["values"][1] == [None, None]
    assert content["values"][0] == similarity.values[0].tolist()
    assert (content["layers_a"], content["index"]) == (["2", "3"], "cka")
    assert content["convention"]["samples"] == 30


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"index": "ckaa"}, DataError, "unknown index 'ckaa'; did you mean cka"),
        ({"debias": True}, DataError, "'cka' has no parameter 'debias'; did you mean debiased"),
        ({"index": CKA(), "debiased": True}, DataError, "made already"),
        ({"index": "svcca", "threshold": 2.0}, DataError, "threshold"),
        ({"precision": "half"}, DataError, "precision is 'half'"),
        ({"significance": "bootstrap"}, DataError, "unknown significance 'bootstrap'"),
        ({"index": "minibatch_cka", "debiased": True}, DataError, "no parameter 'debiased'"),
        ({"index": "minibatch_cka", "bandwidth": -1.0}, DataError, "bandwidth is -1"),
        ({"index": "minibatch_cka", "significance": "jackknife"}, DataError, "keeps no samples"),
        ({"distributed": True}, DataError, "processes have not met"),
        ({"positions": "middle"}, DataError, "unknown positions 'middle'"),
        ({"layers": ["0", "fc"]}, LayerNotFoundError, "Sequential has no layer 'fc'"),
        ({"layers": ["0", "1#2"]}, LayerNotFoundError, "'1#2' exists but was not called"),
        ({"layers": []}, LayerNotFoundError, "name some"),
    ],
)
def test_bad_arguments(keywords, error, message):
    with pytest.raises(error, match=message):
        compare(mlp(), mlp(), randn(8, 6), **keywords)


def test_no_data_and_one_sample_are_refused():
    with pytest.raises(DataError, match="no batch"):
        compare(mlp(), mlp(), [])
    with pytest.raises(DataError, match="1 sample"):
        compare(mlp(), mlp(seed=1), randn(1, 6))


def test_a_network_elsewhere_is_copied_to_the_device():
    a, b = mlp(), mlp(seed=1)
    with pytest.raises((NotImplementedError, RuntimeError)):  # the meta device holds no numbers
        compare(a, b, randn(8, 6), device="meta")
    assert {parameter.device.type for parameter in a.parameters()} == {"cpu"}


def test_same_inputs_same_bits():
    a, b = mlp(seed=0), mlp(seed=1)
    data = list(randn(90, 6).split(25))
    assert np.array_equal(compare(a, b, data).values, compare(a, b, data).values)


def test_progress_counts_the_batches(capsys):
    compare(mlp(), mlp(), list(randn(30, 6).split(10)), progress=True)
    assert "0/3" in capsys.readouterr().err
    compare(mlp(), mlp(), randn(30, 6), progress=False)
    assert capsys.readouterr().err == ""


def similarity_of(rows, columns):
    values = np.linspace(0, 1, rows * columns).reshape(rows, columns)
    names_a, names_b = (tuple(f"{side}{i}" for i in range(n)) for side, n in (("a", rows), ("b", columns)))
    return Similarity(values, names_a, names_b, "cka", {"positions": "samples"})


@pytest.mark.parametrize("own_axes", [True, False])
def test_plot_shows_values_and_names(own_axes):
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    similarity = similarity_of(3, 5)
    given = plt.subplots()[1] if own_axes else None
    ax = similarity.plot(given)
    assert given is None or ax is given
    image = ax.images[0]
    np.testing.assert_array_equal(image.get_array(), similarity.values)
    assert image.origin == "lower"
    assert [label.get_text() for label in ax.get_xticklabels()] == list(similarity.layers_b)
    assert [label.get_text() for label in ax.get_yticklabels()] == list(similarity.layers_a)
    assert image.get_clim() == (0, 1)
    ax.figure.canvas.draw()
    plt.close("all")


PARAMETERS = {"mutual_knn": {"k": 4}, "rsa": {"comparison": "pearson"}}


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("known_length", [True, False])
def test_every_index_equals_its_function_on_the_outputs(name: str, known_length: bool) -> None:
    a, b = mlp(seed=1), mlp((6, 7, 4), seed=2)
    x = randn(60, 6)
    batches = list(x.split(25))
    parameters = PARAMETERS.get(name, {})
    found = compare(a, b, batches if known_length else iter(batches), index=name, **parameters)
    function = getattr(isthmus.metrics, name)
    rows, columns = (outputs(model, x).values() for model in (a, b))
    truth = [[function(row, column, **parameters) for column in columns] for row in rows]
    # Of moments only singular values above 1e-7 are known, in float32 activations all but noise.
    np.testing.assert_allclose(found.values, truth, rtol=1e-4, atol=1e-5)
    assert found.index == name
    assert found.distance == INDICES[name](**parameters).distance


def test_minibatch_cka_equals_the_accumulator() -> None:
    a, b = mlp(seed=1), mlp(seed=2)
    x = randn(96, 6)
    found = compare(a, b, list(x.split(32)), index="minibatch_cka", kernel="rbf", bandwidth=0.7, precision="float64")
    hsic = MinibatchHSIC("rbf", 0.7, layers=(list("01234"), list("56789")))
    for batch in x.split(32):
        values = [*outputs(a, batch).values(), *outputs(b, batch).values()]
        hsic.update({str(i): value for i, value in enumerate(values)})
    np.testing.assert_allclose(found.values, hsic.cka(list("01234"), list("56789")).numpy(), atol=1e-9)
    assert found.convention["samples"] == 96
    assert "3 batches" in found.convention["estimator"]


def test_significance_comes_with_the_values() -> None:
    a, b = mlp(seed=1), mlp(seed=2)
    x = randn(80, 6)
    found = compare(a, b, list(x.split(40)), significance="both", shuffles=30, seed=3, precision="float64")
    again = similarity(collect(a, x), collect(b, x), significance="both", shuffles=30, seed=3)
    assert found.interval is not None
    assert found.p_values is not None
    assert found.null_mean is not None
    assert again.null_mean is not None
    assert again.interval is not None
    assert again.p_values is not None
    for mine, other in ((found.null_mean, again.null_mean), (found.interval, again.interval)):
        np.testing.assert_allclose(mine, other, atol=1e-6)
    assert found.convention["shuffles"] == 30
    assert (found.interval[0] < found.values).all()
    np.testing.assert_array_equal(found.p_values, again.p_values)
    assert found.p_values[0, 0] == 1 / 31


@pytest.mark.parametrize("debiased", [False, True])
def test_spaces_and_precisions_agree(debiased: bool) -> None:
    a, b = mlp(seed=1), mlp((6, 7, 9, 5, 4), seed=2)
    batches = [x + 100 for x in randn(500, 6).split(50)]
    exact = compare(a, b, batches, precision="float64", debiased=debiased).values
    for space in ("sample", "feature", "mixed"):
        np.testing.assert_allclose(compare(a, b, batches, space=space, debiased=debiased).values, exact, atol=1e-6)
    for precision in ("float32", "tf32"):
        found = compare(a, b, batches, precision=precision, debiased=debiased)
        np.testing.assert_allclose(found.values, exact, atol=1e-6)
    np.testing.assert_allclose(compare(a, b, batches, precision="bf16", debiased=debiased).values, exact, atol=1e-3)


def test_one_network_against_itself_runs_once_and_is_symmetric() -> None:
    model, calls = mlp(seed=1), []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    found = compare(model, model, list(randn(60, 6).split(20)), kernel="rbf", precision="float64")
    handle.remove()
    assert len(calls) == 3
    np.testing.assert_allclose(found.values, found.values.T, atol=1e-12)
    np.testing.assert_allclose(found.values.diagonal(), 1, atol=1e-12)

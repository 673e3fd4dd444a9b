"""`similarity` of kept samples: layers, conventions, bounds and refusals; values against the functions on arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import isthmus.metrics
from isthmus.base.errors import DataError, LayerNotFoundError
from isthmus.metrics import CKA, INDICES, RSA, SVCCA, Gram, collect, similarity


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def store(samples: int = 60, names: str = "xy", seed: int = 0, **layers: torch.Tensor) -> Gram:
    base, gram = randn(samples, 5, seed=99), Gram(dtype=torch.float64)
    drawn = {n: base + randn(samples, 5, seed=seed + i) for i, n in enumerate(names)} | layers
    gram.update({name: rows.double() for name, rows in drawn.items()}, samples=range(samples))
    return gram


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("significance", [None, "jackknife"])
def test_every_index_equals_its_function(name: str, significance) -> None:
    a, b = store(), store(names="uvw", seed=7)
    index = INDICES[name]()
    found = similarity(a, b, index=index, significance=significance)
    function = getattr(isthmus.metrics, name)
    truth = [[function(a.rows(i, centred=False), b.rows(j, centred=False)) for j in b.names] for i in a.names]
    np.testing.assert_allclose(found.values, truth, atol=1e-6 if significance is None else 1e-10)
    assert (found.layers_a, found.layers_b) == (("x", "y"), ("u", "v", "w"))
    assert (found.index, found.distance) == (name, index.distance)
    assert found.convention["estimator"] == index.estimator


def test_one_store_is_compared_with_itself_and_layers_are_chosen() -> None:
    gram = store(names="xyz")
    whole = similarity(gram, precision="float64").values
    np.testing.assert_allclose(whole, whole.T, atol=1e-14)
    part = similarity(gram, layers=(["z"], ["x", "y"]), precision="float64")
    np.testing.assert_allclose(part.values, whole[[2]][:, [0, 1]], atol=1e-14)
    assert similarity(gram, layers="y").layers_a == similarity(gram, layers=iter("y")).layers_b == ("y",)


def test_joined_networks_are_compared_in_one_call() -> None:
    grams = {key: store(seed=seed) for seed, key in enumerate("abc")}
    whole = similarity(Gram.join(grams), precision="float64")
    assert whole.layers_a == ("a.x", "a.y", "b.x", "b.y", "c.x", "c.y")
    for i, first in enumerate(grams.values()):
        for j, second in enumerate(grams.values()):
            pair = similarity(first, second, precision="float64").values
            np.testing.assert_allclose(whole.values[2 * i : 2 * i + 2, 2 * j : 2 * j + 2], pair, atol=1e-12)


def test_convention_is_that_of_the_collection() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())
    gram = collect(model, [randn(20, 1, 5, 5)], positions="mean", subsample=0.5, seed=4)
    found = similarity(gram, significance="permutation", shuffles=5, seed=2)
    assert found.convention == {
        "positions": "mean",
        "mask": None,
        "subsample": 0.5,
        "seed": 4,
        "samples": 10,
        "estimator": "biased, linear kernel",
        "significance": "permutation",
        "shuffles": 5,
        "significance_seed": 2,
    }
    with pytest.raises(DataError, match="another convention"):
        collect(model, [randn(20, 1, 5, 5)], positions="samples", gram=gram)


def test_a_loader_that_shuffles_differently_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), randn(30, 4)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    first, second = collect(model, [x]), collect(model, [x[order]])
    with pytest.raises(DataError, match="sample 0"):
        similarity(first, second)
    assert similarity(first, collect(model, list(x.split(7)))).values.item() == pytest.approx(1)


def test_constant_layers_are_nan_and_named_once() -> None:
    gram = store(flat=torch.full((60, 3), 0.1))
    for index in (SVCCA(), RSA("euclidean"), CKA()):
        with pytest.warns(UserWarning, match="'flat'.*vary") as caught:
            found = similarity(gram, index=index, significance=None if index.name != "cka" else "permutation")
        assert sum("'flat'" in str(each.message) for each in caught) == 1
        assert np.isnan(found.values).tolist() == [[False, False, True], [False, False, True], [True, True, True]]


def test_what_is_too_large_is_refused_with_the_need() -> None:
    gram = store()
    assert similarity(gram, index="rsa", max_bytes=8 * 60**2 * 2).values.shape == (2, 2)
    for index in (RSA(), SVCCA()):
        with pytest.raises(DataError, match=r"2 layers and 60 samples would hold .* max_bytes=4000.*subsample"):
            similarity(gram, index=index, max_bytes=4000)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"index": "kca"}, DataError, "unknown index 'kca'; did you mean cka"),
        ({"index": "svcca", "treshold": 0.9}, DataError, "no parameter 'treshold'; did you mean threshold"),
        ({"index": CKA(), "debiased": True}, DataError, "made already"),
        ({"layers": ["x", "q"]}, LayerNotFoundError, "no samples of layer 'q'"),
        ({"layers": []}, DataError, "no layer to compare"),
        ({"significance": "bootstrap"}, DataError, "unknown significance"),
        ({"significance": "permutation", "shuffles": 0}, DataError, "shuffles is 0"),
        ({"precision": "float16"}, DataError, "precision is 'float16'"),
        ({"space": "outer"}, DataError, "space is 'outer'"),
    ],
)
def test_bad_arguments(keywords, error, message) -> None:
    with pytest.raises(error, match=message):
        similarity(store(), **keywords)


def test_too_few_or_unequal_samples() -> None:
    with pytest.raises(DataError, match="3 samples; cka needs at least 4"):
        similarity(store(3), debiased=True)
    gram = Gram()
    gram.update({"x": randn(8, 3), "y": randn(4, 3)})
    with pytest.raises(DataError, match=r"'x' and 'y' have 8 and 4 samples.*positions='mean'"):
        similarity(gram)
    with pytest.raises(DataError, match="no layer to compare"):
        similarity(Gram())

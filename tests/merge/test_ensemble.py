import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isthmus.base.errors import ArchitectureError, DataError
from isthmus.merge import evaluate
from isthmus.merge.ensemble import Ensemble, measured


class Wrapped(nn.Module):
    """Gives its logits in another shape of output."""

    def __init__(self, body, wrap):
        super().__init__()
        self.body, self.wrap = body, wrap

    def forward(self, x):
        return self.wrap(self.body(x))


def networks(count=3, classes=4):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, classes)) for _ in range(count)]


def labelled():
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 5, generator=generator), torch.randint(4, (size,), generator=generator))
        for size in (7, 12, 1)
    ]


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("weights", [None, [1, 2, 1], [0, 1, 3]])
def test_probabilities_are_averaged(weights):
    models = [model.eval() for model in networks()]
    x = labelled()[0][0]
    given = np.array([1.0, 1, 1] if weights is None else weights)
    with torch.no_grad():
        parts = np.stack([softmax(model(x).double().numpy()) for model in models])
        found = Ensemble(models, weights)(x)
    expected = np.tensordot(given / given.sum(), parts, 1)
    np.testing.assert_allclose(found.exp().numpy(), expected, atol=1e-6)
    with torch.no_grad():
        plain = Ensemble(models, weights, average="outputs")(x)
        outputs = np.stack([model(x).double().numpy() for model in models])
    np.testing.assert_allclose(plain.numpy(), np.tensordot(given / given.sum(), outputs, 1), atol=1e-6)


@pytest.mark.parametrize(
    "wrap",
    [lambda out: out, lambda out: {"logits": out, "other": None}, lambda out: SimpleNamespace(logits=out)],
)
def test_logits_are_found_where_the_loss_finds_them(wrap):
    models, (x, y) = networks(), labelled()[0]
    wrapped = Ensemble([Wrapped(model, wrap) for model in models])
    assert evaluate(wrapped, (x, y)) == evaluate(Ensemble(models), (x, y))


def test_outputs_of_any_kind_are_averaged():
    class Several(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x):
            x += 0  # in place: each network must have a copy of its own
            x *= self.value
            return {"pair": (x, [x + 1]), "count": torch.tensor(3), "name": "n", "out": SimpleNamespace(logits=x)}

    x = torch.ones(2, 1)
    found = Ensemble([Several(1.0), Several(3.0)], average="outputs")(x)
    assert found["pair"][0].tolist() == [[2], [2]]
    assert found["pair"][1][0].tolist() == [[3], [3]]
    assert found["out"].tolist() == [[2], [2]]
    assert (int(found["count"]), found["name"]) == (3, "n")
    assert x.tolist() == [[1], [1]]


def test_one_pass_measures_what_many_would():
    models, data = networks(), labelled()
    models[1].train()
    before = [copy.deepcopy(model.state_dict()) for model in models]
    reads = []

    class Counted(list):
        def __iter__(self):
            reads.append(1)
            return super().__iter__()

    each, together = measured(models, Counted(data), weights=[1, 2, 1])
    assert reads == [1]
    assert each == [evaluate(model, data) for model in models]
    expected = evaluate(Ensemble(models, [1, 2, 1]), data)
    assert together == expected
    assert expected.samples == 20
    assert [module.training for module in models[1].modules()] == [True] * 4
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    alone, nothing = measured(models, data, ensemble=False)
    assert alone == each
    assert nothing is None


def test_a_loss_of_ones_own_sees_the_mean_of_the_outputs():
    models = networks()
    data = [(x, x[:, :4]) for x, _ in labelled()]
    _, together = measured(models, data, loss=F.mse_loss)
    with torch.no_grad():
        errors = [
            (sum(model.eval()(x).double() for model in models) / 3 - y.double()).square().mean(1) for x, y in data
        ]
    assert together is not None
    assert together.loss == pytest.approx(float(torch.cat(errors).mean()), rel=1e-5)
    assert together.metric is None


def test_refuses_what_does_not_fit():
    with pytest.raises(ArchitectureError, match="there is none"):
        Ensemble([])
    with pytest.raises(DataError, match="choose 'probabilities' or 'outputs'"):
        Ensemble(networks(), average="votes")
    with pytest.raises(DataError, match="2 weights for 3"):
        Ensemble(networks(), [1, 2])
    x = labelled()[0][0]
    unlike = [networks(1)[0], networks(1, classes=2)[0]]
    for average in ("probabilities", "outputs"):
        with pytest.raises(ArchitectureError, match=r"shape \(7, 4\), network 1 of shape \(7, 2\)"):
            Ensemble(unlike, average=average)(x)
    listed = [Wrapped(model, lambda out: [out]) for model in networks()]
    with pytest.raises(DataError, match="output is a list"):
        Ensemble(listed)(x)
    modes = [copy.deepcopy([module.training for module in model.modules()]) for model in listed]
    with pytest.raises(DataError, match="no logits"):
        measured(listed, labelled())
    assert modes == [[module.training for module in model.modules()] for model in listed]

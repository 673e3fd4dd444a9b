from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

from isthmus.base.errors import DataError, NotFiniteError
from isthmus.base.evaluation import accuracy, cross_entropy
from isthmus.merge import evaluate


def labelled(count=23, features=4, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, features, generator=generator), torch.randint(classes, (count,), generator=generator)


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))


@pytest.mark.parametrize("size", [1, 4, 23])
def test_equals_scikit_learn_whatever_the_batches(model, size):
    x, y = labelled()
    found = evaluate(model, list(zip(x.split(size), y.split(size), strict=True)))
    with torch.no_grad():
        probabilities = model.eval()(x).double().softmax(-1).numpy()
    assert found.loss == pytest.approx(log_loss(y, probabilities, labels=[0, 1, 2]), rel=1e-6)
    assert found.metric == pytest.approx(accuracy_score(y, probabilities.argmax(1)), rel=1e-12)
    assert found.samples == 23


def test_leaves_modes_and_statistics_alone(model):
    model.train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, labelled())
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(DataError):
        evaluate(model, torch.zeros(2, 4))
    assert [module.training for module in model.modules()] == [True, True, False, True, True]


class Language(nn.Module):
    """Logits (samples, tokens, classes), wrapped as asked."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, input_ids):
        return self.wrap(F.one_hot(input_ids, 6).float() * 2)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"logits": x}, lambda x: SimpleNamespace(logits=x)])
def test_tokens_that_do_not_count(wrap):
    ids = torch.tensor([[0, 1, 2], [3, 4, 5], [1, 1, 1]])
    labels = torch.tensor([[0, 1, 0], [3, -100, -100], [-100, -100, -100]])
    batches = [{"input_ids": i[None], "labels": y[None]} for i, y in zip(ids, labels, strict=True)]
    found = evaluate(Language(wrap), batches)
    assert found.metric == 3 / 4
    right, wrong = np.log(np.exp(2) + 5) - 2, np.log(np.exp(2) + 5)
    assert found.loss == pytest.approx((3 * right + wrong) / 4, rel=1e-6)
    assert found.samples == 3
    with pytest.raises(DataError, match="no label of the data counts"):
        evaluate(Language(wrap), batches[2:])


def test_functions_of_the_user():
    x = torch.arange(6.0)[:, None]
    batches = [(x[:1], x[:1] + 1), (x[1:], x[1:] - 3)]
    found = evaluate(nn.Identity(), batches, loss=F.mse_loss, metric=lambda out, y: (out - y).mean())
    assert (found.loss, found.metric) == ((1 + 5 * 9) / 6, (-1 + 5 * 3) / 6)
    assert evaluate(nn.Identity(), batches, loss=F.mse_loss).metric is None
    assert evaluate(nn.Identity(), x, loss=lambda out, _: out.mean()).loss == 2.5


def test_half_precision_logits_are_widened():
    logits = torch.tensor([[1000.0, 0.0]], dtype=torch.float16)
    assert cross_entropy(logits, torch.tensor([1])) == 1000
    assert cross_entropy(logits, torch.tensor([1])).dtype == torch.float32
    assert accuracy(logits, torch.tensor([0])) == 1


def test_a_loss_that_is_not_finite_is_told():
    model = nn.Linear(1, 2)
    nn.init.constant_(model.weight, torch.inf)
    assert np.isnan(evaluate(model, (torch.ones(2, 1), torch.tensor([0, 1]))).loss)


def test_on_a_device_without_moving_the_model(model):
    found = evaluate(model, labelled(), device="cpu")
    assert found == evaluate(model, labelled())
    empty = nn.Linear(4, 3, device="meta")
    with pytest.raises(NotImplementedError):  # a copy is moved, and there is nothing to copy
        evaluate(empty, labelled(), device="cpu")
    assert empty.weight.device.type == "meta"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(2, 4), "the data has no labels: pass batches"),
        ([], "holds no batch"),
        ((torch.zeros(2, 4), torch.tensor([0, 3])), r"label 3 does not fit outputs of shape \(2, 3\)"),
        ((torch.zeros(2, 4), torch.tensor([-1, 0])), "label -1 does not fit"),
        ((torch.zeros(2, 4), torch.tensor([[0], [1]])), r"targets of shape \(2, 1\)"),
        ((torch.zeros(2, 4), torch.zeros(2)), "expect integer labels"),
        ((torch.zeros(2, 4), torch.zeros(3).long()), "first axis must be the same"),
    ],
)
def test_refuses_data(model, data, message):
    with pytest.raises(DataError, match=message):
        evaluate(model, data)


def test_refuses_inputs_that_are_not_finite(model):
    with pytest.raises(NotFiniteError, match="batch 0"):
        evaluate(model, (torch.full((2, 4), torch.nan), torch.tensor([0, 1])))


def test_refuses_outputs_without_logits_and_losses_that_are_no_mean():
    with pytest.raises(DataError, match="is a tuple, in which there are no logits"):
        evaluate(Language(lambda x: (x,)), {"input_ids": torch.zeros(1, 2).long(), "y": torch.zeros(1, 2).long()})
    with pytest.raises(DataError, match=r"mse_loss gave|gave a tensor of shape \(2, 4\)"):
        evaluate(nn.Identity(), torch.zeros(2, 4), loss=lambda out, _: out)

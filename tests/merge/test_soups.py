import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isthmus.base.errors import ArchitectureError, DataError, NotFiniteError
from isthmus.merge import evaluate, weighted_mean
from isthmus.merge.averages.soups import greedy_soup


def networks(count=5, spread=0.7):
    """Networks around one that is good, each with noise of its own size."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for index in range(count):
        net = nn.Linear(6, 3)
        with torch.no_grad():
            net.weight.copy_(torch.eye(3, 6) + spread * (index + 6) / count * torch.randn(3, 6, generator=generator))
            net.bias.zero_()
        made.append(net)
    return [made[index] for index in (2, 0, 4, 1, 3)]


def labelled(count=60):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 6, generator=generator)
    return [(x[i : i + 20], x[i : i + 20, :3].argmax(1)) for i in range(0, count, 20)]


def averaged(models, chosen, weights):
    net = nn.Linear(6, 3)
    net.load_state_dict(weighted_mean([models[i].state_dict() for i in chosen], [weights[i] for i in chosen]))
    return net


@pytest.mark.parametrize("weights", [None, [1, 2, 3, 1, 2]])
@pytest.mark.parametrize("loss", [None, F.cross_entropy])
def test_the_recipe_of_the_paper(weights, loss):
    models, data = networks(), labelled()
    soup = greedy_soup(models, data, weights=weights, loss=loss)
    shares = weights or [1] * 5

    def value(model) -> float:
        found = evaluate(model, data, loss=loss)
        return -found.loss if found.metric is None else found.metric

    alone = [value(model) for model in models]
    order = sorted(range(5), key=lambda index: -alone[index])
    ingredients, best = [order[0]], alone[order[0]]
    for index in order[1:]:
        reached = value(averaged(models, [*ingredients, index], shares))
        if reached >= best:
            ingredients, best = [*ingredients, index], reached
    assert soup.chosen == tuple(ingredients)
    assert [step.network for step in soup.steps] == order
    sign = 1 if loss is None else -1
    assert [step.alone for step in soup.steps] == pytest.approx([sign * alone[index] for index in order])
    assert [step.network for step in soup.steps if step.taken] == ingredients
    assert value(soup.model) == pytest.approx(best)
    assert 1 < len(ingredients) < 5
    expected = averaged(models, ingredients, shares)
    for name, tensor in soup.model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name])


def test_it_is_never_worse_than_the_best_and_says_what_each_step_reached():
    models, data = networks(spread=3.0), labelled()
    soup = greedy_soup(models, data)
    taken = [step.soup for step in soup.steps if step.taken]
    assert taken == sorted(taken)
    assert taken[0] == max(step.alone for step in soup.steps)
    assert evaluate(soup.model, data).metric == taken[-1]
    best = -math.inf
    for step in soup.steps:
        assert step.taken == (step.soup >= best)
        best = max(best, step.soup)
    assert soup.report()["chosen"] == list(soup.chosen)
    assert soup.report()["steps"][0] == {"network": soup.chosen[0], "alone": taken[0], "soup": taken[0], "taken": True}


def test_higher_says_which_way_a_metric_goes():
    models, data = networks(), labelled()

    def error(outputs, targets):
        return (outputs.argmax(1) != targets).double()

    down = greedy_soup(models, data, metric=error, higher=False)
    assert down.chosen == greedy_soup(models, data).chosen
    assert [step.alone for step in down.steps] == sorted(step.alone for step in down.steps)
    assert greedy_soup(models, data, metric=error).chosen[0] == down.steps[-1].network


def test_copies_of_one_network_make_that_network():
    model, data = networks()[0], labelled()
    soup = greedy_soup([model, model, model], data, weights=[0, 0, 1])
    assert soup.chosen == (0, 1, 2)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in soup.model.state_dict().items())
    assert soup.model is not model


def test_refuses_what_does_not_fit():
    models, data = networks(), labelled()
    with pytest.raises(ArchitectureError, match="there are 1"):
        greedy_soup(models[:1], data)
    with pytest.raises(ArchitectureError, match=r"weight: \(3, 6\) in 0, \(2, 6\) in 1"):
        greedy_soup([models[0], nn.Linear(6, 2)], data)
    with pytest.raises(DataError, match="is an iterator"):
        greedy_soup(models, iter(data))
    with pytest.raises(DataError, match="is NaN"):
        greedy_soup(models, data, metric=lambda *_: math.nan)
    with pytest.raises(DataError, match="2 weights for 5"):
        greedy_soup(models, data, weights=[1, 2])
    with pytest.raises(DataError, match="no batch"):
        greedy_soup(models, [])
    with torch.no_grad():
        models[3].bias[0] = math.nan
    with pytest.raises(NotFiniteError, match="network 3: bias"):
        greedy_soup(models, data)

"""Soups: the mean of those networks, of many, whose mean does best on data held out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...base.architecture import full_state
from ...base.batches import Data, require_repeatable
from ...base.errors import ArchitectureError, DataError
from ...base.evaluation import Evaluation, Measure, evaluate
from ...base.interpolation import check_same_ties, normalised, varying, weighted_mean
from ...base.progress import progress as progress_bar
from ..states import rebuilt


@dataclass(frozen=True)
class Step:
    """A network that was tried.

    Attributes:
        network: Its place in the list.
        alone: What it reaches by itself.
        soup: What the soup reaches with it.
        taken: Whether it is in the soup.
    """

    network: int
    alone: float
    soup: float
    taken: bool


@dataclass(frozen=True)
class Soup:
    """A greedy soup.

    Attributes:
        model: The mean of the networks that were chosen.
        chosen: Their places in the list, in the order in which they were taken.
        steps: What was tried, from the best network to the worst.
    """

    model: nn.Module
    chosen: tuple[int, ...]
    steps: tuple[Step, ...]

    def report(self) -> dict[str, Any]:
        """Give what was chosen and what was measured, as plain numbers."""
        return {"chosen": list(self.chosen), "steps": [vars(step) for step in self.steps]}


def greedy_soup(
    models: Sequence[nn.Module],
    data: Data,
    *,
    metric: Measure | None = None,
    loss: Measure | None = None,
    higher: bool | None = None,
    weights: Sequence[float] | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Soup:
    """Average networks one after another, each only if the average does not fall: a greedy soup (Wortsman et al. 2022).

    The networks are sorted by the metric, the best first. Each is added to the soup if the mean with it is at least as
    good as the soup without it. What is reached on `data` has been selected for: measure the soup on other data.
    The soup of networks with batch norm is judged as it is, before any repair.

    Args:
        models: Two or more networks of one architecture, their units in the same order; none is changed.
        data: Held-out batches with labels.
        metric: Function (outputs, targets) → mean over the batch. By default accuracy, or `loss` if that is given.
        loss: A loss to choose by.
        higher: Whether more is better; by default it is for a metric and is not for a loss.
        weights: One non-negative number for each network, for the mean of those chosen; equal by default.
        device: Where to compute; that of the first network by default.
        progress: Show a bar; None: on a terminal.

    Returns:
        The soup, which networks are in it, and the metric after each step.

    Raises:
        ArchitectureError: There are fewer than two networks, or they differ in a name or shape.
        DataError: Data is empty, an iterator or without labels that fit; weights do not fit; or the metric is NaN.
        NotFiniteError: A network or an input holds NaN or infinity.

    Reference:
        Wortsman et al. Model soups: averaging weights of multiple fine-tuned models improves accuracy without
        increasing inference time. ICML 2022, recipe 1. https://arxiv.org/abs/2203.05482

    >>> nets = [nn.Linear(2, 2) for _ in range(3)]
    >>> for net, value in zip(nets, (1.0, 3.0, -9.0)):
    ...     _ = nn.init.zeros_(net.bias), net.weight.data.copy_(torch.tensor([[value, 0.0], [0.0, 1.0]]))
    >>> data = (torch.tensor([[1.0, 2.5], [1.0, 0.0]]), torch.tensor([0, 0]))
    >>> greedy_soup(nets, data).report()["chosen"]
    [1]
    """
    states = _checked(models, data)
    shares = normalised(weights, len(models))
    more = (metric is not None or loss is None) if higher is None else higher

    def value(model: nn.Module) -> float:
        return _figure(evaluate(model, data, loss=loss, metric=metric, device=device), more)

    alone = [value(model) for model in progress_bar(models, "measuring", show=progress)]
    order = sorted(range(len(models)), key=lambda index: -alone[index])
    chosen, best, steps = [order[0]], alone[order[0]], [Step(order[0], alone[order[0]], alone[order[0]], True)]
    sign = 1 if more else -1
    for index in progress_bar(order[1:], "adding", show=progress):
        tried = _average(models[0], states, [*chosen, index], shares)
        reached = value(tried)
        taken = reached >= best
        if taken:
            chosen, best = [*chosen, index], reached
        steps.append(Step(index, alone[index], reached, taken))
    steps = [Step(step.network, sign * step.alone, sign * step.soup, step.taken) for step in steps]
    return Soup(_average(models[0], states, chosen, shares), tuple(chosen), tuple(steps))


def _checked(models: Sequence[nn.Module], data: Data) -> list[dict[str, torch.Tensor]]:
    if len(models) < 2:
        raise ArchitectureError(f"a soup needs two networks or more, and there are {len(models)}")
    require_repeatable(data, "a soup is measured once for every network and every step")
    states = [full_state(model) for model in models]
    varying(states)
    check_same_ties(models)
    return states


def _figure(found: Evaluation, higher: bool) -> float:
    """Give what the choice goes by, so that more is better."""
    value = found.loss if found.metric is None else found.metric
    if math.isnan(value):
        raise DataError("the metric of a network is NaN on the data, and nothing can be chosen by it; use another one")
    return value if higher else -value


def _average(model: nn.Module, states: Sequence[Any], chosen: Sequence[int], shares: Sequence[float]) -> nn.Module:
    own = [shares[index] for index in chosen]
    weights = own if any(own) else None
    return rebuilt(model, weighted_mean([states[index] for index in chosen], weights))

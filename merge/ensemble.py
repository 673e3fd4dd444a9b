"""The ensemble of networks: all are run and their outputs averaged, which is what a merged network is up against."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..base.batches import Batch, Data, batches, model_device
from ..base.errors import ArchitectureError, DataError, nearest
from ..base.evaluation import Evaluation, Measure, Totals, choose_measures, find_logits
from ..base.interpolation import normalised
from ..base.running import evaluating, on_device

AVERAGES = ("probabilities", "outputs")


class Ensemble(nn.Module):
    """Networks of which the outputs are averaged; the networks themselves are held, not copied.

    Args:
        models: Networks that take the same inputs and give outputs of one shape; their weights, and even their
            architectures, may have nothing in common.
        weights: One non-negative number for each; equal by default.
        average: "probabilities": the mean of the softmax over the last axis, given as its logarithm, so that it is
            used as logits are; "outputs": the mean of the outputs as they are.

    Raises:
        ArchitectureError: There is no network, or outputs are of different shapes or kinds.
        DataError: The weights or `average` do not fit.

    >>> sure, unsure = nn.Identity(), nn.Threshold(99.0, 0.0)
    >>> Ensemble([sure, unsure])(torch.tensor([[math.log(3), 0.0]])).exp()
    tensor([[0.6250, 0.3750]])
    """

    def __init__(
        self, models: Sequence[nn.Module], weights: Sequence[float] | None = None, *, average: str = "probabilities"
    ):
        super().__init__()
        if not models:
            raise ArchitectureError("an ensemble needs a network or more, and there is none")
        if average not in AVERAGES:
            raise DataError(f"average is {average!r}{nearest(average, AVERAGES)}; choose 'probabilities' or 'outputs'")
        self.shares = normalised(weights, len(models))
        self.average = average
        self.models = nn.ModuleList(models)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run all networks on a copy of the inputs each, and average what they give."""
        batch = Batch(args, kwargs)
        return self.combined([batch.call(model) for model in self.models])

    def combined(self, outputs: Sequence[Any]) -> Any:
        """Average outputs that the networks have given."""
        if self.average == "outputs":
            return _mean(outputs, self.shares)
        logits = [_logits(output) for output in outputs]
        _check_shapes(logits)
        wide = torch.promote_types(logits[0].dtype, torch.float32)
        parts = [
            one.to(logits[0].device, wide).log_softmax(-1) + math.log(share)
            for one, share in zip(logits, self.shares, strict=True)
            if share
        ]
        return torch.stack(parts).logsumexp(0)


def measured(
    models: Sequence[nn.Module],
    data: Data,
    *,
    weights: Sequence[float] | None = None,
    loss: Measure | None = None,
    metric: Measure | None = None,
    device: torch.device | str | None = None,
    ensemble: bool = True,
) -> tuple[list[Evaluation], Evaluation | None]:
    """Measure networks and, in the same pass over the data, their ensemble.

    The ensemble averages probabilities where the loss is the cross entropy of the default, else the outputs.

    Args:
        models: Two networks or more; none is changed.
        data: Batches with labels.
        weights: How much each counts in the ensemble; equal by default.
        loss: Function (outputs, targets) → mean over the batch; cross entropy by default.
        metric: A second one; accuracy beside the default loss.
        device: Where to compute; that of each network by default.
        ensemble: Whether to measure it.

    Returns:
        What was measured of each network, and of the ensemble (or None).

    Raises:
        ArchitectureError: The outputs are of different shapes.
        DataError: There is no batch, or labels are missing or do not fit.
        NotFiniteError: An input holds NaN or infinity.

    >>> x, y = torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    >>> each, both = measured([nn.Identity(), nn.Threshold(2.0, 0.0)], (x, y))
    >>> [round(one.loss, 3) for one in each], round(both.loss, 3)
    ([0.666, 0.356], 0.487)
    """
    measures = choose_measures(loss, metric)
    networks = [on_device(model, device) for model in models]
    together = Ensemble(networks, weights, average="probabilities" if loss is None else "outputs")
    totals = Totals.zeros(len(networks) + ensemble, len(measures))
    with ExitStack() as stack, torch.no_grad():
        for network in networks:
            stack.enter_context(evaluating(network))
        for batch in batches(data):
            outputs = []
            for index, network in enumerate(networks):
                own = batch.to(model_device(network))
                outputs.append(own.call(network))
                totals.add(index, _Given(outputs[-1]), own, measures)
            if ensemble:
                home = batch.to(model_device(networks[0]))
                totals.add(len(networks), _Given(together.combined(outputs)), home, measures)
            totals.samples += len(batch)
    found = [
        Evaluation(float(means[0]), float(means[1]) if len(measures) > 1 else None, totals.samples)
        for means in totals.means()
    ]
    return found[: len(networks)], found[-1] if ensemble else None


class _Given(nn.Module):
    """Gives the outputs that have been computed already."""

    def __init__(self, outputs: Any):
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.outputs


def _logits(output: Any) -> Tensor:
    found = find_logits(output)
    if found is None or not found.ndim:
        raise DataError(
            f"a network's output is a {type(output).__name__}, in which there are no logits; use average='outputs', "
            "or a loss of your own"
        )
    return found


def _mean(outputs: Sequence[Any], shares: Sequence[float]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor):
        _check_shapes(outputs)
        if not (first.is_floating_point() or first.is_complex()):
            return first
        wide = torch.promote_types(first.dtype, torch.float32)
        total = sum(output.to(first.device, wide) * share for output, share in zip(outputs, shares, strict=True))
        return torch.as_tensor(total).to(first.dtype)
    if isinstance(first, Mapping):
        return {key: _mean([output[key] for output in outputs], shares) for key in first}
    if isinstance(first, (tuple, list)):
        return type(first)([_mean(parts, shares) for parts in zip(*outputs, strict=True)])
    if isinstance(getattr(first, "logits", None), Tensor):
        return _mean([output.logits for output in outputs], shares)
    return first


def _check_shapes(tensors: Sequence[Tensor]) -> None:
    for index, tensor in enumerate(tensors):
        if tensor.shape != tensors[0].shape:
            raise ArchitectureError(
                f"network 0 gives outputs of shape {tuple(tensors[0].shape)}, network {index} of shape "
                f"{tuple(tensor.shape)}; an ensemble averages outputs of one shape"
            )

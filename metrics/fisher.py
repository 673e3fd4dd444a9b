"""The diagonal of the Fisher information: how much each parameter matters to what a network predicts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..base.architecture import check_finite
from ..base.batches import Batch, Data, batches, model_device
from ..base.errors import DataError, NotFiniteError
from ..base.evaluation import IGNORED
from ..base.finite import all_finite
from ..base.progress import progress as progress_bar
from ..base.running import evaluating, on_device
from .per_sample import Gradients, logits, parameters_of, per_sample_gradients
from .reading import without_fast_path

Labels = Literal["model", "data"]
Likelihood = Literal["categorical", "gaussian"]

EXACT = 100
"""Up to so many labels per input are all weighed; where there are more, some are drawn."""


def diagonal_fisher(
    model: nn.Module,
    data: Data,
    *,
    labels: Labels = "model",
    likelihood: Likelihood = "categorical",
    draws: int | None = None,
    seed: int = 0,
    chunk: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Gradients:
    """Estimate the diagonal of the Fisher information: the mean square of the gradients of the log-likelihood.

    F = E_x E_{y ~ p(y | x)} (∇ log p(y | x))², a mean over the inputs of `data` in evaluation mode. Of a sequence,
    log p is the sum over its tokens; the labels of different tokens are independent given the inputs.

    Args:
        model: The network; it is not changed. Parameters that are frozen count like all others.
        data: Batches of inputs. Labels are needed for `labels="data"` only; elsewhere a label of -100 says that its
            token is not predicted.
        labels: "model": expectation over the labels that the network itself would give, the Fisher information. "data":
            those of the data, the so-called empirical Fisher, which vanishes where the network fits its data and is no
            estimate of the other (Kunstner et al. 2019).
        likelihood: "categorical": outputs (…, classes) are logits. "gaussian": outputs are means, of variance one.
        draws: For `labels="model"`: how many labels of each input to draw. Default: none is drawn, all are weighed by
            their probability, if an input has at most 100 of them (tokens x classes); else one.
        seed: Seed of the draws.
        chunk: How many inputs to differentiate at once. Default: as many as 2^24 numbers hold.
        device: Where to compute; that of the network by default.
        progress: Show a bar always (True), never (False), or on a terminal (None).

    Returns:
        A tensor for each parameter, of its shape, in float32 or better; tied parameters under each of their names.

    Raises:
        DataError: There is no batch, labels are missing or do not fit, or an argument is not valid.
        NotFiniteError: A parameter, an input or an output holds NaN or infinity.

    Reference:
        Matena, Raffel. Merging Models with Fisher-Weighted Averaging. NeurIPS 2022, Equations 2 and 3.
        https://arxiv.org/abs/2111.09832

    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> diagonal_fisher(model, torch.tensor([[1.0, 2.0]]))["weight"]  # p (1 - p) x²
    tensor([[0.2500, 1.0000],
            [0.2500, 1.0000]])
    """
    _check(labels, likelihood, draws, chunk)
    check_finite(dict(model.named_parameters()), "the network")
    network = on_device(model, device)
    draw = _Cotangents(labels, likelihood, draws, torch.Generator().manual_seed(seed))
    totals, count = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters_of(network).items()}, 0
    with evaluating(network), without_fast_path():
        for batch in progress_bar(batches(data, model_device(network)), "Fisher information", show=progress):
            with torch.no_grad():
                outputs = batch.call(network)
            for gradients in per_sample_gradients(network, batch, draw(outputs, batch), chunk):
                for name, gradient in gradients.items():
                    totals[name] += gradient.square().sum((0, 1))
            count += len(batch)
    return _named(model, {name: total / count for name, total in totals.items()})


def _named(model: nn.Module, found: Gradients) -> Gradients:
    """Repeat what belongs to a tied parameter under each of its names, in float32 or better."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        name: found[names[id(p)]].to(p.device, torch.promote_types(p.dtype, torch.float32))
        for name, p in model.named_parameters(remove_duplicate=False)
        if p.is_floating_point()
    }


@dataclass
class _Cotangents:
    """Chooses vectors v such that Σ v vᵀ is the (expected) square of the gradient of log p by the outputs."""

    labels: Labels
    likelihood: Likelihood
    draws: int | None
    generator: torch.Generator

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """Give (N, cotangents, *shape of one output)."""
        found = logits(outputs)
        if len(found) != len(batch):
            raise DataError(
                f"outputs of shape {tuple(found.shape)} for {len(batch)} inputs; the first axis must be that of the "
                "inputs"
            )
        if not all_finite(found):
            raise NotFiniteError(f"outputs of shape {tuple(found.shape)} hold NaN or infinity; do they overflow?")
        wide = found.to(torch.promote_types(found.dtype, torch.float32))
        chosen = (self._gaussian if self.likelihood == "gaussian" else self._categorical)(wide, batch.targets)
        return chosen.to(found.dtype)

    def _gaussian(self, means: Tensor, targets: Tensor | None) -> Tensor:
        if self.labels == "data":
            if targets is None or targets.shape != means.shape or not targets.is_floating_point():
                raise DataError(
                    f"outputs of shape {tuple(means.shape)} need floating-point targets of the same shape, not "
                    f"{_shape(targets)}; pass batches (x, y), or labels='model'"
                )
            return (targets.to(means) - means)[:, None]
        size = means[0].numel()
        if self._exact(size):
            return torch.eye(size).to(means).view(size, *means.shape[1:]).expand(len(means), -1, *means.shape[1:])
        draws = self.draws or 1
        noise = torch.randn(len(means), draws, *means.shape[1:], generator=self.generator)
        return noise.to(means) / math.sqrt(draws)

    def _categorical(self, scores: Tensor, targets: Tensor | None) -> Tensor:
        p = scores.softmax(-1)
        counted = self._counted(p, targets)[:, None, ..., None]
        if self.labels == "data":
            assert targets is not None
            return (_one_hot(targets[:, None].clamp(min=0), p) - p[:, None]) * counted
        if self._exact(p[0].numel()):
            return self._every_label(p) * counted
        draws = self.draws or 1
        drawn = torch.multinomial(p.flatten(0, -2).cpu(), draws, True, generator=self.generator)
        drawn = drawn.view(*p.shape[:-1], draws).movedim(-1, 1).to(p.device)
        return (_one_hot(drawn, p) - p[:, None]) * counted / math.sqrt(draws)

    def _exact(self, size: int) -> bool:
        return self.draws is None and size <= EXACT

    def _every_label(self, p: Tensor) -> Tensor:
        """Give √p_c (e_c - p) for each class, one token at a time: Σ over c is diag p - p pᵀ."""
        tokens, classes = p[0].numel() // p.shape[-1], p.shape[-1]
        flat = p.reshape(len(p), tokens, classes)
        centred = flat.sqrt()[..., None] * (torch.eye(classes).to(p) - flat[..., None, :])
        apart = centred[:, :, :, None] * torch.eye(tokens).to(p)[None, :, None, :, None]
        return apart.reshape(len(p), tokens * classes, *p.shape[1:])

    def _counted(self, p: Tensor, targets: Tensor | None) -> Tensor:
        shape = p.shape[:-1]
        if targets is None or (self.labels == "model" and targets.shape != shape):
            if self.labels == "data":
                raise DataError("labels='data' needs labels: pass batches (x, y), or labels='model'")
            return torch.ones(shape).to(p)
        if self.labels == "data":
            _check_labels(targets, p)
        return (targets != IGNORED).to(p)


def _check_labels(targets: Tensor, p: Tensor) -> None:
    if targets.is_floating_point() or targets.shape != p.shape[:-1]:
        raise DataError(
            f"outputs of shape {tuple(p.shape)} need integer labels of shape {tuple(p.shape[:-1])}, not "
            f"{_shape(targets)}; reshape them, or pass likelihood='gaussian' or labels='model'"
        )
    wrong = targets[((targets < 0) | (targets >= p.shape[-1])) & (targets != IGNORED)]
    if len(wrong):
        raise DataError(
            f"label {int(wrong[0])} does not fit outputs of shape {tuple(p.shape)}: labels must be 0 to "
            f"{p.shape[-1] - 1}"
        )


def _one_hot(labels: Tensor, like: Tensor) -> Tensor:
    return nn.functional.one_hot(labels.long(), like.shape[-1]).to(like)


def _shape(targets: Tensor | None) -> str:
    return "none" if targets is None else f"{tuple(targets.shape)} of {targets.dtype}"


def _check(labels: str, likelihood: str, draws: int | None, chunk: int | None) -> None:
    for name, value, known in (("labels", labels, get_args(Labels)), ("likelihood", likelihood, get_args(Likelihood))):
        if value not in known:
            raise DataError(f"{name} is {value!r}; expected one of {', '.join(map(repr, known))}")
    for name, number in (("draws", draws), ("chunk", chunk)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise DataError(f"{name} is {number!r}; expected a whole number from 1")
    if draws is not None and labels == "data":
        raise DataError("draws is for labels='model'; labels='data' takes those of the data")

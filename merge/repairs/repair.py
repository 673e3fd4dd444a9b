"""Repair of an averaged network's statistics: its units vary too little, most of what a straight path loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

import torch
from torch import nn

from ...base.architecture import check_same_architecture, full_state
from ...base.batch_norm import batch_norms
from ...base.batches import Data, model_device
from ...base.errors import ArchitectureError, DataError
from ...base.held import MEMORY
from ...base.interpolation import normalised
from ...base.running import copied, on_device
from .prepared import choose_method, prepare

Model = TypeVar("Model", bound=nn.Module)


def repair(
    model: Model,
    data: Data,
    *,
    method: str = "auto",
    endpoints: Sequence[nn.Module] | None = None,
    alpha: float = 0.5,
    weights: Sequence[float] | None = None,
    logits: bool = False,
    memory: int = MEMORY,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Model:
    """Give an averaged network the activation statistics that its parents have: REPAIR (Jordan et al. 2023).

    - `"reset"`, for batch norms with running statistics: these become the mean and unbiased variance, over all samples,
      of what reaches each in evaluation mode.
    - `"rescale"`, for everything else: each unit of each hidden linear, convolutional (also transposed) or embedding
      layer, of each norm with a weight (layer, RMS, group, instance; batch norm without running statistics) and of each
      projection of `nn.MultiheadAttention` is scaled and shifted to the mean (1 - alpha) mu_a + alpha mu_b and the
      standard deviation (1 - alpha) sigma_a + alpha sigma_b of its parents' units. The map is fused into weight and
      bias: the result is a plain network of the same class. Without a bias a unit is scaled only; one that never
      varies is shifted only. Left alone are weights that two modules share and, but for `logits`, the layer that runs
      last.
    - `"both"`: reset every batch norm, and rescale what no batch norm reads directly.

    Each layer is repaired after those that run before it. Batches are joined into one as far as `memory` allows, and
    then the statistics are those that are wanted in every layer. Where that takes several runs, or where a layer is
    called more than once, each batch is first repaired by itself, and up to eight further passes correct what is left;
    `variance_ratios` measures it. The data is read once if its inputs fit into memory.

    The network then has seen `data`, which its parents may not have: repair on training data, measure on test data.

    Args:
        model: The averaged network; it is not changed.
        data: Batches of inputs; labels are ignored. Padding that an input `attention_mask` names does not count.
        method: `"reset"`, `"rescale"`, `"both"`, or `"auto"`: rescale where there is no batch norm with running
            statistics; reset where there is one for each layer but the last, and `logits` is False, or no endpoints;
            else both.
        endpoints: For `"rescale"` and `"both"`: the parents, with their units in the order of `model`.
        alpha: For two endpoints: the place of `model` on the line between them.
        weights: Instead of `alpha`: one weight for each endpoint.
        logits: Rescale the layer that runs last as well, which the paper leaves alone. It brings back the confidence of
            the parents, and with it most often some of their loss.
        memory: Bytes of inputs to keep, and of activations, as estimated from a few samples, that may be alive at a
            time; 2 GiB by default.
        device: Where to compute; that of `model` by default. The result comes back to the device of `model`.
        progress: Show a bar always (True), never (False), or on a terminal (None).

    Returns:
        A new network.

    Raises:
        ArchitectureError: The method does not fit the network, or an endpoint has other parameters.
        DataError: There is no batch, or one holds a single value for each unit; or `method`, `alpha` or `weights` is
            not valid.
        NotFiniteError: An input or an activation is NaN or infinite.

    Reference:
        Jordan, Sedghi, Saukh, Entezari, Neyshabur. REPAIR: REnormalizing Permuted Activations for Interpolation
        Repair. ICLR 2023. https://arxiv.org/abs/2211.08403

    >>> layer = nn.BatchNorm1d(1)
    >>> fixed = repair(layer, torch.tensor([[1.0], [2.0], [6.0]]))
    >>> fixed.running_mean, fixed.running_var, layer.running_mean
    (tensor([3.]), tensor([7.]), tensor([0.]))
    """
    if method == "auto" and batch_norms(model) and (logits or not endpoints):
        method = "both" if logits else "reset"
    method = choose_method(model, method)
    if logits and method == "reset":
        raise DataError("logits=True rescales the layer that runs last, which method='reset' does not; use 'both'")
    shares = [1.0] if method == "reset" else check_endpoints(model, endpoints, alpha, weights)
    home = model_device(model)
    repaired = cast(Model, copied(model)).to(device)
    parents = [repaired] if method == "reset" else [on_device(parent, device) for parent in endpoints or ()]
    prepare(parents, data, method, progress, memory, logits).apply(repaired, shares)
    return repaired if device is None else repaired.to(home)


def check_endpoints(
    model: nn.Module, endpoints: Sequence[nn.Module] | None, alpha: float, weights: Sequence[float] | None
) -> list[float]:
    """Check the parents of a network, and give the share of each.

    Raises:
        ArchitectureError: There is none, or one has other parameters.
        DataError: `alpha` or `weights` is not valid.
    """
    if not endpoints:
        raise ArchitectureError(
            "targets are taken from the parents; pass endpoints=(model_a, model_b), "
            "with their units in the order of the merged network"
        )
    for index, parent in enumerate(endpoints):
        check_same_architecture(full_state(model), full_state(parent), ("model", f"endpoints[{index}]"))
    if weights is not None or len(endpoints) != 2:
        return normalised(weights, len(endpoints))
    if not 0 <= alpha <= 1:
        raise DataError(f"alpha is {alpha}; expected a number from 0 (the first endpoint) to 1 (the second)")
    return [1 - alpha, alpha]

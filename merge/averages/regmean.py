"""Linear layers merged by regression: outputs as close as can be to those of each network on its own inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ...base.architecture import full_state
from ...base.batches import Data, batches, model_device
from ...base.errors import DataError
from ...base.interpolation import check_same_ties, normalised, varying, weighted_mean
from ...base.progress import progress as progress_bar
from ...base.running import on_device
from ...metrics import Moments
from .reading import (
    Layer,
    LayerMerge,
    check_options,
    data_of_each,
    groups_of,
    matrices,
    row_pieces,
    solvable,
    solve,
    watching,
    write,
)

Bias = Literal["joint", "mean"]
Normal = dict[str, tuple[Tensor, Tensor]]
"""Both sides of the normal equations of each layer."""


def regmean_merge(
    models: Sequence[nn.Module],
    data: Data | None = None,
    *,
    own_data: Sequence[Data] | None = None,
    weights: Sequence[float] | None = None,
    shrink: float = 0.9,
    bias: Bias = "joint",
    ridge: float = 1e-6,
    rows: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> LayerMerge:
    """Merge each linear layer by regression: RegMean (Jin et al. 2023).

    W minimises Σ wᵢ ‖Xᵢ W - Xᵢ Wᵢ‖² / nᵢ over the inputs Xᵢ (nᵢ rows) that network i gives to its own layer, hence
    W = (Σ wᵢ Gᵢ)⁻¹ Σ wᵢ Gᵢ Wᵢ with Gᵢ = Xᵢᵀ Xᵢ / nᵢ, each off-diagonal entry of Gᵢ multiplied by `shrink`. It is solved
    for the difference from the mean of the weights, so that directions in which no input varies keep that mean. A
    convolution is a linear layer of the patches that it sees. All other parameters and buffers are averaged.

    Batch norms need new statistics afterwards (`repair="reset"` of `merge`), and other networks often gain by
    `repair="rescale"`.

    Args:
        models: Networks with their units in one order; none is changed.
        data: Batches of inputs, for all of them; labels are ignored.
        own_data: In place of `data`: batches for each network, of the task that it was trained on.
        weights: One non-negative number for each network; equal by default.
        shrink: What off-diagonal entries are multiplied by: 1 leaves them, 0 weighs units one by one.
        bias: "joint": solved together with the weights, as the weight of an input that is always 1; `shrink` then acts
            on covariances. "mean": averaged, and the weights solved for as if there was none, as published.
        ridge: Pulls towards the mean of the weights, in multiples of the mean eigenvalue of Σ wᵢ Gᵢ.
        rows: At most how many positions or tokens of each batch to read at each layer, drawn by the seed; None: all.
        seed: Seed of the draw.
        device: Where to compute; that of each network by default.
        progress: Show bars; None: on a terminal.

    Returns:
        The merged parameters and buffers, the layers that were solved for, and why others were not.

    Raises:
        ArchitectureError: A name, a shape or a pair of tied tensors differs, or no layer can be solved for.
        DataError: The data, the weights or an option does not fit.
        NotFiniteError: A tensor, an input or an activation holds NaN or infinity.

    Reference:
        Jin, Ren, Preotiuc-Pietro, Cheng. Dataless Knowledge Fusion by Merging Weights of Language Models. ICLR 2023,
        Equation 2. https://arxiv.org/abs/2212.09849

    >>> a, b = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.zeros_(a.weight), nn.init.ones_(b.weight)
    >>> first, second = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> regmean_merge([a, b], own_data=[first, second], ridge=0).state["weight"]  # each keeps what it was asked for
    tensor([[0., 1.]])
    """
    shares = normalised(weights, len(models))
    states = [full_state(model) for model in models]
    varying(states)
    check_same_ties(models)
    check_options(shrink, ridge, rows)
    if bias not in get_args(Bias):
        raise DataError(f"bias is {bias!r}; expected one of {', '.join(map(repr, get_args(Bias)))}")
    layers, others = solvable(models[0])
    each = data_of_each(data, own_data, len(models), "what goes into the layers of each network")
    joint = bias == "joint"
    mean = weighted_mean(states, shares)
    centres = {name: _unknowns(layer, *_means(mean, name), joint) for name, layer in layers.items()}
    normal: Normal = {}
    for model, own, share in zip(models, each, shares, strict=True):
        network = on_device(model, device)
        for name, found in _moments(network, own, rows, seed, progress).items():
            layer: Layer = network.get_submodule(name)  # pyright: ignore[reportAssignmentType]
            gram = share * _gram(found, joint and layer.bias is not None, shrink)
            away = _unknowns(layer, layer.weight, layer.bias, joint) - centres[name].to(gram)
            left, right = normal.get(name, (0.0, 0.0))
            normal[name] = left + gram, right + gram @ away
    for name, (left, right) in normal.items():
        found = centres[name].to(left) + solve(left, right, ridge)
        width = layers[name].weight[0].numel()
        write(mean, models[0], layers[name], found[:, :width], found[:, width] if found.shape[1] > width else None)
    unseen = {name: "the data never reached it" for name in layers if name not in normal}
    return LayerMerge(mean, tuple(name for name in layers if name in normal), {**others, **unseen})


def _means(mean: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor | None]:
    prefix = f"{name}." if name else ""
    return mean[f"{prefix}weight"], mean.get(f"{prefix}bias")


def _unknowns(layer: Layer, weight: Tensor, bias: Tensor | None, joint: bool) -> Tensor:
    """Give (groups, numbers that go in, units), with the bias as a last row where it is solved for as well."""
    found = matrices(layer, weight.detach())
    if bias is None or not joint:
        return found
    return torch.cat([found, bias.detach().to(found).view(len(found), 1, -1)], 1)


def _moments(model: nn.Module, data: Data, rows: int | None, seed: int, show: bool | None) -> dict[str, Moments]:
    """Stream the inputs of every layer: for each group, as layer `x0`, `x1`, …, means and covariances."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Moments] = {}

    def note(name: str, layer: Layer, x: Tensor, _: Tensor) -> None:
        groups = [f"x{group}" for group in range(groups_of(layer))]
        moments = found.setdefault(name, Moments([(group, group) for group in groups]))
        for piece in row_pieces(layer, x, None, rows, generator, name):
            moments.update(piece)

    with watching(model, solvable(model)[0], note) as run:
        for batch in progress_bar(batches(data, model_device(model)), "inputs of layers", show=show):
            run(batch)
    return found


def _gram(moments: Moments, joint: bool, shrink: float) -> Tensor:
    """Give the mean of x xᵀ for each group, x with a 1 behind it where the bias is solved for as well."""
    covariance = torch.stack([moments.covariance(group, group) for group in moments.names])
    mean = torch.stack([moments.mean(group) for group in moments.names])
    outer = mean[:, :, None] * mean[:, None]
    if not joint:
        return _shrunk(covariance + outer, shrink)
    ones = torch.ones_like(mean[:, :1, None])
    top = torch.cat([_shrunk(covariance, shrink) + outer, mean[:, :, None]], 2)
    return torch.cat([top, torch.cat([mean[:, None], ones], 2)], 1)


def _shrunk(matrix: Tensor, shrink: float) -> Tensor:
    diagonal = torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))
    return diagonal + shrink * (matrix - diagonal)

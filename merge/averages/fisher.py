"""The mean of networks in which each parameter counts as much as it matters to its own network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...base.architecture import State, full_state
from ...base.batches import Data
from ...base.errors import ArchitectureError, DataError, NotFiniteError, nearest
from ...base.interpolation import check_same_ties, normalised, varying, weighted_mean
from ...metrics.fisher import Labels, Likelihood, diagonal_fisher
from .reading import data_of_each


def fisher_merge(
    models: Sequence[nn.Module],
    data: Data | None = None,
    *,
    own_data: Sequence[Data] | None = None,
    weights: Sequence[float] | None = None,
    labels: Labels = "model",
    likelihood: Likelihood = "categorical",
    draws: int | None = None,
    floor: float = 1e-6,
    normalise: bool = False,
    chunk: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """Merge networks by their Fisher information (Matena & Raffel 2022): `fisher_mean` with that of `diagonal_fisher`.

    Args:
        models: Networks with their units in one order; none is changed.
        data: Batches of inputs, for all of them.
        own_data: In place of `data`: batches for each network, of the task that it was trained on.
        weights: One non-negative number for each network; equal by default.
        labels: "model" or "data", see `diagonal_fisher`.
        likelihood: "categorical" or "gaussian", see there.
        draws: Labels drawn for each input, see there.
        floor: See `fisher_mean`.
        normalise: See `fisher_mean`.
        chunk: Inputs at once, see `diagonal_fisher`.
        seed: Seed of the draws.
        device: Where to compute; that of each network by default.
        progress: Show bars; None: on a terminal.

    Returns:
        Parameters and buffers by name.

    Raises:
        ArchitectureError: A name, a shape or a pair of tied tensors differs.
        DataError: The data, the weights or an option does not fit.
        NotFiniteError: A tensor, an input or an output holds NaN or infinity.

    >>> a, b = nn.Linear(1, 2, bias=False), nn.Linear(1, 2, bias=False)
    >>> _ = nn.init.zeros_(a.weight), nn.init.ones_(b.weight)
    >>> own = [torch.ones(4, 1), 2 * torch.ones(4, 1)]  # inputs twice as large: four times the information
    >>> fisher_merge([a, b], own_data=own)["weight"]
    tensor([[0.8000],
            [0.8000]])
    """
    shares = normalised(weights, len(models))
    states = [full_state(model) for model in models]
    varying(states)
    check_same_ties(models)
    _check_floor(floor)
    each = data_of_each(data, own_data, len(models), "the Fisher information of each network")
    fishers = [
        diagonal_fisher(
            model,
            own,
            labels=labels,
            likelihood=likelihood,
            draws=draws,
            seed=seed,
            chunk=chunk,
            device=device,
            progress=progress,
        )
        for model, own in zip(models, each, strict=True)
    ]
    return fisher_mean(states, fishers, shares, floor=floor, normalise=normalise)


def fisher_mean(
    states: Sequence[State],
    fishers: Sequence[State],
    weights: Sequence[float] | None = None,
    *,
    floor: float = 1e-6,
    normalise: bool = False,
) -> dict[str, Tensor]:
    """Give the mean of state dicts, entry by entry weighted by Fisher information: Σ wᵢ Fᵢ θᵢ / Σ wᵢ Fᵢ.

    Equal information gives `weighted_mean`, up to rounding, and so does no information at all. Elsewhere each Fᵢ is
    raised by `floor` times the mean information of its tensor over all entries and networks, so that a little noise
    does not decide. (The published floor is the absolute number 1e-6, which means something else in every layer.)
    Entries that are equal in all networks stay exactly as they are. Tensors that no Fisher information is given of,
    such as buffers, are averaged by `weighted_mean`.

    Args:
        states: At least one state dict; all of the same names and shapes, units in one order.
        fishers: For each of them, information by name, none negative; as from `diagonal_fisher`.
        weights: One non-negative number each; equal by default.
        floor: The least information, as a share of the mean of its tensor.
        normalise: Divide the information of each network by its root of the sum of squares first, so that a network
            that is unsure of its labels, and whose gradients are therefore large, does not outweigh the others.

    Returns:
        Tensors by name, of the types and on the devices of the first state.

    Raises:
        ArchitectureError: A name or a shape differs, also between a state and its information.
        NotFiniteError: A tensor holds NaN or infinity.
        DataError: The weights or the floor do not fit, or information is negative.

    Reference:
        Matena, Raffel. Merging Models with Fisher-Weighted Averaging. NeurIPS 2022, Equation 4.
        https://arxiv.org/abs/2111.09832

    >>> states = [{"w": torch.tensor([0.0, 0.0])}, {"w": torch.tensor([1.0, 1.0])}]
    >>> fisher_mean(states, [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([3.0, 0.0])}])
    {'w': tensor([0.7500, 0.5000])}
    """
    shares = normalised(weights, len(states))
    _check_floor(floor)
    names = _check(states, fishers)
    mean = weighted_mean(states, shares)
    sizes = [_size(fisher) if normalise else 1.0 for fisher in fishers]
    factors = [share / size for share, size in zip(shares, sizes, strict=True)]
    for name in names:
        tensors = [state[name] for state in states]
        found = _entries(tensors, [fisher[name] for fisher in fishers], factors, shares, floor)
        mean[name] = found.to(mean[name].dtype)
    return mean


def _entries(
    tensors: list[Tensor], fishers: list[Tensor], factors: list[float], shares: list[float], floor: float
) -> Tensor:
    """Average one tensor in float64, by the update m ← m + Fᵢ/ΣF (θᵢ - m), which keeps equal entries."""
    device = tensors[0].device
    information = [factor * fisher.to(device, torch.float64) for factor, fisher in zip(factors, fishers, strict=True)]
    known = torch.stack(information).sum(0)
    lift = torch.where(known > 0, floor * known.mean(), 1.0)  # where nobody knows, shares decide
    mean, total = tensors[0].to(torch.float64, copy=True), information[0] + lift * shares[0]
    for tensor, own, share in zip(tensors[1:], information[1:], shares[1:], strict=True):
        own = own + lift * share
        total += own
        mean += (own / total.where(total > 0, 1.0)) * (tensor.to(device, torch.float64) - mean)
    return mean


def _size(fisher: Mapping[str, Tensor]) -> float:
    squares = sum(float(tensor.double().square().sum()) for tensor in fisher.values())
    return squares**0.5 or 1.0


def _check(states: Sequence[State], fishers: Sequence[State]) -> list[str]:
    if len(fishers) != len(states):
        raise DataError(f"{len(fishers)} sets of Fisher information for {len(states)} networks; pass one each")
    names = varying(states)
    given = list(fishers[0])
    for index, (state, fisher) in enumerate(zip(states, fishers, strict=True)):
        for name in given:
            if name not in fisher:
                raise ArchitectureError(f"fishers[{index}] lacks {name}, which fishers[0] has{nearest(name, fisher)}")
        for name, tensor in fisher.items():
            if name not in names or name not in given:
                raise ArchitectureError(
                    f"fishers[{index}] has {name}, which is no parameter of all networks{nearest(name, names)}"
                )
            if tensor.shape != state[name].shape:
                raise ArchitectureError(
                    f"fishers[{index}][{name!r}] has shape {tuple(tensor.shape)} for a parameter of shape "
                    f"{tuple(state[name].shape)}; compute it for this network"
                )
            if not torch.isfinite(tensor).all():
                raise NotFiniteError(f"fishers[{index}][{name!r}] holds NaN or infinity")
            if (tensor < 0).any():
                raise DataError(f"fishers[{index}][{name!r}] holds negative numbers; expected mean squares")
    return given


def _check_floor(floor: float) -> None:
    if not 0 <= floor < float("inf"):
        raise DataError(f"floor is {floor}; expected a finite number, not negative")

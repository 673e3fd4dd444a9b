"""Linear layers merged by least squares: from what the merged network feeds them to what its parents make of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ...base.architecture import full_state
from ...base.batch_norm import batch_norms
from ...base.batches import Batch, Data, batches, model_device, require_repeatable
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

Inputs = Literal["merged", "parents"]
Calls = dict[str, list[list[Tensor]]]
"""By layer, for each of its calls: what goes in, what comes out."""


def least_squares_merge(
    models: Sequence[nn.Module],
    data: Data | None = None,
    *,
    own_data: Sequence[Data] | None = None,
    weights: Sequence[float] | None = None,
    inputs: Inputs = "merged",
    ridge: float = 1e-2,
    rows: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> LayerMerge:
    """Merge each linear layer by least squares, in closed form: PLeaS (Nasery et al. 2024), its second step.

    W minimises ‖X W - Ȳ‖² / n + ridge · s ‖W - W̄‖² where Ȳ is the mean of what comes out of that layer in each network
    for the same data, W̄ the mean of the weights and s the mean variance of the columns of X; the bias is solved for
    with it. A convolution is a linear layer of the patches that it sees. All other parameters and buffers are
    averaged. X is chosen by `inputs`:

    - "merged": what the merged network itself gives to the layer, whose earlier layers are solved for already: each
      layer makes good what those before it lost. One pass over part of the network for each layer.
    - "parents": the mean of what goes into the layer in each network, as published; all layers in one pass.

    Batch norms need new statistics afterwards (`repair="reset"` of `merge`). With "parents", other networks often gain
    by `repair="rescale"`: means of units vary less than the units do.

    Args:
        models: Networks with their units in one order; none is changed.
        data: Batches of inputs, for all networks side by side; labels are ignored.
        own_data: In place of `data`: batches for each network, of the task that it was trained on. Ȳ is then what that
            network alone makes of them, and "parents" what goes into its own layers.
        weights: One non-negative number for each network; equal by default.
        inputs: "merged" or "parents", see above.
        ridge: Pulls towards the mean of the weights, see above.
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
        Nasery, Hayase, Koh, Oh. PLeaS: Merging Models with Permutations and Least Squares. CVPR 2025.
        https://arxiv.org/abs/2407.02447

    >>> a, b = nn.Linear(2, 1), nn.Linear(2, 1)
    >>> data = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    >>> state = least_squares_merge([a, b], data, ridge=0).state
    >>> torch.allclose(state["weight"], (a.weight + b.weight) / 2, atol=1e-5)  # inputs are the same
    True
    """
    shares = normalised(weights, len(models))
    states = [full_state(model) for model in models]
    varying(states)
    check_same_ties(models)
    check_options(None, ridge, rows)
    if inputs not in get_args(Inputs):
        raise DataError(f"inputs is {inputs!r}; expected one of {', '.join(map(repr, get_args(Inputs)))}")
    layers, others = solvable(models[0])
    networks = [on_device(model, device) for model in models]
    reading = _Reading(_sources(networks, shares, data, own_data, inputs), rows, seed, progress)
    mean = weighted_mean(states, shares)
    if inputs == "parents":
        solved = reading.moments()
        for name, found in solved.items():
            write(mean, models[0], layers[name], *_solve(layers[name], mean, name, found, ridge))
    else:
        solved = _one_after_another(models[0], networks[0], reading, mean, layers, ridge)
    unseen = {name: "the data never reached it" for name in layers if name not in solved}
    return LayerMerge(mean, tuple(name for name in layers if name in solved), {**others, **unseen})


def _one_after_another(
    first: nn.Module,
    network: nn.Module,
    reading: _Reading,
    mean: dict[str, Tensor],
    layers: Mapping[str, Layer],
    ridge: float,
) -> list[str]:
    """Solve for the layers in the order in which they run, each fed by those before it."""
    scratch = copy.deepcopy(network)
    places, order = full_state(scratch), reading.order()
    for name, calls in order.items():
        with torch.no_grad():
            for key, place in places.items():
                place.copy_(mean[key])
        found = reading.moments(_Only(name, calls), scratch)[name]
        write(mean, first, layers[name], *_solve(layers[name], mean, name, found, ridge))
    return list(order)


Shared = list[tuple[float, Moments]]
"""Moments of several data sets, each with its share."""


def _solve(
    layer: Layer, mean: Mapping[str, Tensor], name: str, found: Shared, ridge: float
) -> tuple[Tensor, Tensor | None]:
    """Give the matrices (groups, in, out) and biases (groups, out) of one layer."""
    x, y = _pooled_mean(layer, found, "x"), _pooled_mean(layer, found, "y")
    centred = layer.bias is not None
    gram = _pooled_products(layer, found, "x", x, x, centred)
    cross = _pooled_products(layer, found, "y", x, y, centred)
    centre = matrices(layer, mean[f"{name}.weight" if name else "weight"]).to(gram)
    weight = centre + solve(gram, cross - gram @ centre, ridge)
    return weight, y - (x[:, None] @ weight)[:, 0] if centred else None


def _pooled_mean(layer: Layer, found: Shared, key: str) -> Tensor:
    return torch.stack(
        [sum((share * m.mean(f"{key}{g}") for share, m in found), torch.tensor(0.0)) for g in range(groups_of(layer))]
    )


def _pooled_products(layer: Layer, found: Shared, key: str, x: Tensor, y: Tensor, centred: bool) -> Tensor:
    """Give the mean product of inputs and `key`, about the pooled means or about zero, for each group."""
    products = []
    for group in range(groups_of(layer)):
        total = torch.zeros_like(x[group][:, None] * y[group])
        for share, moments in found:
            left, right = moments.mean(f"x{group}"), moments.mean(f"{key}{group}")
            if centred:
                left, right = left - x[group], right - y[group]
            total += share * (moments.covariance(f"x{group}", f"{key}{group}") + left[:, None] * right)
        products.append(total)
    return torch.stack(products)


@dataclass(frozen=True)
class _Source:
    """Data, and the networks that are run on it side by side."""

    share: float
    data: Data
    models: Sequence[nn.Module]
    shares: Sequence[float]


def _sources(
    models: Sequence[nn.Module],
    shares: Sequence[float],
    data: Data | None,
    own_data: Sequence[Data] | None,
    inputs: str,
) -> list[_Source]:
    if own_data is not None:
        each = data_of_each(data, own_data, len(models), "what goes into layers")
        sources = [
            _Source(share, own, [model], [1.0]) for share, own, model in zip(shares, each, models, strict=True) if share
        ]
    elif data is None:
        raise DataError("least squares runs the networks on data; pass data, or own_data=[…] with one set for each")
    else:
        sources = [_Source(1.0, data, models, shares)]
    if inputs == "merged":
        for source in sources:
            require_repeatable(source.data, "each layer takes a pass of its own")
    return sources


class _Only(NamedTuple):
    """One layer, and how often it runs: what comes after the last time need not run."""

    name: str
    calls: int


@dataclass
class _Reading:
    """Reads what goes into and comes out of layers."""

    sources: list[_Source]
    rows: int | None
    seed: int
    progress: bool | None

    def order(self) -> dict[str, int]:
        """Name the layers in the order in which they first run, each with how often it runs."""
        names: dict[str, int] = {}
        for source in self.sources:
            found: dict[str, int] = {}

            def count(name: str, *_: Any, found: dict[str, int] = found) -> None:
                found[name] = found.get(name, 0) + 1

            model = source.models[0]
            with watching(model, solvable(model)[0], count) as run:
                run(next(batches(source.data, model_device(model))))
            names |= {name: max(calls, names.get(name, 0)) for name, calls in found.items()}
        return names

    def moments(self, only: _Only | None = None, merged: nn.Module | None = None) -> dict[str, Shared]:
        """Stream inputs and outputs of layers, means over the networks: `x0`, … and `y0`, … for each group.

        Args:
            only: The one layer to read; None: all.
            merged: The network whose inputs count in place of the mean.
        """
        found: dict[str, Shared] = {}
        for source in self.sources:
            for name, moments in self._moments(source, only, merged).items():
                found.setdefault(name, []).append((source.share, moments))
        return {name: _normalised(shared) for name, shared in found.items()}

    def _moments(self, source: _Source, only: _Only | None, merged: nn.Module | None) -> dict[str, Moments]:
        generator = torch.Generator().manual_seed(self.seed)
        found: dict[str, Moments] = {}
        layers = solvable(source.models[0])[0]
        data = batches(source.data, model_device(source.models[0]))
        for batch in progress_bar(data, f"layer {only.name}" if only else "layers", show=self.progress):
            for name, calls in _side_by_side(source, batch, only, merged).items():
                layer = layers[name]
                pairs = [(f"x{group}", f"{key}{group}") for group in range(groups_of(layer)) for key in "xy"]
                moments = found.setdefault(name, Moments(pairs))
                for x, y in calls:
                    for piece in row_pieces(layer, x, y, self.rows, generator, name):
                        moments.update(piece)
        return found


def _normalised(shared: Shared) -> Shared:
    total = sum(share for share, _ in shared)
    return [(share / total, moments) for share, moments in shared]


def _side_by_side(source: _Source, batch: Batch, only: _Only | None, merged: nn.Module | None) -> Calls:
    """Give the means over the networks, the inputs of `merged` in place of theirs if there is one."""
    calls: Calls = {}
    for model, share in zip(source.models, source.shares, strict=True):
        for name, own in _calls(model, batch, only).items():
            if name not in calls:
                calls[name] = [[share * part for part in call] for call in own]
                continue
            for total, call in zip(calls[name], own, strict=True):
                for place, part in zip(total, call, strict=True):
                    place += share * part
    if merged is not None:
        with _batch_statistics(merged):
            for name, own in _calls(merged, batch, only).items():
                calls[name] = [[x, total[1]] for (x, _), total in zip(own, calls[name], strict=True)]
    return calls


def _calls(model: nn.Module, batch: Batch, only: _Only | None) -> Calls:
    layers = solvable(model)[0]
    calls: Calls = {}

    def note(name: str, _: Layer, x: Tensor, y: Tensor) -> None:
        calls.setdefault(name, []).append([_kept(x), _kept(y)])

    wanted = layers if only is None else {only.name: layers[only.name]}
    with watching(model, wanted, note, only.calls if only else None) as run:
        run(batch)
    return calls


def _kept(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)


@contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let batch norms use the statistics of the batch, also inside `evaluating`, and keep their running ones."""
    with ExitStack() as hooks:
        for layer in batch_norms(model).values():
            mean, variance = layer.running_mean, layer.running_var
            layer.running_mean = layer.running_var = None
            hooks.callback(setattr, layer, "running_mean", mean)
            hooks.callback(setattr, layer, "running_var", variance)
        yield

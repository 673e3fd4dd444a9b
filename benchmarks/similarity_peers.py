"""What users would pick instead, behind one call each: two lists of samples x units in, layers x layers out.

Each adapter hands over what the package's own interface takes and nothing else is added to its time: where a package
wants two models and a loader, the models only hand out the given activations. Peers that would record a graph run
under `no_grad`, as their users should.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module, util
from typing import Any

import numpy as np
import plain_similarity as plain
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BANDWIDTH = 0.5

Layers = Sequence[Tensor]


@dataclass(frozen=True)
class Peer:
    """One tool: the package it needs (None: numpy alone) and its call for each estimator that it offers."""

    package: str | None
    arrays: Mapping[str, Callable[[Layers, Layers], Any]] = field(default_factory=dict)
    models: Callable[[nn.Module, nn.Module, Sequence[str], Sequence[str], Sequence[Tensor]], Any] | None = None

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return self.package is None or util.find_spec(self.package) is not None


class _Stored(nn.Module):
    """A model whose layers give stored activations."""

    class _Layer(nn.Module):
        def __init__(self, values: Tensor) -> None:
            super().__init__()
            self.values = values

        def forward(self, rows: Tensor) -> Tensor:
            return self.values

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self._Layer(x) for x in layers)

    def forward(self, rows: Tensor) -> Tensor:
        for layer in self.layers:
            layer(rows)
        return rows


def _names(layers: Layers) -> list[str]:
    return [f"layers.{i}" for i in range(len(layers))]


def _torch_cka(a: Layers, b: Layers) -> Tensor:
    rows = torch.arange(len(a[0]))
    return torch_cka_models(_Stored(a), _Stored(b), _names(a), _names(b), [rows])


def torch_cka_models(
    a: nn.Module, b: nn.Module, layers_a: Sequence[str], layers_b: Sequence[str], batches: Sequence[Tensor]
) -> Tensor:
    kind = import_module("torch_cka").CKA
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        cka = kind(a, b, "a", "b", model1_layers=list(layers_a), model2_layers=list(layers_b))
        cka.compare(_loader(batches))
    return cka.export()["CKA"]


def pytorch_cka_models(
    a: nn.Module, b: nn.Module, layers_a: Sequence[str], layers_b: Sequence[str], batches: Sequence[Tensor]
) -> Tensor:
    compute = import_module("cka").compute_cka
    return compute(
        a, b, _loader(batches), layers=list(layers_a), model2_layers=list(layers_b), device="cpu", progress=False
    )[0]


def _loader(batches: Sequence[Tensor]) -> DataLoader:
    data = TensorDataset(torch.cat(list(batches)))
    return DataLoader(data, batch_size=len(batches[0]))


def _rsatoolbox(a: Layers, b: Layers) -> np.ndarray:
    """Linear CKA is the cosine of whitened squared Euclidean distances (Diedrichsen et al. 2020)."""
    data, rdm = import_module("rsatoolbox.data"), import_module("rsatoolbox.rdm")
    rdms = [rdm.calc_rdm([data.Dataset(x.numpy()) for x in layers], method="euclidean") for layers in (a, b)]
    return rdm.compare(*rdms, method="cosine_cov")


def _ckatorch(kernel: str, debiased: bool) -> Callable[[Layers, Layers], Tensor]:
    def call(a: Layers, b: Layers) -> Tensor:
        cka = import_module("ckatorch").cka_base
        rows = [[cka(x, y, kernel=kernel, unbiased=debiased, threshold=BANDWIDTH) for y in b] for x in a]
        return torch.tensor(rows, dtype=torch.float64)

    return call


def _on_arrays(loop: Callable[..., np.ndarray], *arguments: float) -> Callable[[Layers, Layers], np.ndarray]:
    return lambda a, b: loop([x.numpy() for x in a], [y.numpy() for y in b], *arguments)


PEERS: dict[str, Peer] = {
    "rsatoolbox": Peer("rsatoolbox", {"linear": _rsatoolbox}),
    "pytorch-cka": Peer(
        "cka", {"debiased": lambda a, b: import_module("cka").cka_from_features(a, b)}, pytorch_cka_models
    ),
    "torch_cka": Peer("torch_cka", {"debiased": _torch_cka}, torch_cka_models),
    "ckatorch": Peer(
        "ckatorch",
        {
            "linear": _ckatorch("linear", False),
            "debiased": _ckatorch("linear", True),
            "rbf": _ckatorch("rbf", False),
        },
    ),
    "netrep-style loop": Peer(None, {"linear": _on_arrays(plain.feature_loop)}),
    "notebook-style loop": Peer(
        None,
        {"linear": _on_arrays(plain.notebook_loop), "rbf": _on_arrays(plain.notebook_loop, BANDWIDTH)},
    ),
}

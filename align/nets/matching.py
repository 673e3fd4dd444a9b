"""`match`: bring the units of one network into the order of another's."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from ...base.architecture import check_finite, check_same_architecture, full_state
from ...base.batches import Batch, Data, batches
from ...base.errors import DataError, nearest
from ...base.files import PathLike, save_state_dict
from ...base.running import on_device
from ..derive import as_example
from ..derive import symmetry as derive
from ..permutation import Permutation, check_suffix, read_tensors, reading
from ..symmetry import Symmetry
from .activations import activation_matching
from .problem import pairs, rows
from .weights import weight_matching

FORMAT = "isthmus matching 1"
METHODS = ("weights", "activations")
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Matching:
    """Which unit of the second network is which unit of the first.

    Attributes:
        permutation: Brings the second network into the order of the first.
        objective: What was maximised: the inner product of the parameters, or the sum of matched correlations.
        scores: Per group one number for each unit of the first network: the cosine similarity of its weights with
            those of its match (method "weights"), or the correlation of their activations (method "activations").
        history: Per restart the objective at the start and after each sweep.
        method: "weights" or "activations".
        seed: Of visiting order and random starts.
        by_weights: Groups that were matched by weights although the method was another, for want of an activation.
    """

    permutation: Permutation
    objective: float
    scores: Mapping[str, Tensor]
    history: tuple[tuple[float, ...], ...] = ()
    method: str = "weights"
    seed: int = 0
    by_weights: tuple[str, ...] = field(default=())

    @property
    def symmetry(self) -> Symmetry:
        """The symmetry that the permutation belongs to."""
        return self.permutation.symmetry

    @overload
    def apply(self, target: Model) -> Model: ...
    @overload
    def apply(self, target: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def apply(self, target: Any) -> Any:
        """Bring the second network, a model or a state dict, into the order of the first; a new one is returned."""
        return self.permutation.apply(target)

    def save(self, path: PathLike) -> Path:
        """Write to a safetensors file, whole or not at all."""
        tensors = {f"index:{name}": index for name, index in self.permutation.indices.items()}
        tensors |= {f"score:{name}": score for name, score in self.scores.items()}
        facts = {
            "objective": self.objective,
            "history": self.history,
            "method": self.method,
            "seed": self.seed,
            "by_weights": self.by_weights,
        }
        metadata = {
            "format": FORMAT,
            "symmetry": json.dumps(self.symmetry.to_json()),
            "matching": json.dumps(facts),
        }
        return save_state_dict(tensors, check_suffix(path), metadata)

    @classmethod
    def load(cls, path: PathLike) -> Matching:
        """Read a saved matching.

        Raises:
            CheckpointError: The file is missing, damaged or something else.
        """
        metadata, tensors = read_tensors(path, FORMAT)
        parts: dict[str, dict[str, Tensor]] = {"index": {}, "score": {}}
        with reading(path):
            for name, tensor in tensors.items():
                kind, _, group = name.partition(":")
                parts[kind][group] = tensor
            facts = json.loads(metadata["matching"])
            facts["history"] = tuple(tuple(line) for line in facts["history"])
            facts["by_weights"] = tuple(facts["by_weights"])
            symmetry = Symmetry.from_json(json.loads(metadata["symmetry"]))
            return cls(Permutation(symmetry, parts["index"]), scores=parts["score"], **facts)


def match(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Data | None = None,
    *,
    method: str = "weights",
    symmetry: Symmetry | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    example_inputs: Any = None,
    restarts: int = 2,
    progress: bool | None = None,
    verify: bool = True,
) -> Matching:
    """Find the permutation that brings a network's units into the order of another's.

    Args:
        model_a: The reference.
        model_b: The network to be permuted; of the same architecture. Neither is changed.
        data: Batches. Needed for method "activations" and read once; for "weights" the first batch serves as example.
        method: "weights" (Ainsworth et al. 2023, algorithm 1) or "activations" (correlation on `data`).
        symmetry: Of both networks; None derives it. One that was not verified yet is, on the inputs at hand.
        seed: Of visiting order and random starts; same seed, same result.
        device: Where to compute; None: where the models are.
        example_inputs: For deriving and verifying the symmetry, where there is no data.
        restarts: Restarts of weight matching; the best is returned.
        progress: Show bars; None: on a terminal.
        verify: Refuse a symmetry of which it has not been measured that it holds; False takes it on trust.

    Raises:
        ArchitectureError: The networks differ, with the parameters and both shapes.
        NotFiniteError: A parameter or an activation holds NaN or infinity.
        DataError: Data or example inputs are needed and missing, or the method is unknown.
        SymmetryError: The symmetry cannot be derived, or fails when it is verified; the groups are named.

    >>> make = lambda: nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    >>> net = make()
    >>> planted = derive(net, x).random(torch.Generator().manual_seed(1))
    >>> match(net, planted.apply(net), x).permutation == planted.inverse()
    True
    """
    if method not in METHODS:
        raise DataError(f"unknown matching method {method!r}{nearest(method, METHODS)}")
    if method == "activations" and data is None:
        raise DataError("matching by activations needs data: pass batches of inputs")
    state_a, state_b = full_state(model_a), full_state(model_b)
    check_same_architecture(state_a, state_b, ("model a", "model b"))
    for model, name in ((model_a, "model a"), (model_b, "model b")):
        # a buffer may hold infinity on purpose, as an attention mask does; NaN nothing may
        buffers = {key: buffer for key, buffer in model.named_buffers() if buffer.isnan().any()}
        check_finite({**dict(model.named_parameters()), **buffers}, name)
    first, stream = _first_batch(data)
    symmetry = _symmetry(symmetry, model_a, example_inputs, first, verify)
    parameters = [_parameters(model, device) for model in (model_a, model_b)]
    if method == "weights":
        found = weight_matching(symmetry, *parameters, restarts=restarts, seed=seed, progress=progress)
        return Matching(
            found.permutation,
            found.objective,
            weight_scores(found.permutation, *parameters),
            found.history,
            method,
            seed,
        )
    return _match_activations(symmetry, (model_a, model_b), parameters, stream, seed, device, progress)


def _match_activations(
    symmetry: Symmetry,
    models: tuple[nn.Module, nn.Module],
    parameters: list[dict[str, Tensor]],
    stream: Iterable[Batch],
    seed: int,
    device: torch.device | str | None,
    progress: bool | None,
) -> Matching:
    a, b = (on_device(model, device) for model in models)
    found = activation_matching(symmetry, a, b, stream, progress=progress)
    permutation, scores = found.permutation, found.scores
    if found.unseen:
        permutation = weight_matching(
            symmetry, *parameters, restarts=1, seed=seed, only=found.unseen, start=permutation, progress=progress
        ).permutation
        cosines = weight_scores(permutation, *parameters)
        scores = scores | {name: cosines[name] for name in found.unseen}
    history = ((found.objective,),)
    return Matching(permutation, found.objective, scores, history, "activations", seed, found.unseen)


def _first_batch(data: Data | None) -> tuple[Batch | None, Iterable[Batch]]:
    if data is None:
        return None, ()
    stream = batches(data)
    first = next(stream)
    return first, itertools.chain([first], stream)


def _symmetry(
    given: Symmetry | None, model: nn.Module, example_inputs: Any, first: Batch | None, verify: bool
) -> Symmetry:
    inputs = first if example_inputs is None else example_inputs
    if given is None and inputs is None:
        raise DataError("deriving the symmetry needs inputs: pass data, example_inputs, or a symmetry made before")
    if given is not None:
        given.check_fits(model, "model a")
        if given.is_verified or not verify:
            return given
        if inputs is None:
            warnings.warn(
                "the symmetry was never verified, and without inputs it is taken on trust: pass data or example_inputs "
                "to verify it, or verify=False",
                stacklevel=3,
            )
            return given
    example = as_example(inputs)
    claim = derive(model, example, verify=False) if given is None else given
    return claim.verified(model, example) if verify else claim


def _parameters(model: nn.Module, device: torch.device | str | None) -> dict[str, Tensor]:
    return {name: parameter.detach().to(device) for name, parameter in model.named_parameters()}


def weight_scores(permutation: Permutation, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute for each unit of a the cosine similarity of all its weights with those of its match in b.

    Args:
        permutation: Brings b into the order of a.
        a: Parameters of the first network, by name.
        b: Parameters of the second, before permutation.

    Returns:
        Per group (units,), float64; a unit inside a block is counted once for each block. NaN for one without weights.
    """
    symmetry = permutation.symmetry
    sums: dict[str, Tensor] = {}
    for pair in pairs(symmetry, a, {name: permutation.permute(name, tensor) for name, tensor in b.items()}):
        for at, dim in enumerate(pair.piece.dims):
            if dim.group is None:
                continue
            group = symmetry.by_name[dim.group]
            around = [pair.piece.partner(at, name) for name in group.within]
            dims = [*(d for d in around if d is not None), at]
            x, y = (rows(tensor, dims).double() for tensor in (pair.a, pair.b))
            terms = torch.stack([(x * y).sum(1), (x * x).sum(1), (y * y).sum(1)]).cpu()
            sums[group.name] = sums[group.name] + terms if group.name in sums else terms
    return {name: dot / (xx.sqrt() * yy.sqrt()) for name, (dot, xx, yy) in sums.items()}

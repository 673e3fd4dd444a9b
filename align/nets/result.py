"""A matching as data: which unit is which, how well they agree, how it was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, overload

from torch import Tensor, nn

from ...base.files import PathLike
from ..permutation import Permutation
from ..storage import store, stored
from ..symmetry import Symmetry

FORMAT = "isthmus matching 1"
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Matching:
    """Which unit of the second network is which unit of the first.

    Attributes:
        permutation: Brings the second network into the order of the first.
        objective: What the method maximised: for those that compare weights, and those by gradients, the inner product
            of the parameters <A, p(B)>; for those that compare activations the sum of what they compare.
        scores: Per group one number for each unit of the first network: the correlation of its activations with those
            of its match where activations were compared, else the cosine similarity of their weights.
        history: Per restart the objective at the start and after each sweep.
        method: How it was found.
        seed: Of all random choices.
        by_weights: Groups that were matched by weights although the method was another, for want of an activation.
        bound: No permutation has an objective above it; None where none was computed.
        candidates: What `method="auto"` compared: a line each, with method, objective, loss, accuracy, seconds, margin.
    """

    permutation: Permutation
    objective: float
    scores: Mapping[str, Tensor]
    history: tuple[tuple[float, ...], ...] = ()
    method: str = "weights"
    seed: int = 0
    by_weights: tuple[str, ...] = field(default=())
    bound: float | None = None
    candidates: tuple[Mapping[str, Any], ...] = ()

    @property
    def symmetry(self) -> Symmetry:
        """The symmetry that the permutation belongs to."""
        return self.permutation.symmetry

    @property
    def score(self) -> str:
        """What the scores are: "correlation of activations" or "cosine similarity of weights"."""
        by_activations = self.method.removeprefix("auto: ") in ("activations", "iterated")
        return "correlation of activations" if by_activations else "cosine similarity of weights"

    @overload
    def apply(self, target: Model) -> Model: ...
    @overload
    def apply(self, target: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def apply(self, target: Any) -> Any:
        """Bring the second network, a model or a state dict, into the order of the first; a new one is returned."""
        return self.permutation.apply(target)

    def save(self, path: PathLike) -> Path:
        """Write to a safetensors file, whole or not at all."""
        facts = {
            "objective": self.objective,
            "history": self.history,
            "method": self.method,
            "seed": self.seed,
            "by_weights": self.by_weights,
            "bound": self.bound,
            "candidates": self.candidates,
        }
        parts = {"index": self.permutation.indices, "score": self.scores}
        return store(path, FORMAT, {"symmetry": self.symmetry.to_json(), "matching": facts}, parts)

    @classmethod
    def load(cls, path: PathLike) -> Matching:
        """Read a saved matching.

        Raises:
            CheckpointError: The file is missing, damaged or something else.
        """
        with stored(path, FORMAT) as (found, parts):
            facts = found["matching"]
            facts["history"] = tuple(tuple(line) for line in facts["history"])
            facts["by_weights"] = tuple(facts["by_weights"])
            facts["candidates"] = tuple(facts.get("candidates", ()))  # older files have none
            symmetry = Symmetry.from_json(found["symmetry"])
            return cls(Permutation(symmetry, parts["index"]), scores=parts["score"], **facts)

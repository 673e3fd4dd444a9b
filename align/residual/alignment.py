"""An alignment as data: how the second network is folded, permuted and rotated to lie beside the first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, overload

from torch import Tensor, nn

from ...base.architecture import full_state
from ...base.files import PathLike
from ..permutation import Permutation
from ..storage import store, stored
from ..symmetry import Symmetry
from .folding import Recipe, written
from .streams import Stream

FORMAT = "isthmus alignment 1"
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Alignment:
    """Which basis of the second network is which of the first.

    Attributes:
        recipe: How networks of this architecture are folded.
        permutation: Of the folded second network; the identity on what is rotated.
        rotation: Per stream (units, units), float64: applied after the permutation. What is rotated inside attention
            heads is here as well, (heads, units, units); no rotation, but any basis, where the recipe names what is
            `dual`.
        objective: What was maximised: see `orthogonal_matching`.
        history: The objective at the start and after every step.
        scores: Per group one number for each unit of the first network: the cosine similarity of its weights with those
            of what is laid on it.
        by: "weights", "activations", "both" or "learned".
        seed: Of the search.
        error: Change of the second network's outputs by `apply`, relative, in float64; None: not verified.
        reference: The first network, folded; None for an alignment that was loaded: `fold` gives it.
    """

    recipe: Recipe
    permutation: Permutation
    rotation: Mapping[str, Tensor]
    objective: float
    history: tuple[float, ...]
    scores: Mapping[str, Tensor]
    by: str = "weights"
    seed: int = 0
    error: float | None = None
    reference: nn.Module | None = field(default=None, repr=False)

    @property
    def symmetry(self) -> Symmetry:
        """The permutation symmetry that the groups belong to."""
        return self.recipe.symmetry

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that are rotated."""
        return tuple(stream.name for stream in self.recipe.streams)

    def fold(self, model: Model) -> Model:
        """Fold the norms of a network, as the reference is folded; a new network of the same function.

        Raises:
            ArchitectureError: It is of another architecture, or has other ties.
        """
        self.recipe.check_fits(model, "the model")
        return written(model, self.recipe.fold(full_state(model)), self.recipe)

    @overload
    def apply(self, target: Model) -> Model: ...
    @overload
    def apply(self, target: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def apply(self, target: Any) -> Any:
        """Fold, permute and rotate the second network, a model or a state dict; a new one of the same function.

        Args:
            target: The second network as it was trained. In a state dict, tied parameters must be there by each name.

        Raises:
            ArchitectureError: Names, shapes or ties do not fit.
        """
        if isinstance(target, nn.Module):
            self.recipe.check_fits(target, "the model")
            return written(target, self.transform(full_state(target)), self.recipe)
        moved = self.transform(target)
        return {name: tensor.to(target[name]) for name, tensor in moved.items()}

    def transform(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fold, permute and rotate tensors by name; those that change come back in float64."""
        folded = self.recipe.fold({name: tensor.detach() for name, tensor in state.items()})
        return self.recipe.rotate(self.permutation.apply(folded), self.rotation)

    def save(self, path: PathLike) -> Path:
        """Write to a safetensors file, whole or not at all; the reference is not part of it."""
        facts = {
            "objective": self.objective,
            "history": self.history,
            "by": self.by,
            "seed": self.seed,
            "error": self.error,
        }
        recipe = {
            "streams": [stream.to_json() for stream in self.recipe.streams],
            "kept": self.recipe.kept,
            "ties": self.recipe.ties,
            "dual": self.recipe.dual,
        }
        found = {"symmetry": self.symmetry.to_json(), "recipe": recipe, "alignment": facts}
        parts = {"index": self.permutation.indices, "score": self.scores, "rotation": self.rotation}
        return store(path, FORMAT, found, parts)

    @classmethod
    def load(cls, path: PathLike) -> Alignment:
        """Read a saved alignment.

        Raises:
            CheckpointError: The file is missing, damaged or something else.
        """
        with stored(path, FORMAT) as (found, parts):
            symmetry = Symmetry.from_json(found["symmetry"])
            kept = found["recipe"]
            recipe = Recipe(
                symmetry,
                tuple(map(Stream.from_json, kept["streams"])),
                tuple(kept["kept"]),
                tuple(map(tuple, kept["ties"])),
                tuple(map(tuple, kept.get("dual", ()))),
            )
            facts = found["alignment"]
            facts["history"] = tuple(facts["history"])
            permutation = Permutation(symmetry, parts["index"])
            return cls(recipe, permutation, parts["rotation"], scores=parts["score"], **facts)

"""The search for rotations of streams and heads and a permutation of everything else, by weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..nets.weights import weight_matching
from ..permutation import Permutation
from ..symmetry import Group, Symmetry
from .folding import Recipe
from .heads import assign_heads, block_products, cross_products
from .orthogonal import procrustes

# A round counts as progress if it raises the objective by more than this part of the bound |A| |B|.
TOLERANCE = 1e-6

State = Mapping[str, Tensor]


@dataclass
class Search:
    """Two folded networks; the second stands permuted and rotated as far as has been found.

    Attributes:
        recipe: Of both networks.
        turning: Groups inside heads that are rotated.
        a: Parameters of the first network, by name, without the gains of its norms.
        b: The same of the second, permuted and then rotated.
        permutation: What was permuted.
        rotation: What was rotated after it.
        history: The objective, at the start and after every step.
    """

    recipe: Recipe
    turning: tuple[str, ...]
    a: State
    b: State
    permutation: Permutation
    rotation: dict[str, Tensor]
    history: list[float] = field(default_factory=list)

    @classmethod
    def between(cls, recipe: Recipe, turning: Sequence[str], a: State, b: State) -> Search:
        """Begin with nothing permuted or rotated.

        Args:
            recipe: Of both networks.
            turning: Groups inside heads that are rotated.
            a: Parameters of the first network, folded, by name; tied ones once.
            b: The same of the second.
        """
        gains = {name for stream in recipe.streams for name in stream.gains}
        groups = {name for group in recipe.symmetry.groups for name, _ in group.axes}
        x, y = ({name: t.detach().double() for name, t in s.items() if name in groups - gains} for s in (a, b))
        identity = recipe.symmetry.identity()
        rotation = {stream.name: torch.eye(stream.size, dtype=torch.float64) for stream in recipe.streams}
        for name in turning:
            group = recipe.symmetry.by_name[name]
            blocks = recipe.symmetry.by_name[group.within[0]].size
            rotation[name] = torch.eye(group.size, dtype=torch.float64).repeat(blocks, 1, 1)
        search = cls(recipe, tuple(turning), x, y, identity, rotation)
        search.history.append(search.objective)
        return search

    @property
    def symmetry(self) -> Symmetry:
        """Of both networks."""
        return self.recipe.symmetry

    @property
    def objective(self) -> float:
        """Sum of <A, B> over all parameters with units that can be moved, but for the gains."""
        return float(sum((self.a[name] * tensor).sum() for name, tensor in self.b.items()))

    @property
    def scale(self) -> float:
        """What the objective cannot exceed."""
        return float(sum(self.a[name].norm() * tensor.norm() for name, tensor in self.b.items()))

    @property
    def others(self) -> list[str]:
        """Groups that are permuted and not rotated."""
        streams = {stream.name for stream in self.recipe.streams}
        return [group.name for group in self.symmetry.groups if group.name not in streams]

    def start(self, seed: int = 0, restarts: int = 2) -> None:
        """Rotate the streams by what has a fixed order, as embeddings and heads have; then match everything else."""
        for stream in self.recipe.streams:
            cross = cross_products(self.symmetry, self.a, self.b, self.symmetry.by_name[stream.name], fixed=True)
            self.turn({stream.name: procrustes(cross, hold_ones=stream.hold_ones)})
        self.match(seed, restarts, first=True)
        self.note()

    def run(self, rounds: int, seed: int = 0) -> None:
        """Alternate until a round raises the objective no more; no step lowers it."""
        for at in range(rounds):
            before = self.history[-1]
            self.turn_streams()
            self.note()
            if self.turning:
                self.turn_heads()
                self.note()
            self.match(seed + at)
            self.note()
            if self.history[-1] - before <= TOLERANCE * self.scale:
                break

    def note(self) -> None:
        """Remember the objective."""
        self.history.append(self.objective)

    def turn(self, rotations: Mapping[str, Tensor]) -> None:
        """Rotate further."""
        rotations = {name: matrix.cpu() for name, matrix in rotations.items()}
        self.b = self.recipe.rotate(self.b, rotations)
        for name, matrix in rotations.items():
            self.rotation[name] = matrix @ self.rotation[name]

    def turn_streams(self) -> None:
        """Rotate each stream as well as can be while everything else stays (Schönemann 1966)."""
        for stream in self.recipe.streams:
            cross = cross_products(self.symmetry, self.a, self.b, self.symmetry.by_name[stream.name])
            self._improve({stream.name: procrustes(cross, hold_ones=stream.hold_ones)})

    def turn_heads(self, assign: bool = True) -> None:
        """Assign heads and rotate the units inside them, as well as can be while everything else stays."""
        for outer in self.symmetry.groups:
            inner = [g for g in self.symmetry.groups if g.within == (outer.name,) and g.name in self.turning]
            if not inner:
                continue
            if assign and not outer.within:
                self._assign(outer, inner)
            for group in inner:
                blocks = block_products(self.symmetry, self.a, self.b, outer, group)
                at = torch.arange(outer.size)
                self._improve({group.name: procrustes(blocks[at, at])})

    def _assign(self, outer: Group, inner: Sequence[Group]) -> None:
        """Assign heads together with the rotation inside them; other groups inside move along."""
        blocks = [block_products(self.symmetry, self.a, self.b, outer, group) for group in inner]
        fixed = block_products(self.symmetry, self.a, self.b, outer, None)[..., 0, 0]
        order = assign_heads(blocks, fixed)
        at = torch.arange(outer.size)
        if torch.equal(order, at):
            return
        kept = (self.b, self.permutation, dict(self.rotation), self.objective)
        self.permute({outer.name: order})
        self.turn({group.name: procrustes(block[at, order]) for group, block in zip(inner, blocks, strict=True)})
        if self.objective <= kept[3]:  # exact only where nothing else lies within the heads
            self.b, self.permutation, self.rotation = kept[:3]

    def _improve(self, rotations: Mapping[str, Tensor]) -> None:
        """Rotate if that helps: where a group meets itself in a parameter, the best step is not known to."""
        before, kept, rotation = self.objective, self.b, dict(self.rotation)
        self.turn(rotations)
        if self.objective < before:
            self.b, self.rotation = kept, rotation

    def match(self, seed: int = 0, restarts: int = 1, first: bool = False, only: Sequence[str] | None = None) -> None:
        """Permute everything but the streams, or some groups, if that helps."""
        names = [name for name in self.others if first or name not in self.turning] if only is None else only
        start = None if first else self.symmetry.identity()
        if not names:
            return
        found = weight_matching(
            self.symmetry, self.a, self.b, only=names, start=start, restarts=restarts, seed=seed, progress=False
        )
        kept = (self.b, self.permutation, dict(self.rotation), self.objective)
        self.permute({name: found.permutation.indices[name] for name in names})
        if self.objective < kept[3]:
            self.b, self.permutation, self.rotation = kept[:3]

    def permute(self, indices: Mapping[str, Tensor]) -> None:
        """Permute further; what was rotated inside a block moves with it.

        Args:
            indices: Of groups that are not streams, as in `Permutation`.
        """
        identity = self.symmetry.identity()
        step = Permutation(self.symmetry, {**identity.indices, **indices})
        self.b = {name: step.permute(name, tensor) for name, tensor in self.b.items()}
        held = {}
        for name in self.turning:
            # rows in the new order, of the block that comes to lie here
            blocks = self.rotation[name][step.indices[self.symmetry.by_name[name].within[0]]]
            order = step.indices[name]
            self.rotation[name] = blocks.take_along_dim(order[..., None], -2)
            held[name] = identity.indices[name]
        still = Permutation(self.symmetry, {**step.indices, **held})
        self.permutation = still.compose(self.permutation)

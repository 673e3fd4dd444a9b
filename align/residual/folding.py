"""`fold_norms`: absorb the gains of norms in the weights that read them, so that the stream's basis may be rotated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from ...base.architecture import check_finite, full_state
from ...base.errors import ArchitectureError, SymmetryError
from ...base.running import copied
from ..derive import as_example
from ..derive import symmetry as derive
from ..symmetry import Symmetry
from .finding import check_exact, find_streams
from .norms import Norm
from .probing import Bench
from .readers import Reader
from .streams import Stream, fold, kept_gains, rotated, with_centring

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Recipe:
    """How every network of an architecture is folded: structure, and no weights.

    Attributes:
        symmetry: Of the architecture.
        streams: Whose norms are folded.
        kept: Gains that are constant and stay, for what reads them is tied.
        ties: Names of each tied tensor.
        dual: Groups inside heads whose units may take any basis, each with a parameter that takes the inverse
            transposed of what the others take: keys to queries, the output projection to values. For a rotation that
            is the same.
    """

    symmetry: Symmetry
    streams: tuple[Stream, ...]
    kept: tuple[str, ...] = ()
    ties: tuple[tuple[str, ...], ...] = ()
    dual: tuple[tuple[str, str], ...] = ()

    @property
    def untied(self) -> tuple[tuple[str, ...], ...]:
        """Names of one tensor of which each gets its own."""
        return tuple(
            names for names in self.ties if any(self._treatment(n) != self._treatment(names[0]) for n in names)
        )

    def _treatment(self, name: str) -> tuple[Any, ...]:
        """What folding does to a parameter beyond what it does to others of its value."""
        folded = tuple(
            norm.module
            for stream in self.streams
            for norm, readers in zip(stream.norms, stream.readers, strict=True)
            if norm.gain and norm.gain not in self.kept and name in {reader.name for reader in readers}
        )
        return folded, sorted(axis for stream in self.streams for key, axis in stream.centred if key == name)

    def fold(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fold a network's tensors; those that change come back in float64."""
        for stream in self.streams:
            state = fold(stream, self.symmetry, state, self.kept)
        return dict(state)

    def rotate(self, folded: Mapping[str, Tensor], rotations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rotate a folded network's tensors; those that change come back in float64."""
        return rotated(self.streams, self.symmetry, folded, rotations, self.dual)

    def check_fits(self, model: nn.Module, what: str) -> None:
        """Refuse a network of another architecture, or with other ties.

        Raises:
            ArchitectureError: With what differs.
        """
        self.symmetry.check_fits(model, what)
        if (found := ties_of(model)) != self.ties:
            raise ArchitectureError(
                f"{what} ties {_named(found)}, but the folding was derived for a network that ties "
                f"{_named(self.ties)}; load both checkpoints into networks made by the same constructor"
            )


@dataclass(frozen=True, eq=False)
class Folded:
    """A network whose norms have gains of one, beside what was found in it.

    Attributes:
        model: The folded network: same class, same modules, same function.
        recipe: How it and any other of its architecture is folded.
        refused: Groups with norms that are no streams, and why.
        error: Change of the outputs by folding, relative, in float64; None: not verified.
        rotation_error: The same after a random rotation.
    """

    model: nn.Module
    recipe: Recipe
    refused: Mapping[str, str] = field(default_factory=dict)
    error: float | None = None
    rotation_error: float | None = None

    @property
    def symmetry(self) -> Symmetry:
        """The permutation symmetry, of which the streams are groups."""
        return self.recipe.symmetry

    @property
    def streams(self) -> tuple[Stream, ...]:
        """What may be rotated."""
        return self.recipe.streams

    @property
    def stream(self) -> tuple[str, ...]:
        """Names of the groups that may be rotated."""
        return tuple(stream.name for stream in self.streams)

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Norms that were folded."""
        return tuple(norm for stream in self.streams for norm in stream.norms)

    @property
    def readers(self) -> tuple[Reader, ...]:
        """Weights that took up gains."""
        found = (reader for stream in self.streams for several in stream.readers for reader in several)
        return tuple(dict.fromkeys(found))

    @property
    def writers(self) -> tuple[str, ...]:
        """Parameters that write to a stream, or read it as it is."""
        return tuple(dict.fromkeys(name for stream in self.streams for name, _ in stream.writers))

    @property
    def untied(self) -> tuple[tuple[str, ...], ...]:
        """Names that were one tensor and are several now, since a gain was folded into one of them."""
        return self.recipe.untied


def fold_norms(
    model: nn.Module,
    example_inputs: Any,
    *,
    symmetry: Symmetry | None = None,
    untie: bool | None = None,
    seed: int = 0,
    verify: bool = True,
) -> Folded:
    """Absorb the gains of norms along residual streams in the weights that read them (Ashkboos et al. 2024, §3).

    What reads which norm is found from the network's operators; what may be rotated is measured, with weights that are
    spread out. After folding, RMS norm commutes with every orthogonal change of the stream's basis, layer norm
    with those that leave the vector of ones where it is.

    Args:
        model: Any network whose stream is read through norms only; not changed.
        example_inputs: As in `symmetry`.
        symmetry: Of the network; None derives it.
        untie: Give a reader that is tied to something else (an output head to the embedding) a tensor of its own, where
            a gain is folded into it. None: unless that gain is constant, which is then left with its norm.
        seed: Of what is drawn for the measurements.
        verify: Measure in float64, with the network's own weights, that folding and a random rotation leave the outputs
            unchanged.

    Returns:
        The folded network, and what was found.

    Raises:
        SymmetryError: No stream may be rotated, with the module that prevents it; or the check fails.
        NotFiniteError: A parameter holds NaN or infinity.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.stem, self.norm, self.head = nn.Linear(3, 8), nn.RMSNorm(8), nn.Linear(8, 2)
    ...     def forward(self, x):
    ...         return self.head(self.norm(self.stem(x)))
    >>> model = Block()
    >>> with torch.no_grad():
    ...     _ = model.norm.weight.copy_(torch.linspace(0.5, 2.0, 8))
    >>> x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    >>> folded = fold_norms(model, x)
    >>> folded.stream, [reader.name for reader in folded.readers], folded.model.norm.weight.unique().tolist()
    (('stem',), ['head.weight'], [1.0])
    >>> torch.allclose(folded.model(x), model(x), atol=1e-5)
    True
    """
    check_finite(dict(model.named_parameters()), "the model")
    example = as_example(example_inputs)
    symmetry = derive(model, example) if symmetry is None else symmetry
    symmetry.check_fits(model, "the model")
    bench = Bench.open(model, symmetry, example, seed)
    search = find_streams(symmetry, bench, seed)
    recipe = decided(Recipe(symmetry, search.streams, ties=ties_of(model)), [full_state(model)], untie)
    errors: tuple[float | None, float | None] = (None, None)
    if verify:
        errors = check_exact(bench, symmetry, recipe.streams, recipe.fold(bench.probe.state), seed)
    folded = written(model, recipe.fold(full_state(model)), recipe)
    return Folded(folded, recipe, search.refused, *errors)


def decided(recipe: Recipe, states: Sequence[Mapping[str, Tensor]], untie: bool | None = None) -> Recipe:
    """Decide for some networks alike which ties are broken, and what is centred.

    Args:
        recipe: What was found.
        states: Tensors by name of each network.
        untie: As in `fold_norms`.
    """
    each = [set(kept_gains(recipe.streams, state, recipe.ties, untie)) for state in states]
    kept = tuple(sorted(set.intersection(*each)))
    loose = replace(recipe, kept=kept, streams=tuple(replace(stream, centred=()) for stream in recipe.streams))
    still_tied = [names for names in recipe.ties if names not in loose.untied]
    streams = tuple(
        with_centring(
            stream, kept, writers=not stream.writers or bool(set(stream.writers) & set(stream.centred)), tied=still_tied
        )
        for stream in recipe.streams
    )
    return replace(loose, streams=streams)


@overload
def rotate(folded: Folded, rotation: Tensor | Mapping[str, Tensor], model: Model) -> Model: ...
@overload
def rotate(folded: Folded, rotation: Tensor | Mapping[str, Tensor], model: None = None) -> nn.Module: ...
def rotate(folded: Folded, rotation: Tensor | Mapping[str, Tensor], model: nn.Module | None = None) -> nn.Module:
    """Change the basis of a folded network's streams: x becomes Q x, and the function stays as it is.

    Args:
        folded: What `fold_norms` gave.
        rotation: Q, (units, units), or one for each stream by name. Where the norm is a layer norm, the rows must sum
            to one.
        model: Another network that was folded in the same way; None: that of `folded`.

    Returns:
        A new network.

    Raises:
        SymmetryError: Q has another shape, is not orthogonal, moves the vector of ones, or is of no stream.
    """
    matrices = {folded.stream[0]: rotation} if isinstance(rotation, Tensor) else dict(rotation)
    check_rotations(folded.streams, matrices)
    target = folded.model if model is None else model
    state = folded.recipe.rotate(full_state(target), matrices)
    return written(target, state, folded.recipe)


def check_rotations(streams: Iterable[Stream], rotations: Mapping[str, Tensor]) -> None:
    """Refuse matrices that the streams do not admit.

    Raises:
        SymmetryError: With the stream and what is wrong.
    """
    known = {stream.name: stream for stream in streams}
    for name, matrix in rotations.items():
        if name not in known:
            raise SymmetryError(f"a rotation for {name}, which is no stream; streams: {', '.join(known)}")
        size = known[name].size
        if tuple(matrix.shape) != (size, size):
            raise SymmetryError(f"stream {name}: a matrix of shape {tuple(matrix.shape)}; expected {(size, size)}")
        tolerance = 1e-10 if matrix.dtype == torch.float64 else 1e-5
        exact = matrix.double()
        if not float((exact @ exact.T - torch.eye(size).to(exact)).abs().max()) <= tolerance:
            raise SymmetryError(f"stream {name}: the matrix is not orthogonal; pass U Vᵀ of its SVD")
        if known[name].hold_ones and not float((exact.sum(1) - 1).abs().max()) <= tolerance * size:
            raise SymmetryError(
                f"stream {name} is read through layer norm, so that a rotation must leave the vector of ones where it "
                "is (rows that sum to one); see random_rotation(hold_ones=True)"
            )


def ties_of(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """List the names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(several) for several in names.values() if len(several) > 1)


def written(model: Model, state: Mapping[str, Tensor], recipe: Recipe) -> Model:
    """Copy a network with other values; what the recipe treats differently is tied no longer."""
    result = cast("Model", copied(model))
    loose = {name for names in recipe.untied for name in names[1:]} & {name for ties in ties_of(model) for name in ties}
    for name in loose:
        path, _, leaf = name.rpartition(".")
        parameter = result.get_parameter(name)
        copy = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        setattr(result.get_submodule(path), leaf, copy)
    config = getattr(result, "config", None)
    if loose and config is not None and hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = False  # else saving and loading would tie them again
    with torch.no_grad():
        for name, tensor in full_state(result).items():
            tensor.copy_(state[name])
    return result


def _named(ties: Sequence[Sequence[str]]) -> str:
    return "; ".join(" = ".join(names) for names in ties) or "nothing"

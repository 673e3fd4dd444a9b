"""`orthogonal_matching`: rotate the residual streams of one network onto another's, and permute everything else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ...base.architecture import full_state
from ...base.batches import Batch, Data, batches, require_repeatable
from ...base.errors import DataError, SymmetryError, nearest
from ...base.running import on_device
from ..derive import as_example
from ..derive import symmetry as derive
from ..nets.activations import activation_matching
from ..nets.preparation import check_networks
from ..nets.scores import weight_scores
from ..symmetry import Symmetry
from ..verify import change
from .activations import stream_rotations
from .alignment import Alignment
from .finding import TOLERANCE, check_exact, find_streams
from .folding import Recipe, decided, ties_of, written
from .heads import find_turning
from .probing import Bench
from .search import Search

WAYS = ("weights", "activations", "both")


def orthogonal_matching(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Data | None = None,
    *,
    by: str = "weights",
    symmetry: Symmetry | None = None,
    rounds: int = 50,
    restarts: int = 2,
    heads: bool = True,
    seed: int = 0,
    example_inputs: Any = None,
    device: Any = None,
    verify: bool = True,
    progress: bool | None = None,
) -> Alignment:
    """Align two networks whose residual streams are read through norms: by rotation there, by permutation elsewhere.

    Gains of norms are folded into what reads them (see `fold_norms`); then the stream's basis is free up to a rotation
    (Ashkboos et al. 2024), which says far more than a permutation (Theus et al. 2025). Maximised is the sum of <A, B>
    over the folded parameters, as in weight matching (Ainsworth et al. 2023, eq. 1), by turns: each stream by
    Procrustes, heads of attention with a rotation inside each, all other groups by `weight_matching`. No step lowers
    it.

    Args:
        model_a: The reference.
        model_b: The network to be aligned; of the same architecture. Neither is changed.
        data: Batches. Needed unless `by` is "weights", where the first serves as example; read up to twice.
        by: "weights": begins with a rotation by what has a fixed order (embeddings, output heads). "activations": the
            stream by the covariance of what leaves its norms, other groups by correlation, and nothing after that
            but the rotation inside heads. "both": begins by activations and goes on by weights.
        symmetry: Of both networks; None derives it.
        rounds: Most rounds over all groups.
        restarts: Restarts of the first weight matching.
        heads: Rotate the units inside heads of attention, where this leaves the function as it is: values always,
            queries and keys without rotary positions. False permutes them.
        seed: Of what is drawn; same seed, same result.
        example_inputs: For finding and verifying the streams, where there is no data.
        device: Where to compute; None: where the models are.
        verify: Measure in float64 that both networks' outputs stay as they are.
        progress: Show bars; None: on a terminal.

    Returns:
        The alignment; `isthmus.connect(alignment.reference, alignment.apply(model_b), data)` measures it.

    Raises:
        ArchitectureError: The networks differ.
        NotFiniteError: A parameter or an activation holds NaN or infinity.
        DataError: Data or example inputs are needed and missing, or an argument is out of range.
        SymmetryError: No stream may be rotated, with the module that prevents it; or a check fails.

    >>> import torch
    >>> from isthmus.align.residual import fold_norms, random_rotation, rotate
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.stem, self.norm, self.head = nn.Linear(9, 8), nn.RMSNorm(8), nn.Linear(8, 7)
    ...     def forward(self, x):
    ...         return self.head(self.norm(self.stem(x)))
    >>> model = Block()
    >>> x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    >>> planted = random_rotation(8, torch.Generator().manual_seed(1))
    >>> other = rotate(fold_norms(model, x), planted)
    >>> found = orthogonal_matching(model, other, x)
    >>> torch.allclose(found.rotation["stem"], planted.T, atol=1e-5)
    True
    """
    _check(by, data, rounds, restarts)
    models = _checked(model_a, model_b, device)
    example, stream = _inputs(by, data, example_inputs)
    claim = derive(model_a, example, verify=False) if symmetry is None else symmetry
    claim.check_fits(model_a, "model a")
    claim = claim.verified(model_a, example) if verify else claim
    benches = [Bench.open(model, claim, example, seed) for model in models]
    found = find_streams(claim, benches[0], seed)
    recipe = Recipe(claim, found.streams, ties=ties_of(model_a))
    recipe.check_fits(model_b, "model b")
    recipe = decided(recipe, [full_state(model) for model in models])
    if verify:
        for bench in benches:
            check_exact(bench, claim, recipe.streams, recipe.fold(bench.probe.state), seed)
    folded = [written(model, recipe.fold(full_state(model)), recipe) for model in models]
    turning = find_turning(claim, benches[0], seed) if heads else ()
    search = Search.between(recipe, turning, *(dict(model.named_parameters()) for model in folded))
    if by == "weights":
        search.start(seed, restarts)
    else:
        _start_by_activations(search, folded, stream, seed, progress)
    if by != "activations":
        search.run(rounds, seed)
    return _result(search, model_a, folded[0], benches[1], by, seed, verify)


def _check(by: str, data: Data | None, rounds: int, restarts: int) -> None:
    if by not in WAYS:
        raise DataError(f"unknown way to align {by!r}{nearest(by, WAYS)}")
    if rounds < 1 or restarts < 1:
        raise DataError(f"rounds and restarts must be at least 1, not {rounds} and {restarts}")
    if by != "weights" and data is None:
        raise DataError(f"aligning by {by} needs data: pass batches of inputs")
    if by != "weights" and data is not None:
        require_repeatable(data, "the stream and all other units are looked at in a pass each")


def _checked(model_a: nn.Module, model_b: nn.Module, device: Any) -> list[nn.Module]:
    check_networks((model_a, model_b), ("model a", "model b"))
    return [on_device(model, device) for model in (model_a, model_b)]


def _inputs(by: str, data: Data | None, example_inputs: Any) -> tuple[Batch, list[Batch]]:
    if by != "weights" and data is not None:
        stream = list(batches(data))
    else:
        stream = [next(batches(data))] if data is not None and example_inputs is None else []
    if example_inputs is None and not stream:
        raise DataError("finding the streams needs inputs: pass data or example_inputs")
    return as_example(stream[0] if example_inputs is None else example_inputs), stream


def _start_by_activations(
    search: Search, folded: list[nn.Module], data: list[Batch], seed: int, progress: bool | None
) -> None:
    """Rotate the streams and permute everything else by what units do on data."""
    recipe = search.recipe
    a, b = folded
    search.turn(stream_rotations(recipe.symmetry, recipe.streams, a, b, data, progress=progress))
    turned = written(b, recipe.rotate(full_state(b), search.rotation), recipe)
    found = activation_matching(recipe.symmetry, a, turned, data, progress=progress)
    search.permute({name: found.permutation.indices[name] for name in search.others})
    search.match(seed, only=[name for name in found.unseen if name in search.others])
    if search.turning:
        search.turn_heads(assign=False)
    search.note()


def _result(
    search: Search, model_a: nn.Module, reference: nn.Module, bench: Bench, by: str, seed: int, verify: bool
) -> Alignment:
    identity = search.symmetry.identity()
    scores: dict[str, Tensor] = weight_scores(identity, search.a, search.b)
    alignment = Alignment(
        search.recipe,
        search.permutation,
        {name: matrix.contiguous() for name, matrix in search.rotation.items()},
        search.objective,
        tuple(search.history),
        scores,
        by,
        seed,
        reference=on_device(reference, next(model_a.parameters()).device),
    )
    if not verify:
        return alignment
    error = change(bench.given, bench.probe.run(alignment.transform(bench.probe.state), bench.batch))
    if error > TOLERANCE:
        raise SymmetryError(f"the aligned network's outputs differ by {error:.1e} from those of model b in float64")
    return replace(alignment, error=error)

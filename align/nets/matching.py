"""`match`: bring the units of one network into the order of another's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...base.architecture import check_same_architecture
from ...base.batches import Data
from ...base.errors import DataError
from ...base.evaluation import Measure
from ...base.files import PathLike
from ...base.lazy import LazyState, open_state_dict
from ...base.running import on_device
from ..permutation import Permutation
from ..symmetry import Symmetry
from .methods import Task, method_of
from .preparation import check_networks, first_batch, known_symmetry, parameters_of
from .result import Matching
from .scores import weight_scores
from .weights import weight_matching


def match(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Data | None = None,
    *,
    method: str = "weights",
    init: Permutation | Matching | None = None,
    symmetry: Symmetry | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    example_inputs: Any = None,
    restarts: int = 2,
    loss: Measure | None = None,
    progress: bool | None = None,
    verify: bool = True,
    **options: Any,
) -> Matching:
    """Find the permutation that brings a network's units into the order of another's.

    | method | compares | needs |
    | --- | --- | --- |
    | "weights" | parameters: propagation from the fixed ends, annealing, coordinate descent | nothing |
    | "frank_wolfe" | parameters: all groups at once, over soft permutations (Crisostomi et al. 2024) | nothing |
    | "sinkhorn" | parameters, by gradients through Sinkhorn's operator (Peña et al. 2023) | nothing |
    | "activations" | what units do on data (Li et al. 2015), in one pass | inputs |
    | "iterated" | that, what comes back to them, and their neighbours, in rounds | inputs |
    | "straight_through" | loss halfway, straight-through gradients (Ainsworth et al. 2023, section 3.3) | labels |
    | "learned" | loss on the path, gradients through soft permutations | labels |
    | "auto" | all of `candidates=`, by their midpoint loss | labels |

    Any result starts another: `init=`.

    Args:
        model_a: The reference.
        model_b: The network to be permuted; of the same architecture. Neither is changed.
        data: Batches. Where a method needs none, the first batch serves as example.
        method: See above.
        init: Where to begin; None: each method's own start. "learned" and "straight_through" begin where weight
            matching ends.
        symmetry: Of both networks; None derives it. One that was not verified yet is, on the inputs at hand.
        seed: Of visiting order and random starts; same seed, same result.
        device: Where to compute; None: where the models are.
        example_inputs: For deriving and verifying the symmetry, where there is no data.
        restarts: Restarts of weight matching; the best is returned.
        loss: Function (outputs, targets) → mean over the batch, for methods that need labels; cross entropy by default.
        progress: Show bars; None: on a terminal.
        verify: Refuse a symmetry of which it has not been measured that it holds; False takes it on trust.
        options: Further arguments of the method, such as `choose="midpoint"` of "weights" (of all restarts the one of
            lowest loss halfway is kept, on data with labels), `similarity="covariance"` of "activations", `steps=` of
            "learned", or `candidates=` of "auto": see `weight_matching`, `activation_matching`, `learned`, ….

    Raises:
        ArchitectureError: The networks differ, with the parameters and both shapes.
        NotFiniteError: A parameter or an activation holds NaN or infinity.
        DataError: Data or example inputs are needed and missing, or there is no such method or option.
        SymmetryError: The symmetry cannot be derived, or fails when it is verified; the groups are named.

    >>> from isthmus import symmetry
    >>> make = lambda: nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    >>> net = make()
    >>> planted = symmetry(net, x).random(torch.Generator().manual_seed(1))
    >>> match(net, planted.apply(net), x).permutation == planted.inverse()
    True
    """
    chosen = method_of(method, data, options, init)
    check_networks((model_a, model_b), ("model a", "model b"))
    first, stream = first_batch(data)
    symmetry = known_symmetry(symmetry, model_a, example_inputs, first, verify)
    task = Task(
        symmetry,
        (on_device(model_a, device), on_device(model_b, device)),
        (parameters_of(model_a, device), parameters_of(model_b, device)),
        data,
        stream,
        _start(init, symmetry),
        restarts,
        seed,
        loss,
        device,
        progress,
        options,
    )
    return chosen.run(task)


def match_checkpoints(
    path_a: PathLike,
    path_b: PathLike,
    symmetry: Symmetry,
    *,
    init: Permutation | Matching | None = None,
    restarts: int = 2,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool | None = None,
) -> Matching:
    """Match two networks by weights from their files, a tensor at a time; neither network is ever whole in memory.

    Args:
        path_a: Checkpoint of the reference; safetensors, which is read in place. Any other is read whole.
        path_b: Checkpoint of the network to be permuted.
        symmetry: Of both; derived from a model on the meta device, or saved before.
        init: Where to begin.
        restarts: The best is returned; 1 propagates and descends without annealing.
        seed: Of visiting orders.
        device: Where products are computed.
        progress: Show a bar; None: on a terminal.

    Raises:
        CheckpointError: A file is missing, damaged or of another kind.
        ArchitectureError: A file does not hold the parameters of the symmetry, with names and shapes.
        NotFiniteError: A parameter holds NaN or infinity.
    """
    states = [_parameters_in(path, symmetry, device) for path in (path_a, path_b)]
    start = _start(init, symmetry)
    found = weight_matching(symmetry, *states, restarts=restarts, seed=seed, start=start, progress=progress)
    scores = weight_scores(found.permutation, *states)
    return Matching(found.permutation, found.objective, scores, found.history, seed=seed, bound=found.bound)


def _start(init: Permutation | Matching | None, symmetry: Symmetry) -> Permutation | None:
    if init is None:
        return None
    given = init.permutation if isinstance(init, Matching) else init
    if given.symmetry.within != symmetry.within or given.symmetry.by_name.keys() != symmetry.by_name.keys():
        raise DataError(
            f"init permutes the groups {', '.join(given.symmetry.by_name)}, and the networks have "
            f"{', '.join(symmetry.by_name)}: pass a permutation or matching of this architecture"
        )
    return Permutation(symmetry, given.indices)


class _Only(Mapping[str, Tensor]):
    """Some of the tensors of a state, read when they are asked for."""

    def __init__(self, state: Mapping[str, Tensor], names: list[str]) -> None:
        self.state, self.names = state, names

    def __getitem__(self, name: str) -> Tensor:
        return self.state[name]

    def __iter__(self) -> Any:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _parameters_in(path: PathLike, symmetry: Symmetry, device: torch.device | str) -> Mapping[str, Tensor]:
    state = open_state_dict(path, device)
    names = dict.fromkeys(name for group in symmetry.groups for name, _ in group.axes if name not in symmetry.buffers)
    shapes = state.shapes if isinstance(state, LazyState) else state
    expected = {name: torch.empty(symmetry.shapes[name], device="meta") for name in names}
    check_same_architecture(
        expected, {name: shapes[name] for name in names if name in shapes}, ("the symmetry", str(path))
    )
    return _Only(state, list(names))

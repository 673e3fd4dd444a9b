"""Units that are not zipped: brought into the first network's order, one to one, by what they do on data."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ...align import Permutation
from ...align.assignment import assign
from ...align.nets.activations import activation_matching
from ...base.batches import Data, batches, model_device
from .evidence import correlations
from .planning import Plan


def permuted(
    plan: Plan, groups: Sequence[str], data: Data, progress: bool | None = None
) -> tuple[list[nn.Module], dict[str, float]]:
    """Bring groups of all networks into the first one's order (Li et al. 2015).

    Args:
        plan: The networks.
        groups: Names of groups.
        data: Batches; read once, and once more for each network if groups have an order inside.
        progress: Show bars; None: on a terminal.

    Returns:
        The networks, the first as it is, and by group the mean correlation of matched units. Groups that no activation
        shows are not among them, nor those of networks of other architectures that have an order inside.
    """
    networks, scores = [plan.models[0]], {}
    found = correlations(
        plan.models, {name: plan.looks[name] for name in groups if plan.looks.get(name)}, data, progress=progress
    )
    nested = [name for name in groups if name not in plan.looks]
    for number, model in enumerate(plan.models[1:], 1):
        symmetry = plan.symmetries[number]
        indices: dict[str, Tensor] = {}
        for name, matrix in found.items():
            size = symmetry.by_name[name].size
            block = matrix[:size, number * size : (number + 1) * size]
            indices[name] = assign(block)
            scores.setdefault(name, []).append(float(block.gather(1, indices[name][:, None]).mean()))
        if nested and symmetry is plan.symmetries[0]:
            stream = batches(data, model_device(model))
            matched = activation_matching(symmetry, plan.models[0], model, stream, progress=progress)
            for name in nested:
                if name in matched.scores:
                    indices[name] = matched.permutation.indices[name]
                    scores.setdefault(name, []).append(float(matched.scores[name].mean()))
        networks.append(
            Permutation(symmetry, {**symmetry.identity().indices, **indices}).apply(model) if indices else model
        )
    return networks, {name: sum(values) / len(values) for name, values in scores.items()}

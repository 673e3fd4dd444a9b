"""How alike the units of several networks are, within each and across: correlations of activations, in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ...align import Symmetry
from ...align.nets.views import View, views
from ...base.batches import Data, batches, model_device
from ...base.progress import progress as progress_bar
from ...base.running import evaluating
from ...metrics import Moments, capture

Looks = Mapping[str, Sequence[View]]


def places(symmetry: Symmetry, models: Sequence[nn.Module], groups: Iterable[str], trunk: Sequence[str] = ()) -> Looks:
    """Choose where the units of groups are looked at: in modules that are to be merged, else wherever they are seen.

    Args:
        symmetry: Of the networks.
        models: All of them.
        groups: Names of free groups.
        trunk: Modules that are to be merged, with all that is in them.

    Returns:
        For each group the activations that show its units and nothing else of unknown order; maybe none.
    """
    names = [dict(model.named_modules()) for model in models]
    seen = views(symmetry)
    found = {}
    for group in groups:
        looks = [
            view
            for view in seen[group]
            if view.name == group and not view.loose and all(view.layer.partition("#")[0] in known for known in names)
        ]
        inside = [view for view in looks if any(view.layer == m or view.layer.startswith(f"{m}.") for m in trunk)]
        found[group] = inside or looks
    return found


def correlations(
    models: Sequence[nn.Module],
    looks: Looks,
    data: Data,
    *,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """Correlate the units of all networks with each other, those of one network included.

    Positions of feature maps and tokens count as samples. Of several views of one group the mean is taken. A unit that
    never varies correlates with nothing but one that keeps the same value.

    Args:
        models: k networks; they run in evaluation mode.
        looks: By group where its units are seen.
        data: Batches; read once.
        progress: Show a bar; None: on a terminal.

    Returns:
        By group (k·n, k·n) in float64, the first network's units first.

    Raises:
        DataError: There is no batch.
        NotFiniteError: An activation holds NaN or infinity.
    """
    chosen = [view for found in looks.values() for view in found]
    labels = range(len(models))
    pairs = [(_name(i, v), _name(j, v)) for v in chosen for i in labels for j in labels if i <= j]
    moments = Moments(pairs, product_dtype=torch.float32)
    if chosen:
        _record(models, chosen, data, moments, progress)
    return {
        group: torch.stack([_joint(moments, view, len(models)) for view in found]).mean(0)
        for group, found in looks.items()
        if found
    }


def _name(network: int, view: View) -> str:
    return f"{network}:{view.key}"


def _record(
    models: Sequence[nn.Module], looks: Sequence[View], data: Data, moments: Moments, progress: bool | None
) -> None:
    device = model_device(models[0])
    with torch.no_grad(), ExitStack() as stack:
        watched = []
        for model in models:
            stack.enter_context(evaluating(model))
            wanted = {
                side: list(dict.fromkeys(v.layer for v in looks if v.side == side)) for side in ("input", "output")
            }
            watched.append(
                {
                    side: stack.enter_context(capture(model, names, inputs=side == "input", reuse=True))
                    for side, names in wanted.items()
                    if names
                }
            )
        for batch in progress_bar(batches(data, device), "correlating units", show=progress):
            found = {}
            for network, (model, activations) in enumerate(zip(models, watched, strict=True)):
                batch.call(model)
                for view in looks:
                    found[_name(network, view)] = view.samples(activations[view.side][view.layer], {})
            moments.update(found)


def _joint(moments: Moments, view: View, networks: int) -> Tensor:
    labels = [_name(i, view) for i in range(networks)]
    blocks = [
        torch.cat(
            [moments.correlation(a, b) if i <= j else moments.correlation(b, a).T for j, b in enumerate(labels)], 1
        )
        for i, a in enumerate(labels)
    ]
    joint = torch.cat(blocks).cpu()
    still = torch.cat([moments.variance(label) for label in labels]).cpu() == 0
    values = torch.cat([moments.mean(label) for label in labels]).cpu()
    same = still[:, None] & still & (values[:, None] == values)
    return torch.where(same, 1.0, joint.nan_to_num_(0.0))

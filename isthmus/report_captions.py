"""What a report says of the figures that go layer by layer."""

from __future__ import annotations

from isthmus.merge.layerwise import LayerwisePaths

from .plain import number
from .study import Study

Captions = dict[str, tuple[str, str, str]]


def layer_captions(study: Study) -> Captions:
    """Give for each figure that goes layer by layer its heading, its caption and its text for those who do not see it.

    Args:
        study: What is reported; figures that it does not hold are left out.
    """
    where = f"{study.settings['samples']:,} samples of {study.settings['eval_data']}"
    said: Captions = {}
    if study.features:
        means = "; ".join(
            f"{name} {number(float(found.cosine_distance.mean()))}" for name, found in study.features.items()
        )
        said["features"] = (
            "Features halfway",
            "How far, layer by layer, the features of the network halfway are from halfway between those of A and "
            f"B (1 − cosine, mean over {where}). Dotted: how far the features of A and B are from each other. Where a "
            "straight path is free of a barrier, features are usually near linear on it.",
            f"Distance by layer of features at the midpoint from the mean of features. Means over layers: {means}.",
        )
    if study.layerwise:
        worst = "; ".join(f"{name} {_worst(found)}" for name, found in study.layerwise.items())
        points = len(next(iter(study.layerwise.values())).whole.alphas)
        said["layerwise"] = (
            "One layer at a time",
            f"Loss on {where} with one layer halfway between A and B and the others A's, above the mean of the losses "
            f"of A and B; {points} points on the path of each layer.",
            f"Bars of the barrier of each layer by itself. Largest: {worst}.",
        )
    return said


def _worst(found: LayerwisePaths) -> str:
    place = int(found.midpoint_barriers.argmax())
    return f"{number(float(found.midpoint_barriers[place]))} at {found.layers[place]}"

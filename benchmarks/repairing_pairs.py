"""Networks that repairing.py trains beside those of matching_pairs.py, and what was published of each.

Their recipes are those of REPAIR (Jordan et al. 2023): width 128, SGD at 0.05 with momentum 0.9, fifty epochs of
batches of 1000. Chosen here: He initialisation, weight decay 0.003 (the paper does not state one), a cosine instead of
a straight fall of the rate; and, where 21 layers diverge at 0.05, a rate of 0.02, gradients clipped at 1, and bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from matching_pairs import KINDS, Kind

from isthmus import zoo

_RECIPE = zoo.Recipe(epochs=50, lr=0.05, batch_size=1000, weight_decay=3e-3)
_DEEP = replace(_RECIPE, warmup_epochs=5.0)

QUICK = "digits-4x32"


@dataclass(frozen=True)
class Published:
    """Test accuracy at the midpoint, in percent: as they are, permuted, permuted and repaired; and of the ends."""

    naive: float
    permuted: float
    repaired: float
    ends: float


def _mlp(depth: int, recipe: zoo.Recipe) -> Kind:
    return Kind(
        lambda seed: zoo.mlp(784, (128,) * depth, init="he", seed=seed),
        lambda split: zoo.load_data("mnist", split),  # pyright: ignore[reportArgumentType]
        recipe,
    )


DEPTHS: dict[str, Published] = {
    "repair-2x128": Published(39.6, 96.8, 97.5, 98.1),
    "repair-6x128": Published(10.6, 93.5, 95.9, 98.2),
    "repair-11x128": Published(9.7, 81.2, 95.3, 98.2),
    "repair-21x128": Published(8.9, 50.6, 94.6, 98.1),
}

# Points that the repaired midpoint is below its parents, of networks on CIFAR-10.
DISTANCES: dict[str, tuple[str, float]] = {
    "resnet20-batch": ("ResNet20", 26.0),
    "resnet20-layer": ("ResNet20", 26.0),
    "vgg11": ("VGG16", 3.3),
}

KINDS.update(
    {
        "repair-2x128": _mlp(2, _RECIPE),
        "repair-6x128": _mlp(6, _RECIPE),
        "repair-11x128": _mlp(11, _DEEP),
        "repair-21x128": _mlp(21, replace(_DEEP, lr=0.02, clip=1.0, precision="bfloat16")),
        QUICK: Kind(
            lambda seed: zoo.mlp(64, (32,) * 4, init="he", seed=seed),
            lambda split: zoo.load_data("digits", split),  # pyright: ignore[reportArgumentType]
            zoo.Recipe(epochs=10, lr=0.05, weight_decay=3e-3),
        ),
    }
)

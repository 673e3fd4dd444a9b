"""Networks that matching.py compares in pairs: trained here from several seeds, kept in a folder of the user's choice.

    python benchmarks/matching_pairs.py --networks FOLDER [--seeds 0 1] [NAME …]

Each becomes `FOLDER/NAME-SEED.pt`, a state dict; what is there already is left alone. `matching.py` trains what it
misses in the same way. Data is looked for as `isthmus.zoo` does, under `ISTHMUS_DATA`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from isthmus import zoo

Data = zoo.Dataset | zoo.Text


@dataclass(frozen=True)
class Kind:
    """What is trained, on what, how."""

    make: Callable[[int], nn.Module]
    load: Callable[[str], Data]
    recipe: zoo.Recipe


def _images(name: str) -> Callable[[str], Data]:
    return lambda split: zoo.load_data(name, split)  # pyright: ignore[reportArgumentType]


def _shakespeare(context: int) -> Callable[[str], Data]:
    return lambda split: zoo.load_text("tinyshakespeare", split, context=context)  # pyright: ignore[reportArgumentType]


def _mlp(depth: int, width: int, init: str) -> Callable[[int], nn.Module]:
    return lambda seed: zoo.mlp(784, (width,) * depth, init=init, seed=seed)  # pyright: ignore[reportArgumentType]


# As REPAIR trains them (Jordan et al. 2023): SGD, fifty epochs of batches of 1000.
_REPAIR = zoo.Recipe(epochs=50, lr=0.05, batch_size=1000, weight_decay=0.0)
_CONVOLUTIONS = zoo.Recipe(epochs=3, lr=0.1, precision="bfloat16", warmup_epochs=0.5)
_TOKENS = zoo.Recipe(epochs=3, batch_size=16, optimizer="adamw", lr=1e-3, weight_decay=0.1, warmup_epochs=0.2, clip=1.0)

# What a quick look trains, in a second, where there are no files of data.
QUICK = "digits-2x32"

KINDS: dict[str, Kind] = {
    QUICK: Kind(
        lambda seed: zoo.mlp(64, (32, 32), seed=seed),
        _images("digits"),
        zoo.Recipe(epochs=10, lr=0.1, weight_decay=0.0),
    ),
    "mnist-3x512": Kind(
        _mlp(3, 512, "torch"), _images("mnist"), zoo.Recipe(epochs=8, lr=0.05, precision="bfloat16")
    ),
    **{f"mnist-{depth}x128": Kind(_mlp(depth, 128, "he"), _images("mnist"), _REPAIR) for depth in (2, 6, 11)},
    # at the rate of the others it diverges
    "mnist-21x128": Kind(
        _mlp(21, 128, "he"),
        _images("mnist"),
        replace(_REPAIR, lr=0.01, batch_size=500, warmup_epochs=5.0, precision="bfloat16"),
    ),
    "resnet20-batch": Kind(
        lambda seed: zoo.resnet(20, in_channels=1, seed=seed), _images("fashion_mnist"), _CONVOLUTIONS
    ),
    "resnet20-layer": Kind(
        lambda seed: zoo.resnet(20, norm="layer", in_channels=1, seed=seed), _images("fashion_mnist"), _CONVOLUTIONS
    ),
    "vgg11": Kind(
        lambda seed: zoo.vgg(11, 1, width_multiplier=0.25, norm="batch", image_size=28, seed=seed),
        _images("fashion_mnist"),
        replace(_CONVOLUTIONS, lr=0.05),
    ),
    "charformer-small": Kind(
        lambda seed: zoo.transformer(width=64, layers=2, heads=4, context=64, seed=seed),
        _shakespeare(64),
        replace(_TOKENS, epochs=4, batch_size=32, lr=3e-3),
    ),
    "charformer": Kind(
        lambda seed: zoo.transformer(width=256, layers=6, heads=4, context=128, seed=seed),
        _shakespeare(128),
        replace(_TOKENS, precision="bfloat16"),
    ),
}  # fmt: skip


def network(name: str, seed: int, folder: Path) -> nn.Module:
    """Give a trained network, from its file or, the first time, by training it."""
    kind, path = KINDS[name], folder / f"{name}-{seed}.pt"
    model = kind.make(seed)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    history = zoo.train(model, kind.load("train"), replace(kind.recipe, seed=seed), progress=None)
    loss, accuracy = zoo.evaluate(model, kind.load("test"))
    print(
        f"{name}-{seed}: test loss {loss:.4f}, accuracy {accuracy:.4f}, {sum(history.seconds):.0f} s of training",
        flush=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    torch.save(model.state_dict(), unfinished)
    unfinished.replace(path)
    return model.eval()


def batches(name: str, split: str, limit: int | None, batch_size: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Give what a network is trained or tested on, in batches; the first so many samples, characters of a text."""
    data = KINDS[name].load(split)
    if isinstance(data, zoo.Text):
        data = data if limit is None else replace(data, tokens=data.tokens[: limit + 1])
        return list(data.batches(batch_size or 32))
    # In the order of the files, which is random.
    data = data if limit is None else replace(data, images=data.images[:limit], labels=data.labels[:limit])
    return list(zoo.loader(data, batch_size or 500))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*KINDS, []], metavar="NAME", help=f"of {', '.join(KINDS)}; all")
    parser.add_argument("--networks", type=Path, required=True, help="folder of the trained networks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.names or [name for name in KINDS if name != QUICK]:
        for seed in arguments.seeds:
            network(name, seed, arguments.networks)


if __name__ == "__main__":
    main()

"""One tool on one task, measured: what matching.py runs in a process of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plain_specifications as plain
import torch
from matching_pairs import KINDS, batches, network
from plain_frank_wolfe import frank_wolfe
from plain_sinkhorn import sinkhorn_rebasin
from plain_specifications import Orders, Specification, State
from similarity_tasks import Meter, forget_peak, resident
from torch import Tensor, nn

import isthmus
from isthmus import zoo

Row = dict[str, Any]
Task = Callable[[Row, Meter], Row]
"""Makes its networks, measures inside the meter, and says how good the result is."""

PLAIN: dict[str, Callable[[Specification, State, State], Orders]] = {
    "coordinate descent": plain.coordinate_descent,
    "coordinate descent, best of 5 orders": lambda specification, a, b: max(
        (plain.coordinate_descent(specification, a, b, seed) for seed in range(5)),
        key=lambda orders: plain.objective(a, plain.permute(specification, b, orders)),
    ),
    "Frank-Wolfe, best of 2 starts": frank_wolfe,
    "Sinkhorn, best of 2 rates": sinkhorn_rebasin,
}

# How ours matches trained pairs; all but the first look at training data.
OURS: dict[str, Row] = {
    "isthmus weights": {},
    "isthmus weights, 5 restarts, by midpoint": {"restarts": 5, "choose": "midpoint"},
    "isthmus iterated": {"method": "iterated"},
    "isthmus learned": {"method": "learned"},
}

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def run(spec: Row) -> Row:
    """Run a tool once: {"kind", "tool", "size"}; gives seconds, peak memory in bytes and what the task says."""
    meter = Meter()
    kinds = {"planted": planted, "pair": pair, "speed": speed, "many": many, "transformer": transformer}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = kinds[spec["kind"]](spec["tool"], spec["size"], meter)
    return {**found, "cpu": meter.cpu, "wall": meter.wall, "peak": resident("VmHWM")}


# Planted permutations


class ResidualMLP(nn.Module):
    """A stream of `width` that each block of `hidden` units adds to."""

    def __init__(self, width: int, hidden: int, blocks: int, ends: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(ends, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, hidden), "down": nn.Linear(hidden, width)}) for _ in range(blocks)
        )
        self.head = nn.Linear(width, ends)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, ends) to (n, ends)."""
        x = self.embed(x)
        for block in self.blocks:
            x = x + block.get_submodule("down")(block.get_submodule("up")(x).relu())
        return self.head(x)


@dataclass(frozen=True)
class Planted:
    """A network to be permuted and recovered."""

    make: Callable[[], nn.Module]
    example: Callable[[], Tensor]
    gaussian: bool = False
    """All parameters drawn from the standard normal distribution, in place of the network's own initialisation."""
    specification: Callable[[State], Specification] | None = None
    """By hand, for the published algorithms; None where none can be written."""


def _published(depth: int, checkpoint: str) -> nn.Module:
    model = zoo.resnet(depth, shortcut="pad")
    found = torch.load(SHARED / "resnet_cifar10" / checkpoint, weights_only=True, map_location="cpu")["state_dict"]
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in found.items()})
    return model


def _plain(layers: int) -> Planted:
    widths = (64,) * (layers + 1)
    return Planted(lambda: zoo.mlp(4, widths, 4), lambda: torch.randn(4, 4), gaussian=True, specification=plain.chain)


def _residual(width: int, hidden: int, blocks: int) -> Planted:
    return Planted(lambda: ResidualMLP(width, hidden, blocks), lambda: torch.randn(4, 4), True, plain.residual_mlp)


def _images(size: int = 32) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, 3, size, size)


def _tokens() -> Tensor:
    return torch.randint(65, (2, 16))


def _hugging_face(kind: str, configuration: str, **options: Any) -> nn.Module:
    import transformers

    return getattr(transformers, kind)(getattr(transformers, configuration)(**options))


_LLAMA: dict[str, Any] = {"kv_heads": 2, "norm": "rms", "position": "rotary", "mlp": "swiglu", "bias": False}

PLANTED: dict[str, Planted] = {
    **{f"plain, width 64, {layers} hidden to hidden": _plain(layers) for layers in (1, 3, 6)},
    **{
        f"residual, d = {width}, h = {4 * width}, blocks: {blocks}": _residual(width, 4 * width, blocks)
        for width, blocks in ((16, 1), (16, 4), (64, 1), (64, 4), (256, 8))
    },
    "ResNet20, trained on CIFAR-10": Planted(lambda: _published(20, "resnet20-12fca82f.th"), _images()),
    "ResNet56, trained on CIFAR-10": Planted(lambda: _published(56, "resnet56-4bfd9763.th"), _images()),
    "vision transformer, width 64, 4 layers": Planted(
        lambda: zoo.vit(width=64, layers=4, pool="token"), _images()
    ),
    "like GPT-2, width 128, 4 layers": Planted(
        lambda: zoo.transformer(width=128, layers=4, context=16), _tokens
    ),
    "like Llama, width 128, 4 layers, grouped queries": Planted(
        lambda: zoo.transformer(width=128, layers=4, heads=8, context=16, **_LLAMA),
        _tokens,
    ),
    "ResNet50": Planted(
        lambda: _hugging_face("ResNetForImageClassification", "ResNetConfig", num_labels=1000),
        _images(64),
        specification=plain.bottlenecks,
    ),
    "ViT-B/16": Planted(
        lambda: _hugging_face("ViTForImageClassification", "ViTConfig", num_labels=1000),
        _images(224),
        specification=plain.stream_and_perceptrons,
    ),
}  # fmt: skip


def draw(case: Planted, seed: int) -> nn.Module:
    """Make a network from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = case.make().eval()
        if case.gaussian:
            for parameter in model.parameters():
                nn.init.normal_(parameter)
    return model


def planted(tool: str, size: Row, meter: Meter) -> Row:
    """Permute a network, add noise, and count how often exactly that permutation is found."""
    case = PLANTED[size["network"]]
    symmetry = isthmus.symmetry(draw(case, 0), case.example(), verify=False)
    forget_peak()
    recovered = as_good = 0
    for seed in range(size["draws"]):
        generator = torch.Generator().manual_seed(seed)
        a, truth = draw(case, seed), symmetry.random(generator)
        b = truth.apply(a)
        _add_noise(b, size["noise"], generator)
        if tool == "isthmus weights":
            with meter():
                found = isthmus.match(a, b, symmetry=symmetry, seed=seed, verify=False).permutation
            moved = found.apply(_state(b))
        else:
            moved = _by_hand(PLAIN[tool], case, a, b, meter)
        wanted = truth.inverse().apply(_state(b))
        # Units that are the same number by number, as dead ones, may stand in any order.
        recovered += all(torch.equal(moved[name], tensor) for name, tensor in wanted.items())
        as_good += plain.objective(_state(a), moved) >= plain.objective(_state(a), wanted) * (1 - 1e-9)
    meter.cpu, meter.wall = meter.cpu / size["draws"], meter.wall / size["draws"]
    return {"recovered": recovered, "as_good": as_good, "draws": size["draws"]}


def _add_noise(model: nn.Module, scale: float, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
            parameter += scale * spread * torch.randn(parameter.shape, generator=generator)


def _state(model: nn.Module) -> State:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _by_hand(algorithm: Callable[..., Orders], case: Planted, a: nn.Module, b: nn.Module, meter: Meter) -> State:
    assert case.specification is not None
    state_a, state_b = _state(a), _state(b)
    specification = case.specification(state_a)
    with meter():
        orders = algorithm(specification, state_a, state_b)
    return plain.permute(specification, state_b, orders)


def speed(tool: str, size: Row, meter: Meter) -> Row:
    """Match networks of the size that is used in practice, one planted draw."""
    return planted(tool, {**size, "draws": 1, "noise": 0.0}, meter)


# Trained pairs


def pair(tool: str, size: Row, meter: Meter) -> Row:
    """Align two trained networks and measure the middle of the line between them."""
    name, folder = size["network"], Path(size["networks"])
    a, b = (network(name, seed, folder) for seed in (0, 1))
    symmetry = isthmus.symmetry(a, next(iter(batches(name, "test", 2)))[0])
    seen = batches(name, "train", size["samples"], 250)
    forget_peak()
    if tool in OURS:
        with meter():
            b = isthmus.match(a, b, seen, symmetry=symmetry, **OURS[tool]).apply(b)
    elif tool != "none":
        b.load_state_dict(_pair_by_hand(PLAIN[tool], name, _state(a), _state(b), meter))
    found: Row = {"objective": _objective(a, b)}
    train, test = batches(name, "train", size["samples"]), batches(name, "test", size["samples"])
    for split, data in (("train", train), ("test", test)):
        path = isthmus.connect(a, b, data, points=3)
        found |= {f"{split}_loss": path.midpoint_loss, f"{split}_barrier": path.barrier}
        found[f"{split}_accuracy"] = path.midpoint_accuracy
    if any(isinstance(module, nn.BatchNorm2d) for module in a.modules()):
        path = isthmus.connect(a, b, test, points=3, repair="reset", repair_data=train)
        found |= {"test_loss_repaired": path.midpoint_loss, "test_accuracy_repaired": path.midpoint_accuracy}
    return found


def _objective(a: nn.Module, b: nn.Module) -> float:
    return plain.objective(
        {n: p.detach() for n, p in a.named_parameters()}, {n: p.detach() for n, p in b.named_parameters()}
    )


def _pair_by_hand(algorithm: Callable[..., Orders], name: str, a: State, b: State, meter: Meter) -> State:
    shapes = {key: tensor.shape for key, tensor in b.items()}
    if name.startswith("vgg"):
        # The classifier reads every channel at every position that is left.
        channels = [tensor for tensor in a.values() if tensor.ndim == 4][-1].shape[0]
        for state in (a, b):
            state["classifier.weight"] = state["classifier.weight"].unflatten(1, (channels, -1))
    specification = (plain.resnet if name.startswith("resnet") else plain.chain)(a)
    with meter():
        orders = algorithm(specification, a, b)
    return {key: tensor.reshape(shapes[key]) for key, tensor in plain.permute(specification, b, orders).items()}


# Many networks


def many(tool: str, size: Row, meter: Meter) -> Row:
    """Bring several networks into one order, and test their mean."""
    from isthmus.base.interpolation import weighted_mean

    name, folder, count = size["network"], Path(size["networks"]), size["count"]
    models = [network(name, seed, folder) for seed in range(count)]
    test = batches(name, "test", None)
    parents = [_accuracy(model, test) for model in models]
    forget_peak()
    if tool.startswith("isthmus"):
        from isthmus.align import match_many

        example = next(iter(test))[0][:2]
        with meter():
            matching = match_many(models, method=tool.split()[1], example_inputs=example)
        models = matching.apply(models)
    mean = KINDS[name].make(0)
    mean.load_state_dict(weighted_mean([model.state_dict() for model in models], [1 / count] * count))
    return {"accuracy": _accuracy(mean.eval(), test), "parents": sum(parents) / count}


def _accuracy(model: nn.Module, data: Any) -> float:
    from isthmus.base.evaluation import evaluate

    found = evaluate(model, data).metric
    assert found is not None
    return found


# Transformers


def transformer(tool: str, size: Row, meter: Meter) -> Row:
    """Align two trained transformers and measure the test loss along the line between them."""
    name, folder = size["network"], Path(size["networks"])
    a, b = (network(name, seed, folder) for seed in (0, 1))
    train = batches(name, "train", size["samples"])
    forget_peak()
    with meter():
        a, b = ALIGNMENTS[tool](a, b, train)
    path = isthmus.connect(a, b, batches(name, "test", size["samples"]), points=size["points"])
    return {"test_barrier": path.barrier, "test_loss": path.midpoint_loss, "ends": [path.loss[0], path.loss[-1]]}


Models = tuple[nn.Module, nn.Module]


def _matched(method: str) -> Callable[[nn.Module, nn.Module, Any], Models]:
    return lambda a, b, data: (a, isthmus.match(a, b, data, method=method).apply(b))


def _orthogonal(by: str) -> Callable[[nn.Module, nn.Module, Any], Models]:
    def align(a: nn.Module, b: nn.Module, data: Any) -> Models:
        from isthmus.align.residual import orthogonal_matching

        found = orthogonal_matching(a, b, data, by=by)
        assert found.reference is not None
        return found.reference, found.apply(b)

    return align


def _turned(a: nn.Module, b: nn.Module, data: Any) -> Models:
    from isthmus.align.residual import learned_alignment

    found = learned_alignment(a, b, data)
    assert found.reference is not None
    return found.reference, found.apply(b)


def _learned(first: Callable[[nn.Module, nn.Module, Any], Models]) -> Callable[[nn.Module, nn.Module, Any], Models]:
    def align(a: nn.Module, b: nn.Module, data: Any) -> Models:
        from isthmus.align.nets.learned import learned

        a, b = first(a, b, data)
        symmetry = isthmus.symmetry(a, next(iter(data))[0][:2])
        return a, learned(symmetry, a, b, data).permutation.apply(b)

    return align


ALIGNMENTS: Mapping[str, Callable[[nn.Module, nn.Module, Any], Models]] = {
    "none": lambda a, b, _: (a, b),
    "isthmus activations": _matched("activations"),
    "isthmus weights": _matched("weights"),
    "isthmus weights, orthogonal stream": _orthogonal("weights"),
    "isthmus both, orthogonal stream": _orthogonal("both"),
    "isthmus learned": _learned(_matched("weights")),
    "isthmus learned, orthogonal stream": _turned,
}

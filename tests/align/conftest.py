"""Small networks whose permutation symmetry is derived by hand, each with the derivation beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A network, inputs for it, and what its groups must be: (size, kind) by the name of the group."""

    make: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Any]
    groups: dict[str, tuple[int, str]]
    within: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def model(self, seed: int = 0, double: bool = False) -> nn.Module:
        """Build in evaluation mode with distinct normal weights, biases and statistics."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.make()
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / max(parameter[0].numel(), 1) ** 0.5 + (0.5 if parameter.ndim == 1 else 0))
            for name, buffer in model.named_buffers():
                if buffer.is_floating_point():
                    noise = torch.randn(buffer.shape, generator=generator)
                    buffer.copy_(noise.abs() + 0.5 if name.endswith("var") else 0.3 * noise)
        model = model.eval()
        return model.double() if double else model

    def data(self, seed: int = 0) -> Any:
        """Draw inputs."""
        return self.inputs(torch.Generator().manual_seed(seed))


class Residual(nn.Module):
    def __init__(self, square: bool = False) -> None:
        super().__init__()
        inner = (10, 10) if square else (7, 9)
        self.stem = nn.Linear(6, 10)
        self.up = nn.ModuleList(nn.Linear(10, size) for size in inner)
        self.down = nn.ModuleList(nn.Linear(size, 10) for size in inner)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(F.relu(up(x)))
        return self.head(F.relu(x))


class ResidualConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.square = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.norm(self.square(x)))
        return self.head(x.mean((2, 3)))


class ResidualGroupNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 12, 3, padding=1)
        self.norm = nn.GroupNorm(4, 12)
        self.square = nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.square(F.relu(self.norm(x)))
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(7)
        self.third = nn.Conv2d(7, 5, 3, padding=1)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.first(x))
        ab = torch.cat([a, F.relu(self.second(a))], 1)
        abc = torch.cat([ab, F.relu(self.third(F.relu(self.norm(ab))))], 1)
        return self.head(F.adaptive_avg_pool2d(abc, 1).flatten(1))


class Glu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 16)
        self.down = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, -1)
        return self.down(value * gate.sigmoid())


class PaddedShortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.widen = nn.Conv2d(4, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.widen(x) + F.pad(x, (0, 0, 0, 0, 2, 2)))
        return self.head(x.mean((2, 3)))


class Words(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 6)
        self.back = nn.Linear(6, 8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.back(F.gelu(self.mix(self.table(tokens)))))


class TiedSquare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class RawParameters(nn.Module):
    """Layers that no module holds: nothing but the operators shows them."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(9, 6))
        self.w2 = nn.Parameter(torch.zeros(4, 9))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.w1).relu(), self.w2)


class LowRank(nn.Module):
    """A residual step whose weight is the product of two factors: the rank's units stand between equal groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.left = nn.Parameter(torch.zeros(8, 3))
        self.right = nn.Parameter(torch.zeros(3, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(torch.tanh(x + F.linear(x, self.left @ self.right)))


class Attention(nn.Module):
    """Two heads of four features in a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 10)
        # a bias of the keys would add the same to all of a query's scores, which softmax takes off again
        self.q, self.k, self.v = nn.Linear(10, 8), nn.Linear(10, 8, bias=False), nn.Linear(10, 8)
        self.o = nn.Linear(8, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.head(torch.tanh(x + self.o(mixed.transpose(1, 2).flatten(2))))


class Nested(nn.Module):
    """Softmax inside each cell of a table of units."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 24)
        self.down = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).view(-1, 2, 3, 4).softmax(-1).softmax(-2).flatten(1))


def _vectors(generator: torch.Generator) -> Tensor:
    return torch.randn(8, 6, generator=generator)


def _images(generator: torch.Generator) -> Tensor:
    return torch.randn(4, 2, 6, 6, generator=generator)


def _tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(11, (6, 5), generator=generator)


CASES = {
    # hidden layers 12 and 10
    "mlp": Case(
        lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4)),
        _vectors,
        {"0": (12, "free"), "2": (10, "free")},
    ),
    # dropout does nothing in evaluation mode; softmax normalises over the 10 units whatever their order
    "dropout and softmax": Case(
        lambda: nn.Sequential(
            nn.Linear(6, 12), nn.Dropout(0.5), nn.ReLU(), nn.Linear(12, 10), nn.Softmax(-1), nn.Linear(10, 4)
        ),
        _vectors,
        {"0": (12, "free"), "3": (10, "free")},
    ),
    # layer norm treats its 12 features alike, and its weight and bias follow them
    "layer norm": Case(
        lambda: nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 4)),
        _vectors,
        {"0": (12, "free")},
    ),
    # channels 8 and 6, batch norms following them
    "conv and batch norm": Case(
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
        ),
        _images,
        {"0": (8, "free"), "4": (6, "free")},
    ),
    # the flattened axis is 6 channels × 4 positions: channels are permuted in blocks of four positions
    "flatten": Case(
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 4)
        ),
        _images,
        {"0": (6, "free"), "4": (8, "free")},
    ),
    # 12 channels normalised in 4 blocks: the blocks move as wholes (4!), 3 channels move inside each (3!^4)
    "group norm": Case(
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 12, 3), nn.GroupNorm(4, 12), nn.ReLU(), nn.Conv2d(12, 6, 3), nn.GroupNorm(1, 6), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(24, 4)),
        ),
        _images,
        {"0": (4, "blocks"), "0:2": (3, "within"), "3": (6, "free")},
        {"0:2": ("0",)},
    ),
    # groups=4 reads 4 blocks of 3 channels and writes 4 blocks of 2: the blocks move together, each has its own order
    "grouped conv": Case(
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)),
        ),
        _images,
        {"0": (4, "blocks"), "0:2": (3, "within"), "2": (2, "within")},
        {"0:2": ("0",), "2": ("0",)},
    ),
    # one input channel to a block: no order inside on the left, the pair of outputs inside each block on the right
    "depthwise": Case(
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Conv2d(6, 5, 1), nn.ReLU(), nn.Conv2d(5, 10, 1, groups=5), nn.Tanh(), nn.Flatten(), nn.Linear(40, 4)),
        ),
        _images,
        {"0": (6, "free"), "5": (5, "blocks"), "7": (2, "within")},
        {"7": ("5",)},
    ),
    # groups both before and after a transposed grouped convolution: 3 blocks of 2 in, 3 blocks of 4 out
    "transposed grouped conv": Case(
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 12, 2, groups=3), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)),
        ),
        _images,
        {"0": (3, "blocks"), "0:2": (2, "within"), "2": (4, "within")},
        {"0:2": ("0",), "2": ("0",)},
    ),
    # the stream of 10 is read and written by both blocks, whose inner layers of 7 and 9 are their own
    "residual": Case(Residual, _vectors, {"stem": (10, "free"), "up.0": (7, "free"), "up.1": (9, "free")}),
    # the square convolution reads and writes the one stream of 8
    "residual conv": Case(ResidualConv, _images, {"stem": (8, "free")}),
    # one stream of 12 in 4 normalised blocks; the square convolution meets it twice, blocks and orders inside alike
    "residual group norm": Case(
        ResidualGroupNorm,
        _images,
        {"stem": (4, "blocks"), "stem:2": (3, "within")},
        {"stem:2": ("stem",)},
    ),
    # segments of 4, 3 and 5 channels stay apart in every concatenation
    "dense": Case(Dense, _images, {"first": (4, "free"), "second": (3, "free"), "third": (5, "free")}),
    # unit k of the first half is multiplied with unit k of the second: 8 units, each in two places of `up`
    "glu": Case(Glu, _vectors, {"up": (8, "free")}),
    # channels 2…5 of the wide stream carry the narrow one; the 2 before and the 2 after meet only zeros: they are 4
    "padded shortcut": Case(PaddedShortcut, _images, {"stem": (4, "free"), "widen": (4, "free")}),
    # the embedding's 8 entries, the 6 inner units, and the 8 of `back`; words keep their order
    "embedding": Case(Words, _tokens, {"table": (8, "free"), "mix": (6, "free"), "back": (8, "free")}),
    # the table is read as the output layer, too: what `back` writes is in the order of the table's entries
    "tied embedding": Case(lambda: Words(tied=True), _tokens, {"back": (8, "free"), "mix": (6, "free")}),
    # one square weight reads stem and writes first, reads first and writes second: all one group
    "tied square": Case(TiedSquare, _vectors, {"stem": (8, "free")}),
    "raw parameters": Case(RawParameters, _vectors, {"w1": (9, "free")}),
    # the two heads move as wholes; in each, q and k share an order of their features, v and o another
    "attention": Case(
        Attention,
        lambda generator: torch.randn(3, 5, 6, generator=generator),
        {"stem": (10, "free"), "q": (2, "heads"), "q:2": (4, "within"), "v": (4, "within")},
        {"q:2": ("q",), "v": ("q",)},
    ),
    # 24 = 2 × 3 × 4: the first softmax is within a cell of 2 × 3, the second mixes the 3 of a row at equal places of 4,
    # so that the 4 have one order for each of the 2 rows
    "nested": Case(
        Nested,
        _vectors,
        {"up": (2, "blocks"), "up:2": (3, "within"), "up:3": (4, "within")},
        {"up:2": ("up",), "up:3": ("up",)},
    ),
    # 24 = 2 × 3 × 4 with a softmax in each cell only: the 4 have an order for each of the 6 cells
    "nested twice": Case(
        lambda: nn.Sequential(
            nn.Linear(6, 24), nn.Unflatten(1, (2, 3, 4)), nn.Softmax(-1), nn.Flatten(), nn.Linear(24, 4)
        ),
        _vectors,
        {"0": (2, "blocks"), "0:2": (3, "within"), "0:3": (4, "within")},
        {"0:2": ("0",), "0:3": ("0", "0:2")},
    ),
    # the 3 of the rank stand in `left` and `right` beside the 8 of the stream, and are summed over for every pair
    "low rank": Case(LowRank, _vectors, {"left": (8, "free"), "right": (3, "free")}),
}


@pytest.fixture(scope="session")
def cases() -> dict[str, Case]:
    return CASES


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]

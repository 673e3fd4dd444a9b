"""Small networks with a residual stream that is read through norms, and such as have none."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, rotary: bool, bias: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.rotary = heads, kv_heads, rotary
        size = width // heads
        self.q, self.o = nn.Linear(width, width, bias=bias), nn.Linear(width, width, bias=bias)
        self.k, self.v = (nn.Linear(width, kv_heads * size, bias=bias) for _ in range(2))

    def turned(self, x: Tensor) -> Tensor:
        if not self.rotary:
            return x
        half = x.shape[-1] // 2
        angles = torch.outer(torch.arange(x.shape[-2]), 0.3 ** torch.arange(half)).to(x)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    def forward(self, x: Tensor) -> Tensor:
        q = self.turned(self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2))
        k = self.turned(self.k(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2))
        v = self.v(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads < self.heads)
        return self.o(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, norm: type[nn.Module], attention: nn.Module, bias: bool) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = norm(width), attention, norm(width)
        self.up, self.down = nn.Linear(width, 20, bias=bias), nn.Linear(20, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """Words and places are added to a stream of 12 units; two blocks read and write it."""

    def __init__(
        self,
        norm: type[nn.Module] = nn.LayerNorm,
        rotary: bool = False,
        kv_heads: int = 3,
        bias: bool = True,
        tied: bool = False,
        heads: int = 3,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(19, 12)
        self.places = None if rotary else nn.Parameter(torch.zeros(8, 12))
        self.blocks = nn.ModuleList(
            Block(12, norm, Attention(12, heads, kv_heads, rotary, bias), bias) for _ in range(2)
        )
        self.norm, self.head = norm(12), nn.Linear(12, 19, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        if self.places is not None:
            x = x + self.places[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class PostNorm(nn.Module):
    """What the norm gives is the stream itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 20), nn.Linear(20, 12)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.norm(x + self.down(F.gelu(self.up(x))))
        return self.head(self.norm(x + self.down(F.gelu(self.up(x)))))


class Squashed(nn.Module):
    """A pre-norm stream to which a nonlinearity is applied unit by unit, by a module or in the forward pass."""

    def __init__(self, module: bool) -> None:
        super().__init__()
        self.stem, self.norm, self.read, self.head = (
            nn.Linear(5, 12),
            nn.LayerNorm(12),
            nn.Linear(12, 12),
            nn.Linear(12, 3),
        )
        self.act = nn.Tanh() if module else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.read(self.norm(x))
        x = torch.tanh(x) if self.act is None else self.act(x)
        return self.head(self.norm(x))


class Mlp(nn.Module):
    """A pre-norm perceptron with a square reader, and whatever stands between the stem and the norm."""

    def __init__(self, norm: nn.Module, before: nn.Module | None = None, raw: bool = False) -> None:
        super().__init__()
        self.stem, self.before = nn.Linear(5, 12), before or nn.Identity()
        self.norm, self.square, self.head = norm, nn.Linear(12, 12), nn.Linear(12, 3)
        self.gate = nn.Linear(12, 1) if raw else None
        self.last = type(norm)(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(self.stem(x))
        x = x + self.square(self.norm(x))
        y = self.head(self.last(x))
        return y if self.gate is None else y * self.gate(x)


class PlainNorm(nn.Module):
    """RMS norm, or layer norm, without parameters and without a module."""

    def __init__(self, centred: bool) -> None:
        super().__init__()
        self.stem, self.read, self.head, self.centred = nn.Linear(5, 12), nn.Linear(12, 12), nn.Linear(12, 3), centred

    def normed(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.read(self.normed(x))
        return self.head(self.normed(x))


class Scale(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class OnePlus(nn.Module):
    """RMS norm whose gain is one more than its parameter."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.extra)


def drawn(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build with normal weights, gains near one and biases that are not zero; in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
    generator = torch.Generator().manual_seed(seed + 1)
    ones = {name for name, p in model.named_parameters() if p.ndim == 1 and bool((p == 1).all())}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if name in ones else noise * 0.4)
    return model.eval()


@pytest.fixture(scope="session")
def nets() -> SimpleNamespace:
    return SimpleNamespace(
        Decoder=Decoder,
        PostNorm=PostNorm,
        Squashed=Squashed,
        Mlp=Mlp,
        PlainNorm=PlainNorm,
        Scale=Scale,
        OnePlus=OnePlus,
        drawn=drawn,
        ids=torch.randint(0, 19, (3, 7), generator=torch.Generator().manual_seed(0)),
        x=torch.randn(6, 5, generator=torch.Generator().manual_seed(0)),
    )

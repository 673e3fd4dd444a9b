"""Attention, written out in the ways that are common."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .spec import Architecture, vectors


class Wrapped(nn.Module):
    """A stem, a step that is added to the stream, a head: 6 -> 12 -> 4 entries."""

    def __init__(self, step: nn.Module, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.step = step
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.tanh(x + self.step(x)))


def split(x: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads * units) -> (batch, heads, tokens, units)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class Packed(nn.Module):
    """Queries, keys and values of 3 heads of 4 from one layer, taken apart as in timm."""

    def __init__(self, fused: bool = True, norm: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj, self.fused = nn.Linear(12, 36), nn.Linear(12, 12), fused
        self.q_norm = nn.LayerNorm(4) if norm else nn.Identity()
        self.k_norm = nn.LayerNorm(4) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q * 4**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class PackedByChunks(nn.Module):
    """The same, with `chunk` first and `einsum` after."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(12, 36, bias=False), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (3, 4)) for part in self.qkv(x).chunk(3, dim=-1))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * 0.5
        return self.proj(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2))


class PackedInHeads(nn.Module):
    """Queries, keys and values lie side by side in each head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 12)).transpose(1, 2).split(4, dim=-1)
        return self.proj(join(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class OneKey(nn.Module):
    """Three query heads that share one head of keys and values."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.q, self.kv, self.o, self.fused = nn.Linear(12, 12), nn.Linear(12, 8), nn.Linear(12, 12), fused

    def forward(self, x: Tensor) -> Tensor:
        q, (k, v) = split(self.q(x), 3), self.kv(x).unsqueeze(1).chunk(2, -1)
        if self.fused:
            return self.o(join(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))
        return self.o(join((q @ k.transpose(-1, -2)).softmax(-1) @ v))


class GroupedQueries(nn.Module):
    """Two heads of keys and values, each with three query heads of 4 units."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 24), nn.Linear(12, 8), nn.Linear(12, 8)
        self.o, self.way = nn.Linear(24, 12), way

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split(self.q(x), 6), split(self.k(x), 2), split(self.v(x), 2)
        if self.way == "fused":
            return self.o(join(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))
        if self.way == "repeat":
            k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
        else:
            B, K, N, D = k.shape
            k, v = (part[:, :, None].expand(B, K, 3, N, D).reshape(B, 6, N, D) for part in (k, v))
        return self.o(join(F.scaled_dot_product_attention(q, k, v)))


class Rotary(nn.Module):
    """Rotary positions of neighbouring units (2i, 2i + 1), read as `x[..., ::2]` and `x[..., 1::2]`; two heads of 6."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))

    @staticmethod
    def turned(x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[-2]), 0.1 ** torch.arange(3)).to(x)
        a, b = x[..., ::2], x[..., 1::2]
        pairs = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin())
        return torch.stack(pairs, -1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(layer(x), 2) for layer in (self.q, self.k, self.v))
        return self.o(join(F.scaled_dot_product_attention(self.turned(q), self.turned(k), v)))


class ComplexRotary(Rotary):
    """The same as a product of complex numbers."""

    @staticmethod
    def turned(x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[-2]), 0.1 ** torch.arange(3)).to(x)
        turns = torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)


class Linearised(nn.Module):
    """Attention without softmax: keys and values are summed over all tokens first."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(layer(x), 3) for layer in (self.q, self.k, self.v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.einsum("bhnd,bhne->bhde", k, v)
        scale = 1 / (torch.einsum("bhnd,bhd->bhn", q, k.sum(dim=2)) + 1e-6)
        return self.o(join(torch.einsum("bhnd,bhde,bhn->bhne", q, state, scale)))


class RelativeShift(nn.Module):
    """Transformer-XL: scores of relative positions, brought to their places by padding and reading in rows of n + 1."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.r, self.o = nn.Linear(12, 36, bias=False), nn.Linear(5, 12, bias=False), nn.Linear(12, 12)
        self.r_w_bias, self.r_r_bias = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(3, 4))
        self.register_buffer("positions", torch.zeros(7, 5))

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        q, k, v = (part.view(B, N, 3, 4) for part in self.qkv(x).chunk(3, -1))
        r = self.r(self.positions).view(N, 3, 4)
        content = torch.einsum("bind,bjnd->bnij", q + self.r_w_bias, k)
        place = torch.einsum("bind,jnd->bnij", q + self.r_r_bias, r)
        padded = torch.cat([place.new_zeros(B, 3, N, 1), place], dim=-1)
        place = padded.view(B, 3, N + 1, N)[:, :, 1:].reshape(B, 3, N, N)
        weights = ((content + place) * 0.5).softmax(-1)
        return self.o(torch.einsum("bnij,bjnd->bind", weights, v).reshape(B, N, 12))


class Crossed(nn.Module):
    """Each of two inputs has a stream of its own; one attends to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 12), nn.Linear(5, 10)
        self.q, self.k, self.v, self.o = nn.Linear(12, 12), nn.Linear(10, 12), nn.Linear(10, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.left(x), self.right(y)
        q, k, v = split(self.q(x), 3), split(self.k(y), 3), split(self.v(y), 3)
        return self.head(x + self.o(join(F.scaled_dot_product_attention(q, k, v))))


class Latents(nn.Module):
    """Five learned vectors attend to the input and are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(5, 12))
        self.k, self.v, self.o, self.head = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = self.latents.expand(len(x), -1, -1).unflatten(-1, (3, 4)).transpose(1, 2)
        seen = F.scaled_dot_product_attention(q, split(self.k(x), 3), split(self.v(x), 3))
        return self.head(torch.tanh(self.o(join(seen))).mean(1))


class LearnedScales(nn.Module):
    """Scores divided by a learned temperature per head, as in Swin v2, and heads mixed by none."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.scale = nn.Parameter(torch.zeros(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(layer(x), 3) for layer in (self.q, self.k, self.v))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2) * self.scale.clamp(max=4.6).exp()
        return self.o(join(scores.softmax(-1) @ v))


STREAM = (12, "free")
# heads move as wholes; in each, queries and keys share an order, values and the output projection another
HEADS: dict[str, tuple[int | str, ...]] = {
    "stream": STREAM,
    "heads": (3, "heads"),
    "qk": (4, "within", "heads"),
    "vo": (4, "within", "heads"),
}
_SEPARATE = {
    "stem.weight": "stream, 6",
    "step.q.weight": "heads*qk, stream",
    "step.k.weight": "heads*qk, stream",
    "step.v.weight": "heads*vo, stream",
    "step.o.weight": "stream, heads*vo",
    "head.weight": "4, stream",
}
_PACKED = {
    "step.qkv.weight": "heads*qk + heads*qk + heads*vo, stream",
    "step.proj.weight": "stream, heads*vo",
    "stem.bias": "stream",
}
TOKENS = vectors(3, 7, 6)
# Two heads of keys and values move as wholes, each with its three query heads, which move inside it. The keys of a
# group are read by all its queries: one order of the units for a group, and so for the values.
_GROUPED: dict[str, tuple[int | str, ...]] = {
    "stream": STREAM,
    "kv": (2, "heads"),
    "query": (3, "heads", "kv"),
    "qk": (4, "within", "kv"),
    "vo": (4, "within", "kv"),
}
_GROUPED_LAYOUT = {
    "step.q.weight": "kv*query*qk, stream",
    "step.k.weight": "kv*qk, stream",
    "step.v.bias": "kv*vo",
    "step.o.weight": "stream, kv*query*vo",
}
# All query heads meet the same keys and values: their units have one order for all heads.
_ONE_KEY: dict[str, tuple[int | str, ...]] = {
    "stream": STREAM,
    "query": (3, "heads"),
    "qk": (4, "free"),
    "vo": (4, "free"),
}
_ONE_KEY_LAYOUT = {
    "step.q.weight": "query*qk, stream",
    "step.kv.weight": "qk + vo, stream",
    "step.o.weight": "stream, query*vo",
}
# Every pair of neighbours is turned by an angle of its own: queries and keys stay in order, heads and values do not.
_ROTARY: dict[str, tuple[int | str, ...]] = {
    "stream": STREAM,
    "heads": (2, "heads"),
    "vo": (6, "within", "heads"),
}
_ROTARY_LAYOUT = {
    "step.q.weight": "heads*6, stream",
    "step.k.bias": "heads*6",
    "step.v.weight": "heads*vo, stream",
    "step.o.weight": "stream, heads*vo",
}
ATTENTION = {
    "packed, taken apart by unbind": Architecture(lambda: Wrapped(Packed()), TOKENS, HEADS, _PACKED),
    "packed, spelled out": Architecture(lambda: Wrapped(Packed(fused=False)), TOKENS, HEADS, _PACKED),
    "packed, chunks and einsum": Architecture(lambda: Wrapped(PackedByChunks()), TOKENS, HEADS, _PACKED),
    "packed in each head": Architecture(
        lambda: Wrapped(PackedInHeads()),
        TOKENS,
        HEADS,
        {"step.qkv.weight": "heads*(qk + qk + vo), stream", "step.proj.weight": "stream, heads*vo"},
    ),
    # One norm weight serves all heads, so that queries and keys have one order for all of them.
    "packed, with normed queries": Architecture(
        lambda: Wrapped(Packed(norm=True)),
        TOKENS,
        HEADS | {"qk": (4, "free")},
        _PACKED | {"step.q_norm.weight": "qk", "step.k_norm.bias": "qk"},
    ),
    "one key for all queries": Architecture(lambda: Wrapped(OneKey(False)), TOKENS, _ONE_KEY, _ONE_KEY_LAYOUT),
    "one key for all queries, fused": Architecture(lambda: Wrapped(OneKey(True)), TOKENS, _ONE_KEY, _ONE_KEY_LAYOUT),
    **{
        f"grouped queries, {way}": Architecture(
            lambda way=way: Wrapped(GroupedQueries(way)), TOKENS, _GROUPED, _GROUPED_LAYOUT
        )
        for way in ("fused", "repeat", "expand")
    },
    "rotary, interleaved": Architecture(lambda: Wrapped(Rotary()), TOKENS, _ROTARY, _ROTARY_LAYOUT),
    "rotary, complex": Architecture(lambda: Wrapped(ComplexRotary()), TOKENS, _ROTARY, _ROTARY_LAYOUT),
    # Nothing here is softmaxed, but heads are what stands beside the sum over tokens all the same.
    "linear attention": Architecture(
        lambda: Wrapped(Linearised()), TOKENS, HEADS | {"heads": (3, "heads|blocks")}, _SEPARATE
    ),
    # Relative positions go through a layer whose units meet the queries' like the keys. Their 5 entries are kept beside
    # the weights, in a buffer, and may be permuted with the columns that read them.
    "relative shift": Architecture(
        lambda: Wrapped(RelativeShift()),
        TOKENS,
        HEADS | {"entries": (5, "free")},
        {
            "step.positions": "7, entries",
            "step.qkv.weight": "heads*qk + heads*qk + heads*vo, stream",
            "step.r.weight": "heads*qk, entries",
            "step.r_w_bias": "heads, qk",
            "step.r_r_bias": "heads, qk",
            "step.o.weight": "stream, heads*vo",
        },
    ),
    "cosine attention": Architecture(
        lambda: Wrapped(LearnedScales()), TOKENS, HEADS, _SEPARATE | {"step.scale": "heads, 1, 1"}
    ),
    "cross attention": Architecture(
        Crossed,
        lambda g: (vectors(3, 7, 6)(g), vectors(3, 8, 5)(g)),
        HEADS | {"other": (10, "free")},
        {
            "left.weight": "stream, 6",
            "right.weight": "other, 5",
            "q.weight": "heads*qk, stream",
            "k.weight": "heads*qk, other",
            "v.weight": "heads*vo, other",
            "o.weight": "stream, heads*vo",
        },
    ),
    # The five vectors are treated alike and averaged: they may change places.
    "latents": Architecture(
        Latents,
        TOKENS,
        {**HEADS, "stream": (10, "free"), "latents": (5, "free")},
        {
            "latents": "latents, heads*qk",
            "k.weight": "heads*qk, 6",
            "v.weight": "heads*vo, 6",
            "o.weight": "stream, heads*vo",
        },
    ),
}

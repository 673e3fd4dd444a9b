"""Pre-norm transformers, plainly written: a decoder of tokens, like GPT-2 or Llama, and a vision transformer."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.errors import ArchitectureError
from .checks import check_choice, check_positive
from .seeding import seeded

StreamNorm = Literal["layer", "rms"]
Activation = Literal["gelu", "swiglu"]

# Standard deviation of the initial weights (Radford et al. 2019); the writers of the stream start smaller still.
_DEVIATION = 0.02


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2024): the units i and i + d/2 of a head turn by an angle of their own."""

    cos: Tensor
    sin: Tensor

    def __init__(self, size: int, context: int, base: float = 10_000.0) -> None:
        super().__init__()
        rates = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles = torch.outer(torch.arange(context, dtype=torch.float64), torch.cat((rates, rates)))
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Turn (n, heads, tokens, size) by the position of each token."""
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        length = x.shape[-2]
        return (x * self.cos[:length] + turned * self.sin[:length]).to(x.dtype)


class Attention(nn.Module):
    """Attention of several heads with four separate projections; queries may share heads of keys and values."""

    def __init__(
        self, width: int, heads: int, kv_heads: int, bias: bool, dropout: float, rotary: int | None, causal: bool
    ) -> None:
        super().__init__()
        self.size = width // heads
        self.repeats = heads // kv_heads
        self.dropout = dropout
        self.causal = causal
        self.q = nn.Linear(width, width, bias=bias)
        self.k = nn.Linear(width, kv_heads * self.size, bias=bias)
        self.v = nn.Linear(width, kv_heads * self.size, bias=bias)
        self.o = nn.Linear(width, width, bias=bias)
        self.rotary = nn.Identity() if rotary is None else Rotary(self.size, rotary)

    def forward(self, x: Tensor) -> Tensor:
        """Map the stream (n, tokens, width) to what is added to it, of the same shape."""
        q, k, v = (self._split(projected) for projected in (self.q(x), self.k(x), self.v(x)))
        q, k = self.rotary(q), self.rotary(k)
        if self.repeats > 1:
            k, v = (kept.repeat_interleave(self.repeats, dim=1) for kept in (k, v))
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal)
        return self.o(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.size)).transpose(1, 2)


class Perceptron(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.activation = nn.GELU()
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map the stream (n, tokens, width) to what is added to it, of the same shape."""
        return self.down(self.activation(self.up(x)))


class GatedPerceptron(nn.Module):
    """Two linear layers with SwiGLU between them (Shazeer 2020), which takes a third."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=bias)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.activation = nn.SiLU()
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map the stream (n, tokens, width) to what is added to it, of the same shape."""
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and a perceptron, each reading the stream through a norm and adding to it."""

    def __init__(self, attention: Attention, mlp: nn.Module, width: int, norm: StreamNorm, bias: bool, dropout: float):
        super().__init__()
        self.norm1 = _norm(norm, width, bias)
        self.attention = attention
        self.norm2 = _norm(norm, width, bias)
        self.mlp = mlp
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map the stream (n, tokens, width) to the stream after the block."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """Decoder of tokens; made by `transformer`."""

    def __init__(
        self, vocabulary: int, context: int, blocks: list[Block], norm: nn.Module, learned: bool, tied: bool
    ) -> None:
        super().__init__()
        width = blocks[0].attention.q.in_features
        self.context = context
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width) if learned else None
        self.dropout = nn.Dropout(blocks[0].dropout.p)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = nn.Linear(width, vocabulary, bias=False)
        _initialise(self)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (n, length) to scores of the next token after each, (n, length, vocabulary)."""
        length = tokens.shape[1]
        if length > self.context:
            raise ArchitectureError(
                f"{length} tokens in a row, of shape {tuple(tokens.shape)}, for a context of {self.context}; "
                "cut them, or make the network with a longer context"
            )
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[:length]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class VisionTransformer(nn.Module):
    """Encoder of the patches of an image; made by `vit`."""

    def __init__(
        self, in_channels: int, image_size: int, patch: int, classes: int, blocks: list[Block], norm: nn.Module
    ) -> None:
        super().__init__()
        width = blocks[0].attention.q.in_features
        self.patches = nn.Conv2d(in_channels, width, patch, patch)
        self.token: nn.Parameter | None = None
        self.positions = nn.Parameter(torch.zeros((image_size // patch) ** 2, width))
        self.dropout = nn.Dropout(blocks[0].dropout.p)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = nn.Linear(width, classes)
        _initialise(self)
        nn.init.normal_(self.positions, std=_DEVIATION)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, in_channels, image_size, image_size) to class scores (n, classes)."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        if self.token is not None:
            x = torch.cat((self.token.expand(len(x), 1, -1), x), dim=1)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean(1) if self.token is None else x[:, 0])


def transformer(
    vocabulary: int = 65,
    width: int = 256,
    layers: int = 6,
    heads: int = 4,
    kv_heads: int | None = None,
    context: int = 256,
    norm: StreamNorm = "layer",
    position: Literal["learned", "rotary"] = "learned",
    mlp: Activation = "gelu",
    tied: bool = False,
    bias: bool = True,
    dropout: float = 0.0,
    hidden: int | None = None,
    *,
    seed: int | None = None,
) -> Transformer:
    """Make a pre-norm decoder that gives the scores of the next token after each one.

    The defaults are a small GPT-2 (Radford et al. 2019) with a head of its own; a small Llama (Touvron et al. 2023) is
    `transformer(norm="rms", position="rotary", mlp="swiglu", bias=False, kv_heads=2)`.

    Args:
        vocabulary: Tokens that there are.
        width: Units of the residual stream.
        layers: Blocks of attention and perceptron.
        heads: Heads of attention; they share the width.
        kv_heads: Heads of keys and values, each read by heads / kv_heads heads of queries (Ainslie et al. 2023); None
            for as many as heads.
        context: Most tokens in a row.
        norm: `"layer"`, or `"rms"` (Zhang & Sennrich 2019).
        position: `"learned"`, a vector for each position, or `"rotary"`.
        mlp: `"gelu"`, or `"swiglu"` with its gate.
        tied: The head uses the weights of the embedding.
        bias: Biases in the blocks and norms; the head has none.
        dropout: Share of units left out in training, of the embedding, attention and what is added to the stream.
        hidden: Units between the layers of a perceptron; None for 4 x width, with SwiGLU two thirds of it, rounded
            up to a multiple of eight.
        seed: Seed of the initial weights; None draws them from torch's global generator.

    Raises:
        ArchitectureError: A size is not a positive integer or does not divide another, or there is no such kind.

    >>> transformer(width=16, layers=1, seed=0)(torch.zeros(2, 7, dtype=torch.int64)).shape
    torch.Size([2, 7, 65])
    """
    kv_heads = heads if kv_heads is None else kv_heads
    check_positive("transformer", vocabulary=vocabulary, context=context)
    check_choice("transformer", "position", position, ("learned", "rotary"))
    with seeded(seed):
        blocks, last = _stack(
            "transformer", width, layers, heads, kv_heads, norm, mlp, bias, dropout, hidden,
            rotary=context if position == "rotary" else None, causal=True,
        )  # fmt: skip
        return Transformer(vocabulary, context, blocks, last, position == "learned", tied)


def vit(
    in_channels: int = 3,
    classes: int = 10,
    image_size: int = 32,
    patch: int = 4,
    width: int = 192,
    layers: int = 6,
    heads: int = 4,
    pool: Literal["mean", "token"] = "mean",
    norm: StreamNorm = "layer",
    mlp: Activation = "gelu",
    bias: bool = True,
    dropout: float = 0.0,
    hidden: int | None = None,
    *,
    seed: int | None = None,
) -> VisionTransformer:
    """Make a vision transformer for small images (Dosovitskiy et al. 2021), with learned positions.

    Args:
        in_channels: Channels of the images.
        classes: Outputs.
        image_size: Height and width of the images.
        patch: Height and width of a patch, of which each becomes a token.
        width: Units of the residual stream.
        layers: Blocks of attention and perceptron.
        heads: Heads of attention; they share the width.
        pool: What the classifier reads: the `"mean"` over the patches, or a `"token"` of its own, as in the paper.
        norm: `"layer"` or `"rms"`.
        mlp: `"gelu"`, or `"swiglu"` with its gate.
        bias: Biases in the blocks and norms.
        dropout: Share of units left out in training.
        hidden: Units between the layers of a perceptron; None as in `transformer`.
        seed: Seed of the initial weights; None draws them from torch's global generator.

    Raises:
        ArchitectureError: A size is not a positive integer or does not divide another, or there is no such kind.

    >>> vit(width=16, layers=1, seed=0)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    check_positive("vit", in_channels=in_channels, classes=classes, image_size=image_size, patch=patch)
    check_choice("vit", "pool", pool, ("mean", "token"))
    if image_size % patch:
        raise ArchitectureError(f"vit: image_size is {image_size}, which patches of {patch} do not divide")
    with seeded(seed):
        blocks, last = _stack(
            "vit", width, layers, heads, heads, norm, mlp, bias, dropout, hidden, rotary=None, causal=False
        )
        network = VisionTransformer(in_channels, image_size, patch, classes, blocks, last)
        if pool == "token":
            network.token = nn.Parameter(torch.randn(width) * _DEVIATION)
        return network


def _stack(
    network: str,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    norm: StreamNorm,
    mlp: Activation,
    bias: bool,
    dropout: float,
    hidden: int | None,
    *,
    rotary: int | None,
    causal: bool,
) -> tuple[list[Block], nn.Module]:
    """Make the blocks and the norm after them, of sizes that fit each other."""
    check_positive(network, width=width, layers=layers, heads=heads, kv_heads=kv_heads)
    check_choice(network, "norm", norm, ("layer", "rms"))
    check_choice(network, "mlp", mlp, ("gelu", "swiglu"))
    if width % heads or heads % kv_heads:
        raise ArchitectureError(
            f"{network}: width {width}, {heads} heads, {kv_heads} heads of keys and values; "
            "each must divide the one before"
        )
    if rotary is not None and width // heads % 2:
        raise ArchitectureError(f"{network}: rotary positions turn pairs of units, but a head has {width // heads}")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ArchitectureError(f"{network}: dropout is {dropout!r}; pass a number in [0, 1)")
    if hidden is None:
        hidden = 4 * width if mlp == "gelu" else 8 * math.ceil(width / 3)
    check_positive(network, hidden=hidden)
    kind = Perceptron if mlp == "gelu" else GatedPerceptron
    blocks = [
        Block(
            Attention(width, heads, kv_heads, bias, dropout, rotary, causal),
            kind(width, hidden, bias),
            width,
            norm,
            bias,
            dropout,
        )
        for _ in range(layers)
    ]
    return blocks, _norm(norm, width, bias)


def _norm(norm: StreamNorm, width: int, bias: bool) -> nn.Module:
    return nn.LayerNorm(width, bias=bias) if norm == "layer" else nn.RMSNorm(width, eps=1e-5)


def _initialise(network: Transformer | VisionTransformer) -> None:
    """Draw small weights; those that write to the stream are divided by the root of how many do (GPT-2)."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=_DEVIATION)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for block in network.blocks:
        for name in ("attention.o", "mlp.down"):
            writer = block.get_submodule(name)
            nn.init.normal_(writer.get_parameter("weight"), std=_DEVIATION / math.sqrt(2 * len(network.blocks)))

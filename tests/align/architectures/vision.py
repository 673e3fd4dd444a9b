"""Vision transformers: tokens of patches, windows that are shifted, patches that are merged."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Packed
from .spec import Architecture, vectors


class Block(nn.Module):
    """A block as in timm: packed attention and a perceptron, each behind a norm and a learned scale."""

    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(12), Packed()
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(12), nn.Linear(12, 10), nn.Linear(10, 12)
        self.ls1 = nn.Parameter(torch.zeros(12)) if scaled else None
        self.ls2 = nn.Parameter(torch.zeros(12)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(self.norm1(x))
        x = x + (y if self.ls1 is None else y * self.ls1)
        y = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + (y if self.ls2 is None else y * self.ls2)


class ViT(nn.Module):
    """Two blocks over the patches of an image of 8 x 8, a token of the class and `registers` more."""

    def __init__(self, registers: int = 0, scaled: bool = False) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, 12, 4, stride=4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 12))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, 12)) if registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 12))
        self.blocks = nn.Sequential(Block(scaled), Block(scaled))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        if self.reg_token is not None:
            x = torch.cat([x, self.reg_token.expand(len(x), -1, -1)], dim=1)
        return self.head(self.norm(self.blocks(x))[:, 0])


class Window(nn.Module):
    """A Swin block of 3 heads of 4 in windows of 2 x 2, shifted by one or not, on (batch, 4, 4, 12)."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.fc1, self.fc2 = nn.Linear(12, 10), nn.Linear(10, 12)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 3))
        place = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        apart = place[:, :, None] - place[:, None, :] + 1
        self.register_buffer("relative_position_index", apart[0] * 3 + apart[1])

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, 3, C // 3).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * 0.5) @ k.transpose(-2, -1)
        index: Tensor = self.relative_position_index  # pyright: ignore[reportAssignmentType]
        bias = self.relative_position_bias_table[index.view(-1)].view(N, N, -1).permute(2, 0, 1).contiguous()
        scores = scores + bias.unsqueeze(0)
        if mask is not None:
            windows = len(mask)
            scores = scores.view(B // windows, windows, 3, N, N) + mask.unsqueeze(1).unsqueeze(0)
            scores = scores.view(-1, 3, N, N)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, N, C))

    def mask(self, x: Tensor) -> Tensor | None:
        if not self.shift:
            return None
        regions = x.new_zeros(1, 4, 4, 1)
        for number, (rows, columns) in enumerate(
            (r, c)
            for r in (slice(-2), slice(-2, -1), slice(-1, None))
            for c in (slice(-2), slice(-2, -1), slice(-1, None))
        ):
            regions[:, rows, columns, :] = number
        regions = self.cut(regions).squeeze(-1)
        apart = regions.unsqueeze(1) - regions.unsqueeze(2)
        return apart.masked_fill(apart != 0, -100.0).masked_fill(apart == 0, 0.0)

    @staticmethod
    def cut(x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        x = x.view(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 2, 4, 5).contiguous()
        return x.view(-1, 4, C)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        y = torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2)) if self.shift else self.norm1(x)
        y = self.attend(self.cut(y), self.mask(x))
        y = y.view(B, H // 2, W // 2, 2, 2, C).permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, C)
        x = x + (torch.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Swin(nn.Module):
    """A plain block, a shifted one, and the four neighbours of every other place merged into one."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, 12, 2, stride=2)
        self.plain, self.shifted = Window(0), Window(1)
        self.norm, self.reduction = nn.LayerNorm(48), nn.Linear(48, 14, bias=False)
        self.last, self.head = nn.LayerNorm(14), nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shifted(self.plain(self.patch(x).permute(0, 2, 3, 1)))
        corners = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        x = self.reduction(self.norm(torch.cat(corners, -1)))
        return self.head(self.last(x).mean((1, 2)))


class MergedByViews(nn.Module):
    """Patches merged by reshaping, as in timm: the four places are the slow part of the axis."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm, self.reduction = nn.Conv2d(2, 6, 2, stride=2), nn.LayerNorm(24), nn.Linear(24, 7)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        B, H, W, C = x.shape
        x = x.reshape(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.head(F.gelu(self.reduction(self.norm(x))).mean((1, 2)))


class Mixer(nn.Module):
    """A perceptron over the tokens, then one over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, 12, 4, stride=4)
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.t1, self.t2, self.c1, self.c2 = nn.Linear(4, 7), nn.Linear(7, 4), nn.Linear(12, 10), nn.Linear(10, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.t2(F.gelu(self.t1(self.norm1(x).transpose(1, 2)))).transpose(1, 2)
        return self.head((x + self.c2(F.gelu(self.c1(self.norm2(x))))).mean(1))


class ConvNeXt(nn.Module):
    """Two blocks of a depthwise convolution and a perceptron on the last axis, and a step down between them."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(width, width, 7, padding=3, groups=width)
            self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 10), nn.Linear(10, width)
            self.gamma = nn.Parameter(torch.zeros(width))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x).permute(0, 2, 3, 1))
            return x + (self.gamma * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(2, 8, 2, stride=2), self.Block(8)
        self.norm, self.step, self.second = nn.LayerNorm(8), nn.Conv2d(8, 6, 2, stride=2), self.Block(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        x = self.second(self.step(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))
        return self.head(x.mean((-2, -1)))


_IMAGES = vectors(3, 2, 8, 8)


def _heads(prefix: str) -> dict[str, tuple[int | str, ...]]:
    """Heads that move as wholes, with an order for queries and keys and one for values in each; a perceptron."""
    return {
        f"{prefix}heads": (3, "heads"),
        f"{prefix}qk": (4, "within", f"{prefix}heads"),
        f"{prefix}vo": (4, "within", f"{prefix}heads"),
        f"{prefix}mlp": (10, "free"),
    }


_VIT: dict[str, tuple[int | str, ...]] = {"stream": (12, "free"), **_heads("a"), **_heads("b")}
_VIT_LAYOUT = {
    "patch.weight": "stream, 2, 4, 4",
    "cls_token": "1, 1, stream",
    "pos_embed": "1, 5, stream",
    "blocks.0.norm1.weight": "stream",
    "blocks.0.attn.qkv.weight": "aheads*aqk + aheads*aqk + aheads*avo, stream",
    "blocks.0.attn.qkv.bias": "aheads*aqk + aheads*aqk + aheads*avo",
    "blocks.0.attn.proj.weight": "stream, aheads*avo",
    "blocks.0.fc1.weight": "amlp, stream",
    "blocks.1.attn.qkv.weight": "bheads*bqk + bheads*bqk + bheads*bvo, stream",
    "blocks.1.attn.proj.bias": "stream",
    "blocks.1.fc2.weight": "stream, bmlp",
    "head.weight": "4, stream",
}

VISION = {
    # One stream through both blocks; positions and the token of the class stand in it.
    "vit": Architecture(ViT, _IMAGES, _VIT, _VIT_LAYOUT),
    "vit, layer scale": Architecture(
        lambda: ViT(scaled=True), _IMAGES, _VIT, _VIT_LAYOUT | {"blocks.0.ls1": "stream", "blocks.1.ls2": "stream"}
    ),
    # Registers have no position and are not read at the end: they may change places.
    "vit, registers": Architecture(
        lambda: ViT(registers=3),
        _IMAGES,
        _VIT | {"registers": (3, "free")},
        _VIT_LAYOUT | {"reg_token": "1, registers, stream"},
    ),
    # The table of relative positions has a column for each head of its block. After merging, the stream stands four
    # times in a row, once for each corner of a patch.
    "swin": Architecture(
        Swin,
        _IMAGES,
        {"stream": (12, "free"), "wide": (14, "free"), **_heads("a"), **_heads("b")},
        {
            "patch.weight": "stream, 2, 2, 2",
            "plain.relative_position_bias_table": "9, aheads",
            "plain.relative_position_index": "4, 4",
            "plain.qkv.weight": "aheads*aqk + aheads*aqk + aheads*avo, stream",
            "plain.proj.weight": "stream, aheads*avo",
            "plain.fc1.weight": "amlp, stream",
            "shifted.relative_position_bias_table": "9, bheads",
            "shifted.qkv.weight": "bheads*bqk + bheads*bqk + bheads*bvo, stream",
            "shifted.proj.weight": "stream, bheads*bvo",
            "shifted.fc2.weight": "stream, bmlp",
            "norm.weight": "stream + stream + stream + stream",
            "reduction.weight": "wide, stream + stream + stream + stream",
            "head.weight": "4, wide",
        },
    ),
    "patches merged by views": Architecture(
        MergedByViews,
        _IMAGES,
        {"stream": (6, "free"), "wide": (7, "free")},
        {
            "patch.weight": "stream, 2, 2, 2",
            "norm.weight": "4*stream",
            "reduction.weight": "wide, 4*stream",
            "head.weight": "4, wide",
        },
    ),
    # The perceptron over tokens has 7 free units; tokens are places.
    "mixer": Architecture(
        Mixer,
        _IMAGES,
        {"stream": (12, "free"), "tokens": (7, "free"), "mlp": (10, "free")},
        {
            "patch.weight": "stream, 2, 4, 4",
            "t1.weight": "tokens, 4",
            "t2.weight": "4, tokens",
            "c1.weight": "mlp, stream",
            "c2.weight": "stream, mlp",
        },
    ),
    "convnext": Architecture(
        ConvNeXt,
        _IMAGES,
        {"narrow": (8, "free"), "first": (10, "free"), "wide": (6, "free"), "second": (10, "free")},
        {
            "stem.weight": "narrow, 2, 2, 2",
            "first.conv.weight": "narrow, 1, 7, 7",
            "first.norm.weight": "narrow",
            "first.up.weight": "first, narrow",
            "first.down.weight": "narrow, first",
            "first.gamma": "narrow",
            "step.weight": "wide, narrow, 2, 2",
            "second.gamma": "wide",
            "second.up.weight": "second, wide",
            "head.weight": "4, wide",
        },
    ),
}

"""Attention as torch has it: `nn.MultiheadAttention` and the layers made of it."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from .attention import HEADS, STREAM, TOKENS, Wrapped
from .spec import Architecture, vectors, words


class TorchAttention(nn.Module):
    """`nn.MultiheadAttention` on one stream, without a residual."""

    def __init__(self, batch_first: bool, need_weights: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=batch_first)
        self.head, self.need_weights = nn.Linear(12, 4), need_weights

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.attention(x, x, x, need_weights=self.need_weights)[0])


class TorchCrossed(nn.Module):
    """`nn.MultiheadAttention` on streams of different widths, with a learned key and value for all."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 12), nn.Linear(5, 10)
        self.attention = nn.MultiheadAttention(12, 3, kdim=10, vdim=10, add_bias_kv=True, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.right(y)
        return self.head(self.attention(self.left(x), y, y)[0])


class TorchTransformer(nn.Module):
    """`nn.Transformer` on words, of one table for both sides."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 12)
        with warnings.catch_warnings():  # that nested tensors have no use for it
            warnings.filterwarnings("ignore", "enable_nested_tensor")
            self.body = nn.Transformer(12, 3, 1, 1, 10, batch_first=batch_first)
        self.head = nn.Linear(12, 4)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.body(self.table(source), self.table(target)))


_TORCH = {
    "self_attn.in_proj_weight": "heads*qk + heads*qk + heads*vo, stream",
    "self_attn.in_proj_bias": "heads*qk + heads*qk + heads*vo",
    "self_attn.out_proj.weight": "stream, heads*vo",
    "linear1.weight": "mlp, stream",
    "linear2.weight": "stream, mlp",
    "norm1.weight": "stream",
}
# The attention's output is not added to its input: 12 units of their own.
_TORCH_ALONE = {
    "stem.weight": "stream, 6",
    "attention.in_proj_weight": "heads*qk + heads*qk + heads*vo, stream",
    "attention.in_proj_bias": "heads*qk + heads*qk + heads*vo",
    "attention.out_proj.weight": "out, heads*vo",
    "head.weight": "4, out",
}


def _transformer(batch_first: bool) -> Architecture:
    # The streams of both sides start in the same table, and so have the same order throughout. Three attentions: the
    # encoder's, the decoder's own, and the decoder's of the encoder.
    groups: dict[str, tuple[int | str, ...]] = {"stream": STREAM, "mlp": (10, "free"), "dmlp": (10, "free")}
    layout = {f"body.encoder.layers.0.{name}": axes for name, axes in _TORCH.items()}
    for prefix in ("", "d", "c"):
        groups[f"{prefix}heads"] = (3, "heads")
        groups[f"{prefix}qk"] = groups[f"{prefix}vo"] = (4, "within", f"{prefix}heads")
    for prefix, name in (("d", "self_attn"), ("c", "multihead_attn")):
        at = f"body.decoder.layers.0.{name}"
        qk, vo = f"{prefix}heads*{prefix}qk", f"{prefix}heads*{prefix}vo"
        layout[f"{at}.in_proj_weight"] = f"{qk} + {qk} + {vo}, stream"
        layout[f"{at}.out_proj.weight"] = f"stream, {vo}"
    layout["body.decoder.layers.0.linear2.weight"] = "stream, dmlp"
    return Architecture(
        lambda: TorchTransformer(batch_first),
        lambda g: (words(3, 7)(g), words(3, 5)(g)) if batch_first else (words(7, 3)(g), words(5, 3)(g)),
        groups,
        layout,
    )


TORCH_ATTENTION = {
    **{
        f"nn.MultiheadAttention, batch_first={first}, need_weights={weights}": Architecture(
            lambda first=first, weights=weights: TorchAttention(first, weights),
            TOKENS,
            HEADS | {"out": (12, "free")},
            _TORCH_ALONE,
        )
        for first in (True, False)
        for weights in (True, False)
    },
    "nn.MultiheadAttention, other keys": Architecture(
        TorchCrossed,
        lambda g: (vectors(3, 7, 6)(g), vectors(3, 8, 5)(g)),
        HEADS | {"other": (10, "free"), "out": (12, "free")},
        {
            "left.weight": "stream, 6",
            "right.weight": "other, 5",
            "attention.q_proj_weight": "heads*qk, stream",
            "attention.k_proj_weight": "heads*qk, other",
            "attention.v_proj_weight": "heads*vo, other",
            "attention.in_proj_bias": "heads*qk + heads*qk + heads*vo",
            "attention.bias_k": "1, 1, heads*qk",
            "attention.bias_v": "1, 1, heads*vo",
            "attention.out_proj.weight": "out, heads*vo",
        },
    ),
    **{
        f"nn.TransformerEncoderLayer, batch_first={first}, norm_first={norm}": Architecture(
            lambda first=first, norm=norm: Wrapped(
                nn.TransformerEncoderLayer(12, 3, 10, batch_first=first, norm_first=norm)
            ),
            TOKENS,
            HEADS | {"mlp": (10, "free")},
            {f"step.{name}": axes for name, axes in _TORCH.items()},
        )
        for first, norm in ((True, False), (False, True))
    },
    "nn.Transformer, batch_first=True": _transformer(True),
    "nn.Transformer, batch_first=False": _transformer(False),
}

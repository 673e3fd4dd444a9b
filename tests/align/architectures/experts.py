"""Mixtures of experts: experts move as whole units, and the units inside each have an order of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .language import language_model
from .spec import Architecture, vectors, words


class Gathered(nn.Module):
    """Packed weights (experts, 2 * units, stream), of which each token gathers those of its best two experts."""

    def __init__(self, chosen_first: bool) -> None:
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(6, 8), nn.Linear(8, 4, bias=False), nn.Linear(8, 4)
        self.gate_up, self.down = nn.Parameter(torch.zeros(4, 10, 8)), nn.Parameter(torch.zeros(4, 8, 5))
        self.chosen_first = chosen_first

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        scores = self.router(x)
        if self.chosen_first:  # the softmax is over the chosen
            weights, index = scores.topk(2, dim=-1)
            weights = weights.softmax(-1)
        else:
            weights, index = scores.softmax(-1).topk(2, dim=-1)
            weights = weights / weights.sum(-1, keepdim=True)
        tokens = x.repeat_interleave(2, 0).unsqueeze(-1)
        gate, up = torch.bmm(self.gate_up[index.flatten()], tokens).squeeze(-1).chunk(2, -1)
        made = torch.bmm(self.down[index.flatten()], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return self.head(x + (made.view(-1, 2, 8) * weights.unsqueeze(-1)).sum(1))


class Soft(nn.Module):
    """All experts see all tokens, weighted by the router."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.up, self.bias = nn.Parameter(torch.zeros(4, 8, 5)), nn.Parameter(torch.zeros(4, 5))
        self.down = nn.Parameter(torch.zeros(4, 5, 7))
        self.last = nn.Linear(7, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        inner = F.gelu(torch.einsum("td,edh->teh", x, self.up) + self.bias)
        made = torch.einsum("teh,eho->teo", inner, self.down)
        return self.head(x + self.last(torch.einsum("teo,te->to", made, self.router(x).softmax(-1))))


class Slots(nn.Module):
    """Soft MoE: 4 experts of 3 slots; each slot is a mean of tokens, each token a mean of slots."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.slots = nn.Parameter(torch.zeros(4, 3, 8))
        self.up, self.down = nn.Parameter(torch.zeros(4, 8, 5)), nn.Parameter(torch.zeros(4, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        scores = torch.einsum("btd,esd->btes", x, self.slots)
        dispatch, combine = scores.softmax(1), scores.flatten(2).softmax(-1).view_as(scores)
        seen = torch.einsum("btd,btes->besd", x, dispatch)
        made = torch.einsum("besh,ehd->besd", F.gelu(torch.einsum("besd,edh->besh", seen, self.up)), self.down)
        return self.head(torch.einsum("besd,btes->btd", made, combine))


class Masked(nn.Module):
    """Experts from a list, all computed, weighted by the scores of the best two and by zero else."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 5), nn.GELU(), nn.Linear(5, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        weights = self.router(x).softmax(-1)
        return self.head(x + sum(e(x) * weights[:, i : i + 1] for i, e in enumerate(self.experts)))


_STREAM: dict[str, tuple[int | str, ...]] = {"stream": (8, "free")}
_MIXTRAL = {
    "vocab_size": 17,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 10,
    "max_position_embeddings": 16,
    "num_local_experts": 4,
}

EXPERTS = {
    # Experts are rows of the router. Inside an expert 5 units, the gate and the value of each at equal places.
    **{
        f"gathered experts, softmax of the {'chosen' if first else 'all'}": Architecture(
            lambda first=first: Gathered(first),
            vectors(9, 6),
            _STREAM | {"experts": (4, "blocks"), "units": (5, "within", "experts")},
            {
                "stem.weight": "stream, 6",
                "router.weight": "experts, stream",
                "gate_up": "experts, units + units, stream",
                "down": "experts, stream, units",
                "head.weight": "4, stream",
            },
        )
        for first in (True, False)
    },
    # What the experts return is summed over them: one order for all.
    "soft experts": Architecture(
        Soft,
        vectors(9, 6),
        _STREAM | {"experts": (4, "blocks"), "units": (5, "within", "experts"), "out": (7, "free")},
        {
            "router.weight": "experts, stream",
            "up": "experts, stream, units",
            "bias": "experts, units",
            "down": "experts, units, out",
            "last.weight": "stream, out",
        },
    ),
    # Slots of an expert change places, too: its weights serve all of them. What the slots return is summed over both.
    "experts with slots": Architecture(
        Slots,
        vectors(3, 7, 6),
        _STREAM
        | {
            "experts": (4, "blocks"),
            "slots": (3, "within", "experts"),
            "units": (5, "within", "experts"),
            "out": (8, "free"),
        },
        {
            "stem.weight": "stream, 6",
            "slots": "experts, slots, stream",
            "up": "experts, stream, units",
            "down": "experts, units, out",
            "head.weight": "4, out",
        },
    ),
    # Experts that are modules of their own are no axis: they stay where they are, and so does the router.
    "experts in a list": Architecture(
        Masked,
        vectors(9, 6),
        _STREAM | {"a": (5, "free"), "b": (5, "free"), "c": (5, "free")},
        {
            "router.weight": "3, stream",
            "experts.0.0.weight": "a, stream",
            "experts.1.2.weight": "stream, b",
            "experts.2.0.bias": "c",
        },
    ),
    # As for Llama, with experts in place of the perceptron.
    "mixtral": Architecture(
        lambda: language_model("MixtralForCausalLM", "MixtralConfig", **_MIXTRAL),
        words(3, 7),
        {
            "stream": (16, "free"),
            "kv": (2, "heads"),
            "query": (2, "heads", "kv"),
            "vo": (4, "within", "kv"),
            "experts": (4, "blocks"),
            "units": (10, "within", "experts"),
        },
        {
            "model.layers.0.self_attn.q_proj.weight": "kv*query*4, stream",
            "model.layers.0.self_attn.o_proj.weight": "stream, kv*query*vo",
            "model.layers.0.mlp.gate.weight": "experts, stream",
            "model.layers.0.mlp.experts.gate_up_proj": "experts, units + units, stream",
            "model.layers.0.mlp.experts.down_proj": "experts, stream, units",
        },
        tolerance=1e-4,
    ),
}

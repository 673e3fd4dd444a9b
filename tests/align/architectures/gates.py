"""Gated layers, and other ways in which units meet by multiplication."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .spec import Architecture, vectors, words


class Gated(nn.Module):
    """One layer whose halves are multiplied: the first with a function of the second, or the other way round."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.up, self.down, self.way = nn.Linear(6, 16), nn.Linear(8, 4), way

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.way == "nn.GLU":
            return self.down(F.glu(x, dim=-1))
        if self.way == "slices":
            return self.down(F.silu(x[..., :8]) * x[..., 8:])
        if self.way == "view":
            value, gate = x.unflatten(-1, (2, 8)).unbind(-2)
            return self.down(value * F.gelu(gate))
        if self.way == "interleaved":
            return self.down(x[..., 1::2] * F.silu(x[..., ::2]))
        value, gate = x.chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))


class TwoLayers(nn.Module):
    """Gate and value from layers of their own."""

    def __init__(self, bilinear: bool) -> None:
        super().__init__()
        self.gate, self.value, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4)
        self.act = nn.Identity() if bilinear else nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.value(x))


class GatedConvolution(nn.Module):
    """`nn.GLU` over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.last, self.head = nn.Conv1d(6, 16, 3, padding=1), nn.Conv1d(8, 5, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.last(F.glu(self.up(x.mT), dim=1))).mean(-1))


class Bilinear(nn.Module):
    """A form on two vectors of units."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 5), nn.Linear(6, 7)
        self.form, self.head = nn.Bilinear(5, 7, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.form(torch.tanh(self.left(x)), torch.tanh(self.right(x)))))


class Outer(nn.Module):
    """All pairs of two vectors of units, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 5), nn.Linear(6, 7), nn.Linear(35, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((torch.tanh(self.left(x)).unsqueeze(-1) * torch.tanh(self.right(x)).unsqueeze(-2)).flatten(1))


class Maxout(nn.Module):
    """The largest of three pieces for each of five units."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(6, 15), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(x).unflatten(-1, (5, 3)).amax(-1))


class HyperNetwork(nn.Module):
    """A layer whose weight another layer makes from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.make, self.head = nn.Linear(6, 5), nn.Linear(6, 35), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.make(x).unflatten(-1, (7, 5))
        return self.head(torch.tanh(torch.bmm(weight, torch.tanh(self.up(x)).unsqueeze(-1)).squeeze(-1)))


class Modulated(nn.Module):
    """FiLM: a condition scales and shifts the units of another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.film, self.head = nn.Linear(6, 8), nn.Linear(6, 16), nn.Linear(8, 4)
        self.norm = nn.LayerNorm(8, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        shift, scale = self.film(F.silu(x)).chunk(2, -1)
        return self.head(F.silu(self.norm(self.up(x)) * (1 + scale) + shift))


class Tied(nn.Module):
    """A table of words that is the output layer as well."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.back = nn.Embedding(17, 12), nn.Linear(12, 7), nn.Linear(7, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.back(F.gelu(self.mix(self.table(tokens)))), self.table.weight)


class LowRank(nn.Module):
    """A frozen weight and a product of two factors beside it, as LoRA has it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.a, self.b = nn.Parameter(torch.zeros(3, 6)), nn.Parameter(torch.zeros(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.up(x) + (x @ self.a.T) @ self.b.T))


_VECTORS = vectors(9, 6)


def _free(**sizes: int) -> dict[str, tuple[int | str, ...]]:
    return {label: (size, "free") for label, size in sizes.items()}


GATES = {
    # Unit k of one half is multiplied with unit k of the other.
    **{
        f"gated, {way}": Architecture(
            lambda way=way: Gated(way),
            _VECTORS,
            _free(units=8),
            {"up.weight": "units + units, 6", "up.bias": "units + units", "down.weight": "4, units"},
        )
        for way in ("nn.GLU", "slices", "view", "chunk")
    },
    # Gate and value side by side: 8 pairs.
    "gated, interleaved": Architecture(
        lambda: Gated("interleaved"),
        _VECTORS,
        _free(units=8),
        {"up.weight": "units*2, 6", "down.weight": "4, units"},
    ),
    **{
        f"gated by another layer, bilinear={bilinear}": Architecture(
            lambda bilinear=bilinear: TwoLayers(bilinear),
            _VECTORS,
            _free(units=8),
            {"gate.weight": "units, 6", "value.weight": "units, 6", "down.weight": "4, units"},
        )
        for bilinear in (False, True)
    },
    "gated convolution": Architecture(
        GatedConvolution,
        vectors(3, 7, 6),
        _free(units=8, last=5),
        {"up.weight": "units + units, 6, 3", "last.weight": "last, units, 3", "head.weight": "4, last"},
    ),
    "bilinear form": Architecture(
        Bilinear,
        _VECTORS,
        _free(left=5, right=7, form=8),
        {"left.weight": "left, 6", "form.weight": "form, left, right", "form.bias": "form", "head.weight": "4, form"},
    ),
    "outer product": Architecture(
        Outer,
        _VECTORS,
        _free(left=5, right=7),
        {"left.weight": "left, 6", "right.bias": "right", "head.weight": "4, left*right"},
    ),
    # The pieces of a unit are alike: an order of them for each unit.
    "maxout": Architecture(
        Maxout,
        _VECTORS,
        {"units": (5, "blocks"), "pieces": (3, "within", "units")},
        {"up.weight": "units*pieces, 6", "head.weight": "4, units"},
    ),
    "weights made by a layer": Architecture(
        HyperNetwork,
        _VECTORS,
        _free(inner=5, out=7),
        {"up.weight": "inner, 6", "make.weight": "out*inner, 6", "head.weight": "4, out"},
    ),
    "modulated": Architecture(
        Modulated, _VECTORS, _free(units=8), {"up.weight": "units, 6", "film.weight": "units + units, 6"}
    ),
    "tied table": Architecture(
        Tied,
        words(3, 7),
        _free(stream=12, mix=7),
        {"table.weight": "17, stream", "mix.weight": "mix, stream", "back.weight": "stream, mix"},
    ),
    "low rank beside a weight": Architecture(
        LowRank, _VECTORS, _free(units=8, rank=3), {"a": "rank, 6", "b": "units, rank", "up.weight": "units, 6"}
    ),
}

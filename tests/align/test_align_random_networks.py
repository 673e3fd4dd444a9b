"""Networks grown at random: whatever the wiring, the symmetry holds and a planted permutation is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.align import match, symmetry


class Dice:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def number(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def pick(self, *options: str) -> str:
        return options[self.number(0, len(options) - 1)]


def norm(dice: Dice, channels: int) -> nn.Module:
    kind = dice.pick("batch", "group", "layer", "none")
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group" and channels % 2 == 0:
        return nn.GroupNorm(2, channels)
    return nn.GroupNorm(1, channels) if kind == "layer" else nn.Identity()


KINDS = ("onward", "residual", "concatenation", "grouped", "depthwise", "gated", "shuffled", "heads", "few keys")


class Attention(nn.Module):
    """Attention of pixels to pixels, around which the stream goes on; several heads of queries may share keys."""

    def __init__(self, channels: int, heads: int, shared: int, units: int) -> None:
        super().__init__()
        self.heads, self.shared = heads, shared
        self.query = nn.Linear(channels, heads * shared * units)
        self.key_value = nn.Linear(channels, 2 * heads * units)
        self.out = nn.Linear(heads * shared * units, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        n, length, _ = tokens.shape
        query = self.query(tokens).view(n, length, self.heads * self.shared, -1).transpose(1, 2)
        key, value = self.key_value(tokens).view(n, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        options: Any = {"enable_gqa": True} if self.shared > 1 else {}
        mixed = F.scaled_dot_product_attention(query, key, value, **options)
        return x + self.out(mixed.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, x.shape[2:])


class Step(nn.Module):
    """One step of the wiring: onward, around (residual, attention), or beside (concatenation)."""

    def __init__(self, dice: Dice, channels: int) -> None:
        super().__init__()
        self.kind = dice.pick(*KINDS)
        if self.kind == "grouped" and channels % 2:
            self.kind = "onward"
        self.channels, self.attention, self.back = channels, None, None
        if self.kind in ("heads", "few keys"):
            self.attention = Attention(channels, 2, 1 + (self.kind == "few keys"), dice.number(2, 3))
            return
        width = 2 * dice.number(2, 4)
        self.norm = norm(dice, channels)
        groups = {"grouped": 2, "depthwise": channels}.get(self.kind, 1)
        out = {"depthwise": channels, "gated": 2 * width}.get(self.kind, width)
        self.conv = nn.Conv2d(channels, out, 3, padding=1, groups=groups)
        if self.kind == "residual":
            self.back = nn.Conv2d(width, channels, 1)
        elif self.kind != "depthwise":
            self.channels = width + (channels if self.kind == "concatenation" else 0)

    def forward(self, x: Tensor) -> Tensor:
        if self.attention is not None:
            return self.attention(x)
        y = self.conv(torch.tanh(self.norm(x)))
        if self.kind == "shuffled":
            return torch.cat([y, y.sin()], 1).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)[:, : y.shape[1]]
        if self.kind == "gated":
            value, gate = y.chunk(2, 1)
            return value * gate.sigmoid()
        y = F.gelu(y)
        if self.back is not None:
            return x + self.back(y)
        return torch.cat([x, y], 1) if self.kind == "concatenation" else y


class Grown(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        dice = Dice(seed)
        channels = 2 * dice.number(2, 4)
        self.stem = nn.Conv2d(2, channels, 3)
        self.steps = nn.ModuleList()
        for _ in range(dice.number(1, 4)):
            step = Step(dice, channels)
            self.steps.append(step)
            channels = step.channels
        self.pool = nn.AdaptiveAvgPool2d(1 if dice.pick("pool", "flatten") == "pool" else 2)
        positions = 1 if self.pool.output_size == 1 else 4
        width = dice.number(5, 9)
        self.middle = nn.Linear(channels * positions, width)
        self.norm = nn.LayerNorm(width) if dice.pick("norm", "none") == "norm" else nn.Identity()
        self.head = nn.Linear(width, 3)
        self.drawn(dice.generator)

    def drawn(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / parameter[0].numel() ** 0.5 + (0.5 if parameter.ndim == 1 else 0.0))
            for name, buffer in self.named_buffers():
                if buffer.is_floating_point():
                    noise = torch.randn(buffer.shape, generator=generator)
                    buffer.copy_(noise.abs() + 0.5 if name.endswith("var") else 0.3 * noise)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for step in self.steps:
            x = step(x)
        return self.head(torch.tanh(self.norm(self.middle(self.pool(x).flatten(1)))))


def grown(seed: int) -> tuple[Grown, Tensor]:
    with torch.random.fork_rng():
        model = Grown(seed).eval()
    return model, torch.randn(3, 2, 7, 7, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(24))
def test_the_symmetry_of_a_grown_network_holds(seed: int) -> None:
    model, x = grown(seed)
    found = symmetry(model, x, verify=False)
    report = found.verify(model, x, seed=seed).check()
    assert report.error < 1e-10
    assert found.unruled == ()
    assert {"middle"} <= {group.name for group in found.groups}
    # every hidden channel is in a group: what is pinned are inputs, outputs and positions
    # but where a shuffled half is cut off, or blocks of a group norm run across the shuffle
    shuffled = any(step.kind == "shuffled" for step in model.steps if isinstance(step, Step))
    also = {"unused", "operator"} if shuffled else set()
    assert {item.kind for item in found.pinned} <= {"input", "output", "position"} | also
    planted = found.random(torch.Generator().manual_seed(seed))
    double = planted.apply(model).double()
    with torch.no_grad():
        assert torch.allclose(double(x.double()), model.double()(x.double()), rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(24))
def test_a_permutation_planted_in_a_grown_network_is_found(seed: int) -> None:
    model, x = grown(seed)
    found = symmetry(model, x, verify=False)
    planted = found.random(torch.Generator().manual_seed(100 + seed))
    assert not planted.is_identity
    matching = match(model, planted.apply(model), symmetry=found, seed=seed, verify=False)
    assert matching.permutation == planted.inverse()
    assert all(torch.allclose(s, torch.ones_like(s), atol=1e-6) for s in matching.scores.values())


def test_the_networks_differ_in_their_wiring() -> None:
    kinds = {step.kind for seed in range(24) for step in grown(seed)[0].steps if isinstance(step, Step)}
    assert kinds == set(KINDS)

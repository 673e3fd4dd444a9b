"""Recurrent networks and state spaces: one state goes round and ties whatever reads or writes it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .spec import Architecture, vectors


class Recurrent(nn.Module):
    """A module of torch on sequences, and a head on all steps."""

    def __init__(self, kind: str, out: int, stem: int = 0, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Linear(6, stem) if stem else nn.Identity()
        self.rnn = getattr(nn, kind)(stem or 6, **options)
        self.head = nn.Linear(out, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.stem(x))[0])


class LastState(nn.Module):
    """The same, with the head on the last state of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[1][0][-1])


class Learned(nn.Module):
    """With an initial state that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 4)
        self.first = nn.Parameter(torch.zeros(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x, self.first.expand(-1, len(x), -1).contiguous())[0])


class Cells(nn.Module):
    """Two cells, one upon the other, step by step."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        cell = getattr(nn, kind)
        self.low, self.high, self.head = cell(6, 8), cell(8, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        low, high, outputs = None, None, []
        for step in x.unbind(1):
            low = self.low(step, low)
            high = self.high(low[0] if isinstance(low, tuple) else low, high)
            outputs.append(high[0] if isinstance(high, tuple) else high)
        return self.head(torch.stack(outputs, 1))


class WrittenOut(nn.Module):
    """A recurrent unit by hand, its gates from one layer of input and state."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.head = nn.Linear(14, 16), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 8)
        for step in x.unbind(1):
            gate, value = self.gates(torch.cat([step, state], -1)).chunk(2, -1)
            state = state + gate.sigmoid() * (value.tanh() - state)
        return self.head(state)


class EncoderDecoder(nn.Module):
    """The state of one network starts another."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.LSTM(6, 8, batch_first=True), nn.LSTM(5, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.decoder(y, self.encoder(x)[1])[0])


class Mamba(nn.Module):
    """A selective state space of 8 channels with 4 states each, in a stream of 10."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 10), nn.RMSNorm(10)
        self.in_proj, self.conv1d = nn.Linear(10, 16, bias=False), nn.Conv1d(8, 8, 4, groups=8, padding=3)
        self.x_proj, self.dt_proj = nn.Linear(8, 3 + 4 + 4, bias=False), nn.Linear(3, 8)
        self.A_log, self.D = nn.Parameter(torch.zeros(8, 4)), nn.Parameter(torch.zeros(8))
        self.out_proj, self.head = nn.Linear(8, 10, bias=False), nn.Linear(10, 4)

    def mixed(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., :n]).transpose(1, 2)
        step, B, C = self.x_proj(x).split([3, 4, 4], dim=-1)
        step = F.softplus(self.dt_proj(step))
        decay = torch.exp(step.unsqueeze(-1) * -torch.exp(self.A_log))
        drive = step.unsqueeze(-1) * B.unsqueeze(2) * x.unsqueeze(-1)
        state, seen = x.new_zeros(len(x), 8, 4), []
        for t in range(n):
            state = decay[:, t] * state + drive[:, t]
            seen.append((state @ C[:, t].unsqueeze(-1)).squeeze(-1))
        return self.out_proj((torch.stack(seen, 1) + self.D * x) * F.silu(z))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.mixed(self.norm(x)))


class MambaHeads(nn.Module):
    """Mamba-2: 3 heads of 4 channels with a decay each, and 5 states that all heads share, all from one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.conv1d = nn.Linear(6, 12 + 12 + 5 + 5 + 3), nn.Conv1d(22, 22, 4, groups=22, padding=3)
        self.A_log, self.D, self.dt_bias = (nn.Parameter(torch.zeros(3)) for _ in range(3))
        self.norm, self.out_proj, self.head = nn.RMSNorm(12), nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, u: Tensor) -> Tensor:
        n = u.shape[1]
        z, xBC, dt = self.in_proj(u).split([12, 22, 3], dim=-1)
        xBC = F.silu(self.conv1d(xBC.transpose(1, 2))[..., :n]).transpose(1, 2)
        x, B, C = xBC.split([12, 5, 5], dim=-1)
        x, dt = x.unflatten(-1, (3, 4)), F.softplus(dt + self.dt_bias)
        decay = torch.exp(dt * -torch.exp(self.A_log))
        state, seen = x.new_zeros(len(x), 3, 4, 5), []
        for t in range(n):
            drive = torch.einsum("bh,bhp,bn->bhpn", dt[:, t], x[:, t], B[:, t])
            state = decay[:, t, :, None, None] * state + drive
            seen.append(torch.einsum("bhpn,bn->bhp", state, C[:, t]))
        y = (torch.stack(seen, 1) + self.D[:, None] * x).flatten(-2)
        return self.head(torch.tanh(self.out_proj(self.norm(y * F.silu(z)))))


class Diagonal(nn.Module):
    """S4D: a diagonal state space for each channel, its kernel summed over the states and convolved by Fourier."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.A, self.B, self.C = (nn.Parameter(torch.zeros(8, 5)) for _ in range(3))
        self.D = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).transpose(1, 2)
        n = x.shape[-1]
        places = torch.arange(n).to(x)
        kernel = ((self.B * self.C).unsqueeze(-1) * torch.exp(-self.A.exp().unsqueeze(-1) * places)).sum(1)
        y = torch.fft.irfft(torch.fft.rfft(x, 2 * n) * torch.fft.rfft(kernel, 2 * n), 2 * n)[..., :n]
        return self.head(torch.tanh(y + self.D.unsqueeze(-1) * x).mean(-1))


_STEPS = vectors(3, 5, 6)


def _free(**sizes: int) -> dict[str, tuple[int | str, ...]]:
    return {label: (size, "free") for label, size in sizes.items()}


def _rows(label: str, gates: int) -> str:
    return " + ".join([label] * gates)


def _layer(suffix: str, reads: str, state: str, gates: int) -> dict[str, str]:
    return {
        f"rnn.weight_ih_{suffix}": f"{_rows(state, gates)}, {reads}",
        f"rnn.weight_hh_{suffix}": f"{_rows(state, gates)}, {state}",
        f"rnn.bias_ih_{suffix}": _rows(state, gates),
        f"rnn.bias_hh_{suffix}": _rows(state, gates),
    }


RECURRENT: dict[str, Architecture] = {
    # All gates of a unit stand at its place: 4 of an LSTM, 3 of a GRU, 1 of a plain network; each layer has its own.
    **{
        f"{kind}, {layers} layers": Architecture(
            lambda kind=kind, layers=layers: Recurrent(kind, 8, hidden_size=8, num_layers=layers, batch_first=True),
            _STEPS,
            {f"h{layer}": (8, "free") for layer in range(layers)},
            {
                **_layer("l0", "6", "h0", gates),
                **(_layer("l1", "h0", "h1", gates) if layers == 2 else {}),
                "head.weight": f"4, h{layers - 1}",
            },
        )
        for kind, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1))
        for layers in (1, 2)
    },
    # Steps first, and a stem whose units the network reads.
    **{
        f"{kind}, steps first": Architecture(
            lambda kind=kind: Recurrent(kind, 8, stem=7, hidden_size=8),
            _STEPS,
            _free(stem=7, h=8),
            {"stem.weight": "stem, 6", **_layer("l0", "stem", "h", gates), "head.weight": "4, h"},
        )
        for kind, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1))
    },
    # Each direction has its own units; the next layer reads one after the other.
    **{
        f"{kind}, both directions": Architecture(
            lambda kind=kind: Recurrent(kind, 16, hidden_size=8, num_layers=2, bidirectional=True, batch_first=True),
            _STEPS,
            _free(f0=8, b0=8, f1=8, b1=8),
            {
                **_layer("l0", "6", "f0", gates),
                **_layer("l0_reverse", "6", "b0", gates),
                **_layer("l1", "f0 + b0", "f1", gates),
                **_layer("l1_reverse", "f0 + b0", "b1", gates),
                "head.weight": "4, f1 + b1",
            },
        )
        for kind, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1))
    },
    # The state that goes round is a projection: cells and what is projected have orders of their own.
    "LSTM, projected": Architecture(
        lambda: Recurrent("LSTM", 5, hidden_size=8, proj_size=5, num_layers=2, batch_first=True),
        _STEPS,
        _free(c0=8, p0=5, c1=8, p1=5),
        {
            "rnn.weight_ih_l0": "c0 + c0 + c0 + c0, 6",
            "rnn.weight_hh_l0": "c0 + c0 + c0 + c0, p0",
            "rnn.weight_hr_l0": "p0, c0",
            "rnn.weight_ih_l1": "c1 + c1 + c1 + c1, p0",
            "rnn.weight_hr_l1": "p1, c1",
            "head.weight": "4, p1",
        },
    ),
    "LSTM without biases": Architecture(
        lambda: Recurrent("LSTM", 8, hidden_size=8, bias=False, dropout=0.1, num_layers=2, batch_first=True),
        _STEPS,
        _free(h0=8, h1=8),
        {"rnn.weight_hh_l0": "h0 + h0 + h0 + h0, h0", "rnn.weight_ih_l1": "h1 + h1 + h1 + h1, h0"},
    ),
    "last state": Architecture(
        LastState,
        _STEPS,
        _free(h0=8, h1=8),
        {**_layer("l0", "6", "h0", 4), **_layer("l1", "h0", "h1", 4), "head.weight": "4, h1"},
    ),
    "learned first state": Architecture(
        Learned, _STEPS, _free(h=8), {"first": "1, 1, h", **_layer("l0", "6", "h", 3), "head.weight": "4, h"}
    ),
    **{
        f"{kind}s": Architecture(
            lambda kind=kind: Cells(kind),
            _STEPS,
            _free(low=8, high=7),
            {
                "low.weight_ih": f"{_rows('low', gates)}, 6",
                "low.weight_hh": f"{_rows('low', gates)}, low",
                "high.weight_ih": f"{_rows('high', gates)}, low",
                "high.bias_hh": _rows("high", gates),
                "head.weight": "4, high",
            },
        )
        for kind, gates in (("LSTMCell", 4), ("GRUCell", 3), ("RNNCell", 1))
    },
    "written out": Architecture(
        WrittenOut, _STEPS, _free(h=8), {"gates.weight": "h + h, 6 + h", "gates.bias": "h + h", "head.weight": "4, h"}
    ),
    # The decoder starts in the encoder's state: one order for both.
    "encoder and decoder": Architecture(
        EncoderDecoder,
        lambda g: (vectors(3, 5, 6)(g), vectors(3, 4, 5)(g)),
        _free(h=8),
        {"encoder.weight_ih_l0": "h + h + h + h, 6", "decoder.weight_hh_l0": "h + h + h + h, h", "head.weight": "4, h"},
    ),
    # Channels stand beside their gates. B and C, which write and read the states, are the same for all channels: the
    # states have one order for all of them. The rank of the step's two factors is free.
    "mamba": Architecture(
        Mamba,
        _STEPS,
        _free(stream=10, channels=8, states=4, rank=3),
        {
            "stem.weight": "stream, 6",
            "in_proj.weight": "channels + channels, stream",
            "conv1d.weight": "channels, 1, 4",
            "x_proj.weight": "rank + states + states, channels",
            "dt_proj.weight": "channels, rank",
            "A_log": "channels, states",
            "D": "channels",
            "out_proj.weight": "stream, channels",
        },
    ),
    # Heads move as wholes, channels inside each; the 5 states are common to all heads.
    "mamba, heads": Architecture(
        MambaHeads,
        _STEPS,
        {
            "heads": (3, "blocks|heads"),
            "channels": (4, "within", "heads"),
            "states": (5, "free"),
            "out": (10, "free"),
        },
        {
            "in_proj.weight": "heads*channels + heads*channels + states + states + heads, 6",
            "conv1d.weight": "heads*channels + states + states, 1, 4",
            "A_log": "heads",
            "dt_bias": "heads",
            "norm.weight": "heads*channels",
            "out_proj.weight": "out, heads*channels",
        },
    ),
    # Each channel sums over its own states: an order of them for each channel.
    "diagonal state space": Architecture(
        Diagonal,
        _STEPS,
        {"channels": (8, "blocks"), "states": (5, "within", "channels")},
        {"up.weight": "channels, 6", "A": "channels, states", "C": "channels, states", "D": "channels"},
    ),
}

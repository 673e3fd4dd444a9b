"""What the measurements refuse: claims that are wrong, and networks that would prove nothing."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus.align import symmetry
from isthmus.align.residual import fold_norms
from isthmus.align.residual.finding import check_exact, find_streams
from isthmus.align.residual.probing import Bench
from isthmus.align.residual.streams import fold
from isthmus.base.batches import Batch
from isthmus.base.errors import SymmetryError


def opened(model: nn.Module, x: Tensor) -> tuple[Any, Bench]:
    found = symmetry(model, x, verify=False)
    return found, Bench.open(model, found, Batch((x,)))


def test_a_reader_that_was_overlooked_is_found_out(nets: SimpleNamespace) -> None:
    found, bench = opened(nets.drawn(nets.Decoder), nets.ids)
    (stream,) = find_streams(found, bench).streams
    wrong = replace(stream, readers=(stream.readers[0][1:], *stream.readers[1:]))
    with pytest.raises(SymmetryError, match=r"folding the norms of stream .* changes the outputs by"):
        check_exact(bench, found, [wrong], fold(wrong, found, bench.probe.state))


def test_layer_norm_taken_for_rms_norm_is_found_out(nets: SimpleNamespace) -> None:
    found, bench = opened(nets.drawn(nets.Decoder), nets.ids)
    (stream,) = find_streams(found, bench).streams
    wrong = replace(stream, kind="rms")
    with pytest.raises(SymmetryError, match=r"rotating stream .*: .* \(LayerNorm\) treats its units one by one"):
        check_exact(bench, found, [wrong], fold(stream, found, bench.probe.state))


def test_inputs_that_give_nan_prove_nothing(nets: SimpleNamespace) -> None:
    with pytest.raises(SymmetryError, match="gives NaN on the example inputs"):
        opened(nets.drawn(lambda: nets.Mlp(nn.RMSNorm(12))), torch.full((2, 5), torch.nan))


def test_a_stream_that_does_not_reach_the_outputs_proves_nothing(nets: SimpleNamespace) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.head = nn.Linear(5, 12), nn.RMSNorm(12), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return x + 0.0 * self.head(self.norm(self.stem(x)))

    model = nets.drawn(Idle)
    with pytest.raises(SymmetryError, match="outputs do not depend on it, so nothing is proved"):
        fold_norms(model, nets.x, symmetry=symmetry(model, nets.x, verify=False))


def test_a_gain_that_is_used_twice_over_is_found_out(nets: SimpleNamespace) -> None:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.head = nn.Linear(5, 12), nn.RMSNorm(12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.stem(x))
            return self.head(x * x.mean(-1, keepdim=True))

    with pytest.raises(SymmetryError, match="stem: folding norm into what reads them changes the outputs by"):
        fold_norms(nets.drawn(Squared), nets.x)


def test_a_mean_over_units_is_no_reader(nets: SimpleNamespace) -> None:
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.head, self.gate = (
                nn.Linear(5, 12),
                nn.RMSNorm(12),
                nn.Linear(12, 3),
                nn.Linear(1, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.stem(x))
            return self.head(x) + self.gate(x.mean(-1, keepdim=True))

    with pytest.raises(SymmetryError, match=r"norm \(RMSNorm\) is not only read by weights"):
        fold_norms(nets.drawn(Averaged), nets.x)


def test_a_norm_that_is_told_more_than_the_stream_is_none(nets: SimpleNamespace) -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(12))

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return nn.functional.rms_norm(x, (12,)) * self.gain + shift

    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.head = nn.Linear(5, 12), Conditional(), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.stem(x), x[:, :1]))

    with pytest.raises(SymmetryError, match=r"norm \(Conditional\) does not normalise over all units"):
        fold_norms(nets.drawn(Told), nets.x)


def test_a_forward_pass_without_modules_is_named_as_such(nets: SimpleNamespace) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Parameter(torch.zeros(12, 5)), nn.Parameter(torch.zeros(3, 12))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.stem.T) @ self.head.T

    with pytest.raises(SymmetryError, match="the model's forward pass treats its units one by one"):
        fold_norms(nets.drawn(Bare), nets.x)


def test_norms_of_channels_in_front_of_pixels(nets: SimpleNamespace) -> None:
    class Channels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(12)), nn.Parameter(torch.zeros(12))

        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.layer_norm(x.permute(0, 2, 3, 1), (12,), self.weight, self.bias)
            return y.permute(0, 3, 1, 2)

    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm1, self.read = nn.Conv2d(2, 12, 2), Channels(), nn.Conv2d(12, 12, 1)
            self.norm2, self.head = Channels(), nn.Conv2d(12, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.read(self.norm1(x))
            return self.head(self.norm2(x)).mean((2, 3))

    model = nets.drawn(Images).double()
    x = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    folded = fold_norms(model, x)
    assert {(norm.module, norm.kind) for norm in folded.norms} == {("norm1", "layer"), ("norm2", "layer")}
    assert torch.allclose(folded.model(x), model(x))

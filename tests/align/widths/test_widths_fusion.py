"""Fusion by optimal transport, against linear programs, equations by hand, and permutations where widths are equal."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor, nn

from isthmus.align import symmetry
from isthmus.align.nets.matching import match
from isthmus.align.widths.fusion import Fusion, ot_fusion
from isthmus.base.errors import ArchitectureError, DataError, NotFiniteError, SymmetryError
from isthmus.zoo import resnet

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def drawn(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(parameter[0].numel(), 1) ** 0.5)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                noise = torch.randn(buffer.shape, generator=generator)
                buffer.copy_(noise.abs() + 0.5 if name.endswith("var") else 0.3 * noise)
    return model.eval()


def mlp(*widths: int, inputs: int = 8) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise((inputs, *widths)):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 3))


def arrays(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}


def similarity(a: dict[str, np.ndarray], b: dict[str, np.ndarray], outgoing: bool = True) -> np.ndarray:
    """Of the units of the first hidden layer."""
    rms = lambda name: np.sqrt((a[name] ** 2).mean() * (b[name] ** 2).mean())  # noqa: E731
    total = a["0.weight"] @ b["0.weight"].T / rms("0.weight") + np.outer(a["0.bias"], b["0.bias"]) / rms("0.bias")
    return total + a["2.weight"].T @ b["2.weight"] / rms("2.weight") if outgoing else total


def transport_value(values: np.ndarray) -> float:
    """The largest total similarity of any coupling with equal masses, by a dense linear program."""
    p, q = values.shape
    rows = np.kron(np.eye(p), np.ones(q))
    columns = np.kron(np.ones(p), np.eye(q))
    masses = np.concatenate([np.full(p, 1 / p), np.full(q, 1 / q)])
    solved = linprog(-values.ravel(), A_eq=np.vstack([rows, columns]), b_eq=masses)
    return -solved.fun


@given(st.integers(2, 5), st.integers(2, 6), st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_the_coupling_of_one_hidden_layer_is_the_best_there_is(n: int, m: int, seed: int) -> None:
    a, b = drawn(mlp(n), seed), drawn(mlp(m), seed + 1)
    fused = ot_fusion([a, b], example_inputs=X, verify=False)
    coupling = fused.couplings[0]["0"].numpy()
    assert np.allclose(coupling.sum(1), 1 / n)
    assert np.allclose(coupling.sum(0), 1 / m)
    assert (coupling >= 0).all()
    values = similarity(arrays(a), arrays(b))
    assert (coupling * values).sum() == pytest.approx(transport_value(values), rel=1e-6)


@pytest.mark.parametrize("outgoing", ["sum", "mean"])
def test_a_tiny_network_is_transported_as_by_the_equations(outgoing: str) -> None:
    a, b = drawn(mlp(3, 2), 0), drawn(mlp(5, 4), 1)
    fused = ot_fusion([a, b], example_inputs=X, outgoing=outgoing, weights=[1, 3])
    v, w = arrays(a), arrays(b)
    first, second = (fused.couplings[0][name].numpy() for name in ("0", "2"))
    p, q = 3 * first, 2 * second  # diag(1 / masses of a) T
    reads_p, reads_q = (p * 5 / 3, q * 4 / 2) if outgoing == "sum" else (p, q)
    expected = {
        "0.weight": p @ w["0.weight"],
        "0.bias": p @ w["0.bias"],
        "2.weight": q @ w["2.weight"] @ reads_p.T,
        "2.bias": q @ w["2.bias"],
        "4.weight": w["4.weight"] @ reads_q.T,
        "4.bias": w["4.bias"],
    }
    for name, tensor in fused.aligned[0].items():
        assert np.allclose(tensor.double().numpy(), expected[name], atol=1e-6)
        mean = (v[name] + 3 * expected[name]) / 4
        assert np.allclose(fused.model.state_dict()[name].double().numpy(), mean, atol=1e-6)
    # the first layer by the weights that read the inputs, the second by those that read the first, and the outputs
    value = similarity(v, w, outgoing=False)
    assert (first * value).sum() == pytest.approx(transport_value(value), rel=1e-6)
    moved = w["2.weight"] @ p.T
    rms = lambda name: np.sqrt((v[name] ** 2).mean() * (w[name] ** 2).mean())  # noqa: E731
    value = v["2.weight"] @ moved.T / rms("2.weight") + np.outer(v["2.bias"], w["2.bias"]) / rms("2.bias")
    value += v["4.weight"].T @ w["4.weight"] / rms("4.weight")
    assert (second * value).sum() == pytest.approx(transport_value(value), rel=1e-6)


def permutes(fused: Fusion, model: nn.Module, reference: nn.Module) -> bool:
    return all(torch.allclose(fused.aligned[0][n], t, atol=1e-6) for n, t in reference.state_dict().items())


@pytest.mark.parametrize("outgoing", ["sum", "mean"])
@pytest.mark.parametrize("seed", range(3))
def test_equal_widths_are_permuted_as_by_matching(seed: int, outgoing: str) -> None:
    a = drawn(mlp(9, 8, 7), seed)
    claim = symmetry(a, X)
    order = claim.random(torch.Generator().manual_seed(seed))
    fused = ot_fusion([a, order.apply(a)], example_inputs=X, outgoing=outgoing)
    assert permutes(fused, a, a)
    found = match(a, order.apply(a), X)
    for name, index in found.permutation.indices.items():
        assert torch.allclose(fused.couplings[0][name] * len(index), nn.functional.one_hot(index).double())
    assert torch.allclose(fused.model(X), a(X), atol=1e-5)


def split(model: nn.Sequential, copies: tuple[int, ...], seed: int) -> nn.Sequential:
    """Split every hidden unit in equal copies, each of them heard in part, in a random order."""
    widths = [layer.out_features for layer in model if isinstance(layer, nn.Linear)][:-1]
    wide = mlp(*(n * c for n, c in zip(widths, copies, strict=True)))
    generator = torch.Generator().manual_seed(seed)
    columns, factor = torch.arange(8), 1
    state = {}
    for at, layer in enumerate(m for m in model if isinstance(m, nn.Linear)):
        last = at == len(copies)
        rows = torch.arange(layer.out_features)
        if not last:
            rows = rows.repeat_interleave(copies[at])
            rows = rows[torch.randperm(len(rows), generator=generator)]
        state[f"{2 * at}.weight"] = layer.weight[rows][:, columns] / factor
        state[f"{2 * at}.bias"] = layer.bias[rows]
        columns, factor = rows, 1 if last else copies[at]
    wide.load_state_dict(state)
    return wide


@pytest.mark.parametrize("method", ["weights", "activations"])
def test_split_units_are_put_together_again(method: str) -> None:
    model = mlp(6, 5)
    drawn(model, 4)
    wide = split(model, (2, 3), 5)
    assert torch.allclose(wide(X), model(X), atol=1e-5)
    data = torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    fused = ot_fusion([model, wide], data, method=method)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(fused.aligned[0][name], tensor, atol=1e-5)
    # the other way round every copy gets its unit, and the half of what is heard of it
    back = ot_fusion([wide, model], data, method=method)
    assert torch.allclose(back.model(data), model(data), atol=1e-4)
    # the published equations keep one half and one third of what is read
    published = ot_fusion([model, wide], data, method=method, outgoing="mean")
    assert torch.allclose(published.aligned[0]["2.weight"], model.state_dict()["2.weight"] / 2, atol=1e-5)


def test_several_networks_with_batch_norms_and_streams_are_fused() -> None:
    nets = [drawn(resnet(8, width, shortcut="pad", seed=0), width) for width in (1, 2, 1)]
    fused = ot_fusion(nets, [IMAGES, IMAGES], weights=[2, 1, 1])
    assert len(fused.couplings) == len(fused.aligned) == 2
    assert fused.model(IMAGES).isfinite().all()
    for state in fused.aligned:
        assert {name: t.shape for name, t in state.items()} == {n: t.shape for n, t in nets[0].state_dict().items()}
        assert all((t > 0).all() for name, t in state.items() if name.endswith("running_var"))
    same = ot_fusion([nets[0], symmetry(nets[0], IMAGES).random().apply(nets[0])], example_inputs=IMAGES)
    assert permutes(same, nets[0], nets[0])


def grouped(channels: int, groups: int = 3) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, channels, 3), nn.GroupNorm(groups, channels), nn.ReLU()),
        *(nn.Conv2d(channels, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1)),
    )


def test_blocks_of_equal_numbers_are_permuted_and_others_refused() -> None:
    a = drawn(grouped(6), 0)
    order = symmetry(a, IMAGES).random(torch.Generator().manual_seed(1))
    fused = ot_fusion([a, order.apply(a)], example_inputs=IMAGES)
    assert permutes(fused, a, a)
    assert torch.allclose(fused.couplings[0]["0"].sum(), torch.tensor(1.0).double())
    with pytest.raises(SymmetryError, match="group 0:2, of 2 and 3, consists of blocks or of units inside them"):
        ot_fusion([a, drawn(grouped(9), 1)], example_inputs=IMAGES)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).unflatten(-1, (2, 3, 4)).softmax(-1).flatten(1))


def test_units_several_deep_are_refused() -> None:
    with pytest.raises(SymmetryError, match="lies within several others"):
        ot_fusion([drawn(Deep(), 0), drawn(Deep(), 1)], example_inputs=X)


class Embedded(nn.Module):
    """An embedding writes what a transposed convolution reads, whose outputs a linear layer reads."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.table = nn.Embedding(11, a)
        self.up = nn.ConvTranspose1d(a, b, 1)
        self.out = nn.Linear(b, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.up(self.table(tokens).relu().movedim(-1, 1)).relu().mean(-1))


def test_which_axis_reads_is_told_by_the_kind_of_layer() -> None:
    tokens = torch.arange(11).repeat(2, 1)
    model, wide = Embedded(5, 4), Embedded(10, 12)
    drawn(model, 0)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["table.weight"] = state["table.weight"].repeat(1, 2)
    state["up.weight"] = state["up.weight"].repeat(2, 3, 1) / 2
    state["up.bias"] = state["up.bias"].repeat(3)
    state["out.weight"] = state["out.weight"].repeat(1, 3) / 3
    wide.load_state_dict(state)
    assert torch.allclose(wide(tokens), model(tokens), atol=1e-5)
    fused = ot_fusion([model, wide], example_inputs=tokens)
    assert permutes(fused, model, model)


def test_bad_arguments_are_refused() -> None:
    a, b = drawn(mlp(4), 0), drawn(mlp(6), 1)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"method": "weight"}, "did you mean weights"),
        ({"outgoing": "add"}, "unknown outgoing 'add'"),
        ({"method": "activations"}, "needs data"),
        ({"weights": [1, 2, 3]}, "3 weights for 2 networks"),
        ({"symmetries": [symmetry(a, X)]}, "1 symmetries for 2 networks"),
        ({}, "needs inputs"),
    )
    for options, message in wrong:
        with pytest.raises(DataError, match=message):
            ot_fusion([a, b], **options)
    with pytest.raises(DataError, match="1 networks cannot be fused"):
        ot_fusion([a], X)
    with pytest.raises(DataError, match="read once"):
        ot_fusion([a, b, a], iter([X]), method="activations")
    with pytest.raises(ArchitectureError, match="only network b"):
        ot_fusion([a, drawn(mlp(4, 4), 1)], X)
    with torch.no_grad():
        b.get_parameter("0.weight")[0] = float("inf")
    with pytest.raises(NotFiniteError, match="network 1"):
        ot_fusion([a, b], X)


def test_symmetries_are_taken_and_nothing_is_changed() -> None:
    a, b = drawn(mlp(4), 0), drawn(mlp(6), 1)
    before = [arrays(m) for m in (a, b)]
    claims = [symmetry(m, X) for m in (a, b)]
    one, two = ot_fusion([a, b], symmetries=claims), ot_fusion([a, b], X)
    assert all(torch.equal(t, two.model.state_dict()[n]) for n, t in one.model.state_dict().items())
    for model, values in zip((a, b), before, strict=True):
        assert all(np.array_equal(values[name], array) for name, array in arrays(model).items())

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import isthmus
from isthmus.base.errors import ArchitectureError
from isthmus.zoo import transformer, vit

LLAMA: dict[str, Any] = {"norm": "rms", "position": "rotary", "mlp": "swiglu", "bias": False}
SMALL: dict[str, Any] = {"vocabulary": 11, "width": 12, "layers": 2, "heads": 3, "context": 9}


def tokens(length: int = 7, vocabulary: int = 11, seed: int = 0) -> Tensor:
    return torch.randint(vocabulary, (3, length), generator=torch.Generator().manual_seed(seed))


def larger(model: nn.Module) -> nn.Module:
    """Give weights in float64 under which every part matters, norms and biases included."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.double().eval()


# Computed once more in numpy, head by head and token by token


def dense_norm(x: np.ndarray, state: dict[str, np.ndarray], name: str, kind: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    out = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * state[f"{name}.weight"]
    return out + state.get(f"{name}.bias", 0)


def dense_linear(x: np.ndarray, state: dict[str, np.ndarray], name: str) -> np.ndarray:
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def turned(head: np.ndarray) -> np.ndarray:
    half = head.shape[1] // 2
    angles = np.arange(len(head))[:, None] * 10_000.0 ** (-np.arange(half) / half)
    complex_head = (head[:, :half] + 1j * head[:, half:]) * np.exp(1j * angles)
    return np.concatenate([complex_head.real, complex_head.imag], 1)


def dense_attention(x: np.ndarray, state: dict[str, np.ndarray], name: str, heads: int, rotary: bool, causal: bool):
    q, k, v = (dense_linear(x, state, f"{name}.{part}") for part in "qkv")
    size = q.shape[1] // heads
    shared = heads * size // k.shape[1]
    out = np.zeros_like(q)
    for head in range(heads):
        mine, theirs = slice(head * size, (head + 1) * size), slice(head // shared * size, (head // shared + 1) * size)
        query, key = (turned(q[:, mine]), turned(k[:, theirs])) if rotary else (q[:, mine], k[:, theirs])
        scores = query @ key.T / math.sqrt(size)
        if causal:
            scores[np.triu_indices(len(x), 1)] = -np.inf
        weights = np.exp(scores - scores.max(1, keepdims=True))
        out[:, mine] = weights / weights.sum(1, keepdims=True) @ v[:, theirs]
    return dense_linear(out, state, f"{name}.o")


def dense_blocks(x: np.ndarray, state: dict[str, np.ndarray], heads: int, norm: str, rotary: bool, causal: bool):
    for layer in range(2):
        at = f"blocks.{layer}"
        read = dense_norm(x, state, f"{at}.norm1", norm)
        x = x + dense_attention(read, state, f"{at}.attention", heads, rotary, causal)
        read = dense_norm(x, state, f"{at}.norm2", norm)
        hidden = dense_linear(read, state, f"{at}.mlp.up")
        if f"{at}.mlp.gate.weight" in state:
            gate = dense_linear(read, state, f"{at}.mlp.gate")
            hidden *= gate / (1 + np.exp(-gate))
        else:
            hidden *= np.vectorize(lambda value: (1 + math.erf(value / math.sqrt(2))) / 2)(hidden)
        x = x + dense_linear(hidden, state, f"{at}.mlp.down")
    return dense_norm(x, state, "norm", norm)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tied": True, "bias": False},
        {"norm": "rms", "mlp": "swiglu"},
        {"position": "rotary", "kv_heads": 1},
        {**LLAMA, "heads": 6, "kv_heads": 3},
    ],
    ids=["gpt", "tied", "swiglu", "rotary", "llama"],
)
def test_decoder_against_numpy(options: dict[str, Any]):
    chosen = {**SMALL, **options}
    model = larger(transformer(**chosen, seed=0))
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found = model(tokens()).detach().numpy()
    rotary = chosen.get("position") == "rotary"
    for row, expected in zip(tokens().numpy(), found, strict=True):
        x = state["embedding.weight"][row]
        if not rotary:
            x = x + state["positions.weight"][: len(row)]
        x = dense_blocks(x, state, chosen["heads"], chosen.get("norm", "layer"), rotary, causal=True)
        # cosines and sines are kept in float32
        np.testing.assert_allclose(x @ state["head.weight"].T, expected, rtol=0, atol=1e-5 if rotary else 1e-11)


@pytest.mark.parametrize("pool", ["mean", "token"])
def test_vision_transformer_against_numpy(pool: Any):
    model = larger(vit(2, 5, image_size=6, patch=3, width=12, layers=2, heads=3, pool=pool, seed=0))
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    images = torch.randn(2, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for image, expected in zip(images.numpy(), model(images).detach().numpy(), strict=True):
        patches = [image[:, y : y + 3, x : x + 3] for y in (0, 3) for x in (0, 3)]
        x = np.stack([np.einsum("wcij,cij->w", state["patches.weight"], patch) for patch in patches])
        x = x + state["patches.bias"] + state["positions"]
        if pool == "token":
            x = np.concatenate([state["token"][None], x])
        x = dense_blocks(x, state, 3, "layer", rotary=False, causal=False)
        read = x.mean(0) if pool == "mean" else x[0]
        np.testing.assert_allclose(dense_linear(read, state, "head"), expected, rtol=0, atol=1e-11)


@settings(deadline=None, max_examples=15)
@given(at=st.integers(1, 8), seed=st.integers(0, 100), rotary=st.booleans())
def test_no_token_sees_a_later_one(at: int, seed: int, rotary: bool):
    model = larger(transformer(**SMALL, **(LLAMA if rotary else {}), seed=0))
    first = tokens(9, seed=seed)
    second = first.clone()
    second[:, at] = (second[:, at] + 1) % 11
    before, after = model(first), model(second)
    torch.testing.assert_close(before[:, :at], after[:, :at], rtol=0, atol=1e-12)
    assert ((before - after)[:, at].abs().amax(1) > 1e-3).all()


def test_rotary_positions_are_relative():
    """The scores of two tokens depend on how far apart they are, not on where."""
    attention = transformer(**SMALL, **LLAMA, seed=0).blocks[0].get_submodule("attention").get_submodule("rotary")
    q, k = torch.randn(2, 1, 1, 1, 4, generator=torch.Generator().manual_seed(0)).expand(2, 1, 1, 9, 4)
    scores = (attention(q) @ attention(k).transpose(-1, -2))[0, 0]
    for offset in range(-8, 9):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores.std() > 0.1


# What the symmetry must contain: stream, heads, units inside heads, perceptrons


def kinds(model: nn.Module, example: Tensor) -> list[tuple[int, str, int]]:
    found = isthmus.symmetry(model.eval(), example)
    assert found.is_verified
    return sorted((group.size, group.kind, len(group.within)) for group in found.groups)


PLAIN_HEADS = [(3, "heads", 0), (4, "within", 1), (4, "within", 1), (48, "free", 0)]


@pytest.mark.parametrize("tied", [False, True])
def test_symmetry_of_a_decoder(tied: bool):
    assert kinds(transformer(**SMALL, tied=tied, seed=0), tokens()) == sorted([(12, "free", 0), *PLAIN_HEADS * 2])


def test_symmetry_with_grouped_queries_and_rotary_positions():
    model = transformer(**{**SMALL, "width": 16, "heads": 4}, kv_heads=2, **LLAMA, seed=0)
    # queries and keys inside a head stay in order, since each pair of them turns by an angle of its own
    block = [(2, "heads", 0), (2, "heads", 1), (4, "within", 1), (48, "free", 0)]
    assert kinds(model, tokens()) == sorted([(16, "free", 0), *block * 2])


@pytest.mark.parametrize("pool", ["mean", "token"])
def test_symmetry_of_a_vision_transformer(pool: Any):
    model = vit(image_size=8, patch=4, width=12, layers=2, heads=3, pool=pool, seed=0)
    example = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert kinds(model, example) == sorted([(12, "free", 0), *PLAIN_HEADS * 2])


@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt", "llama"])
def test_a_planted_permutation_leaves_the_function(options: dict[str, Any]):
    model = larger(transformer(**{**SMALL, "width": 18, **options}, seed=0))
    permutation = isthmus.symmetry(model, tokens()).random(torch.Generator().manual_seed(3))
    moved = permutation.apply(model)
    assert not torch.equal(moved.state_dict()["head.weight"], model.state_dict()["head.weight"])
    torch.testing.assert_close(moved(tokens()), model(tokens()), rtol=0, atol=1e-11)


# Making them


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: transformer(**SMALL, seed=seed),
        lambda seed: vit(width=12, heads=3, layers=1, pool="token", seed=seed),
    ],
)
def test_seeds(make: Callable[[int], nn.Module]):
    state = torch.get_rng_state()
    first, again, other = (make(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    random = [name for name, tensor in first.items() if float(tensor.std()) > 0]
    assert random
    assert not any(torch.equal(first[name], other[name]) for name in random)


def test_initial_scale():
    model = transformer(width=64, layers=8, seed=0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            written = name.endswith(("attention.o.weight", "mlp.down.weight"))
            assert float(parameter.detach().std()) == pytest.approx(0.02 / 4 if written else 0.02, rel=0.05), name
    loss = nn.functional.cross_entropy(model(tokens(64, 65)).flatten(0, 1), tokens(64, 65, seed=1).flatten())
    assert loss.item() == pytest.approx(math.log(65), rel=0.02)


def test_sizes_and_names():
    model = transformer(65, 16, 1, 4, 2, mlp="swiglu", position="rotary", norm="rms", bias=False, seed=0)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {
        "embedding.weight": (65, 16),
        "blocks.0.norm1.weight": (16,),
        "blocks.0.attention.q.weight": (16, 16),
        "blocks.0.attention.k.weight": (8, 16),
        "blocks.0.attention.v.weight": (8, 16),
        "blocks.0.attention.o.weight": (16, 16),
        "blocks.0.norm2.weight": (16,),
        "blocks.0.mlp.gate.weight": (48, 16),
        "blocks.0.mlp.up.weight": (48, 16),
        "blocks.0.mlp.down.weight": (16, 48),
        "norm.weight": (16,),
        "head.weight": (65, 16),
    }
    assert transformer(width=8, layers=1, hidden=5, seed=0).get_parameter("blocks.0.mlp.up.weight").shape == (5, 8)
    tied = transformer(**SMALL, tied=True, seed=0)
    assert tied.head.weight is tied.embedding.weight


def test_dropout_acts_in_training_only():
    model = transformer(**SMALL, dropout=0.5, seed=0)
    torch.manual_seed(0)
    assert not torch.equal(model(tokens()), model(tokens()))
    model.eval()
    assert torch.equal(model(tokens()), model(tokens()))
    plain = transformer(**SMALL, seed=0)
    assert torch.equal(plain(tokens()), plain(tokens()))
    assert torch.equal(plain(tokens()), model(tokens()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: transformer(vocabulary=0), "vocabulary is 0; pass a positive integer"),
        (lambda: transformer(layers=0), "layers is 0"),
        (lambda: transformer(context=2.5), "context is 2.5"),  # pyright: ignore[reportArgumentType]
        (lambda: transformer(width=10, heads=4), "width 10, 4 heads, 4 heads of keys and values; each must divide"),
        (lambda: transformer(heads=4, kv_heads=3), "4 heads, 3 heads of keys"),
        (lambda: transformer(width=12, heads=4, position="rotary"), "turn pairs of units, but a head has 3"),
        (lambda: transformer(norm="batch"), "norm is 'batch'; choose from 'layer', 'rms'"),  # pyright: ignore[reportArgumentType]
        (lambda: transformer(mlp="relu"), "mlp is 'relu'"),  # pyright: ignore[reportArgumentType]
        (lambda: transformer(position="none"), "position is 'none'"),  # pyright: ignore[reportArgumentType]
        (lambda: transformer(dropout=1.0), r"dropout is 1\.0; pass a number in \[0, 1\)"),
        (lambda: transformer(hidden=0), "hidden is 0"),
        (lambda: vit(patch=5), "image_size is 32, which patches of 5 do not divide"),
        (lambda: vit(pool="max"), "pool is 'max'; choose from 'mean', 'token'"),  # pyright: ignore[reportArgumentType]
        (lambda: vit(classes=-1), "vit: classes is -1"),
    ],
)
def test_refusals(make: Callable[[], nn.Module], message: str):
    with pytest.raises(ArchitectureError, match=message):
        make()


def test_too_many_tokens():
    with pytest.raises(ArchitectureError, match=r"10 tokens in a row, of shape \(3, 10\), for a context of 9"):
        transformer(**SMALL, seed=0)(tokens(10))

"""Repair of every kind of layer: statistics at its output, as hooks of the test's own see them, are those wanted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isthmus import zoo
from isthmus.base.errors import ArchitectureError, DataError
from isthmus.merge import interpolate, repair
from isthmus.merge.repairs import choose_method

Statistics = dict[str, tuple[np.ndarray, np.ndarray]]


def seeded(make: Callable[[], nn.Module], seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases start where nothing is to be repaired
                nn.init.normal_(parameter, 1.0 if "weight" in name else 0.0, 0.3)
    return model.eval()


def between(a: nn.Module, b: nn.Module) -> Any:
    model = copy.deepcopy(a)
    model.load_state_dict(interpolate(a.state_dict(), b.state_dict(), 0.5))
    return model


def seen(model: nn.Module, x: Any, axes: dict[str, int], mask: Tensor | None = None) -> Statistics:
    """Mean and deviation of the outputs of modules, their units on the given axis."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in axes}

    def hook(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            values = output[0] if isinstance(output, tuple) else output
            values = values.detach().double().movedim(axes[name], -1)
            rows = values.flatten(0, -2) if mask is None or mask.shape != values.shape[:-1] else values[mask]
            found[name].append(rows.numpy())

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in axes]
    with torch.no_grad():
        model(**x) if isinstance(x, dict) else model(x)
    for handle in handles:
        handle.remove()
    joined = {name: np.concatenate(rows) for name, rows in found.items() if rows}
    return {name: (rows.mean(0), rows.std(0)) for name, rows in joined.items()}


def check(
    make: Callable[[], nn.Module],
    x: Tensor | dict[str, Tensor],
    axes: dict[str, int],
    scaled_only: Sequence[str] = (),
    parts: int | None = None,
    **options: Any,
) -> tuple[Any, Any, Any]:
    """Repair the mean of two networks, and compare each layer with its parents'."""
    mask = x["attention_mask"].bool() if isinstance(x, dict) and "attention_mask" in x else None
    a, b = seeded(make, 0), seeded(make, 1)
    naive = between(a, b)
    data = x if parts is None or isinstance(x, dict) else x.split(parts)
    repaired = repair(naive, data, endpoints=(a, b), **options)
    assert type(repaired) is type(naive)
    assert repaired.state_dict().keys() == naive.state_dict().keys()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in repaired.modules())
    of_a, of_b, before, after = (seen(model, x, axes, mask) for model in (a, b, naive, repaired))
    changed = 0.0
    for name in axes:
        std = (of_a[name][1] + of_b[name][1]) / 2
        np.testing.assert_allclose(after[name][1], std, rtol=1e-5, atol=1e-7, err_msg=name)
        changed = max(changed, float(np.abs(before[name][1] / std - 1).max()))
        if name not in scaled_only:
            mean = (of_a[name][0] + of_b[name][0]) / 2
            np.testing.assert_allclose(after[name][0], mean, atol=1e-5 * max(1, std.max()), err_msg=name)
    assert changed > 0.05  # there was something to repair
    return a, b, repaired


def images(*shape: int) -> Tensor:
    return 1 + 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


CONVOLUTIONAL = {
    "group": lambda: nn.GroupNorm(2, 6),
    "instance": lambda: nn.InstanceNorm2d(6, affine=True),
    "batch, of the batch": lambda: nn.BatchNorm2d(6, track_running_stats=False),
    "layer, of all": lambda: nn.LayerNorm([6, 5, 5]),
}


@pytest.mark.parametrize("norm", CONVOLUTIONAL)
@pytest.mark.parametrize("bias", [True, False])
def test_norms_between_convolutions(norm: str, bias: bool) -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(2, 6, 3, bias=bias), CONVOLUTIONAL[norm](), nn.ReLU()),
            *(nn.Conv2d(6, 4, 3, groups=2, bias=bias), nn.Flatten(), nn.Linear(36, 3)),
        )

    axes = {"0": 1, "3": 1} | ({} if "layer" in norm else {"1": 1})
    check(make, images(30, 2, 7, 7), axes, () if bias else ("0", "3"))


def test_layer_norm_over_several_axes_is_restored_element_by_element() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.LayerNorm([3, 5, 5]), nn.ReLU(), nn.Flatten(), nn.Linear(75, 3))

    a, b, repaired = check(make, x := images(30, 2, 7, 7), {"0": 1})
    of_a, of_b, after = (model[:2](x).detach().double().numpy() for model in (a, b, repaired))
    np.testing.assert_allclose(after.std(0), (of_a.std(0) + of_b.std(0)) / 2, rtol=1e-5)
    np.testing.assert_allclose(after.mean(0), (of_a.mean(0) + of_b.mean(0)) / 2, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("memory", [2**30, 0])
def test_transposed_convolutions(groups: int, memory: int) -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            *(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups), nn.ReLU(), nn.Flatten(2)),
            *(nn.ConvTranspose1d(6, 4, 2, groups=groups), nn.ReLU(), nn.Flatten(), nn.Linear(200, 2)),
        )

    check(make, images(20, 4, 3, 3), {"0": 1, "3": 1}, parts=8, memory=memory)


def test_an_input_without_a_batch_axis() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3))

    check(make, images(4, 9, 9), {"0": 0})


TOKENS = torch.randint(65, (6, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_transformers_of_the_zoo(kind: str) -> None:
    options: dict[str, Any] = {} if kind == "gpt" else {
        "kv_heads": 2, "norm": "rms", "position": "rotary", "mlp": "swiglu", "bias": False
    }  # fmt: skip
    model = zoo.transformer(width=16, layers=2, heads=4, context=16, **options)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head"]
    norms = [n for n, m in model.named_modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))]
    check(
        lambda: zoo.transformer(width=16, layers=2, heads=4, context=16, **options),
        TOKENS,
        dict.fromkeys([*linear, *norms, "embedding"], -1),
        () if kind == "gpt" else (*linear, *norms),
    )


def test_a_vision_transformer_and_what_is_tied() -> None:
    def vision() -> nn.Module:
        return zoo.vit(in_channels=1, image_size=8, patch=4, width=16, layers=1, heads=2, pool="token")

    check(vision, images(12, 1, 8, 8), {"patches": 1, "blocks.0.attention.v": -1, "norm": -1})

    def tied() -> nn.Module:
        return zoo.transformer(width=16, layers=1, heads=2, context=16, tied=True)

    a, b = seeded(tied, 0), seeded(tied, 1)
    naive = between(a, b)
    repaired = repair(naive, TOKENS, endpoints=(a, b))
    assert torch.equal(repaired.embedding.weight, naive.embedding.weight)
    assert repaired.head.weight is repaired.embedding.weight


class Attending(nn.Module):
    """Attention of torch's own, to itself or to what it is given."""

    def __init__(self, batch_first: bool = True, bias: bool = True, kdim: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, bias=bias, kdim=kdim, vdim=kdim)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, tokens, 5) to (n, tokens, 3)."""
        h = self.embed(x)
        other = h if self.attention.kdim == 8 else x
        return self.head(h + self.attention(h, other, value=other)[0])

    def projections(self, x: Tensor) -> list[np.ndarray]:
        """Compute queries, keys and values in numpy."""
        h, m = self.embed(x), self.attention
        other = h if m.kdim == 8 else x
        packed = m.in_proj_weight
        weights = packed.chunk(3) if packed is not None else (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
        biases = [0, 0, 0] if m.in_proj_bias is None else [b.detach().double().numpy() for b in m.in_proj_bias.chunk(3)]
        return [
            (rows.detach().double().numpy() @ w.detach().double().numpy().T + b).reshape(-1, 8)
            for rows, w, b in zip((h, other, other), weights, biases, strict=True)
        ]


@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"bias": False}, {"kdim": 5}], ids=str)
def test_multihead_attention(options: dict[str, Any]) -> None:
    x = images(10, 6, 5)
    a, b, repaired = check(lambda: Attending(**options), x, {"embed": -1, "attention": -1},
                           () if options.get("bias", True) else ("attention",))  # fmt: skip
    for index in range(3):
        of_a, of_b, after = (model.projections(x)[index] for model in (a, b, repaired))
        np.testing.assert_allclose(after.std(0), (of_a.std(0) + of_b.std(0)) / 2, rtol=1e-5)
        if options.get("bias", True):
            np.testing.assert_allclose(after.mean(0), (of_a.mean(0) + of_b.mean(0)) / 2, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
def test_many_batches_are_joined_only_where_samples_stand_alone(batch_first: bool) -> None:
    # without batch_first the first axis holds the tokens: joined, they would attend to each other
    parts = [images(4, 6, 5), 3 - images(4, 6, 5)]
    a, b = seeded(lambda: Attending(batch_first), 0), seeded(lambda: Attending(batch_first), 1)
    repaired = repair(between(a, b), parts, endpoints=(a, b))

    def mixed(model: Any) -> np.ndarray:
        rows = [model.attention(h, h, h)[0] for h in map(model.embed, parts)]
        return torch.cat(rows).detach().double().flatten(0, 1).numpy()

    found = [mixed(model) for model in (a, b, repaired)]
    np.testing.assert_allclose(found[2].std(0), (found[0].std(0) + found[1].std(0)) / 2, rtol=1e-5)


def test_the_layer_of_torch_that_has_a_fast_path() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), nn.Linear(8, 2))

    axes: dict[str, int] = dict.fromkeys(("0", "1.self_attn", "1.linear1", "1.linear2", "1.norm1", "1.norm2"), -1)
    enabled = torch.backends.mha.get_fastpath_enabled()
    check(make, images(10, 6, 5), axes)
    assert torch.backends.mha.get_fastpath_enabled() is enabled


def test_weight_normalisation_takes_the_scale_and_others_are_refused() -> None:
    def make() -> nn.Module:
        normed = nn.utils.parametrizations.weight_norm
        return nn.Sequential(normed(nn.Conv1d(3, 6, 2)), nn.ReLU(), normed(nn.Conv1d(6, 4, 2)), nn.ReLU(),
                             nn.Flatten(), nn.Linear(4 * 5, 2))  # fmt: skip

    check(make, images(30, 3, 7), {"0": 1, "2": 1})
    with pytest.raises(ArchitectureError, match="the weight of 0 is computed from other parameters"):
        choose_method(nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))), "rescale")


class OwnNorm(nn.Module):
    """RMS norm with 1 + weight, or weight, as factor."""

    def __init__(self, size: int, offset: float) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.ones(size)), offset

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, size) to (…, size)."""
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (self.weight + self.offset)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_of_the_users_own_is_restored_only_where_its_weight_is_a_factor(offset: float) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 6), OwnNorm(6, offset), nn.Linear(6, 2))

    axes = {"0": -1} | ({} if offset else {"1": -1})
    a, b, repaired = check(make, images(40, 5), axes, ("1",))
    assert torch.equal(repaired[1].weight, between(a, b)[1].weight) == bool(offset)


def test_embeddings_that_clip_themselves_are_left_alone() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Embedding(65, 6, max_norm=1.0), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))

    a, b = seeded(make, 0), seeded(make, 1)
    for model in (a, b):
        model(TOKENS)  # which clips
    naive = between(a, b)
    assert torch.equal(repair(naive, TOKENS, endpoints=(a, b))[0].weight, naive[0].weight)


class Mixed(nn.Module):
    """Some layers with a batch norm after them, some without, and a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.free, self.layer, self.head = nn.Linear(150, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, 2, 7, 7) to (n, 3)."""
        return self.head(self.layer(self.free(self.norm(self.conv(x)).relu().flatten(1)).relu()))


@pytest.mark.parametrize("memory", [2**30, 0])
def test_batch_norms_are_reset_and_the_rest_is_rescaled(memory: int) -> None:
    assert choose_method(Mixed(), "auto") == "both"
    a, b = seeded(Mixed, 0), seeded(Mixed, 1)
    x = images(40, 2, 7, 7)
    for model in (a, b):
        model.norm.running_mean.fill_(0.5)
        model.norm.running_var.fill_(3)
    naive = between(a, b)
    repaired = repair(naive, x.split(16), endpoints=(a, b), memory=memory)
    assert torch.equal(repaired.conv.weight, naive.conv.weight)  # the batch norm takes any scale off again
    read = repaired.conv(x).detach().double().movedim(1, -1).flatten(0, -2).numpy()
    np.testing.assert_allclose(repaired.norm.running_mean, read.mean(0), atol=1e-5)
    np.testing.assert_allclose(repaired.norm.running_var, read.var(0, ddof=1), rtol=1e-5)
    of_a, of_b, after = (seen(model, x, {"free": -1, "layer": -1}) for model in (a, b, repaired))
    for name, (mean, std) in after.items():
        np.testing.assert_allclose(std, (of_a[name][1] + of_b[name][1]) / 2, rtol=1e-5)
        np.testing.assert_allclose(mean, (of_a[name][0] + of_b[name][0]) / 2, atol=1e-5)
    # without parents there is only one thing to be done
    alone = repair(naive, x)
    assert torch.equal(alone.free.weight, naive.free.weight)
    assert not torch.equal(alone.norm.running_mean, naive.norm.running_mean)
    with pytest.raises(ArchitectureError, match="method='both' needs a batch norm"):
        choose_method(nn.Linear(3, 3), "both")
    assert choose_method(zoo.resnet(8), "auto") == "reset"


def test_the_logits_of_a_network_with_batch_norms() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

    a, b, repaired = check(make, images(40, 4), {"3": -1}, logits=True)
    assert torch.equal(repaired[0].weight, between(a, b)[0].weight)
    with pytest.raises(DataError, match="use 'both'"):
        repair(a, images(40, 4), method="reset", logits=True)


def bert() -> nn.Module:
    import transformers

    return transformers.BertModel(
        transformers.BertConfig(vocab_size=65, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                intermediate_size=24, max_position_embeddings=16), add_pooling_layer=False
    )  # fmt: skip


def gpt2() -> nn.Module:
    import transformers

    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=65, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    )


@pytest.mark.parametrize("make", [bert, gpt2])
def test_networks_of_hugging_face_without_their_padding(make: Callable[[], nn.Module]) -> None:
    mask = torch.ones_like(TOKENS)
    mask[2, 5:] = mask[4, 3:] = 0
    x = {"input_ids": TOKENS, "attention_mask": mask}
    if make is bert:
        names = ["embeddings.word_embeddings", "encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense"]
    else:
        names = ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj", "transformer.ln_f"]
    check(make, x, dict.fromkeys(names, -1))

"""Folding and rotating, against folding by hand and by the function of the network, which must stay as it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus.align import symmetry
from isthmus.align.residual import Folded, fold_norms, random_rotation, rotate
from isthmus.base.errors import ArchitectureError, NotFiniteError, SymmetryError

DECODERS: dict[str, dict[str, Any]] = {
    "layer norm": {},
    "layer norm, no biases": {"bias": False},
    "layer norm, tied": {"tied": True},
    "rms norm": {"norm": nn.RMSNorm},
    "rms norm, rotary, grouped queries": {"norm": nn.RMSNorm, "rotary": True, "kv_heads": 1, "bias": False},
    "rms norm, tied": {"norm": nn.RMSNorm, "tied": True},
}


def admitted(folded: Folded, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {s.name: random_rotation(s.size, generator, hold_ones=s.hold_ones) for s in folded.streams}


def head_of(folded: Folded) -> nn.Parameter:
    return folded.model.get_parameter("head.weight")


def words_of(folded: Folded) -> nn.Parameter:
    return folded.model.get_parameter("words.weight")


def run(model: nn.Module, x: Any) -> Tensor:
    with torch.no_grad():
        out = model(**x) if isinstance(x, dict) else model(x)
    return getattr(out, "logits", out)


def check_exact(model: nn.Module, x: Any, tolerance: float = 1e-9, **options: Any) -> Folded:
    """Fold and rotate in float64: the function is the same, the gains are neutral, and the rotation is no small one."""
    model = model.double()
    inputs = x if not isinstance(x, Tensor) or not x.is_floating_point() else x.double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = run(model, inputs)
    folded = fold_norms(model, inputs, **options)
    turned = rotate(folded, admitted(folded))
    size = float(expected.abs().max())
    for found in (folded.model, turned):
        assert type(found) is type(model)
        assert float((run(found, inputs) - expected).abs().max()) <= tolerance * size
    for norm in folded.norms:
        if norm.gain and norm.gain not in folded.recipe.kept:
            assert torch.equal(turned.get_parameter(norm.gain).unique(), torch.tensor([norm.neutral]).double())
    for stream in folded.streams:
        changed = [
            n for n, _ in stream.writers if not torch.equal(turned.state_dict()[n], folded.model.state_dict()[n])
        ]
        assert changed
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert folded.error is not None
    assert folded.rotation_error is not None
    assert max(folded.error, folded.rotation_error) <= 1e-9
    return folded


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_keep_their_function(name: str, nets: SimpleNamespace) -> None:
    options = DECODERS[name]
    folded = check_exact(nets.drawn(lambda: nets.Decoder(**options)), nets.ids)
    (stream,) = folded.streams
    assert stream.kind == ("rms" if "norm" in options else "layer")
    assert len(stream.norms) == 5
    readers = {norm.module: {r.name for r in found} for norm, found in zip(stream.norms, stream.readers, strict=True)}
    for i in range(2):
        assert readers[f"blocks.{i}.norm1"] == {f"blocks.{i}.attention.{part}.weight" for part in "qkv"}
        assert readers[f"blocks.{i}.norm2"] == {f"blocks.{i}.up.weight"}
    assert readers["norm"] == {"head.weight"}
    writers = {"words.weight"} | {
        f"blocks.{i}.{part}" for i in range(2) for part in ("attention.o.weight", "down.weight")
    }
    assert writers <= set(folded.writers)
    assert bool(folded.untied) == bool(options.get("tied"))


def test_it_is_what_folding_by_hand_gives(nets: SimpleNamespace) -> None:
    model = nets.drawn(nets.Decoder).double()
    found = fold_norms(model, nets.ids).model.state_dict()
    old = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    block = "blocks.0."
    gain, bias = old[block + "norm2.weight"], old[block + "norm2.bias"]
    up = old[block + "up.weight"] * gain
    up = up - up.mean(1, keepdims=True)
    assert torch.allclose(found[block + "up.weight"], torch.from_numpy(up))
    added = old[block + "up.bias"] + old[block + "up.weight"] @ bias
    assert torch.allclose(found[block + "up.bias"], torch.from_numpy(added))
    assert not found[block + "norm2.bias"].any()
    down = old[block + "down.weight"] - old[block + "down.weight"].mean(0)
    assert torch.allclose(found[block + "down.weight"], torch.from_numpy(down))
    words = old["words.weight"] - old["words.weight"].mean(1, keepdims=True)
    assert torch.allclose(found["words.weight"], torch.from_numpy(words))
    # the head has no bias to take that of the last norm, which stays, in units of the gain
    assert torch.allclose(found["head.weight"], torch.from_numpy(old["head.weight"] * old["norm.weight"]))
    assert torch.allclose(found["norm.bias"], torch.from_numpy(old["norm.bias"] / old["norm.weight"]))


def test_the_stream_of_layer_norm_has_mean_zero_afterwards(nets: SimpleNamespace) -> None:
    folded = fold_norms(nets.drawn(nets.Decoder).double(), nets.ids)
    seen: list[Tensor] = []
    handle = folded.model.get_submodule("norm").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run(folded.model, nets.ids)
    handle.remove()
    assert float(seen[0].mean(-1).abs().max()) < 1e-12 < float(seen[0].std())


def test_a_constant_gain_before_a_tied_head_stays(nets: SimpleNamespace) -> None:
    model = nets.drawn(lambda: nets.Decoder(norm=nn.RMSNorm, tied=True))
    with torch.no_grad():
        model.norm.weight.fill_(1.7)
    folded = check_exact(model, nets.ids)
    assert folded.recipe.kept == ("norm.weight",)
    assert folded.untied == ()
    assert head_of(folded) is words_of(folded)
    apart = fold_norms(model, nets.ids, untie=True)
    assert apart.untied == (("words.weight", "head.weight"),)
    assert head_of(apart) is not words_of(apart)


def test_with_layer_norm_a_tied_head_keeps_its_ties_too(nets: SimpleNamespace) -> None:
    model = nets.drawn(lambda: nets.Decoder(tied=True))
    with torch.no_grad():
        model.norm.weight.fill_(0.6)
    folded = check_exact(model, nets.ids, untie=False)
    assert head_of(folded) is words_of(folded)


def test_nothing_is_untied_against_orders(nets: SimpleNamespace) -> None:
    model = nets.drawn(lambda: nets.Decoder(tied=True))
    with pytest.raises(SymmetryError, match=r"norm\.weight is not constant.*untie=True"):
        fold_norms(model, nets.ids, untie=False)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_square_readers_and_readers_of_the_stream_itself(
    raw: bool, norm: type[nn.Module], nets: SimpleNamespace
) -> None:
    folded = check_exact(nets.drawn(lambda: nets.Mlp(norm(12), raw=raw)), nets.x)
    (stream,) = folded.streams
    squares = [reader for reader in folded.readers if reader.name == "square.weight"]
    assert [(reader.axis, reader.bias) for reader in squares] == [(1, "square.bias")]
    # what is read without a norm has a mean that counts
    assert (("stem.weight", 0) in stream.centred) == (norm is nn.LayerNorm and not raw)


def test_a_gain_that_is_one_more_than_its_parameter(nets: SimpleNamespace) -> None:
    folded = check_exact(nets.drawn(lambda: nets.Mlp(nets.OnePlus(12))), nets.x)
    assert {(norm.neutral, norm.kind) for norm in folded.norms} == {(0.0, "rms")}


@pytest.mark.parametrize("centred", [False, True])
def test_norms_without_parameters_are_found_by_their_effect(centred: bool, nets: SimpleNamespace) -> None:
    folded = check_exact(nets.drawn(lambda: nets.PlainNorm(centred)), nets.x)
    (stream,) = folded.streams
    assert (stream.kind, stream.norms) == ("layer" if centred else "rms", ())


def test_packed_attention_of_torch(nets: SimpleNamespace) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, norm_first=True, dropout=0.0)
            self.stem, self.head = nn.Linear(5, 12), nn.Linear(12, 3)
            self.layers = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(12), enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layers(self.stem(x)).mean(1))

    folded = check_exact(nets.drawn(Encoder), nets.x[None])
    packed = {reader.bias for reader in folded.readers if "in_proj_weight" in reader.name}
    assert packed == {f"layers.layers.{i}.self_attn.in_proj_bias" for i in range(2)}


# Refusals


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda n: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), r"0: 1 \(ReLU\) treats its units one"),
        (lambda n: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), r"1 \(BatchNorm1d\) does not n"),
        (lambda n: n.PostNorm(), r"output of norm \(LayerNorm\) is not only read by weights.*add"),
        (lambda n: n.Squashed(True), r"act \(Tanh\) treats its units one by one"),
        (lambda n: n.Squashed(False), r"forward pass treats its units one by one, before norm \(LayerNorm\)"),
        (lambda n: n.Mlp(nn.RMSNorm(12), n.Scale(12)), r"before \(Scale\) scales each unit of the stream by itself"),
        (lambda n: nn.Linear(5, 3), "has no residual stream.*it has no free group"),
    ],
    ids=["relu", "batch norm", "post norm", "tanh", "tanh in forward", "scale", "no group"],
)
def test_what_has_no_stream_is_refused_with_the_reason(make: Any, said: str, nets: SimpleNamespace) -> None:
    with pytest.raises(SymmetryError, match=said):
        fold_norms(nets.drawn(lambda: make(nets)), nets.x)


def test_a_reader_of_two_norms_is_refused(nets: SimpleNamespace) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm1, self.norm2 = nn.Linear(5, 12), nn.RMSNorm(12), nn.RMSNorm(12)
            self.read, self.head = nn.Linear(12, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.read(self.norm1(x))
            x = x + self.read(self.norm2(x))
            return self.head(self.norm2(x))

    with pytest.raises(SymmetryError, match=r"read\.weight reads the outputs of norm1 and norm2"):
        fold_norms(nets.drawn(Shared), nets.x)


def test_normed_units_that_meet_each_other_are_refused(nets: SimpleNamespace) -> None:
    class Pairwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.head = nn.Linear(5, 12), nn.RMSNorm(12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.stem(x))
            return self.head(x) * (x @ x.mT).mean()

    with pytest.raises(SymmetryError, match=r"norm \(RMSNorm\) is not only read by weights.*no weight"):
        fold_norms(nets.drawn(Pairwise), nets.x)


def test_a_stream_is_found_beside_a_hidden_layer_with_a_norm_of_its_own(nets: SimpleNamespace) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.up, self.inner = (
                nn.Linear(5, 12),
                nn.RMSNorm(12),
                nn.Linear(12, 9),
                nn.LayerNorm(9),
            )
            self.down, self.last, self.head = nn.Linear(9, 12), nn.RMSNorm(12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.down(torch.relu(self.inner(self.up(self.norm(x)))))
            return self.head(self.last(x))

    folded = check_exact(nets.drawn(Inner), nets.x)
    assert [stream.size for stream in folded.streams] == [12]
    ((name, reason),) = folded.refused.items()
    assert name == "up"
    assert "relu" in reason


def test_a_bias_that_no_reader_takes_needs_a_gain(nets: SimpleNamespace) -> None:
    model = nets.drawn(nets.Decoder)
    with torch.no_grad():
        model.norm.weight[3] = 0.0
    with pytest.raises(SymmetryError, match=r"norm\.bias cannot be kept.*unit 3"):
        fold_norms(model, nets.ids)


def test_weights_that_are_not_finite_or_of_another_network_are_refused(nets: SimpleNamespace) -> None:
    model = nets.drawn(nets.Decoder)
    other = symmetry(nets.drawn(lambda: nets.Decoder(bias=False)), nets.ids)
    with pytest.raises(ArchitectureError, match="not the same architecture"):
        fold_norms(model, nets.ids, symmetry=other)
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match=r"head\.weight"):
        fold_norms(model, nets.ids)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q: {"nothing": q}, "nothing, which is no stream"),
        (lambda q: q[:-1], r"shape \(11, 12\); expected \(12, 12\)"),
        (lambda q: 2 * q, "not orthogonal"),
        (lambda q: random_rotation(12, torch.Generator().manual_seed(0)), "vector of ones"),
    ],
)
def test_other_matrices_are_refused(change: Any, said: str, nets: SimpleNamespace) -> None:
    folded = fold_norms(nets.drawn(nets.Decoder), nets.ids, verify=False)
    assert folded.error is None
    right = random_rotation(12, torch.Generator().manual_seed(0), hold_ones=True)
    with pytest.raises(SymmetryError, match=said):
        rotate(folded, change(right))
    assert torch.allclose(run(rotate(folded, right), nets.ids), run(folded.model, nets.ids), atol=1e-4)


def test_another_network_is_rotated_in_the_same_way(nets: SimpleNamespace) -> None:
    a, b = (nets.drawn(lambda: nets.Decoder(norm=nn.RMSNorm), seed).double() for seed in (0, 5))
    folded = fold_norms(a, nets.ids)
    other = fold_norms(b, nets.ids).model
    assert torch.allclose(run(rotate(folded, admitted(folded), other), nets.ids), run(b, nets.ids))


# Networks of transformers


def hugging(kind: str, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config, model = {
        "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
        "llama": ("LlamaConfig", "LlamaForCausalLM"),
        "gemma": ("GemmaConfig", "GemmaForCausalLM"),
        "vit": ("ViTConfig", "ViTForImageClassification"),
        "bert": ("BertConfig", "BertForMaskedLM"),
    }[kind]
    tokens = {"vocab_size": 17, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    made = getattr(transformers, model)(getattr(transformers, config)(**({} if kind == "vit" else tokens) | options))
    if kind == "vit":
        return made, {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    return made, {"input_ids": torch.randint(0, 17, (3, 7), generator=torch.Generator().manual_seed(0))}


_SMALL = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 10}
_LLAMA = {
    **_SMALL,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}
HUGGING: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_positions": 9, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_inner": 10}),
    "llama": ("llama", _LLAMA),
    "llama, tied": ("llama", {**_LLAMA, "tie_word_embeddings": True}),
    "gemma": ("gemma", {**_LLAMA, "head_dim": 4}),
    "vit": ("vit", {**_SMALL, "image_size": 8, "patch_size": 4}),
}


@pytest.mark.parametrize("name", HUGGING)
def test_networks_of_transformers_keep_their_function(name: str, nets: SimpleNamespace) -> None:
    kind, options = HUGGING[name]
    inputs = hugging(kind, **options)[1]
    model = nets.drawn(lambda: hugging(kind, **options)[0])
    if kind == "vit":
        inputs = {"pixel_values": inputs["pixel_values"].double()}
    # the norms of Llama and Gemma cast to single precision
    folded = check_exact(model, inputs, 1e-5 if kind in ("llama", "gemma") else 1e-9)
    assert len(folded.norms) == 5
    assert bool(folded.untied) == (name in ("gpt2", "llama, tied", "gemma"))
    if folded.untied:
        assert [getattr(m.config, "tie_word_embeddings", None) for m in (folded.model, model)] == [False, True]


def test_bert_is_refused_for_its_norms_write_the_stream(nets: SimpleNamespace) -> None:
    model = nets.drawn(lambda: hugging("bert", max_position_embeddings=16, **_SMALL)[0])
    with pytest.raises(SymmetryError, match=r"LayerNorm \(LayerNorm\) is not only read by weights"):
        fold_norms(model, hugging("bert", **_SMALL)[1])

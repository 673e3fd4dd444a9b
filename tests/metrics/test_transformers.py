"""Networks of the transformers package, built small from their configurations, without weights from elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from isthmus.base.errors import DataError, LayerNotFoundError
from isthmus.metrics import capture, cka, compare
from isthmus.metrics.collect import collect
from isthmus.metrics.gram import Gram

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LENGTHS = (5, 2, 7, 3)


def seeded(make, seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return make().double().eval()


def bert(seed=0):
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12
    )
    return seeded(lambda: transformers.BertModel(config), seed)


def gpt2(seed=0):
    config = transformers.GPT2Config(**SIZES, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    return seeded(lambda: transformers.GPT2Model(config), seed)


def llama(seed=0):
    config = transformers.LlamaConfig(
        **SIZES, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=12
    )
    return seeded(lambda: transformers.LlamaModel(config), seed)


def t5(seed=0):
    config = transformers.T5Config(
        vocab_size=40, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return seeded(lambda: transformers.T5Model(config), seed)


def vit(seed=0):
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4
    )
    return seeded(lambda: transformers.ViTModel(config), seed)


def sentences(padding=0, lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (len(lengths), max(LENGTHS)), generator=generator)
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    return {key: nn.functional.pad(value, (0, padding)) for key, value in batch.items()}


def rows(gram):
    return {name: gram.rows(name) for name in gram.names}


def prints(gram):
    return gram.samples.tolist()


def kept(hidden, mask):
    return hidden[mask.bool()]


@pytest.mark.parametrize("make", [bert, gpt2, llama])
@pytest.mark.parametrize("positions", ["samples", "mean"])
def test_padding_does_not_change_the_rows(make, positions):
    model = make()
    options = {"positions": positions, "dtype": torch.float64}
    plain = collect(model, [sentences()], **options)
    longer = collect(model, [sentences(padding=4)], **options)
    short = {key: value[:2, :5] for key, value in sentences().items()}
    rest = {key: nn.functional.pad(value[2:], (0, 1)) for key, value in sentences().items()}
    for padded in (longer, collect(model, [short, rest], **options)):
        assert padded.names == plain.names
        assert prints(padded) == prints(plain)
        for name, expected in rows(plain).items():
            torch.testing.assert_close(padded.rows(name), expected, rtol=0, atol=1e-10)
    tokens = {plain.count(name) for name in plain.names}
    assert max(tokens) == (sum(LENGTHS) if positions == "samples" else len(LENGTHS))


def test_padding_does_not_change_the_comparison():
    a, b = bert(0), bert(1)
    layers = [name for name, module in a.named_modules() if isinstance(module, nn.Linear) and "pooler" not in name]
    plain = compare(a, b, [sentences(), sentences(seed=1)], layers=layers)
    longer = compare(a, b, [sentences(padding=3), sentences(seed=1)], layers=layers)
    np.testing.assert_allclose(longer.values, plain.values, rtol=0, atol=1e-6)
    assert plain.convention["mask"] == "attention_mask"
    assert plain.convention["samples"] == 2 * sum(LENGTHS)
    ignored = compare(a, b, [sentences(padding=3), sentences(seed=1)], layers=layers, mask=None)
    assert np.abs(ignored.values - plain.values).max() > 0.01


@pytest.mark.parametrize(("make", "layer"), [(bert, "encoder.layer.{}"), (gpt2, "h.{}"), (llama, "layers.{}")])
def test_hidden_states_are_what_the_network_itself_reports(make, layer):
    model, batch = make(), sentences()
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
    names = [layer.format(0), layer.format(1)]
    gram = collect(model, [batch], layers=[*names, ""], dtype=torch.float64)
    assert gram.names == (*names, "[last_hidden_state]")
    # The second state that is reported is that after the last normalisation in some networks.
    for name, state in ((names[0], output.hidden_states[1]), ("[last_hidden_state]", output.last_hidden_state)):
        truth = kept(state, batch["attention_mask"])
        torch.testing.assert_close(gram.rows(name), truth - truth.mean(0))


def test_attention_gives_its_output_by_default_and_its_weights_by_name():
    model = bert()
    model.set_attn_implementation("eager")
    batch = sentences()
    with torch.no_grad():
        weights = model(**batch, output_attentions=True).attentions[1]
    layer = "encoder.layer.1.attention.self"
    with capture(model, [layer]) as activations, torch.no_grad():
        model(**batch)
    assert list(activations) == [f"{layer}[0]", f"{layer}[1]"]
    torch.testing.assert_close(activations[f"{layer}[1]"], weights)
    assert collect(model, [batch], layers=[layer]).names == (f"{layer}[0]",)
    # (N, heads, tokens, tokens): heads are the units, no token is dropped
    chosen = collect(model, [batch], layers=[f"{layer}[1]"])
    assert (chosen.units(f"{layer}[1]"), chosen.count(f"{layer}[1]")) == (2, 4 * 7 * 7)


def test_layers_by_default_are_those_of_tokens_and_of_sentences():
    gram = collect(bert(), [sentences()])
    assert "embeddings.position_embeddings" not in gram.names  # of shape (1, tokens, units)
    assert gram.names[0] == "embeddings.word_embeddings"
    assert gram.names[-2:] == ("pooler.dense", "pooler.activation")
    counts = {name: gram.count(name) for name in gram.names}
    assert {name for name, count in counts.items() if count != sum(LENGTHS)} == {"pooler.dense", "pooler.activation"}
    with pytest.warns(UserWarning, match=r"token_type_embeddings'.* does not vary"):
        states = compare(bert(0), bert(1), [sentences()], positions="mean")
    assert states.values.shape == (len(gram.names), len(gram.names))


def test_an_encoder_and_a_decoder_are_masked_apart():
    model, batch = t5(), sentences()
    decoder = sentences(lengths=(7, 1, 2, 4), seed=3)
    both = batch | {"decoder_" + key: value for key, value in decoder.items()}
    layers = ["encoder", "decoder"]
    with pytest.raises(DataError, match="'decoder_input_ids' beside the mask 'attention_mask'"):
        collect(model, [both], layers=layers)
    mask = {"encoder": "attention_mask", "decoder": "decoder_attention_mask"}
    gram = collect(model, [both], layers=layers, mask=mask, dtype=torch.float64)
    with torch.no_grad():
        output = model(**both)
    truths = (
        kept(output.encoder_last_hidden_state, batch["attention_mask"]),
        kept(output.last_hidden_state, decoder["attention_mask"]),
    )
    assert gram.names == ("encoder[last_hidden_state]", "decoder[last_hidden_state]")
    for name, truth in zip(gram.names, truths, strict=True):
        torch.testing.assert_close(gram.rows(name), truth - truth.mean(0))
    every = collect(model, [both], mask=mask | {"decoder.block.0.layer.1.EncDecAttention.k": "attention_mask"})
    assert "encoder.block.0.layer.0.SelfAttention.relative_attention_bias" not in every.names
    assert every.count("decoder.block.0.layer.1.EncDecAttention.k") == sum(LENGTHS)
    assert every.count("decoder.block.0.layer.1.EncDecAttention.q") == 7 + 1 + 2 + 4


def test_patches_of_images_are_tokens():
    model = vit()
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = collect(model, [{"pixel_values": images}], dtype=torch.float64)
    patches = "embeddings.patch_embeddings.projection"
    assert (gram.count(patches), gram.units(patches)) == (5 * 4, 8)
    assert gram.count("layernorm") == 5 * 5  # one more token for the class
    with torch.no_grad():
        truth = model(images).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(gram.rows("layernorm"), truth - truth.mean(0))
    assert prints(gram) == prints(collect(model, images, layers="layernorm"))
    value = compare(model, vit(1), images, layers="layernorm").values.item()
    with torch.no_grad():
        other = vit(1)(images).last_hidden_state.flatten(0, 1)
    assert value == pytest.approx(cka(truth, other), abs=1e-6)


def test_grams_of_two_networks_join_if_the_sentences_are_the_same():
    data = [sentences(), sentences(seed=1)]
    a = collect(bert(), data, layers="encoder.layer.1")
    b = collect(gpt2(), [{key: nn.functional.pad(value, (0, 2)) for key, value in batch.items()} for batch in data],
                layers="h.1")  # fmt: skip
    joined = Gram.join({"a": a, "b": b})
    assert joined.count("a.encoder.layer.1") == joined.count("b.h.1") == 2 * sum(LENGTHS)
    with pytest.raises(DataError, match="saw different samples"):
        Gram.join({"a": a, "b": collect(gpt2(), data[::-1], layers="h.1")})


def test_wanted_outputs_that_are_not_there_are_named():
    model = llama()
    with pytest.raises(LayerNotFoundError, match=r"'rotary_emb\[2\]' exists but was not called .* no such output"):
        collect(model, [sentences()], layers=["rotary_emb[2]"])
    with pytest.raises(LayerNotFoundError, match=r"has no layer 'layer\.0'"):
        collect(model, [sentences()], layers=["layer.0"])

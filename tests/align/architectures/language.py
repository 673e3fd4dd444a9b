"""Language models of `transformers`, from small configurations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .spec import Architecture, words


def language_model(kind: str, config: str, **options: Any) -> nn.Module:
    import transformers

    implementation = options.pop("attention", "sdpa")
    built = getattr(transformers, config)(**{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | options)
    built._attn_implementation = implementation
    built._experts_implementation = "eager"  # expert by expert: kernels that take all at once have no double precision
    return getattr(transformers, kind)(built)


def _repeated(layers: int, *parts: dict[str, tuple[int | str, ...]], **shared: Any) -> dict[str, Any]:
    """Write groups down for every layer, labelled with its number; labels that are `shared` have none."""
    groups: dict[str, Any] = dict(shared)
    for layer in range(layers):
        for part in parts:
            for label, (size, kind, *within) in part.items():
                around = [other if other in shared else f"{other}{layer}" for other in map(str, within)]
                groups[f"{label}{layer}"] = (size, kind, *around)
    return groups


# heads move as wholes; in each, queries and keys share an order (their product is summed over it), and values and the
# columns of the output projection another; the units between the two layers of the perceptron are free
HEADS: dict[str, tuple[int | str, ...]] = {
    "heads": (3, "heads"),
    "qk": (4, "within", "heads"),
    "vo": (4, "within", "heads"),
    "mlp": (10, "free"),
}
STREAM = (12, "free")

SINGLE = 1e-4  # norms or scores are computed in float32

_BERT = {
    "vocab_size": 17,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 10,
    "max_position_embeddings": 9,
}
_BERT_LAYOUT = {
    "embeddings.word_embeddings.weight": "17, stream",
    "embeddings.position_embeddings.weight": "9, stream",
    "embeddings.token_type_embeddings.weight": "2, stream",
    "embeddings.LayerNorm.weight": "stream",
    "encoder.layer.0.attention.self.query.weight": "heads0*qk0, stream",
    "encoder.layer.0.attention.self.key.weight": "heads0*qk0, stream",
    "encoder.layer.0.attention.self.value.bias": "heads0*vo0",
    "encoder.layer.0.attention.output.dense.weight": "stream, heads0*vo0",
    "encoder.layer.0.intermediate.dense.weight": "mlp0, stream",
    "encoder.layer.1.attention.self.query.weight": "heads1*qk1, stream",
    "encoder.layer.1.attention.self.value.weight": "heads1*vo1, stream",
    "encoder.layer.1.attention.output.dense.weight": "stream, heads1*vo1",
    "encoder.layer.1.output.dense.weight": "stream, mlp1",
}
_BERT_LAYOUT = {f"bert.{name}": axes for name, axes in _BERT_LAYOUT.items()}

_LLAMA = {
    "vocab_size": 17,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 10,
    "max_position_embeddings": 16,
}
# Two groups of two query heads, each with one head of keys and values. The groups move as wholes and the queries inside
# each. RoPE turns the pair of units (i, i + 2) by an angle of its own, so that queries and keys stay in order; values
# are not turned, and all queries of a group read the same ones: their order is the group's.
_LLAMA_GROUPS: dict[str, tuple[int | str, ...]] = {
    "kv": (2, "heads"),
    "query": (2, "heads", "kv"),
    "vo": (4, "within", "kv"),
    "mlp": (10, "free"),
}
_LLAMA_LAYOUT = {
    "model.embed_tokens.weight": "17, stream",
    "model.layers.0.self_attn.q_proj.weight": "kv0*query0*4, stream",
    "model.layers.0.self_attn.k_proj.weight": "kv0*4, stream",
    "model.layers.0.self_attn.v_proj.weight": "kv0*vo0, stream",
    "model.layers.0.self_attn.o_proj.weight": "stream, kv0*query0*vo0",
    "model.layers.0.mlp.gate_proj.weight": "mlp0, stream",
    "model.layers.0.mlp.up_proj.weight": "mlp0, stream",
    "model.layers.0.mlp.down_proj.weight": "stream, mlp0",
    "model.layers.0.input_layernorm.weight": "stream",
    "model.layers.1.self_attn.o_proj.weight": "stream, kv1*query1*vo1",
    "model.layers.1.mlp.down_proj.weight": "stream, mlp1",
    "model.norm.weight": "stream",
    "lm_head.weight": "17, stream",
}

_T5_ATTENTION = {"qk": (4, "within", "heads"), "vo": (4, "within", "heads")}


def _t5_groups() -> dict[str, Any]:
    # One table of relative positions, buckets x heads, is added to the scores of every layer of a stack: its heads have
    # one order through the whole stack, one for the encoder and one for the decoder. Cross attention has no table: its
    # heads are free in each layer. All embeddings are one table, which ties the streams of encoder and decoder.
    groups: dict[str, Any] = {"stream": (12, "free"), "encoder": (3, "heads"), "decoder": (3, "heads")}
    for layer in range(2):
        groups[f"cross{layer}"] = (3, "heads")
        for prefix, heads in (("e", "encoder"), ("d", "decoder"), ("c", f"cross{layer}")):
            groups[f"{prefix}qk{layer}"] = (4, "within", heads)
            groups[f"{prefix}vo{layer}"] = (4, "within", heads)
        groups[f"emlp{layer}"] = groups[f"dmlp{layer}"] = (10, "free")
    return groups


def _t5_layout() -> dict[str, str]:
    layout = {
        "shared.weight": "17, stream",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "8, encoder",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "8, decoder",
    }
    for i in range(2):
        for stack, prefix, layer, attention, heads in (
            ("encoder", "e", 0, "SelfAttention", "encoder"),
            ("decoder", "d", 0, "SelfAttention", "decoder"),
            ("decoder", "c", 1, "EncDecAttention", f"cross{i}"),
        ):
            at = f"{stack}.block.{i}.layer.{layer}.{attention}"
            layout[f"{at}.q.weight"] = layout[f"{at}.k.weight"] = f"{heads}*{prefix}qk{i}, stream"
            layout[f"{at}.v.weight"] = f"{heads}*{prefix}vo{i}, stream"
            layout[f"{at}.o.weight"] = f"stream, {heads}*{prefix}vo{i}"
        layout[f"encoder.block.{i}.layer.1.DenseReluDense.wi.weight"] = f"emlp{i}, stream"
        layout[f"decoder.block.{i}.layer.2.DenseReluDense.wo.weight"] = f"stream, dmlp{i}"
    return layout


_T5 = {
    "vocab_size": 17,
    "d_model": 12,
    "d_kv": 4,
    "d_ff": 10,
    "num_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,
    "decoder_start_token_id": 0,
}

LANGUAGE = {
    # The last layer is the table of words once more, so that the head's transform writes in the order of the stream.
    "bert": Architecture(
        lambda: language_model("BertForMaskedLM", "BertConfig", **_BERT),
        words(3, 7),
        _repeated(2, HEADS, stream=STREAM),
        _BERT_LAYOUT
        | {
            "cls.predictions.transform.dense.weight": "stream, stream",
            "cls.predictions.decoder.weight": "17, stream",
            "cls.predictions.bias": "17",
        },
    ),
    "bert, attention spelled out": Architecture(
        lambda: language_model("BertForMaskedLM", "BertConfig", attention="eager", **_BERT),
        words(3, 7),
        _repeated(2, HEADS, stream=STREAM),
        _BERT_LAYOUT,
    ),
    # The pooler's output is seen by the classifier only: 12 units of its own.
    "bert with a pooler": Architecture(
        lambda: language_model("BertForSequenceClassification", "BertConfig", num_labels=3, **_BERT),
        words(3, 7),
        _repeated(2, HEADS, stream=STREAM, pool=(12, "free")),
        _BERT_LAYOUT | {"bert.pooler.dense.weight": "pool, stream", "classifier.weight": "3, pool"},
    ),
    # With a padding mask, which is added to the scores of all heads alike.
    "bert with a mask": Architecture(
        lambda: language_model("BertForMaskedLM", "BertConfig", **_BERT),
        lambda g: {
            "input_ids": words(3, 7)(g),
            "attention_mask": torch.arange(7).lt(torch.tensor([[7], [5], [6]])).long(),
        },
        _repeated(2, HEADS, stream=STREAM),
        _BERT_LAYOUT,
    ),
    # Words are looked up in 6 entries, which the head's transform ends in as well; one layer is applied three times.
    "albert": Architecture(
        lambda: language_model(
            "AlbertForMaskedLM",
            "AlbertConfig",
            **{**_BERT, "num_hidden_layers": 3},
            embedding_size=6,
        ),
        words(3, 7),
        {"stream": STREAM, "entries": (6, "free"), **HEADS},
        {
            "albert.embeddings.word_embeddings.weight": "17, entries",
            "albert.embeddings.LayerNorm.weight": "entries",
            "albert.encoder.embedding_hidden_mapping_in.weight": "stream, entries",
            "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query.weight": "heads*qk, stream",
            "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.value.weight": "heads*vo, stream",
            "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.dense.weight": "stream, heads*vo",
            "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight": "mlp, stream",
            "predictions.dense.weight": "entries, stream",
        },
    ),
    # `Conv1D` holds its weights as (inputs, outputs); queries, keys and values are three segments of its outputs.
    "gpt2": Architecture(
        lambda: language_model(
            "GPT2LMHeadModel", "GPT2Config", vocab_size=17, n_positions=9, n_embd=12, n_layer=2, n_head=3, n_inner=10
        ),
        words(3, 7),
        _repeated(2, HEADS, stream=STREAM),
        {
            "transformer.wte.weight": "17, stream",
            "transformer.wpe.weight": "9, stream",
            "transformer.h.0.attn.c_attn.weight": "stream, heads0*qk0 + heads0*qk0 + heads0*vo0",
            "transformer.h.0.attn.c_attn.bias": "heads0*qk0 + heads0*qk0 + heads0*vo0",
            "transformer.h.0.attn.c_proj.weight": "heads0*vo0, stream",
            "transformer.h.0.mlp.c_fc.weight": "stream, mlp0",
            "transformer.h.1.attn.c_attn.weight": "stream, heads1*qk1 + heads1*qk1 + heads1*vo1",
            "transformer.h.1.mlp.c_proj.weight": "mlp1, stream",
            "lm_head.weight": "17, stream",
        },
    ),
    "llama, grouped queries": Architecture(
        lambda: language_model("LlamaForCausalLM", "LlamaConfig", **_LLAMA),
        words(3, 7),
        _repeated(2, _LLAMA_GROUPS, stream=(16, "free")),
        _LLAMA_LAYOUT,
        tolerance=SINGLE,
    ),
    "llama, tied": Architecture(
        lambda: language_model("LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=True, **_LLAMA),
        words(3, 7),
        _repeated(2, _LLAMA_GROUPS, stream=(16, "free")),
        _LLAMA_LAYOUT,
        tolerance=SINGLE,
    ),
    "llama, spelled out": Architecture(
        lambda: language_model("LlamaForCausalLM", "LlamaConfig", attention="eager", **_LLAMA),
        words(3, 7),
        _repeated(2, _LLAMA_GROUPS, stream=(16, "free")),
        _LLAMA_LAYOUT,
        tolerance=SINGLE,
    ),
    # As many heads of keys as of queries: heads move as wholes.
    "llama, plain heads": Architecture(
        lambda: language_model("LlamaForCausalLM", "LlamaConfig", **{**_LLAMA, "num_key_value_heads": 4}),
        words(3, 7),
        _repeated(
            2,
            {"heads": (4, "heads"), "vo": (4, "within", "heads"), "mlp": (10, "free")},
            stream=(16, "free"),
        ),
        {
            "model.layers.0.self_attn.q_proj.weight": "heads0*4, stream",
            "model.layers.0.self_attn.k_proj.weight": "heads0*4, stream",
            "model.layers.0.self_attn.o_proj.weight": "stream, heads0*vo0",
            "model.layers.1.self_attn.v_proj.weight": "heads1*vo1, stream",
            "model.layers.0.mlp.up_proj.weight": "mlp0, stream",
            "model.layers.1.mlp.down_proj.weight": "stream, mlp1",
        },
        tolerance=SINGLE,
    ),
    # A single head of keys and values: its units have one order for all query heads, which move freely.
    "llama, one key head": Architecture(
        lambda: language_model("LlamaForCausalLM", "LlamaConfig", **{**_LLAMA, "num_key_value_heads": 1}),
        words(3, 7),
        _repeated(2, {"query": (4, "heads"), "vo": (4, "free"), "mlp": (10, "free")}, stream=(16, "free")),
        {
            "model.layers.0.self_attn.q_proj.weight": "query0*4, stream",
            "model.layers.0.self_attn.k_proj.weight": "4, stream",
            "model.layers.0.self_attn.v_proj.weight": "vo0, stream",
            "model.layers.0.self_attn.o_proj.weight": "stream, query0*vo0",
            "model.layers.0.mlp.gate_proj.weight": "mlp0, stream",
            "model.layers.1.mlp.down_proj.weight": "stream, mlp1",
            "model.layers.1.self_attn.o_proj.weight": "stream, query1*vo1",
        },
        tolerance=SINGLE,
    ),
    # Half of each head's 8 units are turned and stay in order; the other 4 share an order in queries and keys.
    "phi, partly rotary": Architecture(
        lambda: language_model(
            "PhiForCausalLM",
            "PhiConfig",
            **{**_LLAMA, "num_attention_heads": 2, "num_key_value_heads": 2},
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        ),
        words(3, 7),
        _repeated(
            2,
            {
                "heads": (2, "heads"),
                "rest": (4, "within", "heads"),
                "vo": (8, "within", "heads"),
                "mlp": (10, "free"),
            },
            stream=(16, "free"),
        ),
        {
            "model.layers.0.self_attn.q_proj.weight": "heads0*(4 + rest0), stream",
            "model.layers.0.self_attn.k_proj.bias": "heads0*(4 + rest0)",
            "model.layers.0.self_attn.v_proj.weight": "heads0*vo0, stream",
            "model.layers.0.self_attn.dense.weight": "stream, heads0*vo0",
            "model.layers.1.self_attn.q_proj.weight": "heads1*(4 + rest1), stream",
            "lm_head.weight": "17, stream",
            "lm_head.bias": "17",
            "model.layers.0.mlp.fc1.weight": "mlp0, stream",
            "model.layers.1.mlp.fc2.weight": "stream, mlp1",
            "model.layers.1.self_attn.dense.weight": "stream, heads1*vo1",
        },
    ),
    # Queries, keys and values lie together head by head, half of the queries' and keys' 8 units rotary.
    "gpt-neox": Architecture(
        lambda: language_model(
            "GPTNeoXForCausalLM",
            "GPTNeoXConfig",
            **{
                key: value for key, value in _LLAMA.items() if key not in ("num_attention_heads", "num_key_value_heads")
            },
            num_attention_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        ),
        words(3, 7),
        _repeated(
            2,
            {
                "heads": (2, "heads"),
                "rest": (4, "within", "heads"),
                "vo": (8, "within", "heads"),
                "mlp": (10, "free"),
            },
            stream=(16, "free"),
        ),
        {
            "gpt_neox.embed_in.weight": "17, stream",
            "gpt_neox.layers.0.attention.query_key_value.weight": "heads0*(4 + rest0 + 4 + rest0 + vo0), stream",
            "gpt_neox.layers.0.attention.query_key_value.bias": "heads0*(4 + rest0 + 4 + rest0 + vo0)",
            "gpt_neox.layers.0.attention.dense.weight": "stream, heads0*vo0",
            "gpt_neox.layers.1.attention.query_key_value.weight": "heads1*(4 + rest1 + 4 + rest1 + vo1), stream",
            "lm_head.weight": "17, stream",
            "gpt_neox.layers.0.mlp.dense_h_to_4h.weight": "mlp0, stream",
            "gpt_neox.layers.1.mlp.dense_4h_to_h.weight": "stream, mlp1",
        },
    ),
    # Neighbours (2i, 2i + 1) are turned, in the first 4 of each head's 8 units.
    "gpt-j, interleaved": Architecture(
        lambda: language_model(
            "GPTJForCausalLM",
            "GPTJConfig",
            vocab_size=17,
            n_positions=16,
            n_embd=16,
            n_layer=2,
            n_head=2,
            rotary_dim=4,
            n_inner=10,
            attention="eager",
        ),
        words(3, 7),
        _repeated(
            2,
            {
                "heads": (2, "heads"),
                "rest": (4, "within", "heads"),
                "vo": (8, "within", "heads"),
                "mlp": (10, "free"),
            },
            stream=(16, "free"),
        ),
        {
            "transformer.h.0.attn.q_proj.weight": "heads0*(4 + rest0), stream",
            "transformer.h.0.attn.k_proj.weight": "heads0*(4 + rest0), stream",
            "transformer.h.0.attn.out_proj.weight": "stream, heads0*vo0",
            "transformer.h.1.attn.k_proj.weight": "heads1*(4 + rest1), stream",
            "transformer.h.0.mlp.fc_in.weight": "mlp0, stream",
            "transformer.h.1.mlp.fc_out.weight": "stream, mlp1",
            "transformer.h.1.attn.out_proj.weight": "stream, heads1*vo1",
        },
        tolerance=SINGLE,
    ),
    "t5": Architecture(
        lambda: language_model("T5ForConditionalGeneration", "T5Config", **_T5),
        lambda g: {"input_ids": words(3, 7)(g), "decoder_input_ids": words(3, 5)(g)},
        _t5_groups(),
        _t5_layout(),
        tolerance=SINGLE,
    ),
}

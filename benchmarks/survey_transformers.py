"""Architectures of transformers for the survey, each built from a small configuration of its own.

The table is plain data, so that it can be read without transformers: name, model class, configuration class, its
arguments, and which inputs the model takes. Widths differ from one another wherever a configuration lets them, so that
axes that have nothing to do with each other cannot be confused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 7
BATCH = 2
VOCABULARY = 64

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED: dict[str, Any] = {**TEXT, "num_key_value_heads": 2}
EIGHT: dict[str, Any] = {**GROUPED, "head_dim": 8}
GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
SEGFORMER: dict[str, Any] = {
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 2, 4],
    "decoder_hidden_size": 16,
}
SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
}
T5: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
SPEECH: dict[str, Any] = {
    **{key: TEXT[key] for key in TEXT if key != "max_position_embeddings"},
    "conv_dim": [8, 8],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
MAMBA: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DISENTANGLED: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}


@dataclass(frozen=True)
class Architecture:
    """A model of transformers in small.

    Attributes:
        model: Name of its class.
        config: Name of its configuration's class.
        arguments: What the configuration is built with.
        inputs: Which inputs it takes; see `example`.
    """

    model: str
    config: str
    arguments: dict[str, Any]
    inputs: str = "ids"


A = Architecture
ARCHITECTURES: dict[str, Architecture] = {
    # decoders
    "llama": A("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": A("MistralForCausalLM", "MistralConfig", GROUPED),
    "ministral": A("MinistralForCausalLM", "MinistralConfig", EIGHT),
    "qwen2": A("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": A("Qwen3ForCausalLM", "Qwen3Config", EIGHT),
    "gemma": A("GemmaForCausalLM", "GemmaConfig", EIGHT),
    "gemma2": A("Gemma2ForCausalLM", "Gemma2Config", EIGHT),
    "gemma3": A("Gemma3ForCausalLM", "Gemma3TextConfig", EIGHT),
    "gpt2": A("GPT2LMHeadModel", "GPT2Config", GPT),
    "gpt_bigcode": A("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT),
    "gpt_neox": A("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "gpt_neo": A(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            **{key: TEXT[key] for key in ("vocab_size", "hidden_size", "max_position_embeddings")},
            **{"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        },
    ),
    "gptj": A("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}),
    "codegen": A("CodeGenForCausalLM", "CodeGenConfig", {**GPT, "rotary_dim": 4, "n_ctx": 64}),
    "phi": A("PhiForCausalLM", "PhiConfig", TEXT),
    "phi3": A("Phi3ForCausalLM", "Phi3Config", {**GROUPED, "pad_token_id": 0}),
    "falcon": A("FalconForCausalLM", "FalconConfig", {**MAMBA, "num_attention_heads": 4}),
    "falcon_alibi": A(
        "FalconForCausalLM",
        "FalconConfig",
        {**MAMBA, **{"num_attention_heads": 4, "alibi": True, "multi_query": False, "new_decoder_architecture": False}},
    ),
    "opt": A("OPTForCausalLM", "OPTConfig", {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 16}),
    "bloom": A("BloomForCausalLM", "BloomConfig", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": A("MptForCausalLM", "MptConfig", {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4}),
    "stablelm": A("StableLmForCausalLM", "StableLmConfig", GROUPED),
    "olmo": A("OlmoForCausalLM", "OlmoConfig", GROUPED),
    "olmo2": A("Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    "cohere": A("CohereForCausalLM", "CohereConfig", GROUPED),
    "granite": A("GraniteForCausalLM", "GraniteConfig", GROUPED),
    "starcoder2": A("Starcoder2ForCausalLM", "Starcoder2Config", GROUPED),
    "smollm3": A("SmolLM3ForCausalLM", "SmolLM3Config", {**GROUPED, "pad_token_id": 0}),
    "glm": A("GlmForCausalLM", "GlmConfig", {**EIGHT, "pad_token_id": 0}),
    "nemotron": A("NemotronForCausalLM", "NemotronConfig", GROUPED),
    "exaone4": A("Exaone4ForCausalLM", "Exaone4Config", GROUPED),
    "biogpt": A("BioGptForCausalLM", "BioGptConfig", TEXT),
    "xglm": A(
        "XGLMForCausalLM",
        "XGLMConfig",
        {"vocab_size": 64, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    ),
    "xlnet": A(
        "XLNetLMHeadModel", "XLNetConfig", {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
    ),
    # mixtures of experts
    "mixtral": A("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "qwen2_moe": A(
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 24}
    ),
    "qwen3_moe": A("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**EIGHT, **EXPERTS}),
    "olmoe": A("OlmoeForCausalLM", "OlmoeConfig", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": A("DeepseekV3ForCausalLM", "DeepseekV3Config", {**TEXT, **DEEPSEEK}),
    "gpt_oss": A("GptOssForCausalLM", "GptOssConfig", {**EIGHT, "num_local_experts": 4, "num_experts_per_tok": 2}),
    # state spaces and other recurrences
    "mamba": A("MambaForCausalLM", "MambaConfig", {**MAMBA, "state_size": 4}),
    "mamba2": A(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {**MAMBA, "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
    ),
    "falcon_mamba": A("FalconMambaForCausalLM", "FalconMambaConfig", {**MAMBA, "state_size": 4}),
    "jamba": A(
        "JambaForCausalLM",
        "JambaConfig",
        {
            **GROUPED,
            **{"num_experts": 4, "use_mamba_kernels": False, "mamba_d_state": 4},
            **{"attn_layer_period": 2, "attn_layer_offset": 1},
        },
    ),
    "rwkv": A("RwkvForCausalLM", "RwkvConfig", {**MAMBA, "context_length": 32}),
    # encoders of text
    "bert": A("BertForMaskedLM", "BertConfig", TEXT),
    "bert_pooler": A("BertForSequenceClassification", "BertConfig", TEXT, "masked"),
    "roberta": A("RobertaForMaskedLM", "RobertaConfig", TEXT),
    "xlm_roberta": A("XLMRobertaForMaskedLM", "XLMRobertaConfig", TEXT),
    "camembert": A("CamembertForMaskedLM", "CamembertConfig", TEXT),
    "distilbert": A(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    ),
    "albert": A("AlbertForMaskedLM", "AlbertConfig", {**TEXT, "embedding_size": 16}),
    "electra": A("ElectraForMaskedLM", "ElectraConfig", {**TEXT, "embedding_size": 16}),
    "mpnet": A("MPNetForMaskedLM", "MPNetConfig", TEXT),
    "deberta": A("DebertaForMaskedLM", "DebertaConfig", {**TEXT, **DISENTANGLED, "max_relative_positions": 16}),
    "deberta_v2": A(
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {
            **{**TEXT, **DISENTANGLED, "share_att_key": True, "position_buckets": 8},
            **{"norm_rel_ebd": "layer_norm", "position_biased_input": False},
        },
    ),
    "squeezebert": A("SqueezeBertForMaskedLM", "SqueezeBertConfig", {**TEXT, "embedding_size": 32}),
    "convbert": A("ConvBertForMaskedLM", "ConvBertConfig", {**TEXT, "embedding_size": 32}),
    "modernbert": A("ModernBertForMaskedLM", "ModernBertConfig", {**TEXT, **SPECIAL, "cls_token_id": 1}),
    "fnet": A("FNetForMaskedLM", "FNetConfig", {key: TEXT[key] for key in TEXT if key != "num_attention_heads"}),
    # encoders of images
    "vit": A("ViTForImageClassification", "ViTConfig", VISION, "image"),
    "deit": A("DeiTForImageClassification", "DeiTConfig", VISION, "image"),
    "beit": A("BeitForImageClassification", "BeitConfig", {**VISION, "use_relative_position_bias": True}, "image"),
    "dinov2": A("Dinov2ForImageClassification", "Dinov2Config", VISION, "image"),
    "dinov3_vit": A("DINOv3ViTModel", "DINOv3ViTConfig", VISION, "image"),
    "ijepa": A("IJepaForImageClassification", "IJepaConfig", VISION, "image"),
    "swin": A("SwinForImageClassification", "SwinConfig", SWIN, "image"),
    "swinv2": A("Swinv2ForImageClassification", "Swinv2Config", SWIN, "image"),
    "convnext": A(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 12], "depths": [1, 2], "num_stages": 2},
        "image",
    ),
    "convnextv2": A(
        "ConvNextV2ForImageClassification",
        "ConvNextV2Config",
        {"hidden_sizes": [8, 12], "depths": [1, 2], "num_stages": 2},
        "image",
    ),
    "segformer": A("SegformerForImageClassification", "SegformerConfig", SEGFORMER, "large image"),
    "segformer_decoder": A("SegformerForSemanticSegmentation", "SegformerConfig", SEGFORMER, "large image"),
    "resnet": A(
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2]},
        "image",
    ),
    "regnet": A(
        "RegNetForImageClassification",
        "RegNetConfig",
        {"embedding_size": 8, "hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1], "groups_width": 8},
        "image",
    ),
    "mobilevit": A(
        "MobileViTForImageClassification",
        "MobileViTConfig",
        {
            **{"image_size": 128, "hidden_sizes": [16, 24, 32], "num_attention_heads": 2},
            "neck_hidden_sizes": [8, 8, 12, 12, 16, 16, 32],
        },
        "huge image",
    ),
    "poolformer": A(
        "PoolFormerForImageClassification",
        "PoolFormerConfig",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
        "large image",
    ),
    # encoders and decoders
    "t5": A("T5ForConditionalGeneration", "T5Config", T5, "pair"),
    "mt5": A("MT5ForConditionalGeneration", "MT5Config", T5, "pair"),
    "umt5": A("UMT5ForConditionalGeneration", "UMT5Config", T5, "pair"),
    "bart": A("BartForConditionalGeneration", "BartConfig", SEQ2SEQ, "pair"),
    "mbart": A("MBartForConditionalGeneration", "MBartConfig", SEQ2SEQ, "pair"),
    "pegasus": A("PegasusForConditionalGeneration", "PegasusConfig", SEQ2SEQ, "pair"),
    "marian": A("MarianMTModel", "MarianConfig", {**SEQ2SEQ, "pad_token_id": 0, "decoder_start_token_id": 0}, "pair"),
    "blenderbot": A("BlenderbotForConditionalGeneration", "BlenderbotConfig", SEQ2SEQ, "pair"),
    "whisper": A(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **{key: SEQ2SEQ[key] for key in SEQ2SEQ if key != "max_position_embeddings"},
            **SPECIAL,
            **{"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20, "decoder_start_token_id": 1},
        },
        "spectrogram",
    ),
    # speech, and text with images
    "wav2vec2": A("Wav2Vec2ForCTC", "Wav2Vec2Config", SPEECH, "waveform"),
    "hubert": A("HubertForCTC", "HubertConfig", SPEECH, "waveform"),
    "clip": A(
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**TEXT, "projection_dim": 16, "eos_token_id": 2},  # it looks where the largest id is
            "vision_config": {**VISION, "projection_dim": 16},
            "projection_dim": 16,
        },
        "ids and image",
    ),
    "siglip": A("SiglipModel", "SiglipConfig", {"text_config": TEXT, "vision_config": VISION}, "ids and image"),
}
QUICK = ("llama", "mixtral", "gpt2", "mamba", "bert", "deberta", "vit", "swin", "segformer", "t5", "whisper", "clip")


def example(inputs: str) -> dict[str, Tensor]:
    """Give example inputs of one kind, as keyword inputs.

    Raises:
        KeyError: There is no such kind.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=generator)

    ids = {"input_ids": torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS) % VOCABULARY}
    return {
        "ids": ids,
        "masked": {**ids, "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long)},
        "pair": {**ids, "decoder_input_ids": ids["input_ids"]},
        "image": {"pixel_values": noise(3, 32, 32)},
        "large image": {"pixel_values": noise(3, 64, 64)},
        "huge image": {"pixel_values": noise(3, 128, 128)},
        "ids and image": {**ids, "pixel_values": noise(3, 32, 32)},
        "spectrogram": {"input_features": noise(8, 40), "decoder_input_ids": ids["input_ids"]},
        "waveform": {"input_values": noise(400)},
    }[inputs]


def names() -> list[str]:
    """List the architectures."""
    return list(ARCHITECTURES)


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build a small model with random weights and its example inputs."""
    import transformers

    transformers.logging.set_verbosity_error()
    chosen = ARCHITECTURES[name]
    config = getattr(transformers, chosen.config)(**chosen.arguments)
    return getattr(transformers, chosen.model)(config), example(chosen.inputs)

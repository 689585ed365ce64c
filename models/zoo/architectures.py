"""The architectures of the zoo: tiny configurations of Hugging Face transformers with random weights that matter.

Contract: `build(name)` gives the same weights for a name whenever the same versions run. They are not those that
transformers would draw: with its small ones attention is uniform, and a model that ignored its cache would pass.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
import transformers

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 32, "n_positions": 128}
SEQ2SEQ: dict[str, Any] = {"vocab_size": 104, "max_position_embeddings": 96, "num_key_value_heads": 4}
BART: dict[str, Any] = {
    **SEQ2SEQ,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "decoder_start_token_id": 1,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
}
MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "num_key_value_heads": 4,
}
SLIDING = {"sliding_window": 6}
OWN_SCALE = {"query_pre_attn_scalar": 6}
SOFTCAP = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0, **OWN_SCALE}

GEMMA3N = {
    "head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0, 0.0],
    **SLIDING,
}

# name: (configuration class, what differs from BASE)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", SLIDING),
    "qwen2": ("Qwen2Config", {}),
    "qwen2_sliding": ("Qwen2Config", {"use_sliding_window": True, "max_window_layers": 1, **SLIDING}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma": ("GemmaConfig", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, **SLIDING, **SOFTCAP}),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 16, "sliding_window_pattern": 2, **SLIDING, **OWN_SCALE},
    ),
    "gemma3n": ("Gemma3nTextConfig", GEMMA3N),
    "granite": ("GraniteConfig", {"attention_multiplier": 0.3, "residual_multiplier": 0.8}),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "glm": ("GlmConfig", {"head_dim": 8, "partial_rotary_factor": 0.5}),
    "stablelm": ("StableLmConfig", {"partial_rotary_factor": 0.5, "use_parallel_residual": True}),
    "phi": ("PhiConfig", {"num_key_value_heads": 4}),
    "phi3": ("Phi3Config", {"original_max_position_embeddings": 128}),
    "gpt2": ("GPT2Config", GPT2),
    "gpt2_scaled": ("GPT2Config", {**GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "gptj": ("GPTJConfig", {**GPT2, "rotary_dim": 4}),
    "codegen": ("CodeGenConfig", {**GPT2, "n_head": 4, "rotary_dim": 4}),
    "gpt_bigcode": ("GPTBigCodeConfig", {**GPT2, "multi_query": True}),
    "gpt_neo": (
        "GPTNeoConfig",
        {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": 6},
    ),
    "gpt_neox": ("GPTNeoXConfig", {"rotary_pct": 0.5}),
    "falcon_mqa": ("FalconConfig", {"multi_query": True, "new_decoder_architecture": False}),
    "falcon_new": ("FalconConfig", {"new_decoder_architecture": True}),
    "falcon_alibi": ("FalconConfig", {"multi_query": False, "new_decoder_architecture": False, "alibi": True}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "mpt": ("MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 128}),
    "opt": ("OPTConfig", {"ffn_dim": 32, "word_embed_proj_dim": 32}),
    "xglm": ("XGLMConfig", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 32}),
    "gpt_oss": ("GptOssConfig", {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 2, **SLIDING}),
    "deepseek_v3": ("DeepseekV3Config", MLA),
    "deepseek_v3_dense": ("DeepseekV3Config", {**MLA, "first_k_dense_replace": 2}),
    "t5": (
        "T5Config",
        {**SEQ2SEQ, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "bart": ("BartConfig", BART),
    "m2m100": (
        "M2M100Config",
        {**BART, "max_position_embeddings": 80, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
    ),
    "whisper": ("WhisperConfig", {**BART, "num_mel_bins": 8, "max_source_positions": 1500, "max_target_positions": 96}),
}
ENCODER_DECODERS = frozenset({"t5", "bart", "m2m100", "whisper"})
KEY_BIAS_OUTLIERS = frozenset({"qwen2", "qwen2_sliding"})
KEY_BIAS_OUTLIER = 15.0
FINE = 0.1
ATTENTION_GAIN = 2.0
# Without a scale on the scores the same gain would leave attention to one token.
UNSCALED = frozenset({"gpt_neo", "t5"})
UNSCALED_GAIN = 1.2
ATTENTION_NAMES = ("attn", "attention", "query", "key", "value")


def build(name: str, attention: str | None = None, **more: Any) -> torch.nn.Module:
    """The model `name`; `attention` is transformers' attention function, `more` changes the configuration."""
    class_name, changes = ARCHITECTURES[name]
    config = getattr(transformers, class_name)(**(BASE | changes | more))
    kind = transformers.AutoModelForSeq2SeqLM if name in ENCODER_DECODERS else transformers.AutoModelForCausalLM
    if name == "whisper":
        kind = transformers.AutoModelForSpeechSeq2Seq
    torch.manual_seed(zlib.crc32(name.encode()))
    model: torch.nn.Module = kind.from_config(config, attn_implementation=attention).eval().float()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            _draw(path, parameter, UNSCALED_GAIN if name in UNSCALED else ATTENTION_GAIN)
        if name in KEY_BIAS_OUTLIERS:
            _add_outliers(model, config)
    return model


def _add_outliers(model: torch.nn.Module, config: transformers.PretrainedConfig) -> None:
    """One key channel per head far from zero: the one that rotates slowest, so that the softmax hardly notices."""
    half = (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) // 2
    for path, parameter in model.named_parameters():
        if path.endswith("k_proj.bias"):
            parameter[half - 1 :: 2 * half] += KEY_BIAS_OUTLIER


def _draw(path: str, parameter: torch.nn.Parameter, attention_gain: float) -> None:
    if parameter.ndim == 1:
        parameter += FINE * torch.randn_like(parameter)
    elif "emb" in path or any(part in path for part in ("wte", "wpe", "shared.weight")):
        parameter.normal_(std=0.5)
    else:
        gain = attention_gain if any(part in path for part in ATTENTION_NAMES) else 1.0
        parameter.normal_(std=gain / math.sqrt(min(parameter.shape[-2:])))

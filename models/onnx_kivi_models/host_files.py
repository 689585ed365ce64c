"""Writes config.json and genai_config.json of an emitted decoder, by which transformers, optimum and genai open it.

Source: transformers' LlamaConfig, and the fields that onnxruntime-genai 0.18 reads of a decoder.
"""

from __future__ import annotations

from pathlib import Path

from .checkpoint import Vocabulary
from .decoder import DecoderConfig
from .tokenizer import write_json


def write_host_files(
    config: DecoderConfig, vocabulary: Vocabulary, context: int, model: str, element: str, folder: Path
) -> None:
    """Write both files into `folder`.

    context: the longest input the decoder was trained for, in tokens. model: the name of its file. element: the type
    of its weights, "float32" or "float16".
    """
    special = {"bos_token_id": vocabulary.bos, "eos_token_id": vocabulary.eos, "pad_token_id": vocabulary.padding}
    write_json(folder / "config.json", _transformers(config, context, element) | special)
    write_json(folder / "genai_config.json", _genai(config, context, model, special))


def _transformers(config: DecoderConfig, context: int, element: str) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocabulary,
        "hidden_size": config.hidden,
        "intermediate_size": config.feed_forward,
        "hidden_act": "silu",
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": context,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "attention_bias": config.qkv_bias,
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": element,
    }


def _genai(config: DecoderConfig, context: int, model: str, special: dict[str, int]) -> dict[str, object]:
    inputs = ("input_ids", "attention_mask", "position_ids")
    decoder = {
        "filename": model,
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "hidden_size": config.hidden,
        "head_size": config.head_size,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "inputs": {name: name for name in inputs} | _cache_names("past", "past_key_values.%d"),
        "outputs": {"logits": "logits"} | _cache_names("present", "present.%d"),
    }
    about = {"type": "llama", "vocab_size": config.vocabulary, "context_length": context}
    search = {"max_length": context, "do_sample": False, "past_present_share_buffer": False}
    return {"model": {**about, **special, "decoder": decoder}, "search": search}


def _cache_names(when: str, prefix: str) -> dict[str, str]:
    return {f"{when}_{side}_names": f"{prefix}.{side}" for side in ("key", "value")}

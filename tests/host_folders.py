"""A folder that optimum and genai open, of a tiny llama, and what `rewrite` makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx

from commands import SMALL
from onnx_kivi.cli.parser import main
from onnx_kivi_models.tiny import tiny_config, tiny_decoder

# Embeddings of its own for the output: tied ones make random models repeat themselves.
TINY = tiny_config(tied_embeddings=False)
END = TINY.vocabulary - 1
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": TINY.vocabulary,
    "hidden_size": TINY.hidden,
    "num_hidden_layers": TINY.layers,
    "num_attention_heads": TINY.heads,
    "num_key_value_heads": TINY.kv_heads,
    "head_dim": TINY.head_size,
    "intermediate_size": TINY.feed_forward,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": END,
    "pad_token_id": 0,
    "use_cache": True,
}


def genai_config(*, share_buffer: bool, end: int) -> dict[str, Any]:
    """genai_config.json as genai's builder writes it."""
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids")}
    past = {f"past_{side}_names": f"past_key_values.%d.{side}" for side in ("key", "value")}
    present = {f"present_{side}_names": f"present.%d.{side}" for side in ("key", "value")}
    decoder = {
        "filename": "model.onnx",
        "session_options": {"provider_options": [], "intra_op_num_threads": 1},
        "inputs": inputs | past,
        "outputs": {"logits": "logits"} | present,
        "hidden_size": TINY.hidden,
        "head_size": TINY.head_size,
        "num_attention_heads": TINY.heads,
        "num_key_value_heads": TINY.kv_heads,
        "num_hidden_layers": TINY.layers,
    }
    tokens = {"bos_token_id": 1, "eos_token_id": end, "pad_token_id": 0, "vocab_size": TINY.vocabulary}
    return {
        "model": {"type": "llama", "context_length": 1024, "decoder": decoder, **tokens},
        "search": {"max_length": 1024, "past_present_share_buffer": share_buffer},
    }


def write_original(folder: Path, *, share_buffer: bool = False, end: int = END) -> Path:
    """The folder before it is rewritten. end: the token that ends a text."""
    folder.mkdir(parents=True)
    onnx.save(tiny_decoder(TINY, sharpness=1.4), folder / "model.onnx")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "genai_config.json").write_text(json.dumps(genai_config(share_buffer=share_buffer, end=end)))
    return folder


def write_rewritten(original: Path, folder: Path, bits: int) -> Path:
    """The folder that the command makes of it, moved to where it is used."""
    made = folder.with_name(f"{folder.name}.made")
    assert main(["rewrite", str(original), "-o", str(made), "--bits", str(bits), *SMALL, "--no-verify"]) == 0
    return made.rename(folder)

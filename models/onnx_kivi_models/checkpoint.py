"""Reads a Llama-type GGUF file: the decoder's configuration, its weights as float32, and its tokenizer's tables.

Contract: `Checkpoint.weights` has the names and shapes that `decoder.emit` asks for. GGUF files of this architecture
hold the rows of the query and key projections interleaved for rotary embeddings on adjacent channels; they are put
back to the half-and-half order that exported graphs use. Source: the GGUF specification, read with the `gguf` package.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from onnx_kivi.arrays import Array
from onnx_kivi.errors import KiviError, UnsupportedModelError

from .decoder import DecoderConfig

ARCHITECTURE = "llama"
TIED_HEAD = "output.weight"
TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": TIED_HEAD,
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A byte-level BPE tokenizer's tables; `special` are the ids of control tokens."""

    tokens: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]
    special: tuple[int, ...]
    pre_tokenizer: str
    bos: int
    eos: int
    unknown: int
    padding: int
    chat_template: str


class Checkpoint:
    """One GGUF file, memory-mapped; tensors are dequantized when asked for."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise KiviError("reading a GGUF file needs the package gguf: pip install 'onnx_kivi[demo]'") from error
        self._gguf = gguf
        self._path = path
        try:
            reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError) as error:
            raise UnsupportedModelError(f"{path}: not a readable GGUF file ({error}); fetch it again") from error
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def config(self) -> DecoderConfig:
        """The decoder that this file's metadata describes."""
        architecture = self._field("general", "architecture")
        if architecture != ARCHITECTURE:
            raise UnsupportedModelError(f"{self._path}: architecture {architecture!r}, expected {ARCHITECTURE!r}")
        number = partial(self._field, ARCHITECTURE)
        heads, hidden = number("attention.head_count"), number("embedding_length")
        return DecoderConfig(
            layers=number("block_count"),
            hidden=hidden,
            heads=heads,
            kv_heads=number("attention.head_count_kv"),
            head_size=hidden // heads,
            feed_forward=number("feed_forward_length"),
            vocabulary=len(self._field("tokenizer.ggml", "tokens")),
            rope_theta=number("rope.freq_base"),
            norm_epsilon=number("attention.layer_norm_rms_epsilon"),
            tied_embeddings=TIED_HEAD not in self._tensors,
        )

    def vocabulary(self) -> Vocabulary:
        """The tokenizer's tables."""
        field = partial(self._field, "tokenizer.ggml")
        if field("model") != "gpt2":
            raise UnsupportedModelError(f"{self._path}: tokenizer {field('model')!r}, expected 'gpt2' (byte-level BPE)")
        control = self._gguf.TokenType.CONTROL
        return Vocabulary(
            tokens=tuple(field("tokens")),
            merges=tuple((left, right) for left, _, right in (merge.partition(" ") for merge in field("merges"))),
            special=tuple(index for index, kind in enumerate(field("token_type")) if kind == control),
            pre_tokenizer=field("pre"),
            bos=field("bos_token_id"),
            eos=field("eos_token_id"),
            unknown=field("unknown_token_id"),
            padding=field("padding_token_id"),
            chat_template=self._field("tokenizer", "chat_template"),
        )

    def weights(self, name: str, shape: tuple[int, ...]) -> Array:
        """The tensor `name` as float32 of `shape`; matrices come as (inputs, outputs), the embedding as (tokens, E)."""
        source = self._source_name(name)
        tensor = self._tensors.get(source)
        if tensor is None:
            raise UnsupportedModelError(f"{self._path}: tensor {source!r} ({name}) is missing")
        array: Array = self._gguf.dequantize(tensor.data, tensor.tensor_type)
        if source.endswith(("attn_q.weight", "attn_k.weight")):
            head_size = self.config().head_size
            array = array.reshape(-1, head_size // 2, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        if array.ndim == 2 and name != "model.embed_tokens.weight":
            array = array.T
        if array.shape != shape:
            raise UnsupportedModelError(f"{self._path}: tensor {source!r} has shape {array.shape}, expected {shape}")
        return np.ascontiguousarray(array, np.float32)

    def _source_name(self, name: str) -> str:
        if name in TOP_NAMES:
            return TOP_NAMES[name]
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        module, _, kind = rest.rpartition(".")
        return f"blk.{layer}.{LAYER_NAMES.get(module, module)}.{kind}"

    def _field(self, section: str, key: str) -> Any:
        name = f"{section}.{key}"
        if name not in self._fields:
            raise UnsupportedModelError(f"{self._path}: metadata {name!r} is missing")
        return self._fields[name].contents()

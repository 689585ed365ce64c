"""Emits a llama-type decoder with a key/value cache as ONNX, in the form that exporters write.

Contract: input_ids (B, S), attention_mask (B, P + S), position_ids (B, S) and per layer past_key_values.N.key
(B, Hkv, P, Dk) and .value (B, Hkv, P, Dv) in; logits (B, S, V) of every token and present.N.key/value with P + S tokens
out. Nothing is fused: RMSNorm, rotary embedding, repeat_kv and attention are plain ai.onnx operators, and `Spelling`
picks among the ways in which exporters write the same mathematics. Source: the Llama architecture (arXiv 2302.13971)
and the graphs that torch.onnx writes of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_kivi.arrays import Array
from onnx_kivi.errors import ConfigError

from .graph import ModelBuilder, Store

Weights = Callable[[str, tuple[int, ...]], Array]

BATCH, TOKENS, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
MIN_OPSET = 17
AXES_AS_INPUT_OPSET = 18
ATTENTION_OPSET = 23


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """What the decoder computes. `v_head_size` 0 means `head_size`; `window` and `softcap` 0 mean none."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int
    vocabulary: int
    v_head_size: int = 0
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5
    tied_embeddings: bool = True
    qkv_bias: bool = False
    window: int = 0
    softcap: float = 0.0

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ConfigError(f"DecoderConfig: heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if self.head_size % 2:
            raise ConfigError(f"DecoderConfig: head_size {self.head_size} must be even for the rotary embedding")

    @property
    def value_size(self) -> int:
        """Channels of one value head."""
        return self.v_head_size or self.head_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """How the same decoder is written down.

    scale: multiply the scores, the query, or query and key by the square root each. mask: add a fill value, or select
    with Where. repeat: expand the kv heads, or leave one kv head to MatMul's broadcasting. core: the attention as
    MatMul and Softmax, or as ai.onnx Attention (opset 23).
    """

    scale: Literal["scores", "query", "split"] = "scores"
    mask: Literal["add", "where"] = "add"
    repeat: Literal["expand", "broadcast"] = "expand"
    core: Literal["matmul", "attention"] = "matmul"
    opset: int = 18
    dtype: Literal["float32", "float16"] = "float32"

    def check(self, config: DecoderConfig) -> None:
        """Raise ConfigError where this spelling can't express that decoder."""
        if self.opset < MIN_OPSET:
            raise ConfigError(f"Spelling: opset {self.opset} is below {MIN_OPSET}")
        if self.repeat == "broadcast" and config.kv_heads not in {1, config.heads}:
            raise ConfigError(f"Spelling: repeat 'broadcast' needs 1 kv head, got {config.kv_heads}; use 'expand'")
        if self.core == "attention" and self.opset < ATTENTION_OPSET:
            raise ConfigError(f"Spelling: core 'attention' needs opset {ATTENTION_OPSET}, got {self.opset}")
        if self.core == "attention" and (self.scale, self.mask, config.softcap) != ("scores", "add", 0.0):
            raise ConfigError("Spelling: core 'attention' fixes scale and mask itself and has no softcap here")


@dataclass(frozen=True, slots=True)
class _Step:
    """Tensors that every layer reads."""

    cos: str
    sin: str
    allowed: str
    mask: str


def emit(
    config: DecoderConfig,
    weights: Weights,
    spelling: Spelling | None = None,
    store: Store = numpy_helper.from_array,
) -> onnx.ModelProto:
    """Write the decoder; `weights(name, shape)` supplies tensors, matrices as (inputs, outputs); `store` keeps them."""
    spelling = spelling or Spelling()
    spelling.check(config)
    return _Emitter(config, weights, spelling, store).model()


class _Emitter:
    def __init__(self, config: DecoderConfig, weights: Weights, spelling: Spelling, store: Store) -> None:
        self.config = config
        self.spelling = spelling
        self.weights = weights
        self.g = ModelBuilder(spelling.opset, spelling.dtype, store)
        self.half = spelling.dtype == "float16"

    def model(self) -> onnx.ModelProto:
        config, g = self.config, self.g
        ids = g.input("input_ids", np.int64, (BATCH, TOKENS))
        padding = g.input("attention_mask", np.int64, (BATCH, TOTAL))
        positions = g.input("position_ids", np.int64, (BATCH, TOKENS))
        caches = [self.cache(layer) for layer in range(config.layers)]
        logits = self.outputs()
        with g.scope("model"):
            embedding = self.weight("model.embed_tokens.weight", config.vocabulary, config.hidden)
            x_BSE = g.op("Gather", embedding, ids, axis=0)
            step = self.step(ids, padding, positions, caches[0][0])
            for layer, cache in enumerate(caches):
                with g.scope(f"layers.{layer}"):
                    x_BSE = self.layer(x_BSE, layer, cache, step)
            x_BSE = self.norm(x_BSE, "model.norm.weight")
        with g.scope("lm_head"):
            if config.tied_embeddings:
                head = g.op("Transpose", embedding, perm=[1, 0])
            else:
                head = self.weight("lm_head.weight", config.hidden, config.vocabulary)
            g.op("MatMul", x_BSE, head, output=logits)
        return g.model()

    def outputs(self) -> str:
        """Declare the outputs; returns the logits."""
        config, g = self.config, self.g
        logits = g.output("logits", g.dtype, (BATCH, TOKENS, config.vocabulary))
        for layer in range(config.layers):
            for name, size in (("key", config.head_size), ("value", config.value_size)):
                g.output(f"present.{layer}.{name}", g.dtype, (BATCH, config.kv_heads, TOTAL, size))
        return logits

    def cache(self, layer: int) -> tuple[str, str]:
        kv_heads, sizes = self.config.kv_heads, (self.config.head_size, self.config.value_size)
        key, value = (
            self.g.input(f"past_key_values.{layer}.{name}", self.g.dtype, (BATCH, kv_heads, PAST, size))
            for name, size in zip(("key", "value"), sizes, strict=True)
        )
        return key, value

    def step(self, ids: str, padding: str, positions: str, past_key: str) -> _Step:
        g = self.g
        past = g.op("Gather", g.op("Shape", past_key), 2, axis=0)
        total = g.op("Add", past, g.op("Gather", g.op("Shape", ids), 1, axis=0))
        query_S1 = g.op("Unsqueeze", g.op("Range", past, total, 1), [1])
        key_T = g.op("Range", 0, total, 1)
        allowed = g.op("LessOrEqual", key_T, query_S1)
        if self.config.window:
            first_S1 = g.op("Sub", query_S1, self.config.window)
            allowed = g.op("And", allowed, g.op("Greater", key_T, first_S1))
        present = g.op("Unsqueeze", g.op("Cast", padding, to=onnx.TensorProto.BOOL), [1, 2])
        allowed = g.op("And", allowed, present)
        mask = g.op("Where", allowed, 0.0, self.fill) if self.spelling.mask == "add" else ""
        with g.scope("rotary_emb"):
            cos, sin = self.rotary(positions)
        return _Step(cos, sin, allowed, mask)

    def rotary(self, positions: str) -> tuple[str, str]:
        g, size = self.g, self.config.head_size
        frequency = self.config.rope_theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
        inv_freq = g.weight("model.rotary_emb.inv_freq", frequency.astype(np.float32))
        position = g.op("Cast", g.op("Unsqueeze", positions, [2]), to=onnx.TensorProto.FLOAT)
        half = g.op("Mul", position, inv_freq)
        angle = g.op("Unsqueeze", g.op("Concat", half, half, axis=-1), [1])
        cos, sin = (self.narrow(g.op(function, angle)) for function in ("Cos", "Sin"))
        return cos, sin

    def layer(self, x_BSE: str, layer: int, cache: tuple[str, str], step: _Step) -> str:
        g, prefix = self.g, f"model.layers.{layer}"
        with g.scope("input_layernorm"):
            normed = self.norm(x_BSE, f"{prefix}.input_layernorm.weight")
        with g.scope("self_attn"):
            attended = self.attention(normed, layer, cache, step)
        x_BSE = g.op("Add", x_BSE, attended)
        with g.scope("post_attention_layernorm"):
            normed = self.norm(x_BSE, f"{prefix}.post_attention_layernorm.weight")
        with g.scope("mlp"):
            width = self.config.feed_forward
            gate = self.linear(normed, f"{prefix}.mlp.gate_proj", self.config.hidden, width)
            up = self.linear(normed, f"{prefix}.mlp.up_proj", self.config.hidden, width)
            gated = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
            down = self.linear(gated, f"{prefix}.mlp.down_proj", width, self.config.hidden)
        return g.op("Add", x_BSE, down)

    def attention(self, x_BSE: str, layer: int, cache: tuple[str, str], step: _Step) -> str:
        config, g, prefix = self.config, self.g, f"model.layers.{layer}.self_attn"
        q_BHSD = self.rotate(self.heads(x_BSE, f"{prefix}.q_proj", config.heads, config.head_size), step)
        k_BHSD = self.rotate(self.heads(x_BSE, f"{prefix}.k_proj", config.kv_heads, config.head_size), step)
        v_BHSD = self.heads(x_BSE, f"{prefix}.v_proj", config.kv_heads, config.value_size)
        k_BHTD = g.op("Concat", cache[0], k_BHSD, axis=-2, output=f"present.{layer}.key")
        v_BHTD = g.op("Concat", cache[1], v_BHSD, axis=-2, output=f"present.{layer}.value")
        if self.spelling.repeat == "expand" and config.kv_heads < config.heads:
            k_BHTD, v_BHTD = self.repeat(k_BHTD, config.head_size), self.repeat(v_BHTD, config.value_size)
        if self.spelling.core == "attention":
            out_BHSD = g.op("Attention", q_BHSD, k_BHTD, v_BHTD, step.allowed, scale=self.scale)
        else:
            out_BHSD = g.op("MatMul", self.probabilities(q_BHSD, k_BHTD, step), v_BHTD)
        width = config.heads * config.value_size
        out_BSE = g.op("Reshape", g.op("Transpose", out_BHSD, perm=[0, 2, 1, 3]), [0, 0, width])
        return self.linear(out_BSE, f"{prefix}.o_proj", width, config.hidden)

    def probabilities(self, q_BHSD: str, k_BHTD: str, step: _Step) -> str:
        g, scale = self.g, self.scale
        k_BHDT = g.op("Transpose", k_BHTD, perm=[0, 1, 3, 2])
        match self.spelling.scale:
            case "query":
                scores = g.op("MatMul", g.op("Mul", q_BHSD, scale), k_BHDT)
            case "split":
                root = math.sqrt(scale)
                scores = g.op("MatMul", g.op("Mul", q_BHSD, root), g.op("Mul", k_BHDT, root))
            case "scores":
                scores = g.op("Mul", g.op("MatMul", q_BHSD, k_BHDT), scale)
        if self.config.softcap:
            capped = g.op("Tanh", g.op("Div", scores, self.config.softcap))
            scores = g.op("Mul", capped, self.config.softcap)
        if self.spelling.mask == "where":
            scores = g.op("Where", step.allowed, scores, self.fill)
        else:
            scores = g.op("Add", scores, step.mask)
        return self.narrow(g.op("Softmax", self.widen(scores), axis=-1))

    def heads(self, x_BSE: str, name: str, heads: int, size: int) -> str:
        g = self.g
        projected = self.linear(x_BSE, name, self.config.hidden, heads * size, bias=self.config.qkv_bias)
        return g.op("Transpose", g.op("Reshape", projected, [0, 0, heads, size]), perm=[0, 2, 1, 3])

    def rotate(self, x_BHSD: str, step: _Step) -> str:
        g, size = self.g, self.config.head_size
        first = g.op("Slice", x_BHSD, [0], [size // 2], [3], [1])
        second = g.op("Slice", x_BHSD, [size // 2], [size], [3], [1])
        turned = g.op("Concat", g.op("Neg", second), first, axis=-1)
        return g.op("Add", g.op("Mul", x_BHSD, step.cos), g.op("Mul", turned, step.sin))

    def repeat(self, x_BHTD: str, size: int) -> str:
        g, groups = self.g, self.config.heads // self.config.kv_heads
        shape = g.op("Shape", x_BHTD)
        batch, tokens = (g.op("Unsqueeze", g.op("Gather", shape, axis, axis=0), [0]) for axis in (0, 2))
        wide = g.op("Concat", batch, [self.config.kv_heads], [groups], tokens, [size], axis=0)
        flat = g.op("Concat", batch, [self.config.heads], tokens, [size], axis=0)
        return g.op("Reshape", g.op("Expand", g.op("Unsqueeze", x_BHTD, [2]), wide), flat)

    def norm(self, x_BSE: str, name: str) -> str:
        g = self.g
        wide = self.widen(x_BSE)
        square = g.op("Mul", wide, wide)
        if self.spelling.opset < AXES_AS_INPUT_OPSET:
            mean = g.op("ReduceMean", square, axes=[-1])
        else:
            mean = g.op("ReduceMean", square, [-1])
        epsilon = g.weight("model.norm_epsilon", np.array(self.config.norm_epsilon, np.float32))
        root = g.op("Sqrt", g.op("Add", mean, epsilon))
        return g.op("Mul", self.narrow(g.op("Div", wide, root)), self.weight(name, self.config.hidden))

    def linear(self, x: str, name: str, inputs: int, outputs: int, *, bias: bool = False) -> str:
        with self.g.scope(name.rpartition(".")[2]):
            product = self.g.op("MatMul", x, self.weight(f"{name}.weight", inputs, outputs))
            return self.g.op("Add", product, self.weight(f"{name}.bias", outputs)) if bias else product

    def weight(self, name: str, *shape: int) -> str:
        return self.g.weight(name, np.ascontiguousarray(self.weights(name, shape), self.g.dtype))

    def widen(self, x: str) -> str:
        return self.g.op("Cast", x, to=onnx.TensorProto.FLOAT) if self.half else x

    def narrow(self, x: str) -> str:
        return self.g.op("Cast", x, to=helper.np_dtype_to_tensor_dtype(self.g.dtype)) if self.half else x

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.config.head_size)

    @property
    def fill(self) -> float:
        return float(np.finfo(self.g.dtype).min)

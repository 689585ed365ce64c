"""One decode step of attention as onnxruntime does it by itself, over enough layers that no cache level holds them.

Each contender is a one-layer graph with its caches bound in place: `concat` is what exporters emit (Concat,
repeat_kv, MatMul), the others are com.microsoft GroupQueryAttention on a shared buffer, f32, int8 and int4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from ..graph import parse_model
from ..naming import is_past_name, present_of
from ..run.session import taking_turns


@dataclass(frozen=True, slots=True)
class AttentionSize:
    """What is attended: query heads, key/value heads, head size, and the tokens in the cache."""

    heads: int
    kv_heads: int
    head_size: int
    context: int

    @property
    def dense_bytes(self) -> int:
        """Bytes of one layer's f32 cache."""
        return 2 * self.kv_heads * self.head_size * self.context * 4


class Contender(Protocol):
    """Something that attends one token."""

    name: str
    layer_bytes: int

    def step(self, turn: int) -> None:
        """Attend one token in the layer whose turn it is."""


def layers_for(layer_bytes: int, total_bytes: int) -> int:
    """Layers so that all of them exceed `total_bytes`; at least two, so that none follows itself."""
    return max(2, -(-total_bytes // layer_bytes))


class GraphContender:
    """An onnxruntime session of a one-layer graph, with `layers` sets of caches."""

    def __init__(
        self, name: str, graph: str, shape: AttentionSize, layer_bytes: int, total_bytes: int, threads: int
    ) -> None:
        self.name = name
        self.layer_bytes = layer_bytes
        options = taking_turns()
        options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(parse_model(graph), options, providers=["CPUExecutionProvider"])
        self._bindings = [self._bind(shape, seed=layer) for layer in range(layers_for(layer_bytes, total_bytes))]

    def step(self, turn: int) -> None:
        """See Contender."""
        self._session.run_with_iobinding(self._bindings[turn % len(self._bindings)])

    def _bind(self, shape: AttentionSize, seed: int) -> Any:
        """Random caches; an output present_X shares the buffer of past_X where their sizes are equal."""
        random = np.random.default_rng(seed)
        binding = self._session.io_binding()
        shared = {}
        for i in self._session.get_inputs():
            if is_past_name(i.name):
                values = random.integers(-100, 100, i.shape, np.int8)
                kind = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}[i.type]
                shared[i.name] = ort.OrtValue.ortvalue_from_numpy(values.astype(kind))
                binding.bind_ortvalue_input(i.name, shared[i.name])
            elif i.type == "tensor(int32)":
                last = shape.context - 1 if i.shape else shape.context
                binding.bind_cpu_input(i.name, np.full(i.shape, last, np.int32))
            else:
                binding.bind_cpu_input(i.name, random.standard_normal(i.shape, np.float32) / 100)
        outputs = [o.name for o in self._session.get_outputs()]
        carried = {present_of(name, outputs): past for name, past in shared.items()}
        for o in self._session.get_outputs():
            past = carried.get(o.name)
            if past is not None and past.shape() == o.shape:
                binding.bind_ortvalue_output(o.name, past)
            else:
                binding.bind_output(o.name)
        return binding


def concat(shape: AttentionSize, total_bytes: int, threads: int) -> GraphContender:
    """Concat, repeat_kv and MatMul, as optimum and torch export it."""
    H, K, D, P = shape.heads, shape.kv_heads, shape.head_size, shape.context - 1
    T = shape.context
    graph = f"""<ir_version: 10, opset_import: ["": 18]>
    concat (float[1,{H},1,{D}] q, float[1,{K},1,{D}] k, float[1,{K},1,{D}] v,
            float[1,{K},{P},{D}] past_k, float[1,{K},{P},{D}] past_v)
        => (float[1,{H},1,{D}] y, float[1,{K},{T},{D}] present_k, float[1,{K},{T},{D}] present_v)
    <int64[1] two = {{2}}, float scale = {{{D**-0.5}}},
     int64[5] repeated = {{1,{K},{H // K},{T},{D}}}, int64[4] heads = {{1,{H},{T},{D}}}>
    {{
        present_k = Concat <axis = 2> (past_k, k)
        present_v = Concat <axis = 2> (past_v, v)
        k5 = Unsqueeze (present_k, two)
        k6 = Expand (k5, repeated)
        k7 = Reshape (k6, heads)
        v5 = Unsqueeze (present_v, two)
        v6 = Expand (v5, repeated)
        v7 = Reshape (v6, heads)
        kt = Transpose <perm = [0, 1, 3, 2]> (k7)
        qk = MatMul (q, kt)
        scores = Mul (qk, scale)
        p = Softmax <axis = -1> (scores)
        y = MatMul (p, v7)
    }}"""
    return GraphContender("concat", graph, shape, shape.dense_bytes, total_bytes, threads)


def group_query_attention(shape: AttentionSize, total_bytes: int, threads: int, bits: int) -> GraphContender:
    """GroupQueryAttention on a shared buffer; bits 32, 8 or 4 (static symmetric scales, per channel)."""
    H, K, D, T = shape.heads, shape.kv_heads, shape.head_size, shape.context
    element = {32: "float", 8: "int8", 4: "uint8"}[bits]
    stored = D // 2 if bits == 4 else D
    scales = "" if bits == 32 else f", float[{K * D}] k_scale, float[{K * D}] v_scale"
    inputs = "q, k, v, past_k, past_v, last, total" + ("" if bits == 32 else ", , , , , , k_scale, v_scale")
    attributes = f"num_heads = {H}, kv_num_heads = {K}"
    if bits != 32:
        attributes += f', k_quant_type = "PER_CHANNEL", v_quant_type = "PER_CHANNEL", kv_cache_bit_width = {bits}'
    graph = f"""<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
    gqa (float[1,1,{H * D}] q, float[1,1,{K * D}] k, float[1,1,{K * D}] v, {element}[1,{K},{T},{stored}] past_k,
         {element}[1,{K},{T},{stored}] past_v, int32[1] last, int32 total{scales})
        => (float[1,1,{H * D}] y, {element}[1,{K},{T},{stored}] present_k, {element}[1,{K},{T},{stored}] present_v)
    {{ y, present_k, present_v = com.microsoft.GroupQueryAttention <{attributes}> ({inputs}) }}"""
    name = "gqa_f32" if bits == 32 else f"gqa_int{bits}"
    return GraphContender(name, graph, shape, shape.dense_bytes * bits // 32, total_bytes, threads)

"""The emitted decoder: against an independent NumPy one, in every spelling, and step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_kivi.errors import ConfigError
from onnx_kivi_models import DecoderConfig, Spelling, random_weights, tiny_config, tiny_decoder

Array = npt.NDArray[Any]
Feeds = dict[str, Array]

# Two layers of float32 over sums of at most 128 products: rounding stays under 1e-5 of logits of size about 10.
FLOAT32 = 1e-4
# float16 weights and activations have 11 bits; two layers of width 64 multiply that error about tenfold.
FLOAT16 = 0.2


def empty_cache(config: DecoderConfig, batch: int, dtype: npt.DTypeLike = np.float32) -> Feeds:
    sizes = {"key": config.head_size, "value": config.value_size}
    return {
        f"past_key_values.{layer}.{name}": np.zeros((batch, config.kv_heads, 0, size), dtype)
        for layer in range(config.layers)
        for name, size in sizes.items()
    }


def run(
    model: onnx.ModelProto, ids_BS: Array, mask_BT: Array, past: dict[str, Array]
) -> tuple[Array, dict[str, Array]]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    positions = np.clip(mask_BT.cumsum(1) - 1, 0, None)[:, -ids_BS.shape[1] :]
    feeds = {"input_ids": ids_BS, "attention_mask": mask_BT, "position_ids": positions, **past}
    names = [output.name for output in session.get_outputs()]
    results = dict(zip(names, session.run(None, feeds), strict=True))
    logits = results.pop("logits")
    return logits, {name.replace("present", "past_key_values"): value for name, value in results.items()}


def oracle(config: DecoderConfig, seed: int, ids_S: Array, key_outlier: float = 0.0) -> Array:
    """The same decoder on one unpadded sequence in float64, a token at a time per query: no shared code."""
    weight = random_weights(seed, key_outlier)
    half = config.head_size // 2
    group = config.heads // config.kv_heads

    def norm(x: Array, name: str) -> Array:
        y: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * weight(name, (config.hidden,))
        return y

    def project(x: Array, name: str, outputs: int, biased: bool) -> Array:
        y: Array = x @ weight(f"{name}.weight", (x.shape[-1], outputs)).astype(np.float64)
        return y + weight(f"{name}.bias", (outputs,)) if biased else y

    def turn(x_SD: Array) -> Array:
        out = x_SD.copy()
        for position, row in enumerate(x_SD):
            for channel in range(half):
                angle = position * config.rope_theta ** (-2 * channel / config.head_size)
                a, b = row[channel], row[channel + half]
                out[position, channel] = a * np.cos(angle) - b * np.sin(angle)
                out[position, channel + half] = b * np.cos(angle) + a * np.sin(angle)
        return out

    embedding = weight("model.embed_tokens.weight", (config.vocabulary, config.hidden)).astype(np.float64)
    x = embedding[ids_S]
    for layer in range(config.layers):
        name = f"model.layers.{layer}"
        h = norm(x, f"{name}.input_layernorm.weight")
        q = project(h, f"{name}.self_attn.q_proj", config.heads * config.head_size, config.qkv_bias)
        k = project(h, f"{name}.self_attn.k_proj", config.kv_heads * config.head_size, config.qkv_bias)
        v = project(h, f"{name}.self_attn.v_proj", config.kv_heads * config.value_size, config.qkv_bias)
        outputs = []
        for head in range(config.heads):
            kv = head // group
            q_SD = turn(q[:, head * config.head_size : (head + 1) * config.head_size])
            k_SD = turn(k[:, kv * config.head_size : (kv + 1) * config.head_size])
            v_SD = v[:, kv * config.value_size : (kv + 1) * config.value_size]
            rows = []
            for i in range(len(ids_S)):
                first = max(0, i - config.window + 1) if config.window else 0
                scores = k_SD[first : i + 1] @ q_SD[i] / np.sqrt(config.head_size)
                if config.softcap:
                    scores = np.tanh(scores / config.softcap) * config.softcap
                p = np.exp(scores - scores.max())
                rows.append(p / p.sum() @ v_SD[first : i + 1])
            outputs.append(np.array(rows))
        x = x + project(np.concatenate(outputs, -1), f"{name}.self_attn.o_proj", config.hidden, False)
        h = norm(x, f"{name}.post_attention_layernorm.weight")
        gate = project(h, f"{name}.mlp.gate_proj", config.feed_forward, False)
        up = project(h, f"{name}.mlp.up_proj", config.feed_forward, False)
        x = x + project(gate / (1 + np.exp(-gate)) * up, f"{name}.mlp.down_proj", config.hidden, False)
    x = norm(x, "model.norm.weight")
    final = embedding.T if config.tied_embeddings else weight("lm_head.weight", (config.hidden, config.vocabulary))
    logits: Array = x @ final
    return logits


CONFIGS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"kv_heads": 4},
    "grouped by 4": {"heads": 8, "kv_heads": 2},
    "mqa": {"kv_heads": 1},
    "value size": {"v_head_size": 20},
    "window": {"window": 5},
    "softcap": {"softcap": 3.0},
    "bias": {"qkv_bias": True},
    "untied": {"tied_embeddings": False, "rope_theta": 500.0},
}
SPELLINGS = {
    "query": Spelling(scale="query"),
    "split": Spelling(scale="split"),
    "where": Spelling(mask="where"),
    "opset 17": Spelling(opset=17),
    "opset 21": Spelling(opset=21, scale="split", mask="where"),
    "attention": Spelling(opset=23, core="attention"),
    "broadcast": Spelling(repeat="broadcast"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_decoder_agrees_with_numpy(name: str) -> None:
    config = tiny_config(**CONFIGS[name])
    ids = np.random.default_rng(1).integers(0, config.vocabulary, (1, 12))
    model = tiny_decoder(config, seed=3, key_outlier=20.0 if config.qkv_bias else 0.0)
    onnx.checker.check_model(model, full_check=True)
    logits, _ = run(model, ids, np.ones_like(ids), empty_cache(config, 1))
    expected = oracle(config, 3, ids[0], 20.0 if config.qkv_bias else 0.0)
    np.testing.assert_allclose(logits[0], expected, atol=FLOAT32)


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_agree(name: str) -> None:
    config = tiny_config(kv_heads=1) if name == "broadcast" else tiny_config()
    ids = np.random.default_rng(2).integers(0, config.vocabulary, (2, 9))
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    expected, _ = run(tiny_decoder(config), ids, mask, empty_cache(config, 2))
    logits, _ = run(tiny_decoder(config, SPELLINGS[name]), ids, mask, empty_cache(config, 2))
    np.testing.assert_allclose(logits[mask == 1], expected[mask == 1], atol=FLOAT32)


def test_half_precision() -> None:
    config = tiny_config()
    ids = np.random.default_rng(2).integers(0, config.vocabulary, (1, 9))
    expected, _ = run(tiny_decoder(config), ids, np.ones_like(ids), empty_cache(config, 1))
    model = tiny_decoder(config, Spelling(dtype="float16"))
    logits, present = run(model, ids, np.ones_like(ids), empty_cache(config, 1, np.float16))
    assert {array.dtype for array in present.values()} == {np.dtype(np.float16)}
    np.testing.assert_allclose(logits, expected, atol=FLOAT16)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(0, 2))
def test_chunks_and_padding_change_nothing(chunks: list[int], padding: int) -> None:
    config = tiny_config()
    model = tiny_decoder(config, seed=5)
    tokens = sum(chunks)
    ids = np.random.default_rng(7).integers(0, config.vocabulary, (1, tokens))
    whole, _ = run(model, ids, np.ones_like(ids), empty_cache(config, 1))
    padded = np.concatenate([np.zeros((1, padding), np.int64), ids], 1)
    mask = np.concatenate([np.zeros((1, padding), np.int64), np.ones_like(ids)], 1)
    past, parts, start = empty_cache(config, 1), [], 0
    for length in (chunks[0] + padding, *chunks[1:]):
        end = start + length
        logits, past = run(model, padded[:, start:end], mask[:, :end], past)
        parts.append(logits)
        start = end
    np.testing.assert_allclose(np.concatenate(parts, 1)[:, padding:], whole, atol=FLOAT32)


def test_attention_decides_the_logits() -> None:
    config = tiny_config()
    ids = np.random.default_rng(1).integers(0, config.vocabulary, (1, 12))
    other = ids.copy()
    other[0, 0] = (ids[0, 0] + 1) % config.vocabulary
    a, _ = run(tiny_decoder(config), ids, np.ones_like(ids), empty_cache(config, 1))
    b, _ = run(tiny_decoder(config), other, np.ones_like(ids), empty_cache(config, 1))
    assert np.abs(a[0, -1] - b[0, -1]).max() > 0.02 * np.ptp(a)


def test_same_arguments_same_bytes() -> None:
    first, second = (tiny_decoder(seed=4).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
    assert first != tiny_decoder(seed=5).SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    ("config", "spelling"),
    [
        ({}, Spelling(opset=16)),
        ({}, Spelling(repeat="broadcast")),
        ({}, Spelling(core="attention")),
        ({"softcap": 1.0}, Spelling(core="attention", opset=23)),
    ],
)
def test_impossible_spellings(config: dict[str, Any], spelling: Spelling) -> None:
    with pytest.raises(ConfigError):
        tiny_decoder(tiny_config(**config), spelling)


@pytest.mark.parametrize("change", [{"kv_heads": 3}, {"kv_heads": 0}, {"head_size": 15}])
def test_impossible_configs(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        tiny_config(**change)

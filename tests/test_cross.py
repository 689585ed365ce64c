"""Attention over an encoder's keys and values, rewritten with `cross`: stored once, read in every step.

The models are the zoo's encoder-decoders and decoders of one layer with a self and a cross attention. Keys and values
are fed in the first step only, so that a slot that lost them, or its mask, could not give the original's result.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest

import graphs
import onnx_kivi as kivi
from onnx_kivi.decoder import Decoder
from onnx_kivi.generate import generate
from onnx_kivi.runtime.backend import CacheState, QuantizedBlock
from onnx_kivi.savings import cache_bytes, original_bytes
from onnx_kivi.session import open_model, quiet_options
from onnx_kivi.spec import CROSS, STORED_TOKENS
from stepping import assert_same
from test_zoo import EIGHT_BITS, ROUNDING, difference, original_decoder
from zoo import MODELS, REFUSED

Array = npt.NDArray[Any]
Opener = Callable[[Path], kivi.Session]

ZOO = [name for name in MODELS if "with_past" in name and name not in REFUSED]
BLOCK = 4
DENSE = kivi.KiviConfig(32, 32, BLOCK, 64, 0, 0, cross=True)
SMALL = kivi.KiviConfig(8, 8, BLOCK, 64, 0, 0, cross=True)
ENCODER_TOKENS = 11
STEPS = 9
QUANTIZED = 1e-5  # ten times what rounding changes in these models
KEY, VALUE = "past_0_encoder_key", "past_0_encoder_value"


@pytest.fixture(params=["python", "native"])
def open_session(request: pytest.FixtureRequest) -> Opener:
    """Opens sessions on each host that this machine has."""

    def opened(path: Path) -> kivi.Session:
        try:
            return kivi.Session(path, host=request.param)
        except kivi.BackendUnavailableError as error:
            pytest.skip(str(error))

    return opened


def rewritten(model: onnx.ModelProto | Path, folder: Path, config: kivi.KiviConfig) -> Path:
    """The model, rewritten and saved."""
    path = folder / f"model{config.k_bits}.onnx"
    kivi.save(kivi.rewrite(model, config)[0], path)
    return path


def cross_slots(state: CacheState) -> list[Any]:
    """The slots that store what an encoder gave."""
    return [slot for slot in state.slots if slot.attributes.kind == CROSS]


def test_the_zoo_has_encoder_decoders() -> None:
    assert len(ZOO) >= 4


@pytest.mark.parametrize("name", ZOO)
def test_zoo_at_32_bits_gives_the_recorded_logits(name: str, tmp_path: Path, open_session: Opener) -> None:
    with np.load(MODELS[name].parent / "replay.npz") as file:
        recorded = dict(file)
    session = open_session(rewritten(MODELS[name], tmp_path, DENSE))
    inputs = {i.name for i in session.get_inputs()}
    encoder = {name: array for name, array in recorded.items() if name.endswith((".encoder.key", ".encoder.value"))}
    assert encoder.keys() <= inputs
    outputs, start = [], 0
    for end in recorded["ends"]:
        feeds = {"input_ids": recorded["ids"][:, start:end], **(encoder if start == 0 else {})}
        feeds |= {name: recorded[name] for name in inputs & {"encoder_attention_mask"}}
        outputs.append(session.run(["logits"], feeds)[0])
        start = end
    assert difference(recorded["logits"], np.concatenate(outputs, 1)) <= ROUNDING
    assert len(cross_slots(session.backend.export_state(session.cache.handle))) == len(encoder) // 2


@pytest.mark.parametrize("name", ZOO)
def test_zoo_quantized_is_close_and_not_identical(name: str, tmp_path: Path, open_session: Opener) -> None:
    """With no self slot quantized but for what is behind, the encoder's tokens alone make the difference."""
    session = open_session(rewritten(MODELS[name], tmp_path, SMALL))
    cache = session.new_cache()
    original, quantized = original_decoder(MODELS[name]), Decoder(session, cache)
    ids = np.random.default_rng(5).integers(3, 100, (2, STEPS))
    differences = [difference(original.step(ids[:, [t]]), quantized.step(ids[:, [t]])) for t in range(STEPS)]
    assert cache.sealed_tokens > 0
    slots = cross_slots(session.backend.export_state(cache.handle))
    assert slots
    for slot in slots:
        assert len(slot.rows) == 2
        assert all(row.blocks and isinstance(row.blocks[0].key, QuantizedBlock) for row in slot.rows)
    assert differences[0] <= ROUNDING
    assert all(QUANTIZED <= d <= EIGHT_BITS for d in differences[1:BLOCK])  # no self slot has sealed a block yet
    assert max(differences) <= EIGHT_BITS


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("bits", [32, 8])
def test_zoo_passes_verification_and_a_wrong_cross_scale_does_not(name: str, bits: int, tmp_path: Path) -> None:
    config = kivi.KiviConfig(bits, bits, BLOCK, 64, 0, 0, cross=True)
    path = rewritten(MODELS[name], tmp_path, config)
    checked = kivi.verify(MODELS[name], path)
    assert checked.ok, checked.reason
    assert (checked.sealed_tokens > 0) == (bits < 32)
    model = onnx.load(path)
    node = next(n for n in model.graph.node if any(a.s == CROSS.encode() for a in n.attribute))
    (scale,) = (a for a in node.attribute if a.name == "scale")
    scale.s = str(float(scale.s) * 2).encode()
    onnx.save(model, path)
    assert not kivi.verify(MODELS[name], path).ok


CROSS_LINES = {
    "turn": "ct = Transpose<perm=[0,1,3,2]>(past_0_encoder_key)",
    "product": "c1 = MatMul(query, ct) c2 = Mul(c1, f(0.4))",
    "mask": "c3 = Add(c2, encoder_mask)",
    "values": "cw = Softmax<axis=-1>(c3) crossed = MatMul(cw, past_0_encoder_value)",
}
CROSS_INPUTS = {
    "encoder_key": "float[B,4,E,8] past_0_encoder_key",
    "encoder_value": "float[B,4,E,8] past_0_encoder_value",
    "encoder_mask": "float[B,1,1,E] encoder_mask",
}
CROSS_OUTPUTS = {"crossed": "float[B,4,S,8] crossed"}


def model(
    *,
    inputs: dict[str, str | None] | None = None,
    outputs: dict[str, str | None] | None = None,
    opset: int = 18,
    **lines: str,
) -> onnx.ModelProto:
    """A decoder with one self and one cross attention; lines of CROSS_LINES may be replaced by name."""
    assert lines.keys() <= CROSS_LINES.keys() | {"more"}
    return graphs.decoder(
        opset=opset,
        domains=', "com.microsoft": 1',
        inputs=CROSS_INPUTS | (inputs or {}),
        outputs=CROSS_OUTPUTS | (outputs or {}),
        values=" ".join((graphs.LINES["values"], *(CROSS_LINES | lines).values())),
    )


MERGED_QUERY = "q1 = Transpose<perm=[0,2,1,3]>(query) q2 = Reshape(q1, i(0,0,32))"
MERGED_RESULT = "m2 = Reshape(m1, i(0,0,4,8)) crossed = Transpose<perm=[0,2,1,3]>(m2)"
NO_LINES = {"turn": "", "product": "", "mask": ""}
BIAS = ",".join(["0.5", "-0.3"] * 16 + ["0"] * 64)

SPELLINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "heads repeated": {
        "inputs": {"encoder_key": "float[B,2,E,8] past_0_encoder_key"},
        "turn": """ck = Unsqueeze(past_0_encoder_key, i(2)) cx = Expand(ck, i(1,1,2,1,1)) cr = Reshape(cx, i(0,4,-1,8))
            ct = Transpose<perm=[0,1,3,2]>(cr)""",
        "values": """cv = Slice(past_0_encoder_value, i(0), i(2), i(1))
            cw = Softmax<axis=-1>(c3) crossed = MatMul(cw, past_0_encoder_value)""",
    },
    "keys turned already": {
        "inputs": {"encoder_key": "float[B,4,8,E] past_0_encoder_key"},
        "turn": "ct = Identity(past_0_encoder_key)",
    },
    "float16": {
        "inputs": {"encoder_key": "float16[B,4,E,8] past_0_encoder_key"},
        "turn": "ck = Cast<to=1>(past_0_encoder_key) ct = Transpose<perm=[0,1,3,2]>(ck)",
    },
    "returned as they came": {
        "more": "present_0_encoder_key = Identity(past_0_encoder_key)",
        "outputs": {"encoder_key": "float[B,4,E,8] present_0_encoder_key"},
    },
    "a length that the mask tells": {
        "mask": """size = Shape(past_0_encoder_key) length = Slice(size, i(2), i(3))
            one = ConstantOfShape(length) c0 = Add(c2, one) c3 = Add(c0, encoder_mask)""",
    },
    "padding, zeros and ones": {
        "mask": """seen = Cast<to=9>(encoder_mask) seen4 = Unsqueeze(seen, i(1,2))
            bias = Where(seen4, f(0), f(-3.4028235e38)) c3 = Add(c2, bias)""",
        "inputs": {"encoder_mask": "int64[B,E] encoder_mask"},
    },
    "ai.onnx Attention": {
        "opset": 23,
        **NO_LINES,
        "values": "crossed = Attention(query, past_0_encoder_key, past_0_encoder_value, encoder_mask)",
        "inputs": {"encoder_mask": "float[B,1,S,E] encoder_mask"},
    },
    "MultiHeadAttention": {
        **NO_LINES,
        "values": f"""{MERGED_QUERY} m1 = com.microsoft.MultiHeadAttention<num_heads=4>(
            q2, past_0_encoder_key, past_0_encoder_value, f({BIAS}), , encoder_mask) {MERGED_RESULT}""",
        "inputs": {"encoder_mask": "float[B,1,S,E] encoder_mask"},
    },
}
SPELLINGS["heads repeated"]["inputs"] |= {"encoder_value": "float[B,2,E,8] past_0_encoder_value"}
SPELLINGS["heads repeated"]["values"] = """cv = Unsqueeze(past_0_encoder_value, i(2)) cy = Expand(cv, i(1,1,2,1,1))
    cz = Reshape(cy, i(0,4,-1,8)) cw = Softmax<axis=-1>(c3) crossed = MatMul(cw, cz)"""


def encoder(proto: onnx.ModelProto, rng: np.random.Generator, tokens: int = ENCODER_TOKENS) -> dict[str, Array]:
    """Random keys and values for the model's inputs."""
    sizes = {"B": graphs.BATCH, "E": tokens}
    out = {}
    for info in proto.graph.input:
        if info.name in (KEY, VALUE):
            shape = [sizes[d.dim_param] if d.dim_param else d.dim_value for d in info.type.tensor_type.shape.dim]
            out[info.name] = rng.standard_normal(shape, np.float32).astype(graphs.element_of(info))
    return out


def new_tokens(
    proto: onnx.ModelProto, rng: np.random.Generator, past: int, count: int, tokens: int
) -> dict[str, Array]:
    """Random new tokens, the causal mask of the self attention, and a mask that hides encoder tokens 2, 5, 8, ..."""
    (mask,) = (info for info in proto.graph.input if info.name == "encoder_mask")
    sizes = {"B": graphs.BATCH, "S": count, "E": tokens}
    shape = [sizes.get(d.dim_param, 1) for d in mask.type.tensor_type.shape.dim]
    hidden = np.arange(tokens) % 3 == 2
    added = np.issubdtype(graphs.element_of(mask), np.floating)
    values = (np.where(hidden, -1e4, 0) if added else ~hidden).astype(graphs.element_of(mask))
    return graphs.feeds(rng, past, count, graphs.decoder()) | {
        "encoder_mask": np.ascontiguousarray(np.broadcast_to(values, shape))
    }


def compared(proto: onnx.ModelProto, session: kivi.Session, seed: int, tokens: int) -> list[float]:
    """Differences over a prefill, a chunk and single steps; the first one starts over and feeds the encoder."""
    original = ort.InferenceSession(proto.SerializeToString(), quiet_options(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(seed)
    given = encoder(proto, rng, tokens)
    past = {
        name: np.zeros((graphs.BATCH, graphs.KV_HEADS, 0, 8), np.float32) for name in ("past_0_key", "past_0_value")
    }
    differences, length = [], 0
    for count in graphs.STEPS:
        new = new_tokens(proto, rng, length, count, tokens)
        names = ["out", "crossed", "present_0_key", "present_0_value"]
        out, crossed, *present = original.run(names, new | given | past)
        first = {**given, "past_length": np.zeros(1, np.int64)} if length == 0 else {}
        got = session.run(["out", "crossed"], new | first)
        differences.append(max(difference(a, b) for a, b in zip((out, crossed), got, strict=True)))
        past = dict(zip(past, present, strict=True))
        length += count
    return differences


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_equal_at_32_bits_and_close_at_8(name: str, tmp_path: Path, open_session: Opener) -> None:
    proto = model(**SPELLINGS[name])
    report = kivi.inspect(proto, cross=True)
    assert not report.misses
    assert sorted(site.kind for site in report.sites) == ["cross", "self"]
    dense = open_session(rewritten(proto, tmp_path, DENSE))
    assert max(compared(proto, dense, 0, ENCODER_TOKENS)) <= 2e-6  # sums of at most 16 products, in another order
    small = open_session(rewritten(proto, tmp_path, SMALL))
    differences = compared(proto, small, 0, ENCODER_TOKENS)
    (slot,) = cross_slots(small.backend.export_state(small.cache.handle))
    assert all(len(row.blocks) == ENCODER_TOKENS // BLOCK for row in slot.rows)
    assert differences[0] <= 2e-6
    assert QUANTIZED < max(differences[1:]) <= 0.02  # a step of 1/255 of the range


def test_the_inputs_stay_with_tokens_of_their_own_and_the_outputs_go() -> None:
    proto = model(**SPELLINGS["returned as they came"])
    result, report = kivi.rewrite(proto, SMALL)
    shapes = {i.name: [d.dim_param for d in i.type.tensor_type.shape.dim] for i in result.graph.input}
    assert shapes[KEY][2] == shapes[VALUE][2] == STORED_TOKENS
    assert shapes["encoder_mask"][3] == "E"
    assert "past_0_key" not in shapes
    assert [o.name for o in result.graph.output] == ["out", "crossed"]
    assert [site.removed_inputs for site in report.sites] == [("past_0_key", "past_0_value"), ()]


def test_without_the_option_they_are_left_as_they_are() -> None:
    proto = model()
    result, report = kivi.rewrite(proto, kivi.KiviConfig())
    assert [site.kind for site in report.sites] == ["self"]
    assert not report.misses
    assert STORED_TOKENS not in str(result.graph.input)


def test_a_second_fill_replaces_the_first(tmp_path: Path, open_session: Opener) -> None:
    proto = model()
    session = open_session(rewritten(proto, tmp_path, SMALL))
    compared(proto, session, 0, ENCODER_TOKENS)
    again = compared(proto, session, 1, 2 * ENCODER_TOKENS)
    fresh = kivi.Session(tmp_path / "model8.onnx", host=session.host)
    assert again == compared(proto, fresh, 1, 2 * ENCODER_TOKENS)
    states = [s.backend.export_state(s.cache.handle) for s in (session, fresh)]
    assert cross_slots(states[0])[0].rows[0].blocks
    assert_same(*states)


def test_arrays_of_no_tokens_stand_for_what_is_stored(tmp_path: Path) -> None:
    """In a plain InferenceSession, with the model's own default cache."""
    proto = model()
    options = quiet_options()
    kivi.register(options)
    path = rewritten(proto, tmp_path, SMALL)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    given = encoder(proto, rng)
    new = new_tokens(proto, rng, 0, 3, ENCODER_TOKENS)
    with pytest.raises(ValueError, match=KEY):
        session.run(["crossed"], new)
    (first,) = session.run(["crossed"], new | given)
    start_over = {"past_length": np.zeros(1, np.int64)}
    none = {name: array[:, :, :0] for name, array in given.items()}
    (second,) = session.run(["crossed"], new | none | start_over)
    assert 0 < difference(first, second) < 0.02
    (third,) = session.run(["crossed"], new | given | start_over)
    np.testing.assert_array_equal(third, first)


def test_forks_rows_and_files_carry_what_is_stored(tmp_path: Path, open_session: Opener) -> None:
    proto = model()
    session = open_session(rewritten(proto, tmp_path, SMALL))
    rng = np.random.default_rng(0)
    session.run(None, new_tokens(proto, rng, 0, 6, ENCODER_TOKENS) | encoder(proto, rng))
    new = new_tokens(proto, rng, 6, 1, ENCODER_TOKENS)
    fork = session.cache.fork()
    swapped = session.cache.fork()
    swapped.reorder([1, 0])
    session.cache.save(tmp_path / "cache")
    loaded = session.load_cache(tmp_path / "cache")
    expected = session.run(["crossed"], new)[0]
    for cache in (fork, loaded):
        np.testing.assert_array_equal(session.run(["crossed"], new, cache=cache)[0], expected)
    flipped = {name: array[::-1].copy() if array.shape[0] == 2 else array for name, array in new.items()}
    np.testing.assert_array_equal(session.run(["crossed"], flipped, cache=swapped)[0], expected[::-1])
    fork.crop(0)
    (rewound,) = session.run(["crossed"], new_tokens(proto, rng, 0, 1, ENCODER_TOKENS), cache=fork)
    assert np.abs(rewound).max() > 0
    fork.reset()
    with pytest.raises(kivi.CacheError, match="as the cache holds none"):
        session.run(["crossed"], new_tokens(proto, rng, 0, 1, ENCODER_TOKENS), cache=fork)


def test_an_encoder_is_fed_whole_and_before_it_is_read(tmp_path: Path, open_session: Opener) -> None:
    proto = model()
    session = open_session(rewritten(proto, tmp_path, SMALL))
    rng = np.random.default_rng(0)
    given, new = encoder(proto, rng), new_tokens(proto, rng, 0, 2, ENCODER_TOKENS)
    with pytest.raises(kivi.CacheError, match=f"{KEY}: expected an encoder's keys or values, as the cache holds none"):
        session.run(None, new)
    with pytest.raises(kivi.CacheError, match=f"{VALUE}: expected all of an encoder's keys and values, or none"):
        session.run(None, new | {KEY: given[KEY]})
    assert session.cache.length == 0
    session.run(None, new | given)
    with pytest.raises(kivi.CacheError, match="attn_mask"):
        session.run(None, new_tokens(proto, rng, 2, 1, ENCODER_TOKENS - 1))
    assert session.cache.length == 2


def test_generate_reads_the_encoder_that_it_is_given(tmp_path: Path, open_session: Opener) -> None:
    name = "optimum/bart/decoder_with_past_model"
    session = open_session(rewritten(MODELS[name], tmp_path, DENSE))
    rng = np.random.default_rng(0)

    def inputs() -> dict[str, Array]:
        past = [i for i in session.get_inputs() if STORED_TOKENS in i.shape]
        given: dict[str, Array] = {i.name: 3 * rng.standard_normal((1, 4, 13, 8), np.float32) for i in past}
        return given | {"encoder_attention_mask": np.array([[1] * 10 + [0] * 3])}

    texts = []
    for given in (inputs(), inputs()):
        original = Decoder(open_model(MODELS[name]), given=given)
        texts.append(list(session.generate([2], max_new_tokens=12, inputs=given)))
        assert texts[-1] == list(generate(original, [2], max_new_tokens=12))
    assert texts[0] != texts[1]
    with pytest.raises(kivi.UnsupportedModelError, match=r"encoder_attention_mask: .* one of its `inputs`"):
        next(session.generate([2]))
    mask = {"encoder_attention_mask": given["encoder_attention_mask"]}
    with pytest.raises(kivi.CacheError, match="as the cache holds none"):
        next(session.generate([2], inputs=mask))
    cache = session.new_cache()
    whole = list(session.generate([2], max_new_tokens=12, inputs=given, cache=cache))
    cache.crop(5)
    assert list(session.generate(whole[4:5], max_new_tokens=7, inputs=mask, cache=cache)) == whole[5:]


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_promised_bytes_are_held(tmp_path: Path, bits: int) -> None:
    """The encoder's tokens have no residual, whatever the others keep."""
    config = kivi.KiviConfig(bits, bits, 8, 0, 16, 2, cross=True)
    proto = model()
    result, report = kivi.rewrite(proto, config)
    kivi.save(result, tmp_path / "out.onnx")
    session = kivi.Session(tmp_path / "out.onnx", backend="numpy")
    rng, tokens = np.random.default_rng(0), 21
    session.run(None, new_tokens(proto, rng, 0, 30, tokens) | encoder(proto, rng, tokens))
    assert session.cache.sealed_tokens == (8 if bits < 32 else 0)
    lengths = [(30, [report.sites[0]]), (tokens, [report.sites[1]])]
    assert session.cache.nbytes == graphs.BATCH * sum(cache_bytes(s, config, n) or 0 for n, s in lengths)
    assert session.cache.dense_nbytes == graphs.BATCH * sum(original_bytes(s, n) or 0 for n, s in lengths)


def test_the_report_counts_them_apart() -> None:
    report = kivi.inspect(model(), cross=True)
    data = report.to_dict()
    assert [(site["layer"], site["kind"]) for site in data["sites"]] == [(0, "self"), (0, "cross")]
    assert data["savings"] == kivi.inspect(model()).to_dict()["savings"]
    (short, _) = data["cross_savings"]
    assert short["original"] == 512 * 4 * (8 + 8) * 4
    assert short["original"] > short["bits_8"] > short["bits_4"] > short["bits_2"]
    assert "encoder's cache of 1,500 tokens" in str(report)
    assert "encoder's cache" not in str(kivi.inspect(model()))
    assert kivi.inspect(model()).to_dict()["cross_savings"] == []


NEAR_MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "keys that grow": (
        {"turn": "ck = Concat<axis=2>(past_0_encoder_key, key4) ct = Transpose<perm=[0,1,3,2]>(ck)"}
        | {"inputs": {"key4": "float[B,4,S,8] key4"}},
        "one cache that grows and one that does not",
    ),
    "keys that change": (
        {
            "more": "present_0_encoder_key = Add(past_0_encoder_key, f(1))",
            "outputs": {"encoder_key": "float[B,4,E,8] present_0_encoder_key"},
        },
        "reads it before it is joined with new tokens",
    ),
    "values of another layer": (
        {
            "inputs": {"encoder_value": "float[B,4,E,8] past_1_encoder_value"},
            "values": "cw = Softmax<axis=-1>(c3) crossed = MatMul(cw, past_1_encoder_value)",
        },
        "caches of different layers: past_0_encoder_key, past_1_encoder_value",
    ),
    "returned as values": (
        {
            "more": "present_0_encoder_value = Identity(past_0_encoder_key)",
            "outputs": {"encoder_key": "float[B,4,E,8] present_0_encoder_value"},
        },
        "is returned as 'present_0_encoder_value'; expected its own",
    ),
    "read elsewhere": (
        {"more": "qt = Transpose<perm=[0,1,3,2]>(query) also = MatMul(past_0_encoder_key, qt)"}
        | {"outputs": {"also": "float[B,4,E,S] also"}},
        "'past_0_encoder_key', which a step leaves empty once the cache is stored, is also read by MatMul 'also'",
    ),
    "turned keys read elsewhere": (
        {"more": "also = MatMul(key4, ct)", "outputs": {"also": "float[B,4,S,E] also"}}
        | {"inputs": {"key4": "float[B,4,S,8] key4"}},
        "'ct', which a step leaves empty once the cache is stored, is also read by MatMul 'also'",
    ),
    "a length that nothing else tells": (
        {
            "inputs": {"encoder_mask": "float encoder_mask"},
            "mask": """size = Shape(past_0_encoder_key) length = Slice(size, i(2), i(3))
                one = ConstantOfShape(length) c0 = Add(c2, one) c3 = Add(c0, encoder_mask)""",
        },
        "size 'E' of 'past_0_encoder_key' is known from the cache only",
    ),
    "a length that is declared": (
        {"inputs": {"encoder_key": "float[B,4,12,8] past_0_encoder_key"}},
        "declared to hold exactly 12 tokens",
    ),
    "heads of another number": (
        {"inputs": {"encoder_key": "float[B,2,E,8] past_0_encoder_key"}, "mask": "c3 = Identity(c2)"},
        "4 query heads meet 2 key heads",
    ),
    "softmax over queries": (
        {"values": "cw = Softmax<axis=2>(c3) crossed = MatMul(cw, past_0_encoder_value)"},
        "expected the last axis",
    ),
    "tokens and size exchanged": (
        {
            "turn": "ct = Identity(past_0_encoder_key)",
            "mask": "c3 = Identity(c2)",
            "inputs": {
                "query4": "float[B,4,S,E] query4",
                "encoder_value": "float[B,4,8,E] past_0_encoder_value",
            },
            "product": "c1 = MatMul(query4, ct) c2 = Mul(c1, f(0.4))",
            "outputs": {"crossed": "float[B,4,S,E] crossed"},
        },
        "expected the cache 'past_0_encoder_key' with its tokens on axis -1",
    ),
    "a causal MultiHeadAttention": (
        NO_LINES
        | {
            "values": f"""{MERGED_QUERY} m1 = com.microsoft.MultiHeadAttention<num_heads=4, unidirectional=1>(
                q2, past_0_encoder_key, past_0_encoder_value) {MERGED_RESULT}""",
        },
        "counts positions from 0",
    ),
    "a MultiHeadAttention with the ends of its rows": (
        NO_LINES
        | {
            "inputs": {"ends": "int32[B] ends"},
            "values": f"""{MERGED_QUERY} m1 = com.microsoft.MultiHeadAttention<num_heads=4>(
                q2, past_0_encoder_key, past_0_encoder_value, , ends) {MERGED_RESULT}""",
        },
        "its mask counts tokens of 'past_0_encoder_key', which are not the decoder's",
    ),
    "a MultiHeadAttention that projects keys with a bias": (
        NO_LINES
        | {
            "values": f"""{MERGED_QUERY} m1 = com.microsoft.MultiHeadAttention<num_heads=4>(
                q2, past_0_encoder_key, past_0_encoder_value, f({BIAS[:-1]}1)) {MERGED_RESULT}""",
        },
        "the bias of a projection of what is in the cache already",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_say_why(name: str) -> None:
    changes, reason = NEAR_MISSES[name]
    report = kivi.inspect(model(**changes), cross=True)
    assert all(site.kind == "self" and KEY not in site.cache_inputs for site in report.sites)
    assert any(re.search(reason, miss.reason) for miss in report.misses), report


def test_partial_leaves_those_that_miss_as_they_are(tmp_path: Path) -> None:
    proto = model(**NEAR_MISSES["read elsewhere"][0])
    with pytest.raises(kivi.UnsupportedModelError, match="--partial rewrites those alone"):
        kivi.rewrite(proto, DENSE)
    result, _ = kivi.rewrite(proto, DENSE, partial=True)
    assert STORED_TOKENS not in str(result.graph.input)
    assert not any(a.s == CROSS.encode() for node in result.graph.node for a in node.attribute)
    kivi.save(result, tmp_path / "model.onnx")
    session = kivi.Session(tmp_path / "model.onnx")
    rng = np.random.default_rng(0)
    new = new_tokens(proto, rng, 0, 2, ENCODER_TOKENS)
    with pytest.raises(ValueError, match=KEY):
        session.run(["crossed"], new)
    assert session.run(["crossed"], new | encoder(proto, rng))[0].any()


@pytest.mark.parametrize("name", [name for name in REFUSED if "merged" in name])
def test_merged_decoders_are_refused_with_the_same_reason(name: str) -> None:
    with pytest.raises(kivi.UnsupportedModelError, match=REFUSED[name]):
        kivi.rewrite(MODELS[name], SMALL)

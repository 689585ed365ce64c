"""An encoder's keys and values, rewritten with `cross`: stored once, quantized, read in every step, on every host."""

from __future__ import annotations

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
from cross_graphs import (
    BLOCK,
    DENSE,
    ENCODER_TOKENS,
    KEY,
    QUANTIZED,
    SMALL,
    VALUE,
    compared,
    cross_slots,
    encoder,
    model,
    new_tokens,
    rewritten,
)
from limits import EIGHT_BITS, ROUNDING, difference, original_stepper
from onnx_kivi.measure.synthetic import synthetic_stepper
from onnx_kivi.rewrite.savings import cache_bytes, original_bytes
from onnx_kivi.run.generate import generate
from onnx_kivi.run.session import open_model, quiet_options
from onnx_kivi.run.stepper import Stepper
from onnx_kivi.runtime.backend import QuantizedBlock
from onnx_kivi.spec import CROSS, STORED_TOKENS
from stepping import assert_same
from zoo import MODELS, REFUSED

Array = npt.NDArray[Any]
Opener = Callable[[Path], kivi.Session]

ZOO = [name for name in MODELS if "with_past" in name and name not in REFUSED]
STEPS = 9


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
    original, quantized = original_stepper(MODELS[name], 2), synthetic_stepper(session, cache, batch=2)
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
    none = {name: array[:, :, :0] for name, array in given.items()}
    with pytest.raises(ValueError, match=KEY):
        session.run(["crossed"], new)
    with pytest.raises(Exception, match="expected an encoder's keys and values in the first run, got none"):
        session.run(["crossed"], new | none)
    (first,) = session.run(["crossed"], new | given)
    start_over = {"past_length": np.zeros(1, np.int64)}
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
    with pytest.raises(kivi.CacheError, match="expected an encoder's keys and values in the first run, got none"):
        session.run(["crossed"], new_tokens(proto, rng, 0, 1, ENCODER_TOKENS), cache=fork)


def test_an_encoder_is_fed_whole_and_before_it_is_read(tmp_path: Path, open_session: Opener) -> None:
    proto = model()
    session = open_session(rewritten(proto, tmp_path, SMALL))
    rng = np.random.default_rng(0)
    given, new = encoder(proto, rng), new_tokens(proto, rng, 0, 2, ENCODER_TOKENS)
    with pytest.raises(kivi.CacheError, match="expected an encoder's keys and values in the first run, got none"):
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
        original = Stepper(open_model(MODELS[name]), given=given)
        texts.append(list(session.generate([2], max_new_tokens=12, inputs=given)))
        assert texts[-1] == list(generate(original, [2], max_new_tokens=12))
    assert texts[0] != texts[1]
    with pytest.raises(kivi.UnsupportedModelError, match=r"encoder_attention_mask: .* one of its `inputs`"):
        next(session.generate([2]))
    mask = {"encoder_attention_mask": given["encoder_attention_mask"]}
    with pytest.raises(kivi.CacheError, match="expected an encoder's keys and values in the first run, got none"):
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

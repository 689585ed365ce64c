"""The rewritten model: what vanishes, what survives, shapes of the cache, partial rewrites, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import onnx_kivi as kivi
from graphs import BATCH, decoder, feeds, half, replay, two_layers
from onnx_kivi.spec import CONTROL_INPUTS

ROUNDING = 2e-6  # sums of at most 16 float32 products of order 1, taken in another order
HALF_ROUNDING = 4e-3  # float16 has 11 bits; the original rounds scores, weights and sums to it, the op only its ends


def nodes(model: onnx.ModelProto, op: str) -> list[dict[str, Any]]:
    """Attributes of the nodes of an op."""
    found = [n for n in model.graph.node if n.op_type == op]
    return [{a.name: onnx.helper.get_attribute_value(a) for a in n.attribute} for n in found]


def test_caches_leave_the_interface_and_two_inputs_with_defaults_join() -> None:
    original = decoder()
    before = original.SerializeToString(deterministic=True)
    model, report = kivi.rewrite(original)
    assert original.SerializeToString(deterministic=True) == before
    assert [i.name for i in model.graph.input] == ["query", "key", "value", "mask", *CONTROL_INPUTS]
    assert [o.name for o in model.graph.output] == ["out"]
    defaults = {t.name: onnx.numpy_helper.to_array(t).tolist() for t in model.graph.initializer}
    assert defaults["cache_handle"] == [0]
    assert defaults["past_length"] == [-1]
    assert model.ir_version >= 8
    ops = [n.op_type for n in model.graph.node]
    assert sorted(ops) == ["Identity", "KvCacheStepV2", "QuantizedKvSdpa"]
    assert {o.domain: o.version for o in model.opset_import} == {"": 18, "onnx_kivi": 1}
    assert report.sites[0].cache_inputs == ("past_0_key", "past_0_value")
    assert report.sites[0].cache_outputs == ("present_0_key", "present_0_value")


def test_the_rest_survives_as_it_was() -> None:
    original = decoder()
    original.metadata_props.add(key="author", value="somebody")
    original.graph.node[0].metadata_props.add(key="gone", value="with the cache")
    original.graph.doc_string = "a doc string"
    original.graph.node.append(onnx.helper.make_node("Relu", ["out"], ["positive"], name="kept"))
    original.graph.node[-1].metadata_props.add(key="scope", value="layer 0")
    original.graph.output.append(onnx.helper.make_tensor_value_info("positive", 1, ["B", 4, "S", 8]))
    function = onnx.helper.make_function("local", "f", ["x"], ["y"], [onnx.helper.make_node("Relu", ["x"], ["y"])], [])
    original.functions.append(function)
    model, _ = kivi.rewrite(original)
    assert [(p.key, p.value) for p in model.metadata_props] == [("author", "somebody")]
    assert model.graph.doc_string == "a doc string"
    (kept,) = (n for n in model.graph.node if n.name == "kept")
    assert kept == original.graph.node[-1]
    assert list(model.functions) == [function]
    assert list(model.graph.output) == [o for o in original.graph.output if not o.name.startswith("present")]
    assert list(model.graph.input)[:4] == list(original.graph.input)[:4]


def test_the_same_model_and_configuration_give_the_same_bytes() -> None:
    def made(original: onnx.ModelProto, **config: Any) -> bytes:
        model, _ = kivi.rewrite(original, kivi.KiviConfig(**config))
        return bytes(model.SerializeToString(deterministic=True))

    def model_id(content: bytes) -> bytes:
        return bytes(nodes(onnx.load_from_string(content), "KvCacheStepV2")[0]["model_id"])

    assert made(decoder()) == made(decoder())
    others = [decoder(scale="scaled = Mul(scores, f(0.4))"), decoder(opset=17)]
    ids = {model_id(made(m)) for m in [decoder(), *others]} | {model_id(made(decoder(), k_bits=4))}
    assert len(ids) == 4


def test_configuration_reaches_the_nodes_by_layer() -> None:
    config = kivi.KiviConfig(4, 2, 32, 16, 96, 7, layer_bits={1: (8, 32)})
    model, report = kivi.rewrite(two_layers(-1), config)
    assert [site.layer for site in report.sites] == [0, 1]
    first, second = nodes(model, "QuantizedKvSdpa")
    assert (first["slot"], first["k_bits"], first["v_bits"]) == (0, 4, 2)
    assert (second["slot"], second["k_bits"], second["v_bits"]) == (1, 8, 32)
    for node in (first, second):
        assert (node["block_tokens"], node["v_group_size"], node["residual_length"], node["sink_length"]) == (
            32,
            16,
            96,
            7,
        )
    assert nodes(model, "KvCacheStepV2")[0]["layers"] == 2


def test_a_plain_session_keeps_state_rewinds_and_restarts(tmp_path: Path) -> None:
    model = decoder()
    kivi.save(kivi.rewrite(model, kivi.KiviConfig(32, 32))[0], tmp_path / "out.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    kivi.register(options)
    session = ort.InferenceSession(tmp_path / "out.onnx", options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    prompt, token = feeds(rng, 0, 6, model), feeds(rng, 6, 1, model)
    session.run(None, prompt)
    expected = session.run(None, token)[0]
    np.testing.assert_array_equal(session.run(None, token | {"past_length": np.array([6])})[0], expected)
    session.run(None, prompt | {"past_length": np.array([0])})
    np.testing.assert_array_equal(session.run(None, token)[0], expected)


SHAPES: dict[str, dict[str, Any]] = {
    "shape of past and of past with new": {
        "outputs": {"sizes": "int64[8] sizes"},
        "guard": "s1 = Shape(past_0_key) s2 = Shape(present_0_value) sizes = Concat<axis=0>(s1, s2)",
    },
    "parts of a shape": {
        "outputs": {"sizes": "int64[3] sizes"},
        "guard": """s1 = Shape<start=2,end=3>(past_0_key) s2 = Shape<start=-2>(present_0_key)
            sizes = Concat<axis=0>(s1, s2)""",
    },
    "shape of repeated and transposed keys": {
        "outputs": {"sizes": "int64[9] sizes"},
        "guard": "s1 = Shape(k6) s2 = Shape(kt) sizes = Concat<axis=0>(s1, s2)",
    },
    "shape of what only gives a shape": {
        "outputs": {"sizes": "int64[4] sizes"},
        "guard": "other = Transpose<perm=[3,2,1,0]>(k) sizes = Shape(other)",
    },
    "shape of scores": {"outputs": {"sizes": "int64[4] sizes"}, "guard": "sizes = Shape(scores)"},
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_the_cache_chain_stay_right(name: str, tmp_path: Path) -> None:
    model = decoder(**SHAPES[name])
    out, sizes = model.graph.output[0].name, [o for o in model.graph.output if o.name == "sizes"]
    assert (out, len(sizes)) == ("out", 1)
    path = tmp_path / "out.onnx"
    kivi.save(kivi.rewrite(model, kivi.KiviConfig(32, 32))[0], path)
    onnx.checker.check_model(str(path), full_check=True)
    original = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    session, rng, length = kivi.Session(path), np.random.default_rng(0), 0
    for count in (5, 2, 1):
        new = feeds(rng, length, count, model)
        past = {f"past_0_{side}": np.zeros((BATCH, 2, length, 8), np.float32) for side in ("key", "value")}
        np.testing.assert_array_equal(session.run(["sizes"], new)[0], original.run(["sizes"], new | past)[0])
        length += count


def test_a_batch_size_that_nothing_else_has_is_refused() -> None:
    rows: dict[str, Any] = {"outputs": {"rows": "int64[1] rows"}, "guard": "rows = Shape<start=0,end=1>(past_0_key)"}
    other = {"past_key": "float[R,2,P,8] past_0_key"}
    assert not kivi.inspect(decoder(**rows, inputs=other)).misses  # Concat makes R the rows of the new key
    with pytest.raises(kivi.UnsupportedModelError, match="known from the cache only; give the axis of another input"):
        kivi.rewrite(
            decoder(
                inputs=other | {"key": "float[N] flat"},
                outputs=rows["outputs"],
                join_key="""rows = Shape<start=0,end=1>(past_0_key) to = Concat<axis=0>(rows, i(2), i(-1), i(8))
                    key = Reshape(flat, to) present_0_key = Concat<axis=2>(past_0_key, key)""",
            )
        )


def test_partial_rewrites_what_matches(tmp_path: Path) -> None:
    model = two_layers(2)
    report = kivi.inspect(model)
    assert [site.layer for site in report.sites] == [0]
    assert any("expected the last axis" in miss.reason for miss in report.misses)
    with pytest.raises(kivi.UnsupportedModelError, match="--partial"):
        kivi.rewrite(model)
    partial, _ = kivi.rewrite(model, kivi.KiviConfig(32, 32), partial=True)
    assert "past_1_key" in {i.name for i in partial.graph.input}
    assert "past_0_key" not in {i.name for i in partial.graph.input}
    kivi.save(partial, tmp_path / "out.onnx")
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    original = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    session, rng = kivi.Session(tmp_path / "out.onnx"), np.random.default_rng(0)
    names = [o.name for o in original.get_outputs()]
    past = {
        f"past_{layer}_{side}": np.zeros((BATCH, 2, 0, 8), np.float32) for layer in (0, 1) for side in ("key", "value")
    }
    length = 0
    for count in (5, 2):
        new = feeds(rng, length, count, model)
        expected = dict(zip(names, original.run(None, new | past), strict=True))
        kept = {name: past[name] for name in past if "_1_" in name}
        for name, got in zip(("out", "out_1"), session.run(["out", "out_1"], new | kept), strict=True):
            assert np.abs(got - expected[name]).max() <= ROUNDING * np.ptp(expected[name])
        past = {name: expected[name.replace("past", "present")] for name in past}
        length += count


def test_half_precision_models_get_casts_around_the_node(tmp_path: Path) -> None:
    model = half(decoder(mask="masked = Where(seen, scaled, f(-3.0e38))", inputs={"mask": "bool[B,1,S,T] seen"}))
    assert kivi.inspect(model).element == "float16"
    for expected, got in replay(model, tmp_path):
        assert got.dtype == np.float16
        assert np.abs(got.astype(np.float32) - expected).max() <= HALF_ROUNDING * np.ptp(expected)


def test_inputs_that_old_models_list_for_their_initializers_are_dropped() -> None:
    model = decoder()
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    made, _ = kivi.rewrite(model)
    assert made.ir_version >= 8
    assert [i.name for i in made.graph.input] == ["query", "key", "value", "mask", *CONTROL_INPUTS]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opset": 10}, "expected ai.onnx 11 to"),
        ({"opset": 99}, "expected ai.onnx 11 to"),
        ({"inputs": {"mask": "float[B,1,S,T] past_length"}, "mask": "masked = Add(scaled, past_length)"}, "rename it"),
        (
            {
                "inputs": {"past_key": "float[B,2,T,8] k_all", "past_value": "float[B,2,T,8] v_all"},
                "outputs": {"present_key": None, "present_value": None},
                "join_key": "present_0_key = Identity(k_all)",
                "join_value": "present_0_value = Identity(v_all)",
            },
            "no input is a cache",
        ),
    ],
)
def test_what_cannot_be_rewritten_is_said_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(kivi.UnsupportedModelError, match=message) as error:
        kivi.rewrite(decoder(**changes))
    assert "\n" not in str(error.value)


def test_a_rewritten_model_is_not_rewritten_again() -> None:
    with pytest.raises(kivi.UnsupportedModelError, match="already rewritten"):
        kivi.rewrite(kivi.rewrite(decoder())[0])

"""Symbolic sizes and shapes against real ones; model files: whole, truncated, external, hostile; the ops' schemas."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

import onnx_kivi as kivi
from graphs import BATCH, decoder, feeds
from onnx_kivi import graph
from onnx_kivi.graph import files
from onnx_kivi.graph.symbolic import dims
from onnx_kivi.spec import OPS, SdpaAttributes
from spellings import SPELLINGS

VALUES = {"a": 2, "b": 3, "c": 5}


def sizes() -> st.SearchStrategy[int | dims.Dim]:
    leaves = st.integers(-3, 3) | st.sampled_from([dims.symbol(name) for name in VALUES])
    return st.recursive(
        leaves,
        lambda inner: st.tuples(inner, inner, st.booleans()).map(lambda t: t[0] + t[1] if t[2] else t[0] * t[1]),
        max_leaves=8,
    )


def number(size: int | dims.Dim) -> int:
    value = dims.evaluate(size, VALUES.__getitem__)
    assert isinstance(value, int)
    return value


@given(sizes(), sizes())
def test_sizes_compute_like_integers(x: int | dims.Dim, y: int | dims.Dim) -> None:
    assert number(x + y) == number(x) + number(y)
    assert number(x - y) == number(x) - number(y)
    assert number(x * y) == number(x) * number(y)
    assert x * (y + 1) == x * y + x
    assert hash(x + y) == hash(y + x)


@given(sizes(), sizes())
def test_division_is_exact_or_unknown(x: int | dims.Dim, y: int | dims.Dim) -> None:
    if y != 0:
        assert dims.divide(x * y, y) == x
    assert dims.divide(x, 0) is None
    assert dims.divide(dims.symbol("a") * 2 + 1, 2) is None
    assert dims.divide(dims.symbol("a"), dims.symbol("b")) is None


def test_a_size_that_grows_without_bound_is_refused() -> None:
    size: int | dims.Dim = dims.symbol("a") + dims.symbol("b")
    for _ in range(3):
        size = size * size
    with pytest.raises(dims.TooComplexError):
        size * size


@pytest.mark.parametrize("name", [name for name, changes in SPELLINGS.items() if "domains" not in changes])
def test_inferred_shapes_are_the_real_ones(name: str) -> None:
    model = decoder(**SPELLINGS[name])
    shapes = graph.infer_shapes(graph.Graph(model))
    names = [o for node in model.graph.node for o in node.output]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    new = feeds(np.random.default_rng(0), 4, 3, model)
    sizes = {"B": BATCH, "S": 3, "P": 4, "T": 7}
    for info in model.graph.input:
        if info.name.startswith("past"):
            dims_of = [sizes.get(d.dim_param, d.dim_value) for d in info.type.tensor_type.shape.dim]
            new[info.name] = np.zeros(dims_of, np.float32)
    real = dict(zip(names, ReferenceEvaluator(model).run(None, new), strict=True))
    for tensor, array in real.items():
        shape = shapes.shape(tensor)
        assert shape is not None
        assert len(shape) == array.ndim
        for size, expected in zip(shape, array.shape, strict=True):
            if isinstance(size, int) or size.symbols <= sizes.keys():
                assert dims.evaluate(size, sizes.__getitem__) == expected, tensor
        value = shapes.value(tensor)
        if value is not None and not any(isinstance(x, dims.Dim) for x in value.flat):
            np.testing.assert_allclose(np.asarray(value, array.dtype), array, rtol=1e-6)  # float32 against float64


def test_comparisons_broadcast_before_opset_16() -> None:
    text = """<ir_version: 8, opset_import: ["": 14]> g (float[A,1] x, float[1,B] y, float[3] u) => (bool[A,B] z)
        { z = LessOrEqual(x, y) v = GreaterOrEqual(u, x) }"""
    shapes = graph.infer_shapes(graph.Graph(onnx.parser.parse_model(text)))
    assert shapes.shape("z") == (dims.symbol("A"), dims.symbol("B"))
    assert shapes.shape("v") == (dims.symbol("A"), 3)
    assert shapes.element("z") == onnx.TensorProto.BOOL


def test_concat_makes_its_other_axes_equal() -> None:
    text = """<ir_version: 8, opset_import: ["": 18]> g (float[A,2] x, float[B,2] y) => (float[B,C] z)
        { z = Concat<axis=1>(x, y) w = Add(z, z) }"""
    shapes = graph.infer_shapes(graph.Graph(onnx.parser.parse_model(text)))
    assert shapes.shape("w") == (dims.symbol("A"), 4)
    assert shapes.shape("y") == (dims.symbol("A"), 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"\x08", "truncated or something else"),
        (b"", "without nodes"),
        (b"not onnx", "truncated or something else"),
    ],
)
def test_what_is_no_model_is_said_in_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(kivi.UnsupportedModelError, match=message) as error:
        graph.load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_folder_means_its_model_file(tmp_path: Path) -> None:
    graph.save(decoder(), tmp_path / "model.onnx")
    assert graph.load(tmp_path) == graph.load(tmp_path / "model.onnx")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_models_are_refused_or_understood_and_never_crash(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(decoder().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    path.write_bytes(bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))]))
    with contextlib.suppress(kivi.KiviError):
        kivi.rewrite(path)


def external_model(folder: Path) -> tuple[Path, bytes]:
    """A decoder with one weight in weights/data.bin, behind 64 bytes of something else; and that file's content."""
    (folder / "weights").mkdir(parents=True)
    weight = np.linspace(-1, 1, 4, dtype=np.float32)
    content = bytes(64) + weight.tobytes()
    (folder / "weights" / "data.bin").write_bytes(content)
    model = decoder(mask="m1 = Add(scaled, big) masked = Add(m1, mask)")
    tensor = model.graph.initializer.add(name="big", dims=[1, 4, 1, 1], data_type=onnx.TensorProto.FLOAT)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "weights/data.bin"), ("offset", "64"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx", content


@pytest.mark.parametrize("link", [False, True])
def test_external_weights_stay_external(tmp_path: Path, link: bool) -> None:
    path, content = external_model(tmp_path / "a")
    (tmp_path / "b").mkdir()
    out = tmp_path / "b" / "out.onnx"
    for _ in range(2):  # the second time the weights are there already
        graph.save(kivi.rewrite(path)[0], out, link=link)
    moved = tmp_path / "b" / "weights" / "data.bin"
    assert moved.read_bytes() == content
    assert moved.samefile(tmp_path / "a" / "weights" / "data.bin") == link
    assert list(moved.parent.iterdir()) == [moved]
    (tensor,) = (t for t in onnx.load(out, load_external_data=False).graph.initializer if t.name == "big")
    assert {e.key: e.value for e in tensor.external_data} == {
        "location": "weights/data.bin",
        "offset": "64",
        "length": "16",
    }
    if not link:
        onnx.checker.check_model(str(out), full_check=True)
    kivi.Session(out)


def test_in_the_same_folder_the_weight_file_is_shared(tmp_path: Path) -> None:
    path, _ = external_model(tmp_path)
    out = save_rewrite(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "rewritten.onnx", "weights"]
    onnx.checker.check_model(str(out), full_check=True)


def test_weights_are_copied_where_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: object) -> None:
        raise OSError

    path, content = external_model(tmp_path / "a")
    (tmp_path / "b").mkdir()
    monkeypatch.setattr("os.link", no_link)
    graph.save(graph.load(path), tmp_path / "b" / "out.onnx", link=True)
    assert (tmp_path / "b" / "weights" / "data.bin").read_bytes() == content


def test_a_hub_s_linked_weights_are_linked_to_what_they_point_to(tmp_path: Path) -> None:
    _, content = external_model(tmp_path / "a")
    snapshot = tmp_path / "snapshot"
    (snapshot / "weights").mkdir(parents=True)
    (snapshot / "model.onnx").symlink_to("../a/model.onnx")
    (snapshot / "weights" / "data.bin").symlink_to("../../a/weights/data.bin")
    (tmp_path / "far" / "b").mkdir(parents=True)
    graph.save(kivi.load(snapshot), tmp_path / "far" / "b" / "out.onnx", link=True)
    moved = tmp_path / "far" / "b" / "weights" / "data.bin"
    assert moved.read_bytes() == content
    assert not moved.is_symlink()


def test_another_model_s_weight_file_is_left_alone(tmp_path: Path) -> None:
    path, content = external_model(tmp_path / "a")
    other = tmp_path / "b" / "weights" / "data.bin"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"other")
    graph.save(graph.load(path), tmp_path / "b" / "out.onnx")
    assert other.read_bytes() == b"other"
    assert (tmp_path / "b" / "out-data.bin").read_bytes() == content
    kivi.Session(save_rewrite(tmp_path / "b" / "out.onnx"))


def save_rewrite(path: Path) -> Path:
    graph.save(kivi.rewrite(path)[0], path.with_name("rewritten.onnx"))
    return path.with_name("rewritten.onnx")


def test_external_weights_outside_the_folder_are_refused(tmp_path: Path) -> None:
    path, _ = external_model(tmp_path / "a")
    model = onnx.load(path, load_external_data=False)
    (tensor,) = (t for t in model.graph.initializer if t.name == "big")
    tensor.external_data[0].value = "../../secret"
    onnx.save(model, path)
    with pytest.raises(kivi.UnsupportedModelError, match="in the model's folder"):
        save_rewrite(path)


def test_axes_and_shapes_in_external_data_are_read(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(onnx.load(tiny), path, save_as_external_data=True, location="data", size_threshold=0)
    assert kivi.inspect(path).sites == kivi.inspect(tiny).sites
    (tmp_path / "data").write_bytes((tmp_path / "data").read_bytes()[:-1])
    with pytest.raises(kivi.UnsupportedModelError, match=r"data: expected at least [\d,]+ bytes, which .* truncated"):
        kivi.inspect(path)


def test_an_original_is_never_overwritten(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(onnx.load(tiny), path)
    model, _ = kivi.rewrite(path)
    with pytest.raises(kivi.ConfigError, match="originals are never overwritten"):
        kivi.save(model, path)
    assert len(kivi.inspect(path).sites) == 2
    for _ in range(2):
        kivi.save(model, tmp_path / "small.onnx")


def test_missing_external_weights_are_named(tmp_path: Path) -> None:
    path, _ = external_model(tmp_path / "a")
    (tmp_path / "a" / "weights" / "data.bin").unlink()
    (tmp_path / "b").mkdir()
    with pytest.raises(kivi.UnsupportedModelError, match=r"data\.bin: expected the model's external weights"):
        graph.save(graph.load(path), tmp_path / "b" / "out.onnx")
    assert not any((tmp_path / "b").iterdir())


def test_a_model_too_large_for_one_file_gets_a_weight_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PROTOBUF_LIMIT", 1 << 12)
    model = decoder(mask="m1 = Add(scaled, big) masked = Add(m1, mask)")
    big = np.random.default_rng(0).standard_normal((2, 4, 16, 64)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(big, "big"))
    model.metadata_props.add(key="origin", value="test")
    graph.save(model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").stat().st_size < 4096 < (tmp_path / "out.onnx.data").stat().st_size
    loaded = onnx.load(tmp_path / "out.onnx")
    (tensor,) = (t for t in loaded.graph.initializer if t.name == "big")
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), big)
    assert loaded.metadata_props[0].value == "test"
    assert [n.op_type for n in loaded.graph.node] == [n.op_type for n in model.graph.node]


def test_an_old_file_survives_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    out = tmp_path / "out.onnx"
    out.write_bytes(b"old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        graph.save(decoder(), out)
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


def test_no_schema_outlives_the_interpreter() -> None:
    code = """if True:
        import atexit, onnx
        atexit.register(lambda: print([s.name for s in onnx.defs.get_all_schemas() if s.domain == "onnx_kivi"]))
        from onnx_kivi.graph import register_schemas
        register_schemas()
        print(onnx.defs.has("KvCacheStep", 1, "onnx_kivi"))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["True", "[]"]


def test_schemas_say_what_the_spec_says() -> None:
    graph.register_schemas()
    graph.register_schemas()
    for op in OPS:
        schema = onnx.defs.get_schema(op.name, 1, "onnx_kivi")
        assert [i.name for i in schema.inputs] == [t.name for t in op.inputs]
        assert [o.name for o in schema.outputs] == [t.name for t in op.outputs]
        assert schema.attributes.keys() == {a.name for a in op.attributes}
    wire: dict[str, Any] = SdpaAttributes(slot=0).to_wire()
    node = onnx.helper.make_node("QuantizedKvSdpa", list("qkvmhs"), ["o"], domain="onnx_kivi", **wire)
    shapes: dict[str, list[str | int | None]] = {"q": ["B", 4, "S", 8], "v": ["B", 2, "S", 5]}
    types = {n: onnx.helper.make_tensor_type_proto(1, s) for n, s in shapes.items()}
    types |= {n: onnx.helper.make_tensor_type_proto(1, None) for n in "km"} | {
        "h": onnx.helper.make_tensor_type_proto(1, [0])
    }
    types["s"] = onnx.helper.make_tensor_type_proto(7, [1])
    schema = onnx.defs.get_schema("QuantizedKvSdpa", 1, "onnx_kivi")
    inferred = onnx.shape_inference.infer_node_outputs(schema, node, types)["o"].tensor_type
    assert [d.dim_param or d.dim_value for d in inferred.shape.dim] == ["B", 4, "S", 5]

"""Attributes of nodes: the spec and the native library take and refuse the same ones, whatever type or locale."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes import model
from onnx_kivi import spec
from onnx_kivi.errors import ConfigError, KiviError
from onnx_kivi.spec_schemes import K_SCHEMES, V_BITS, V_SCHEMES, k_bits_of
from stepping import sdpa

_native = pytest.importorskip("onnx_kivi._native", reason="nothing is compiled here", exc_type=ImportError)

from onnx_kivi.runtime import native  # noqa: E402

LIMITS = {
    "slot": (0, spec.MAX_SLOT),
    "block_tokens": (1, spec.MAX_BLOCK_TOKENS),
    "v_group_size": (0, spec.MAX_V_GROUP_SIZE),
    "residual_length": (0, spec.MAX_RESIDUAL_LENGTH),
    "sink_length": (0, spec.MAX_SINK_LENGTH),
    "window": (0, spec.MAX_WINDOW),
}
STEP = {"model_id": "m", "layers": 1}


def outcome(make: Any, wire: dict[str, Any]) -> str:
    try:
        make(wire)
    except KiviError as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


def both(wire: dict[str, Any], step: bool = False) -> str:
    """What spec and native library say of these attributes: the same."""
    kind = spec.StepAttributes if step else spec.SdpaAttributes
    version = min(wire.get("spec_version", 1), 2)
    defaults = {a.name: a.default for a in kind.specs(version) if a.default is not None}
    words = outcome(kind.from_wire, wire)
    assert outcome(getattr(_native, kind.__name__), defaults | wire) == words
    return words


WINDOW_SINKS = {"slot": 0, "spec_version": 2, "window": 8}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window_sinks": 4}, "taken"),
        ({"window_sinks": 5}, "window_sinks: expected at most sink_length, 4, and a window, got 5 and window 8"),
        ({"window_sinks": 1, "window": 0}, "and a window, got 1 and window 0"),
        ({"evict": 1}, "taken"),
        ({"evict": 2}, "evict: expected one of 0, 1, got 2"),
        ({"evict": 1, "window": 0}, "evict: expected 0 without a window over a slot that grows, got 1"),
        ({"evict": 1, "kind": "cross"}, "evict: expected 0 without a window over a slot that grows, got 1"),
        ({"window_sinks": -1}, "window_sinks: expected an integer from 0 to 65536, got -1"),
        ({"window_sinks": 1 << 17}, "window_sinks: expected an integer from 0 to 65536, got 131072"),
        *(({"k_scheme": scheme, "k_bits": k_bits_of(scheme)[0]}, "taken") for scheme in K_SCHEMES),
        *(({"v_scheme": scheme, "v_bits": V_BITS[scheme][-1]}, "taken") for scheme in V_SCHEMES),
        ({"k_scheme": "digits:2", "k_bits": 4}, "k_bits: expected one of 2 with k_scheme digits:2, got 4"),
        (
            {"k_scheme": "affine+token", "k_bits": 32},
            "k_bits: expected one of 2, 4 with k_scheme affine+token, got 32",
        ),
        ({"v_scheme": "symmetric+rotated", "v_bits": 8}, "v_bits: expected one of 2, 3, 4 with v_scheme symmetric"),
        ({"v_bits": 3}, "v_bits: expected one of 2, 4, 8, 32 with v_scheme affine, got 3"),
        ({"k_bits": 3}, "k_bits: expected one of 2, 4, 8, 32, got 3"),
        ({"k_scheme": "fast"}, f"k_scheme: expected one of {', '.join(K_SCHEMES)}, got 'fast'"),
        ({"v_scheme": "digits:2"}, "v_scheme: expected one of affine, symmetric+rotated, got 'digits:2'"),
        ({"dense_element": "float16"}, "float16 is specified but not built yet"),
        ({"dense_element": "float64"}, "dense_element: expected one of float32, got 'float64'"),
        ({"kind": "latent"}, "kind: expected one of self, cross, got 'latent'; latent is specified but not built yet"),
        ({"spec_version": 3}, "SpecMismatchError: spec_version: expected 1 or 2, got 3"),
        ({"spec_version": 0}, "SpecMismatchError: spec_version: expected 1 or 2, got 0"),
    ],
)
def test_what_version_2_brought_is_served_or_refused_by_name(changes: dict[str, Any], words: str) -> None:
    assert words in both(WINDOW_SINKS | changes)


@pytest.mark.parametrize("name", ["evict", "window_sinks", "k_scheme", "v_scheme", "dense_element", "colour"])
def test_a_node_of_version_1_has_none_of_it(name: str) -> None:
    assert f"attribute {name}: expected one of slot, kind" in both({"slot": 0, name: 0})


def test_a_step_says_why_its_rows_are_of_one_length_from_version_2_on() -> None:
    assert both(STEP | {"spec_version": 2, "one_length": "positions"}, step=True) == "taken"
    assert "attribute one_length: expected one of model_id, layers" in both(STEP | {"one_length": "x"}, step=True)


@pytest.mark.parametrize("value", ["affine", 1, 1.0])
def test_a_loaded_node_of_version_1_has_none_of_it_either(value: object) -> None:
    with pytest.raises(Exception, match=r"attribute k_scheme: .*, got an unknown one") as caught:
        load(model([sdpa(0)], "old", sdpa_wire={"k_scheme": value}))
    assert isinstance(native.error_from(caught.value), ConfigError)


@pytest.mark.parametrize("name", LIMITS)
def test_a_number_at_its_limits_is_taken_and_one_beyond_is_refused(name: str) -> None:
    least, most = LIMITS[name]
    for value in (least, most):
        assert both({"slot": 0, name: value}) == "taken"
    for value in (least - 1, most + 1, 2**63 - 1, -(2**63)):
        expected = f"ConfigError: {name}: expected an integer from {least} to {most}, got {value}"
        assert both({"slot": 0, name: value}) == expected


def test_a_step_has_at_most_so_many_layers() -> None:
    assert both(STEP | {"layers": spec.MAX_LAYERS}, step=True) == "taken"
    assert both(STEP | {"layers": spec.MAX_LAYERS + 1}, step=True).startswith(
        "ConfigError: layers: expected an integer"
    )


@pytest.mark.parametrize(
    "text",
    [
        *("0x10", " 1", "1 ", "1_0", "+1", "1,5", "", ".", "-", "1e", "1e+", "1.0\0", "1.0\0x", "inf", "infinity"),
        *("nan", "1.0f", "1e999", "-1e999", "1e-999", "--1", "1.2.3", "e5", "0x1p3", "1d0"),
    ],
)
def test_what_is_no_decimal_is_refused(text: str) -> None:
    words = both({"slot": 0, "scale": text})
    assert words.startswith("ConfigError: attribute scale: expected float, got '")


@pytest.mark.parametrize("text", ["\u0661", "1\u00a0", "\udcff"])
def test_digits_are_ascii(text: str) -> None:
    with pytest.raises(ConfigError, match="scale: expected float"):
        spec.SdpaAttributes.from_wire({"slot": 0, "scale": text})
    with pytest.raises(Exception, match="scale: expected float"):
        load(model([sdpa(0)], "digits", sdpa_wire={"scale": text.encode(errors="surrogateescape")}))


@pytest.mark.parametrize("text", ["1", "1.", ".5", "-.5", "1e5", "1E-5", "0.1e+1", "-0", "0e999", "1e-320", "00.50"])
def test_every_spelling_of_a_decimal_is_taken(text: str) -> None:
    assert both({"slot": 0, "scale": text}) == "taken"
    assert spec.SdpaAttributes.from_wire({"slot": 0, "scale": text}).scale == float(text)


@settings(max_examples=300, deadline=None)
@given(text=st.text("0123456789.eE+- xinfna_\0", max_size=12) | st.floats().map(repr))
def test_any_text_is_a_decimal_for_both_or_for_neither(text: str) -> None:
    both({"slot": 0, "softcap": text})


@pytest.mark.parametrize("model_id", ["", "a\0b", "a\nb", "\x7f", "käse"])
def test_a_model_id_is_printable_ascii(model_id: str) -> None:
    assert both(STEP | {"model_id": model_id}, step=True).startswith("ConfigError: model_id: expected")


def load(proto: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    native.register(options)
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


OTHERS: dict[str, list[Any]] = {
    "int": [1.0, "1", b"\xff", [1], [1.0], ["1"], onnx.helper.make_tensor("t", 7, [1], [1])],
    "string": [1, 1.0, [1], ["1.0"], onnx.TensorProto(name="t", data_type=8, dims=[1], string_data=[b"1"])],
}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("attributes", [spec.StepAttributes, spec.SdpaAttributes])
def test_an_attribute_of_another_type_is_refused_when_the_model_loads(
    attributes: type[spec.StepAttributes | spec.SdpaAttributes], version: int
) -> None:
    """Never taken for an absent one: its default would run in silence."""
    tried = 0
    for a in attributes.specs(version):
        for value in OTHERS[a.wire]:
            wire = {"spec_version": version, a.name: value}
            changes: dict[str, Any] = {"step_wire" if attributes is spec.StepAttributes else "sdpa_wire": wire}
            with pytest.raises(Exception, match=f"attribute {a.name}: expected {a.wire}, got another type") as caught:
                load(model([sdpa(0)], "typed", **changes))
            assert isinstance(native.error_from(caught.value), ConfigError)
            tried += 1
    assert tried > 15


@pytest.mark.parametrize("name", [a.name for a in spec.SdpaAttributes.specs(2)])
@pytest.mark.parametrize("value", [1.0, True, None, [], b"\xff", " 1", "1_0"])
def test_the_spec_refuses_other_types_than_a_node_may_have(name: str, value: object) -> None:
    wire: dict[str, Any] = {"slot": 0, "spec_version": 2, name: value}
    with pytest.raises(KiviError, match="expected"):
        spec.SdpaAttributes.from_wire(wire)


def test_the_spec_refuses_an_attribute_that_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match=r"attribute colour: expected one of slot, kind, .*, got an unknown one"):
        spec.SdpaAttributes.from_wire({"slot": 0, "colour": 1})


def test_a_string_that_is_no_text_is_refused_in_ascii() -> None:
    with pytest.raises(Exception, match=r"kind: expected one of self, cross, got '\\xff\\x00self'"):
        load(model([sdpa(0)], "bytes", sdpa_wire={"kind": b"\xff\0self"}))
    with pytest.raises(Exception, match="model_id: expected printable ASCII characters, got others"):
        load(model([sdpa(0)], "bytes", step_wire={"model_id": b"\xff\xfe"}))


def comma_locale(folder: Path) -> dict[str, str] | None:
    """Environment in which "comma" is a locale whose decimal point is a comma; None where none can be made."""
    try:
        command = ["localedef", "-i", "de_DE", "-f", "UTF-8", str(folder / "comma")]
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        return None
    made = (folder / "comma").is_dir() and done.returncode in (0, 1)
    return {"LOCPATH": str(folder)} if made else None


def test_a_locale_with_a_decimal_comma_changes_nothing(tmp_path: Path) -> None:
    environment = comma_locale(tmp_path)
    if environment is None:
        pytest.skip("no locale with a decimal comma can be made here")
    code = """
import locale
locale.setlocale(locale.LC_ALL, "comma")
assert locale.localeconv()["decimal_point"] == ","
import test_native_attributes as t
t.load(t.model([t.sdpa(0, scale=0.125, softcap=2.5)], "locale"))
t._native.SdpaAttributes(t.sdpa(0, scale=0.125).to_wire())
"""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | environment | {"PYTHONPATH": path})

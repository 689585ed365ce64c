"""The spec: attributes survive the wire, validation says what was expected, and SPEC.md shows the same tables."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import onnx_kivi
from onnx_kivi.config import KiviConfig, parse_layer_bits
from onnx_kivi.errors import CacheError, ConfigError, SpecMismatchError
from onnx_kivi.spec import (
    MAX_BLOCK_TOKENS,
    OPS,
    QUANTIZED_KV_SDPA,
    SdpaAttributes,
    StepAttributes,
)
from onnx_kivi.spec_document import document
from onnx_kivi.spec_types import check_shapes


@given(
    st.builds(
        SdpaAttributes,
        slot=st.integers(0, 200),
        kind=st.sampled_from(["self", "cross"]),
        k_bits=st.sampled_from([2, 4, 8, 32]),
        block_tokens=st.integers(1, 1024),
        scale=st.floats(allow_nan=False, allow_infinity=False, width=64),
        softcap=st.floats(0, 1e6),
        window=st.integers(0, 1 << 40),
    )
)
def test_attributes_survive_the_wire(attributes: SdpaAttributes) -> None:
    wire = attributes.to_wire()
    assert SdpaAttributes.from_wire(wire) == attributes
    assert SdpaAttributes.from_wire({k: str(v).encode() for k, v in wire.items()}) == attributes
    assert set(map(type, wire.values())) <= {int, str}


def test_absent_attributes_take_their_default_unless_they_have_none() -> None:
    assert SdpaAttributes.from_wire({"slot": 3}) == SdpaAttributes(slot=3)
    with pytest.raises(ConfigError, match="attribute slot: missing"):
        SdpaAttributes.from_wire({})


@pytest.mark.parametrize("kind", [SdpaAttributes, StepAttributes])
def test_other_versions_are_a_spec_mismatch(kind: type[SdpaAttributes] | type[StepAttributes]) -> None:
    with pytest.raises(SpecMismatchError, match="spec_version: expected 1 or 2, got 99"):
        kind.from_wire({"slot": 0, "model_id": "m", "layers": 1, "spec_version": 99})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k_bits", 5),
        ("v_bits", 16),
        ("block_tokens", 0),
        ("block_tokens", 1025),
        ("v_group_size", -1),
        ("residual_length", -1),
        ("sink_length", -1),
        ("kind", "other"),
        ("is_causal", 2),
        ("window", -1),
        ("scale", float("nan")),
        ("softcap", -1.0),
        ("slot", -1),
        ("slot", True),
    ],
)
def test_values_out_of_range(name: str, value: object) -> None:
    change: dict[str, Any] = {name: value}
    with pytest.raises(ConfigError, match=f"{name}: expected"):
        dataclasses.replace(SdpaAttributes(slot=0), **change)


def test_wire_that_is_no_number() -> None:
    with pytest.raises(ConfigError, match="attribute scale: expected float, got 'wide'"):
        SdpaAttributes.from_wire({"slot": 0, "scale": "wide"})


SHAPES = {
    "query": (2, 4, 3, 16),
    "key": (2, 2, 3, 16),
    "value": (2, 2, 3, 8),
    "attn_mask": (2, 1, 3, 13),
    "head_sink": (4,),
    "step": (1,),
}


def test_shapes_bind_letters() -> None:
    dims = {"P": 10}
    check_shapes("node", QUANTIZED_KV_SDPA.inputs, SHAPES, dims)
    assert dims == {"P": 10, "B": 2, "Hq": 4, "S": 3, "Dk": 16, "Hkv": 2, "N": 3, "Dv": 8, "T": 13}


@pytest.mark.parametrize("absent", ["attn_mask", "head_sink"])
def test_optional_inputs_may_be_empty(absent: str) -> None:
    check_shapes("node", QUANTIZED_KV_SDPA.inputs, SHAPES | {absent: (0,)}, {"P": 10})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("key", (2, 2, 3, 15)),
        ("key", (3, 2, 3, 16)),
        ("value", (2, 1, 3, 8)),
        ("value", (2, 2, 4, 8)),
        ("attn_mask", (2, 1, 3, 12)),
        ("attn_mask", (2, 2, 3, 13)),
        ("attn_mask", (3, 13)),
        ("head_sink", (3,)),
        ("step", (2,)),
    ],
)
def test_wrong_shapes_are_told(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(CacheError, match=rf"node 7: {name}: expected shape .* got \({shape[0]}"):
        check_shapes("node 7", QUANTIZED_KV_SDPA.inputs, SHAPES | {name: shape}, {"P": 10})


def test_layer_bits() -> None:
    assert parse_layer_bits("0,29:8") == {0: (8, 8), 29: (8, 8)}
    assert parse_layer_bits("0:8; 3:4/2") == {0: (8, 8), 3: (4, 2)}
    assert parse_layer_bits("") == {}
    config = KiviConfig(4, 4, layer_bits={0: (8, 8)})
    assert [(config.sides(layer)["k_bits"], config.sides(layer)["v_bits"]) for layer in (0, 1)] == [(8, 8), (4, 4)]
    with pytest.raises(ConfigError, match="k_bits: expected one of"):
        KiviConfig(layer_bits={0: (7, 8)})


def test_a_layer_whose_bits_a_scheme_does_not_take_is_affine() -> None:
    config = KiviConfig.of_preset("smallest", layer_bits={0: (8, 3)})
    affine_keys = {"k_bits": 8, "k_scheme": "affine", "v_bits": 3, "v_scheme": "symmetric+rotated"}
    assert config.sides(0) == affine_keys
    assert config.sides(1) == affine_keys | {"k_bits": 2, "k_scheme": "digits:2+token", "v_bits": 2}
    with pytest.raises(ConfigError, match="k_bits: expected one of 2 with k_scheme digits:3, got 8"):
        KiviConfig(k_scheme="digits:3")
    with pytest.raises(ConfigError, match="v_bits: expected one of 2, 4, 8, 32 with v_scheme affine, got 3"):
        KiviConfig(layer_bits={0: (8, 3)})
    with pytest.raises(ConfigError, match="preset: expected one of lossless, balanced, small, smallest, got 'tiny'"):
        KiviConfig.of_preset("tiny")


def test_the_document_is_current_and_names_every_attribute_and_limit() -> None:
    text = (Path(onnx_kivi.__file__).parent / "SPEC.md").read_text(encoding="utf-8")
    assert text == document(), "run: python -m onnx_kivi.spec > onnx_kivi/SPEC.md"
    names = [row.name for op in OPS for rows in (op.inputs, op.outputs, op.attributes) for row in rows]
    assert all(f"| `{name}` |" in text for name in names)
    assert f"| `MAX_BLOCK_TOKENS` | {MAX_BLOCK_TOKENS:,} |" in text


def test_the_document_is_printed() -> None:
    command = [sys.executable, "-m", "onnx_kivi.spec"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == document()

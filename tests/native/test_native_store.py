"""The native library's tables of attributes and tensors are those of the spec."""

from __future__ import annotations

import pytest

from onnx_kivi import spec, spec_types

_native = pytest.importorskip("onnx_kivi._native", reason="nothing is compiled here", exc_type=ImportError)


@pytest.mark.parametrize("version", spec_types.VERSIONS)
def test_the_native_tables_are_those_of_the_spec(version: int) -> None:
    def rows(attributes: type[spec_types.NodeAttributes]) -> list[tuple[str, str, object]]:
        return [(a.name, a.wire, a.default) for a in attributes.specs(version)]

    def native_rows(specs: list[tuple[str, str, object]]) -> list[tuple[str, str, object]]:
        wired = [
            (name, wire, repr(default) if isinstance(default, float) else default) for name, wire, default in specs
        ]
        assert {wire for _, wire, _ in wired} == {"int", "string"}
        return wired

    assert native_rows(_native.step_attribute_specs(version)) == rows(spec.StepAttributes)
    assert native_rows(_native.sdpa_attribute_specs(version)) == rows(spec.SdpaAttributes)
    if version >= spec.CACHE_OPEN.version:
        assert native_rows(_native.ghost_attribute_specs(version)) == rows(spec.GhostAttributes)
    floats = [t for t in spec.QUANTIZED_KV_SDPA.inputs if t.element == "float"]
    assert _native.tensor_specs() == [(t.name, t.shape, t.optional, t.broadcast) for t in floats]

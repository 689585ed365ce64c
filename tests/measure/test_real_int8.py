"""SmolLM2 through onnxruntime's quantizers is rewritten, and its mutants are not, at the level that rewrite takes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest

import onnx_kivi as kivi
from mutants import Edit, heads, set_attribute

VALUE = 2
MUTANTS: dict[str, Edit] = {
    "scale of one layer 2% off": set_attribute("scale", lambda x: x * 1.02, slice(14, 15)),
    "value heads swapped": heads(VALUE, [1, 0, 2]),
    "causal mask dropped": set_attribute("is_causal", lambda _: 0, slice(1)),
}


def int4(block: int, level: int) -> Callable[[Path, Path], None]:
    def write(source: Path, target: Path) -> None:
        pytest.importorskip("onnx_ir", reason="onnxruntime's quantizer of MatMulNBits needs onnx-ir")
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        logging.getLogger("onnxruntime.quantization").setLevel(logging.ERROR)
        made = MatMulNBitsQuantizer(onnx.load(source), block_size=block, is_symmetric=True, accuracy_level=level)
        made.process()
        onnx.save(made.model.model, target)

    return write


def dynamic(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().setLevel(logging.ERROR)
    quantize_dynamic(source, target, weight_type=QuantType.QInt8)


QUANTIZERS: dict[str, Callable[[Path, Path], None]] = {
    **{f"int4 in blocks of {b} at level {level}": int4(b, level) for b in (32, 128) for level in (0, 4)},
    "dynamic int8": dynamic,
}


@pytest.fixture(scope="module", params=QUANTIZERS)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    pytest.importorskip("gguf", reason="builds SmolLM2")
    from onnx_kivi_models import build

    path = tmp_path_factory.mktemp("int8") / "model.onnx"
    QUANTIZERS[request.param](build().model, path)
    yield path
    path.unlink()


@pytest.mark.slow
def test_a_quantized_smollm2_is_rewritten_and_its_mutants_are_not(original: Path, tmp_path: Path) -> None:
    model, report = kivi.rewrite(original)
    kivi.save(model, tmp_path / "sound.onnx")
    checked = kivi.verify(original, tmp_path / "sound.onnx", level="quick", report=report)
    assert checked.ok, checked.reason
    assert checked.sealed_tokens > 0
    assert checked.max_rel_diff < 1e-5
    for name, edit in MUTANTS.items():
        mutant = onnx.load(tmp_path / "sound.onnx")
        edit(mutant)
        onnx.save(mutant, tmp_path / "mutant.onnx")
        reason = kivi.verify(original, tmp_path / "mutant.onnx", level="quick", report=report).reason
        assert "at 32 bits logits differ" in reason, name

"""Quantizes exports of the zoo with onnxruntime's own quantizers, so that they round activations to 8 bits as they run.

Run by hand, in an environment with requirements-torch.txt: `python quantize.py [STYLE/NAME ...]`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
from finish import finish, selected
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

HERE = Path(__file__).parent
SOURCE = "optimum"
BLOCK, INT8_ACTIVATIONS = 32, 4
STYLES = {"ort-int4-level4": ("llama",), "ort-dynamic-int8": ("llama",)}


def quantize(style: str, source: Path, folder: Path) -> None:
    """Write `source` into `folder`, quantized as `style` says."""
    folder.mkdir(parents=True, exist_ok=True)
    if style == "ort-dynamic-int8":
        quantize_dynamic(source, folder / "model.onnx", weight_type=QuantType.QInt8)
    else:
        made = MatMulNBitsQuantizer(
            onnx.load(source), block_size=BLOCK, is_symmetric=True, accuracy_level=INT8_ACTIVATIONS
        )
        made.process()
        onnx.save(made.model.model, folder / "model.onnx")
    finish(folder)


def main() -> None:
    """Quantize what the command line names, or all."""
    for style, name in selected(STYLES, sys.argv[1:]):
        quantize(style, HERE / SOURCE / name / "model.onnx", HERE / style / name)


if __name__ == "__main__":
    main()

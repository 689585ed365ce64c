"""Exports the zoo's architectures as optimum-onnx does (TorchScript), and as onnxruntime then rewrites some of them.

Run by hand, in an environment with requirements-optimum.txt: `python export_optimum.py [STYLE/NAME ...]`.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import onnx
import onnxruntime as ort
from architectures import ARCHITECTURES, ENCODER_DECODERS, build
from finish import clean_file, finish, selected
from onnxruntime.transformers import float16, optimizer
from onnxruntime.transformers.fusion_options import FusionOptions
from optimum.exporters.onnx import export as export_one
from optimum.exporters.onnx import main_export
from optimum.exporters.tasks import TasksManager
from optimum.onnx import merge_decoders

HERE = Path(__file__).parent
ABSENT = {"qwen2_sliding", "deepseek_v3_dense", "gemma3n", "xglm"}
SEQ2SEQ_FILES = ("decoder_with_past_model.onnx", "decoder_model_merged.onnx")
OPTIMIZER_TYPES = {"gpt2": "gpt2", "whisper/decoder_with_past_model": "bart"}
OPTIMIZED = {
    "ort-basic-optimum": ("gpt2",),
    "ort-extended-optimum": ("llama", "bloom", "gpt_neox"),
    "ortopt-optimum": tuple(OPTIMIZER_TYPES),
    "optimum-fp16": ("llama",),
}
MERGED_STYLE = "optimum-merged"
MERGED = ("gpt2", "opt")
LEVELS = {
    "ort-basic-optimum": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "ort-extended-optimum": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
}


def export(name: str, folder: Path) -> None:
    """Export one architecture."""
    task = "text2text-generation-with-past" if name in ENCODER_DECODERS else "text-generation-with-past"
    if name == "whisper":
        task = "automatic-speech-recognition-with-past"
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "source", Path(scratch) / "target"
        build(name).save_pretrained(source)
        main_export(str(source), target, task=task, do_validation=False, library_name="transformers", device="cpu")
        for file in SEQ2SEQ_FILES if name in ENCODER_DECODERS else ("model.onnx",):
            place = folder / Path(file).stem if name in ENCODER_DECODERS else folder
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(target / file, place / "model.onnx")
            finish(place)
        if name in ENCODER_DECODERS:
            keep_for_generation(source, target, folder)


def keep_for_generation(source: Path, target: Path, folder: Path) -> None:
    """What the tests of generate() take beside the decoders: the encoder, the configuration, and torch's weights."""
    shutil.copy(source / "model.safetensors", folder)
    for file in ("generation_config.json", "encoder_model.onnx"):
        shutil.copy(target / file, folder)
    config = json.loads((target / "config.json").read_text())
    if "encoder_layers" in config:  # which transformers 5 takes from here, and 4 does not
        config["num_hidden_layers"] = config["encoder_layers"]
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    clean_file(folder / "encoder_model.onnx")


def export_merged(name: str, folder: Path) -> None:
    """Export a decoder without and with a past and merge them, as earlier versions of optimum did."""
    folder.mkdir(parents=True, exist_ok=True)
    model = build(name)
    kind = TasksManager.get_exporter_config_constructor(
        "onnx", model=model, task="text-generation", library_name="transformers"
    )
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / f"{past}.onnx" for past in (False, True)]
        for past, file in enumerate(files):
            config = kind(model.config, task="text-generation", use_past=True, use_past_in_inputs=bool(past))
            export_one(model, config, file, opset=config.DEFAULT_ONNX_OPSET)
        merge_decoders(*files, save_path=folder / "model.onnx")
    finish(folder)


def optimize(style: str, name: str, folder: Path) -> None:
    """Write what onnxruntime makes of optimum's export."""
    folder.mkdir(parents=True, exist_ok=True)
    source, target = HERE / "optimum" / name / "model.onnx", folder / "model.onnx"
    if style in LEVELS:
        options = ort.SessionOptions()
        options.graph_optimization_level = LEVELS[style]
        options.optimized_model_filepath = str(target)
        ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    elif style == "ortopt-optimum":
        kind = OPTIMIZER_TYPES[name]
        options = FusionOptions(kind)
        options.use_multi_head_attention = True
        optimized = optimizer.optimize_model(
            str(source), model_type=kind, num_heads=4, hidden_size=32, optimization_options=options
        )
        optimized.save_model_to_file(str(target))
    else:
        onnx.save(float16.convert_float_to_float16(onnx.load(source)), target)
    finish(folder)


def main() -> None:
    """Export what the command line names, or all."""
    wanted = {"optimum": tuple(name for name in ARCHITECTURES if name not in ABSENT), **OPTIMIZED, MERGED_STYLE: MERGED}
    for style, name in selected(wanted, sys.argv[1:]):
        folder = HERE / style / name
        if style == "optimum":
            export(name, folder)
        elif style == MERGED_STYLE:
            export_merged(name, folder)
        else:
            optimize(style, name, folder)


if __name__ == "__main__":
    main()

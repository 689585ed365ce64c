"""The zoo's encoder-decoders twice: transformers' own, in torch, and the exports of them rewritten into a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

import onnx_kivi as kivi
from zoo import MODELS, ZOO

NAMES = ("bart", "m2m100", "t5", "whisper")
SPEECH = "whisper"
BLOCK = 8


def original(name: str) -> Any:
    """transformers' model. Nothing ends its texts but their length."""
    folder = ZOO / "optimum" / name
    kind = AutoModelForSpeechSeq2Seq if name == SPEECH else AutoModelForSeq2SeqLM
    model = kind.from_pretrained(folder, config=AutoConfig.from_pretrained(folder)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.begin_suppress_tokens = None  # whisper's defaults, beyond so small a vocabulary
    return model


def write_folder(folder: Path, name: str, bits: int, *, cross: bool = True) -> Path:
    """The encoder, the merged decoder rewritten, and the configuration, as `rewrite FOLDER --cross` leaves them."""
    source = ZOO / "optimum" / name
    for file in ("encoder_model.onnx", "config.json"):
        shutil.copy(source / file, folder)
    config = kivi.KiviConfig(bits, bits, BLOCK, 64, 4, 1, cross=cross)
    decoder, _ = kivi.rewrite(MODELS[f"optimum/{name}/decoder_model_merged"], config)
    kivi.save(decoder, folder / "decoder_model_merged.onnx")
    original(name).generation_config.save_pretrained(folder)
    return folder


def prompts(name: str, rows: int) -> dict[str, Any]:
    """What the encoder takes, random; tokens are padded on the right of the first row."""
    random = torch.Generator().manual_seed(4)
    if name == SPEECH:
        return {"input_features": torch.randn(rows, 8, 3000, generator=random)}
    ids = torch.randint(3, 100, (rows, 20), generator=random)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[0, 14:], ids[0, 14:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}

"""Exports the zoo's architectures with torch.onnx.export, both exporters, and with onnxruntime-genai's model builder.

Run by hand, in an environment with requirements-torch.txt: `python export_torch.py [STYLE/NAME ...]`. The cache goes in
and out as flat tensors past_key_values.N.key/value and present.N.key/value, built into transformers' DynamicCache.
"""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from architectures import BASE, build
from finish import finish, selected
from tokenizers import Tokenizer, models
from transformers import DynamicCache, PreTrainedTokenizerFast, StaticCache

HERE = Path(__file__).parent
BATCH, TOKENS, PAST = 2, 3, 5
BUFFER = 96
# GroupQueryAttention takes head sizes that are multiples of 16.
GENAI_CHANGES = {"head_dim": 16}
TORCH_STYLES: dict[str, tuple[str, ...]] = {
    "dynamo-18": (
        *("llama", "mistral", "qwen2", "qwen2_sliding", "qwen3", "gemma", "gemma3n", "gpt2", "phi", "opt"),
        *("falcon_new", "granite", "deepseek_v3_dense"),
    ),
    "dynamo-18-eager": ("llama", "gemma2", "gptj"),
    "dynamo-18-fp16": ("llama",),
    "dynamo-23": ("llama", "qwen3", "gemma3", "gpt2"),
    "dynamo-24": ("llama",),
    "legacy-14": ("llama",),
    "legacy-17": ("llama", "gpt2", "gemma2", "xglm"),
    "legacy-17-sdpa": ("llama",),
    "dynamo-18-static": ("llama",),
    "dynamo-18-static-eager": ("llama",),
    "dynamo-23-static": ("llama",),
    "legacy-17-static": ("llama",),
    "legacy-17-static-sdpa": ("llama",),
}
GENAI_STYLES: dict[str, tuple[str, ...]] = {
    "genai-fp32": ("llama", "phi3", "qwen2", "qwen3", "granite"),
    "genai-fp32-nowin": ("mistral", "gemma2", "gpt_oss"),
    "genai-int4": ("llama",),
    "genai-fp16-dml": ("llama",),
}


class Flat(torch.nn.Module):
    """A causal LM whose cache goes in and out as a list of tensors, key and value of each layer in turn."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Logits, then keys and values of all tokens so far."""
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        extra = {"position_ids": position_ids} if takes_positions else {}
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **extra
        )
        return out.logits, *(part for layer in cache.layers for part in (layer.keys, layer.values))


class Buffered(torch.nn.Module):
    """A causal LM whose cache goes in and out as buffers of BUFFER tokens, written from `cache_position` on.

    The TorchScript exporter turns the sizes of transformers' own mask into constants, so it gets one made here.
    """

    def __init__(self, model: torch.nn.Module, own_mask: bool) -> None:
        super().__init__()
        self.model = model
        self.own_mask = own_mask

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, cache_position: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Logits, then keys and values as they stand in the buffers."""
        cache = StaticCache(config=self.model.config, max_cache_len=BUFFER)
        for layer, keys, values in zip(cache.layers, past[::2], past[1::2], strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys.clone(), values.clone()
            layer.cumulative_length = cache_position[0].clone()
        out = self.model(
            input_ids=input_ids,
            attention_mask=self._mask(attention_mask, cache_position) if self.own_mask else attention_mask,
            position_ids=cache_position.expand(input_ids.shape[0], -1),
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits, *(part for layer in cache.layers for part in (layer.keys, layer.values))

    def _mask(self, padding: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(B, 1, S, BUFFER), the least float where a key is padding, or is not written yet."""
        shown = torch.nn.functional.pad(padding, (0, BUFFER - padding.shape[1]))[:, None, None, :] > 0
        seen = shown & (torch.arange(BUFFER)[None, :] <= positions[:, None])
        return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


def export(style: str, name: str, folder: Path) -> None:
    """Export one architecture with torch.onnx.export, as `style` says: exporter-opset[-options]."""
    exporter, opset, *rest = style.split("-")
    default = "eager" if exporter == "legacy" else "sdpa"
    attention = next((part for part in rest if part in {"eager", "sdpa"}), default)
    model = build(name, attention)
    dtype = torch.float16 if "fp16" in rest else torch.float32
    model = model.to(dtype)
    past = _past(model, dtype)
    static = "static" in rest
    positions = torch.arange(PAST, PAST + TOKENS)
    buffers = [torch.nn.functional.pad(part, (0, 0, 0, BUFFER - PAST)) for part in past]
    inputs = (
        torch.ones(BATCH, TOKENS, dtype=torch.int64),
        torch.ones(BATCH, PAST + TOKENS, dtype=torch.int64),
        positions if static else positions.repeat(BATCH, 1),
        *(buffers if static else past),
    )
    names, axes, outputs = _interface(len(past) // 2, static)
    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"input_names": names, "output_names": outputs, "opset_version": int(opset)}
    if exporter == "dynamo":
        dynamic = [dict.fromkeys(axis, torch.export.Dim.DYNAMIC) for axis in axes]
        options |= {"dynamo": True, "dynamic_shapes": (*dynamic[:3], tuple(dynamic[3:])), "external_data": False}
    else:
        options |= {"dynamo": False, "dynamic_axes": dict(zip(names, axes, strict=True))}
    module = Buffered(model, own_mask=exporter == "legacy") if static else Flat(model)
    torch.onnx.export(module, inputs, str(folder / "model.onnx"), **options)
    finish(folder)


def _interface(layers: int, static: bool) -> tuple[list[str], list[dict[int, str]], list[str]]:
    """Names of the inputs, their dynamic axes, and names of the outputs."""
    sides = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    places = "cache_position" if static else "position_ids"
    names = ["input_ids", "attention_mask", places, *(f"past_key_values.{side}" for side in sides)]
    tokens = {0: "batch", 1: "sequence"}
    axes = [tokens, {0: "batch", 1: "total"}, {0: "sequence"} if static else tokens]
    axes += [{0: "batch"} if static else {0: "batch", 2: "past"} for _ in sides]
    return names, axes, ["logits", *(f"present.{side}" for side in sides)]


def _past(model: torch.nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
    """A cache of PAST tokens, in the shapes that the model itself makes."""
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.ones(BATCH, PAST, dtype=torch.int64), past_key_values=cache, use_cache=True)
    return [torch.randn_like(part, dtype=dtype) for layer in cache.layers for part in (layer.keys, layer.values)]


def build_genai(style: str, name: str, folder: Path) -> None:
    """Export one architecture with onnxruntime-genai's builder: genai-precision[-provider or option]."""
    _, precision, *rest = style.split("-")
    provider = next((part for part in rest if part in {"dml", "cuda"}), "cpu")
    options = ["windowed_kv_cache=false"] if "nowin" in rest else []
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "source", Path(scratch) / "target"
        build(name, **GENAI_CHANGES).save_pretrained(source)
        vocabulary = {f"t{i}": i for i in range(BASE["vocab_size"])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t2", pad_token="t0").save_pretrained(source)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", precision, "-e", provider]
        command += ["-i", str(source), "-o", str(target), "-c", str(Path(scratch) / "cache")]
        subprocess.run([*command, "--extra_options", *options] if options else command, check=True)
        folder.mkdir(parents=True, exist_ok=True)
        for path in target.glob("model.onnx*"):
            shutil.copy(path, folder)
        head_size = json.loads((target / "genai_config.json").read_text())["model"]["decoder"]["head_size"]
        config = {"model": {"decoder": {"head_size": head_size}}}
        (folder / "genai_config.json").write_text(json.dumps(config) + "\n")
    finish(folder, padding=0)


def main() -> None:
    """Export what the command line names, or all."""
    for style, name in selected(TORCH_STYLES | GENAI_STYLES, sys.argv[1:]):
        (build_genai if style in GENAI_STYLES else export)(style, name, HERE / style / name)


if __name__ == "__main__":
    main()

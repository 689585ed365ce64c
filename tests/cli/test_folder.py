"""Folders: a rewritten one has what its host needs, and nothing is written unless all of it is well."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import onnx_kivi as kivi
from commands import SMALL, Run, json_of
from onnx_kivi.cli.parser import main
from refusals import refusal
from zoo import MODELS

QUICK = (*SMALL, "--no-verify")
CONFIG = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
BESIDE = ("tokenizer.json", "generation_config.json", "chat_template.jinja", "nested/vocab.txt")
ENCODER = '<ir_version: 8, opset_import: ["": 18]> g (float[N] x) => (float[N] y) { y = Relu(x) }'


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """(exit code, stdout, stderr) of `rewrite`."""

    def call(*args: object) -> tuple[int, str, str]:
        return main(["rewrite", *map(str, args)]), *capsys.readouterr()

    return call


def with_weights(model: Path, to: Path) -> Path:
    """A copy of a model with its weights beside it."""
    to.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(onnx.load(model), to, save_as_external_data=True, location="weights.bin")
    return to


@pytest.fixture
def source(tiny: Path, tmp_path: Path) -> Path:
    """A folder as optimum writes it: a model, its weights, and what goes with them."""
    folder = tmp_path / "in"
    with_weights(tiny, folder / "model.onnx")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in (*BESIDE, ".git/config"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def genai(tmp_path: Path) -> Path:
    """A folder as genai's builder writes it."""
    folder = tmp_path / "genai"
    folder.mkdir()
    shutil.copy(MODELS["genai-fp32/llama"], folder / "decoder.onnx")
    write_genai(folder, {})
    return folder


def write_genai(folder: Path, changes: dict[str, object]) -> None:
    sides = {side: f"past_key_values.%d.{side}" for side in ("key", "value")}
    decoder = {
        "filename": "decoder.onnx",
        "session_options": {"log_id": "genai"},
        "inputs": {"input_ids": "input_ids", "past_key_names": sides["key"], "past_value_names": sides["value"]},
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key"},
        "num_hidden_layers": 2,
    }
    config = {"model": {"type": "llama", "decoder": decoder | changes}, "search": {"max_length": 512}}
    (folder / "genai_config.json").write_text(json.dumps(config))


def held(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and file number of everything in a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_ino) for path in paths}


def is_rewritten(model: Path) -> bool:
    return any(node.op_type == "QuantizedKvSdpa" for node in onnx.load(model, load_external_data=False).graph.node)


def test_a_folder_gives_a_folder_with_all_that_goes_with_the_model(source: Path, tmp_path: Path, run: Run) -> None:
    before = held(source)
    data = json_of(run(source, "-o", tmp_path / "out", *SMALL, "--json"))
    assert data["rewritten"] == str(tmp_path / "out")
    assert len(data["sites"]) == 2
    assert data["misses"] == []
    assert len(data["removed_inputs"]) == len(data["removed_outputs"]) == 2
    assert [model["io"] for model in data["models"]] == ["ghost"]
    assert data["verify"]["ok"]
    assert data["verify"]["sealed_tokens"] > 0
    assert [model["file"] for model in data["models"]] == ["model.onnx"]
    after = held(tmp_path / "out")
    assert set(after) == {name for name in before if not name.startswith(".")}
    assert all(after[name][0] == before[name][0] for name in ("config.json", *BESIDE))
    assert after["weights.bin"] == before["weights.bin"]
    assert after["config.json"][1] != before["config.json"][1]
    assert held(source).keys() == before.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    session = kivi.Session((tmp_path / "out").rename(tmp_path / "moved"))
    assert len(list(session.generate([1, 2, 3], max_new_tokens=2))) == 2


def test_weights_are_copied_on_demand_and_onnx_reads_them(source: Path, tmp_path: Path, run: Run) -> None:
    json_of(run(source, "-o", tmp_path / "out", "--copy-weights", *QUICK, "--json"))
    assert (tmp_path / "out" / "weights.bin").stat().st_nlink == 1
    onnx.load(tmp_path / "out" / "model.onnx")


def test_every_decoder_is_rewritten_and_other_models_are_copied(tiny: Path, tmp_path: Path, run: Run) -> None:
    """As transformers.js has them: in a folder of their own, some variants on the same weights."""
    folder = tmp_path / "in" / "onnx"
    with_weights(tiny, folder / "model.onnx")
    shutil.copy(folder / "model.onnx", folder / "model_fp16.onnx")
    onnx.save(onnx.parser.parse_model(ENCODER), folder / "encoder_model.onnx")
    data = json_of(run(tmp_path / "in", "-o", tmp_path / "out", *QUICK, "--json"))
    assert [model["file"] for model in data["models"]] == ["onnx/model.onnx", "onnx/model_fp16.onnx"]
    assert len(data["sites"]) == 4
    out = tmp_path / "out" / "onnx"
    assert {path.name: is_rewritten(path) for path in out.glob("*.onnx")} == {
        "encoder_model.onnx": False,
        "model.onnx": True,
        "model_fp16.onnx": True,
    }
    assert [path.name for path in out.iterdir() if path.suffix != ".onnx"] == ["weights.bin"]
    kivi.Session(out / "model_fp16.onnx")


def test_weights_of_a_model_that_is_left_are_shared_too(source: Path, tmp_path: Path, run: Run) -> None:
    model = onnx.parser.parse_model(ENCODER)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(4096, np.float32), "unused"))
    onnx.save(model, source / "encoder.onnx", save_as_external_data=True, location="encoder.bin")
    for option, shared in ((), True), (("--copy-weights",), False):
        out = tmp_path / f"out{shared}"
        json_of(run(source, "-o", out, *option, *QUICK, "--json"))
        assert (out / "encoder.bin").samefile(source / "encoder.bin") == shared
        assert not (out / "encoder.onnx").samefile(source / "encoder.onnx")


def test_a_hubs_snapshot_of_links_becomes_a_folder_of_files(source: Path, tmp_path: Path, run: Run) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in ("model.onnx", "weights.bin", "config.json"):
        (snapshot / name).symlink_to(Path("..") / "in" / name)
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / "elsewhere" / "out"
    assert json_of(run(snapshot, "-o", out, *SMALL, "--json"))["verify"]["ok"]
    assert not any(path.is_symlink() for path in out.iterdir())
    assert (out / "weights.bin").samefile(source / "weights.bin")


def test_a_decoder_that_does_not_match_is_named_or_left_with_partial(tmp_path: Path, run: Run) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name, model in (("model", "optimum/t5/decoder_with_past_model"), ("other", "dynamo-18/deepseek_v3_dense")):
        shutil.copy(MODELS[model], source / f"{name}.onnx")
    code, _, err = run(source, "-o", out, *QUICK)
    assert code == 2
    assert "other.onnx: can't rewrite: " in refusal(err)
    assert not out.exists()
    data = json_of(run(source, "-o", out, "--partial", *QUICK, "--json"))
    assert [model["file"] for model in data["models"]] == ["model.onnx"]
    assert not is_rewritten(out / "other.onnx")


def test_a_folder_of_optimums_has_its_decoders_rewritten(tmp_path: Path, run: Run) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("decoder_model_merged", "decoder_with_past_model"):
        shutil.copy(MODELS[f"optimum/t5/{name}"], source / f"{name}.onnx")
    data = json_of(run(source, "-o", out, "--cross", *SMALL, "--json"))
    assert [model["verify"]["ok"] for model in data["models"]] == [True, True]
    assert all(is_rewritten(out / f"{name}.onnx") for name in ("decoder_model_merged", "decoder_with_past_model"))


def test_a_decoder_without_a_past_names_the_one_beside_it(tmp_path: Path, run: Run) -> None:
    onnx.save(onnx.parser.parse_model(ENCODER), tmp_path / "decoder_model.onnx")
    ask = (tmp_path / "decoder_model.onnx", "-o", tmp_path / "out.onnx")
    assert "as optimum-cli export onnx does for a --task TASK-with-past" in refusal(run(*ask)[2])
    for name in ("decoder_model_merged.onnx", "decoder_with_past_model.onnx"):
        (tmp_path / name).touch()
        code, _, err = run(*ask)
        assert code == 2
        assert f"none is joined with new tokens; rewrite {name}, which lies beside it" in refusal(err)


def test_genais_configuration_names_the_library_and_no_cache(genai: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("onnx_kivi.runtime.native", reason="nothing is compiled here", exc_type=ImportError)
    json_of(run(genai, "-o", tmp_path / "out", "--io", "none", *QUICK, "--json"))
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    config = json.loads((moved / "genai_config.json").read_text())
    decoder = config["model"]["decoder"]
    assert decoder["session_options"] == {"log_id": "genai", "custom_ops_library": "libonnx_kivi.so"}
    assert decoder["inputs"] == {"input_ids": "input_ids"}
    assert decoder["outputs"] == {"logits": "logits"}
    assert config["search"] == {"max_length": 512}
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(moved / "libonnx_kivi.so"))
    ort.InferenceSession(moved / "decoder.onnx", options)


def test_genai_is_told_of_a_past_as_narrow_as_stamps(genai: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("onnx_kivi.runtime.native", reason="nothing is compiled here", exc_type=ImportError)
    data = json_of(run(genai, "-o", tmp_path / "out", *QUICK, "--json"))
    assert [model["io"] for model in data["models"]] == ["ghost"]
    decoder = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["decoder"]
    before = json.loads((genai / "genai_config.json").read_text())["model"]["decoder"]
    assert decoder["inputs"] == before["inputs"]
    assert decoder["outputs"] == before["outputs"]
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (2, 1, 4)


def test_a_folder_has_ghost_io_only_if_its_host_carries_a_past_and_its_model_can(
    source: Path, tmp_path: Path, run: Run
) -> None:
    for name, options, io in (("asked", ("--io", "none"), "none"), ("host", (), "ghost")):
        assert json_of(run(source, "-o", tmp_path / name, *options, *QUICK, "--json"))["models"][0]["io"] == io
    (source / "config.json").unlink()
    assert json_of(run(source, "-o", tmp_path / "no host", *QUICK, "--json"))["models"][0]["io"] == "none"
    whisper = tmp_path / "whisper"
    whisper.mkdir()
    shutil.copy(MODELS["optimum/t5/decoder_with_past_model"], whisper / "model.onnx")
    (whisper / "config.json").write_text('{"is_encoder_decoder": true}')
    code, out, _ = run(whisper, "-o", tmp_path / "can't", *QUICK)
    assert code == 0
    said = " ".join(out.replace("\u2502", " ").split())
    assert "I/O: none (ghost I/O: there are no inputs input_ids and attention_mask" in said
    code, _, err = run(whisper, "-o", tmp_path / "must", "--io", "ghost", *QUICK)
    assert code == 2
    assert "model.onnx: ghost I/O: there are no inputs" in refusal(err)


def test_a_folder_gives_a_file_if_a_file_is_named(source: Path, tmp_path: Path, run: Run) -> None:
    json_of(run(source, "-o", tmp_path / "small.onnx", *QUICK, "--json"))
    assert is_rewritten(tmp_path / "small.onnx")
    (source / "model.onnx").rename(source / "only.onnx")
    assert json_of(run(source, "-o", tmp_path / "only.onnx", *QUICK, "--json"))["rewritten"]
    shutil.copy(source / "only.onnx", source / "other.onnx")
    code, _, err = run(source, "-o", tmp_path / "which.onnx", *QUICK)
    assert code == 2
    assert "expected model.onnx or one model, got only.onnx, other.onnx" in refusal(err)


def link(path: Path) -> None:
    path.symlink_to(path.with_name("elsewhere"))


def other_model(path: Path) -> None:
    path.mkdir()
    (path / "model.onnx").write_bytes(b"precious")


TARGETS: dict[str, tuple[str, Callable[[Path], object] | None, str]] = {
    "itself": ("in", None, "which is it; originals are never overwritten"),
    "inside": ("in/out", None, "inside it"),
    "around": (".", None, "around it"),
    "another model": ("other", other_model, "got one with files"),
    "a file": ("file", lambda path: path.write_bytes(b"precious"), "got a regular file"),
    "a link": ("link", link, "got a symbolic link"),
    "nowhere": ("absent/out", None, "expected an existing folder"),
    "no text": ("a\udcff", None, "expected a path in UTF-8 and without NUL"),
    "NUL": ("a\0b", None, "expected a path in UTF-8 and without NUL"),
    "unwritable": ("/proc/self/out", None, "expected a folder that can be written to, got /proc/"),
}


@pytest.mark.parametrize("case", TARGETS)
def test_a_folder_is_written_only_where_nothing_is(source: Path, tmp_path: Path, run: Run, case: str) -> None:
    name, make, message = TARGETS[case]
    if make:
        make(tmp_path / name)
    before = held(tmp_path)
    code, out, err = run(source, "-o", tmp_path / name, *QUICK)
    assert (code, out) == (2, "")
    assert message in refusal(err)
    assert held(tmp_path) == before


@pytest.mark.parametrize("name", ["out", "."])
def test_an_empty_folder_may_be_the_target(
    source: Path, tmp_path: Path, run: Run, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path if name == "out" else tmp_path / "out")
    json_of(run(source, "-o", name, *QUICK, "--json"))
    assert is_rewritten(tmp_path / "out" / "model.onnx")


def no_decoder(folder: Path) -> None:
    onnx.save(onnx.parser.parse_model(ENCODER), folder / "model.onnx")


def no_model(folder: Path) -> None:
    (folder / "model.onnx").unlink()


def truncated(folder: Path) -> None:
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-99])


def without_weights(folder: Path) -> None:
    (folder / "weights.bin").unlink()


def fifo(folder: Path) -> None:
    os.mkfifo(folder / "tokenizer.model")


def folder_link(folder: Path) -> None:
    (folder / "link").symlink_to(folder.parent)


def dangling(folder: Path) -> None:
    (folder / "special_tokens_map.json").symlink_to("nothing")


def config(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(text)


SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no decoder": (no_decoder, "expected a model with a float cache, got 1 models without"),
    "no model": (no_model, "expected a model with a float cache, got 0 models without"),
    "truncated": (truncated, "model.onnx: expected an ONNX model"),
    "no weights": (without_weights, "weights.bin: expected the model's external weights, got no such file"),
    "fifo": (fifo, "tokenizer.model: expected regular files and folders, got a FIFO"),
    "link": (folder_link, "link: expected regular files and folders, got a symbolic link"),
    "dangling link": (dangling, "No such file"),
    "fewer layers": (config('{"num_hidden_layers": 1}'), "config.json: expected num_hidden_layers to fit the model"),
    "other heads": (config('{"num_key_value_heads": 3}'), "which has 2, got 3; take the configuration"),
    "no JSON": (config("{"), "config.json: expected JSON"),
    "no object": (config("[]"), "config.json: expected a JSON object, got list"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_damaged_folder_is_refused_in_one_line(source: Path, tmp_path: Path, run: Run, case: str) -> None:
    damage, message = SOURCES[case]
    damage(source)
    code, out, err = run(source, "-o", tmp_path / "out", *QUICK)
    assert (code, out) == (2, "")
    assert message in refusal(err)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filename": "absent.onnx"}, "expected model.decoder.filename to be one of decoder.onnx"),
        ({"session_options": {"custom_ops_library": "theirs.so"}}, "expected no custom_ops_library"),
        ({"num_hidden_layers": 1}, "genai_config.json: expected num_hidden_layers to fit the model"),
    ],
)
def test_a_genai_configuration_that_does_not_fit_is_refused(
    genai: Path, tmp_path: Path, run: Run, changes: dict[str, object], message: str
) -> None:
    pytest.importorskip("onnx_kivi.runtime.native", reason="nothing is compiled here", exc_type=ImportError)
    write_genai(genai, changes)
    code, _, err = run(genai, "-o", tmp_path / "out", *QUICK)
    assert code == 2
    assert message in refusal(err)
    assert [path.name for path in tmp_path.iterdir()] == ["genai"]


def test_one_model_that_fails_its_verification_keeps_all_from_being_written(
    tiny: Path, source: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(tiny, source / "other.onnx")
    monkeypatch.setattr("onnx_kivi.measure.verify.ROUNDING", {"float": (1e-13, 1e-13)})
    code, out, err = run(source, "-o", tmp_path / "out", "--bits", 32, "--json")
    assert code == 1
    assert "nothing written: model.onnx: at 32 bits" in refusal(err)
    assert json.loads(out)["rewritten"] is None
    assert not json.loads(out)["verify"]["ok"]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("small", [1 << 10, 1 << 20], ids=["the model", "another file"])
def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path, run: Run, small: int) -> None:
    (source / "large.bin").write_bytes(bytes(2 << 20))
    before = held(source)
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (small, hard))
    try:
        code, out, err = run(source, "-o", tmp_path / "out", *QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, out) == (2, "")
    assert "File too large" in refusal(err)
    assert str(tmp_path) in refusal(err)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert held(source) == before

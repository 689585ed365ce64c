"""The command line: JSON alone on stdout, exit codes, and one clear line for each kind of bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from commands import SMALL, Run, json_of
from onnx_kivi.cli.parser import main
from onnx_kivi.rewrite import pipeline
from onnx_kivi.run.session import Session
from onnx_kivi.runtime.hosts import describe
from zoo import MODELS


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """(exit code, stdout, stderr) of a command."""

    def call(*args: object) -> tuple[int, str, str]:
        try:
            code = main([str(a) for a in args])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


def test_inspect_lists_sites(tiny: Path, run: Run) -> None:
    data = json_of(run("inspect", tiny, "--json"))
    assert data["misses"] == []
    first, second = data["sites"]
    assert (first["layer"], second["layer"]) == (0, 1)
    assert first["family"] == "decomposed"
    assert (first["q_heads"], first["kv_heads"], first["k_head_size"], first["v_head_size"]) == (4, 2, 16, 16)
    assert first["scale"] == pytest.approx(0.25)
    assert first["cache_inputs"] == ["past_key_values.0.key", "past_key_values.0.value"]
    assert first["cache_outputs"] == ["present.0.key", "present.0.value"]
    assert {"node", "mask", "causal", "window", "softcap"} <= set(first)


def test_inspect_takes_a_folder_and_prints_a_table(tiny: Path, run: Run) -> None:
    code, out, _ = run("inspect", tiny.parent)
    assert code == 0
    assert "decomposed" in out


def test_rewrite_verifies_and_writes(tiny: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "small.onnx"
    data = json_of(run("rewrite", tiny, "-o", out, "--bits", 8, *SMALL, "--json"))
    assert data["rewritten"] == str(out)
    assert len(data["sites"]) == 2
    assert len(data["removed_inputs"]) == len(data["removed_outputs"]) == 4
    assert data["verify"]["ok"]
    assert data["verify"]["sealed_tokens"] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["small.onnx"]
    model = onnx.load(out)
    bits = {a.i for n in model.graph.node for a in n.attribute if a.name in ("k_bits", "v_bits")}
    assert bits == {8}


def test_rewrite_adds_the_input_for_the_last_logits(tiny: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "small.onnx"
    assert json_of(run("rewrite", tiny, "-o", out, *SMALL, "--last-logits", "--json"))["verify"]["ok"]
    assert "num_logits_to_keep" in {i.name for i in Session(out).get_overridable_initializers()}


def test_rewrite_examines_the_model_once(tiny: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def counted(model: onnx.ModelProto, **options: Any) -> pipeline.Findings:
        seen.append(model)
        return examine(model, **options)

    examine = pipeline.examine
    monkeypatch.setattr(pipeline, "examine", counted)
    assert json_of(run("rewrite", tiny, "-o", tmp_path / "small.onnx", *SMALL, "--json"))["verify"]["ok"]
    assert len(seen) == 1


def test_rewrite_options_reach_the_nodes(tiny: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "small.onnx"
    args = ("--k-bits", 4, "--v-bits", 2, "--v-group-size", 8, "--layer-bits", "1:8", "--no-verify", *SMALL)
    assert json_of(run("rewrite", tiny, "-o", out, *args, "--json"))["verify"] is None
    nodes = [n for n in onnx.load(out).graph.node if n.op_type == "QuantizedKvSdpa"]
    found = [{a.name: a.i for a in n.attribute if a.type == onnx.AttributeProto.INT} for n in nodes]
    assert [(f["k_bits"], f["v_bits"]) for f in found] == [(4, 2), (8, 8)]
    assert {f["block_tokens"] for f in found} == {16}
    assert {f["v_group_size"] for f in found} == {8}
    assert {f["residual_length"] for f in found} == {8}
    assert {f["sink_length"] for f in found} == {2}


def test_a_preset_reaches_the_nodes_and_says_its_bits(tiny: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "small.onnx"
    data = json_of(run("rewrite", tiny, "-o", out, "--preset", "smallest", "--json"))
    assert data["verify"]["ok"]
    assert data["verify"]["sealed_tokens"] > 0
    assert 2 < data["bits_at_16k"] < 6
    nodes = [n for n in onnx.load(out).graph.node if n.op_type == "QuantizedKvSdpaV2"]
    assert {a.s for n in nodes for a in n.attribute if a.name.endswith("_scheme")} == {
        b"digits:2+token",
        b"symmetric+rotated",
    }


def test_cross_reaches_inspect_and_rewrite(tmp_path: Path, run: Run) -> None:
    source, out = MODELS["optimum/t5/decoder_with_past_model"], tmp_path / "small.onnx"
    assert [site["kind"] for site in json_of(run("inspect", source, "--json"))["sites"]] == ["self"] * 2
    found = json_of(run("inspect", source, "--cross", "--json"))["sites"]
    assert [(site["layer"], site["kind"]) for site in found] == [
        (n, kind) for n in (0, 1) for kind in ("self", "cross")
    ]
    args = ("--cross", *SMALL, "--layer-bits", "1:4")
    data = json_of(run("rewrite", source, "-o", out, *args, "--json"))
    assert data["verify"]["ok"]
    assert data["verify"]["sealed_tokens"] > 0
    assert sorted(data["removed_inputs"]) == sorted(
        f"past_key_values.{n}.decoder.{side}" for n in (0, 1) for side in ("key", "value")
    )
    assert all("decoder" in name for name in data["removed_outputs"])
    nodes = [n for n in onnx.load(out).graph.node if n.op_type == "QuantizedKvSdpa"]
    found = [{a.name: a.s.decode() if a.name == "kind" else a.i for a in n.attribute} for n in nodes]
    assert sorted((f["kind"], f["k_bits"], f["residual_length"], f["sink_length"]) for f in found) == [
        ("cross", 4, 0, 2),
        ("cross", 8, 0, 2),
        ("self", 4, 8, 2),
        ("self", 8, 8, 2),
    ]


def test_rewrite_verifies_at_the_level_asked_for(tiny: Path, tmp_path: Path, run: Run) -> None:
    asked = {(): "quick", ("--verify", "full"): "full", ("--verify", "no"): None, ("--no-verify",): None}
    for n, (options, level) in enumerate(asked.items()):
        checked = json_of(run("rewrite", tiny, "-o", tmp_path / f"{n}.onnx", *options, *SMALL, "--json"))["verify"]
        assert (checked and checked["level"]) == level


@pytest.mark.parametrize("options", [("--verify", "some"), ("--verify", "full", "--no-verify")])
def test_levels_that_do_not_go_are_bad_usage(tiny: Path, tmp_path: Path, run: Run, options: tuple[str, ...]) -> None:
    code, _, err = run("rewrite", tiny, "-o", tmp_path / "small.onnx", *options)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "--verify" in err


def test_verify_reports_and_fails_with_1(tiny: Path, rewritten: Callable[[int], Path], run: Run) -> None:
    data = json_of(run("verify", tiny, rewritten(8), "--json"))
    assert data["ok"]
    assert data["max_rel_diff"] < 1e-4
    assert data["top1_agreement"] > 0.9
    code, out, err = run("verify", tiny, rewritten(32), "--tolerance", "1e-12", "--json")
    assert code == 1
    assert not json.loads(out)["ok"]
    assert "at 32 bits logits differ" in err


def test_info(run: Run) -> None:
    data = json_of(run("info", "--json"))
    assert {"version", "host", "backend", "isa"} <= set(data)


def test_help_has_an_example(run: Run) -> None:
    benches = ("bench", "batch-bench", "kernel-bench", "host-bench")
    for command in ("inspect", "rewrite", "verify", "generate", "ppl", *benches, "demo", "info"):
        code, out, _ = run(command, "--help")
        assert code == 0
        assert f"example: onnx-kivi {command}" in " ".join(out.split())


def test_bench_rows(tiny: Path, rewritten: Callable[[int], Path], run: Run) -> None:
    args = ("--reference", tiny, "--context", "64,256", "--new-tokens", 3)
    rows = json_of(run("bench", rewritten(8), *args, "--json"))["rows"]
    assert [row["context"] for row in rows] == [64, 256]
    for row in rows:
        assert row["ms_per_token"] > 0
        assert row["reference_ms_per_token"] > 0
        # 2 layers, 2 kv heads, 16 + 16 channels, f32; 5 tokens were decoded, two of them to warm up.
        assert row["reference_cache_bytes"] == (row["context"] + 5) * 2 * 2 * 32 * 4
        assert row["cache_bytes"] < 0.6 * row["reference_cache_bytes"]


def test_batch_bench_rows(tiny: Path, rewritten: Callable[[int], Path], run: Run) -> None:
    args = ("--reference", tiny, "--streams", "1,3", "--context", 100, "--new-tokens", 3)
    rows = json_of(run("batch-bench", rewritten(8), *args, "--json"))["rows"]
    assert [(row["streams"], row["context"]) for row in rows] == [(1, 100), (3, 100)]
    for row in rows:
        assert min(row["tokens_per_s"], row["first_token_ms"], row["reference_tokens_per_s"]) > 0
    assert 2.5 < rows[1]["cache_bytes"] / rows[0]["cache_bytes"] < 4
    assert "tokens/s" in run("batch-bench", rewritten(8), "--streams", 2, "--context", 20, "--new-tokens", 1)[1]


@pytest.mark.parametrize("option", [("--streams", "0"), ("--streams", "1,x"), ("--context", "-5"), ("--new-tokens", 0)])
def test_batch_bench_refuses_numbers_out_of_range(
    rewritten: Callable[[int], Path], run: Run, option: tuple[str, object]
) -> None:
    code, _, errors = run("batch-bench", rewritten(8), *option)
    assert code == 2
    assert f"argument {option[0]}: expected an integer from 1" in errors


def test_kernel_bench_rows(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnx_kivi.measure import kernel_bench as kernel

    monkeypatch.setattr(kernel, "BUDGET_SECONDS", 0.0)
    monkeypatch.setattr(kernel, "last_level_cache_bytes", lambda: 1 << 16)
    args = ("--heads", 4, "--kv-heads", 2, "--head-size", 32, "--context", 200, "--threads", describe()["threads"])
    data = json_of(run("kernel-bench", *args, "--json"))
    assert set(data["ratios"]) == {"concat", "gqa_f32", "gqa_int8", "gqa_int4", "stream"}
    assert all(row["ms"] > 0 and row["gb_per_s"] > 0 for row in data["rows"])


def test_host_bench_rows(run: Run) -> None:
    rows = json_of(run("host-bench", "--turns", 2, "--json"))["rows"]
    assert [row["host"] for row in rows] == describe()["hosts"]
    assert all(math.isfinite(row["us_per_node"]) for row in rows)
    assert run("host-bench", "--turns", 0)[0] == 2


def old_file(tmp_path: Path) -> Path:
    out = tmp_path / "out.onnx"
    out.write_bytes(b"old")
    return out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--bits", 5), "k_bits: expected one of 2, 4, 8, 32, got 5"),
        (("--k-bits", 3), "k_bits: expected one of 2, 4, 8, 32, got 3"),
        (("--block-tokens", 0), "block_tokens: expected an integer from 1 to 1024, got 0"),
        (("--residual", -1), "residual_length: expected an integer from 0 to 1048576, got -1"),
        (("--sinks", -1), "sink_length: expected an integer from 0 to 65536, got -1"),
        (("--v-group-size", -2), "v_group_size: expected an integer from 0 to 1048576, got -2"),
        (("--layer-bits", "0-8"), "layer bits: expected LAYERS:BITS"),
        (("--bits", "many"), "invalid int value"),
    ],
)
def test_bad_options(tiny: Path, tmp_path: Path, run: Run, args: tuple[object, ...], message: str) -> None:
    out = old_file(tmp_path)
    code, stdout, err = run("rewrite", tiny, "-o", out, *args)
    assert code == 2
    assert stdout == ""
    assert message in err
    assert out.read_bytes() == b"old"


def test_missing_truncated_cacheless_and_rewritten_models(
    tiny: Path, rewritten: Callable[[int], Path], tmp_path: Path, run: Run
) -> None:
    truncated = tmp_path / "truncated.onnx"
    truncated.write_bytes(tiny.read_bytes()[:-999])
    cacheless = tmp_path / "cacheless.onnx"
    text = '<ir_version: 8, opset_import: ["": 18]> g (float[N] x) => (float[N] y) { y = Relu(x) }'
    onnx.save(onnx.parser.parse_model(text), cacheless)
    old = tmp_path / "opset.onnx"
    model = onnx.load(tiny)
    model.opset_import[0].version = 5
    onnx.save(model, old)
    out = old_file(tmp_path)
    for model_path, message in (
        (tmp_path / "absent.onnx", "absent.onnx"),
        (truncated, "truncated.onnx"),
        (cacheless, "cache"),
        (rewritten(8), "already"),
        (old, "opset"),
    ):
        code, stdout, err = run("rewrite", model_path, "-o", out)
        assert (code, stdout) == (2, ""), model_path
        assert message in err
        assert len(err.strip().splitlines()[-1:]) == 1
        assert "Traceback" not in err
        assert out.read_bytes() == b"old"


def test_output_that_cannot_be_written(tiny: Path, tmp_path: Path, run: Run) -> None:
    code, _, err = run("rewrite", tiny, "-o", tmp_path / "absent" / "out.onnx")
    assert code == 2
    assert "expected an existing folder" in err
    code, _, err = run("rewrite", tiny, "-o", tiny)
    assert code == 2
    assert "never overwritten" in err
    (tmp_path / "folder.onnx").mkdir()
    code, _, err = run("rewrite", tiny, "-o", tmp_path / "folder.onnx", "--no-verify")
    assert code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["folder.onnx"]


def test_failed_verification_writes_nothing(
    tiny: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnx_kivi.measure.verify.ROUNDING", {"float": (1e-13, 1e-13)})
    out = old_file(tmp_path)
    code, _, err = run("rewrite", tiny, "-o", out, "--bits", 32)
    assert code == 1
    assert "nothing written" in err
    assert out.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--layer-bits", "0,77:8"), "layer_bits: expected layers that the model has, 0 to 1, got [77]"),
        (("--bit", "4"), "unrecognized arguments: --bit 4"),
        (("--preset", "small", "--v-bits", "4"), "--preset: expected no bits and no schemes beside small, got v_bits"),
        (("--k-scheme", "digits:2"), "k_bits: expected one of 2 with k_scheme digits:2, got 8"),
        (("--v-scheme", "fast"), "v_scheme: expected one of affine, symmetric+rotated, got 'fast'"),
    ],
)
def test_rewrite_refuses_options_that_mean_nothing(
    tiny: Path, tmp_path: Path, run: Run, args: tuple[str, ...], message: str
) -> None:
    code, _, errors = run("rewrite", tiny, "-o", tmp_path / "small.onnx", *args)
    assert code == 2
    assert message in errors
    assert not any(tmp_path.iterdir())


def test_rewrite_refuses_a_folder_as_its_output(tiny: Path, tmp_path: Path, run: Run) -> None:
    code, _, errors = run("rewrite", tiny, "-o", tmp_path)
    assert code == 2
    assert "-o: expected a file to write, got the folder" in errors


def test_bench_refuses_a_plot_it_can_not_draw_before_it_measures(tiny: Path, run: Run) -> None:
    pytest.importorskip("matplotlib", exc_type=ImportError)
    code, _, errors = run("bench", tiny, "--plot", "curves.xyz")
    assert code == 2
    assert "--plot: expected a file that ends in one of" in errors


def test_what_onnxruntime_refuses_is_one_line(tmp_path: Path, rewritten: Callable[[int], Path], run: Run) -> None:
    """A tokenizer of more tokens than the model knows."""
    tokenizers = pytest.importorskip("tokenizers", exc_type=ImportError)
    vocabulary = {"Once": 70000, "[UNK]": 0}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text").write_text("Once " * 8)
    args = ("--tokenizer", tmp_path, "--text", tmp_path / "text", "--window", 8)
    code, _, errors = run("ppl", rewritten(8), *args)
    assert code == 2
    assert "Traceback" not in errors
    assert "70000" in errors

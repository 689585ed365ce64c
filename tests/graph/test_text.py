"""Text in, text out: tokenizer folders, and the commands generate and ppl on a tiny decoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import onnx_kivi as kivi
from onnx_kivi.cli.parser import main
from onnx_kivi.run.tokenizer import Tokenizer

WORDS = " ".join(f"w{i * 37 % 256}" for i in range(150))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer of 256 words, of which w7 ends a text."""
    backend = Backend(WordLevel({f"w{i}": i for i in range(256)}, unk_token="w0"))
    backend.pre_tokenizer = Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "w7"}}))
    return tmp_path


def test_tokenizer_folder(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("w3 w200 what") == [3, 200, 0]
    assert tokenizer.decode([3, 200]) == "w3 w200"
    assert tokenizer.stop_tokens == (7,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert Tokenizer.load(folder).stop_tokens == (5, 6)


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(kivi.UnsupportedModelError, match=r"tokenizer.json: expected a tokenizers file"):
        Tokenizer.load(tmp_path)


def test_generate_prints_what_the_session_generates(
    folder: Path, rewritten: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer.load(folder)
    session = kivi.Session(rewritten(8))
    expected = list(session.generate(tokenizer.encode(WORDS), max_new_tokens=9, stop_tokens=[7]))
    args = ["generate", str(rewritten(8)), "--tokenizer", str(folder), "--prompt", WORDS, "--max-new-tokens", "9"]
    assert main([*args, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["tokens"] == len(expected)
    assert data["text"] == tokenizer.decode(expected)
    assert data["ms_per_token"] > 0
    assert 0 < data["cache_bytes"] < 159 * 2 * 2 * 32 * 4
    assert main(args) == 0
    assert capsys.readouterr().out.startswith(data["text"])


def test_ppl_of_quantized_and_dense_against_the_original(
    folder: Path, tiny: Path, rewritten: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text = folder / "text.txt"
    text.write_text(WORDS)
    kl = {}
    for bits in (32, 8, 4):
        args = ["ppl", str(rewritten(bits)), "--tokenizer", str(folder), "--text", str(text), "--reference", str(tiny)]
        assert main([*args, "--window", "130", "--windows", "2", "--json"]) == 0
        data = json.loads(capsys.readouterr().out)
        kl[bits] = data["mean_kl"]
        assert data["ppl"] == pytest.approx(data["reference_ppl"], rel=1e-5 if bits == 32 else 0.2)
        assert (data["sealed_tokens"] > 0) == (bits < 32)
    # Rounding of float32 logits, against 8 and 4 bits on 112 of 130 tokens.
    assert kl[32] < 1e-9 < kl[8] < kl[4] / 10


def test_ppl_of_a_short_text(folder: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = folder / "text.txt"
    text.write_text("w1 w2")
    assert main(["ppl", str(tiny), "--tokenizer", str(folder), "--text", str(text)]) == 2
    assert "expected at least 1024 tokens, got 2" in capsys.readouterr().err

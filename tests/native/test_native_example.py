"""The C++ example chats as the Python session does: turns, an end token, beams, a cache that is saved and loaded."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import onnx_kivi as kivi
from onnx_kivi_models.tiny import tiny_decoder

native = pytest.importorskip("onnx_kivi.runtime.native", reason="nothing is compiled here", exc_type=ImportError)

ROOT = Path(__file__).parents[2]
TURNS = ([7, 200, 31, 5, 90], [12, 3], [44, 45, 46, 47])
COUNT = 30


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, onnxruntime_include: Path) -> Path:
    """The built program; its onnxruntime is the one of the Python package."""
    runtime = next((Path(ort.__file__).parent / "capi").glob("libonnxruntime.so*"), None)
    if runtime is None or shutil.which("g++") is None:
        pytest.skip("no g++ here, or no libonnxruntime in the Python package")
    folder = tmp_path_factory.mktemp("example")
    (folder / "libonnxruntime.so.1").symlink_to(runtime)
    library = Path(native.library_path())
    command = ["g++", "-std=c++20", "-Wall", "-Wextra", "-Werror", str(ROOT / "examples" / "cpp" / "chat.cpp")]
    command += [f"-I{onnxruntime_include}", f"-I{ROOT / 'custom_ops' / 'include'}", str(runtime), str(library)]
    command += [f"-Wl,-rpath,{folder}:{library.parent}", "-o", str(folder / "chat")]
    subprocess.run(command, check=True)
    return folder / "chat"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder that quantizes all but its first tokens and the block that is open."""
    config = kivi.KiviConfig(block_tokens=16, v_group_size=16, residual_length=0, sink_length=2)
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    kivi.save(kivi.rewrite(tiny_decoder(seed=5), config)[0], path)
    return path


@dataclass
class Said:
    """What the program printed: a reply for each turn, then tokens, bytes and quantized tokens of the cache."""

    replies: list[list[int]]
    tokens: int
    nbytes: int
    sealed: int


def chat(program: Path, model: Path, turns: Sequence[Sequence[int]], *options: object) -> Said:
    lines = "\n\n".join(" ".join(map(str, turn)) for turn in turns)
    command = [str(part) for part in (program, model, native.library_path(), "--count", COUNT, *options)]
    printed = subprocess.run(command, input=lines, capture_output=True, text=True, check=True).stdout
    *replies, summary = printed.splitlines()
    return Said([[int(token) for token in reply.split()] for reply in replies], *map(int, re.findall(r"\d+", summary)))


def step(session: kivi.Session, rows: list[list[int]]) -> np.ndarray:
    """Log-probabilities (rows, vocabulary) behind the last of equally many new tokens of each row."""
    past, shape = session.cache.length, (len(rows), len(rows[0]))
    feeds = {
        "input_ids": np.array(rows),
        "attention_mask": np.ones((shape[0], past + shape[1]), np.int64),
        "position_ids": np.broadcast_to(np.arange(past, past + shape[1]), shape).copy(),
    }
    logits = session.run(["logits"], feeds, cache=session.cache)[0][:, -1].astype(np.float64)
    most = logits.max(axis=1, keepdims=True)
    return np.asarray(logits - most - np.log(np.exp(logits - most).sum(axis=1, keepdims=True)))


def beam_search(session: kivi.Session, turn: list[int], width: int, end: int = -1) -> list[int]:
    """The likeliest reply of at most COUNT tokens; the session's cache then holds it, behind the turn."""
    scores = step(session, [turn])
    begin, beams = session.cache.length, [(0.0, [])]  # type: tuple[int, list[tuple[float, list[int]]]]
    for _ in range(COUNT):
        if all(reply[-1:] == [end] for _, reply in beams):
            break
        grown = []
        for row, (score, reply) in enumerate(beams):
            if reply[-1:] == [end]:
                grown.append((score, row, reply))
            else:
                grown += [(score + s, row, [*reply, token]) for token, s in enumerate(scores[row])]
        grown = sorted(grown, key=lambda candidate: -candidate[0])[:width]
        session.cache.reorder([row for _, row, _ in grown])
        beams = [(score, reply) for score, _, reply in grown]
        scores = step(session, [reply[-1:] for _, reply in beams])
    session.cache.reorder([0])
    session.cache.crop(begin + len(beams[0][1]))
    return beams[0][1]


def check_cache(said: Said, session: kivi.Session) -> None:
    assert session.cache.sealed_tokens >= 64
    assert (said.tokens, said.nbytes, said.sealed) == (
        session.cache.length,
        session.cache.nbytes,
        session.cache.sealed_tokens,
    )


def test_its_greedy_replies_are_those_of_python(program: Path, model: Path) -> None:
    said = chat(program, model, TURNS)
    session = kivi.Session(model, host="native")
    prompt: list[int] = []
    for turn, reply in zip(TURNS, said.replies, strict=True):
        prompt += turn
        generated = session.generate(np.array([prompt]), max_new_tokens=COUNT, cache=session.cache)
        assert reply == [int(np.ravel(token)[0]) for token in generated]
        prompt = [reply[-1]]  # generate leaves the last token to the next prompt
    step(session, [prompt])
    check_cache(said, session)


@pytest.mark.parametrize("width", [2, 4])
def test_its_beams_are_those_of_python(program: Path, model: Path, width: int) -> None:
    greedy, said = chat(program, model, TURNS), chat(program, model, TURNS, "--beams", width)
    session = kivi.Session(model, host="native")
    assert said.replies == [beam_search(session, turn, width) for turn in TURNS]
    assert said.replies != greedy.replies
    check_cache(said, session)


@pytest.mark.parametrize("width", [1, 3])
def test_a_reply_ends_with_the_end_token_and_so_does_its_beam(program: Path, model: Path, width: int) -> None:
    end = chat(program, model, TURNS, "--beams", width).replies[0][9]
    said = chat(program, model, TURNS, "--beams", width, "--end", end)
    session = kivi.Session(model, host="native")
    assert said.replies == [beam_search(session, turn, width, end) for turn in TURNS]
    assert said.replies[0][-1] == end
    assert len(said.replies[0]) < COUNT
    assert (said.tokens, said.sealed) == (session.cache.length, session.cache.sealed_tokens)


@pytest.mark.parametrize("width", [1, 3])
def test_a_chat_that_is_saved_and_continued_is_an_uninterrupted_one(
    program: Path, model: Path, tmp_path: Path, width: int
) -> None:
    whole = chat(program, model, TURNS, "--beams", width, "--save", tmp_path / "whole.kivi")
    begun = chat(program, model, TURNS[:2], "--beams", width, "--save", tmp_path / "part.kivi")
    (tmp_path / "turns").write_text(" ".join(map(str, TURNS[2])))
    files = ("--turns", tmp_path / "turns", "--load", tmp_path / "part.kivi", "--save", tmp_path / "end.kivi")
    ended = chat(program, model, [], "--beams", width, *files)
    assert begun.replies + ended.replies == whole.replies
    assert (tmp_path / "end.kivi").read_bytes() == (tmp_path / "whole.kivi").read_bytes()
    with kivi.Session(model).load_cache(tmp_path / "end.kivi") as cache:
        assert (cache.length, cache.sealed_tokens) == (whole.tokens, whole.sealed)
        assert cache.sealed_tokens >= 64


@pytest.mark.parametrize(
    ("options", "turn", "message"),
    [
        (("--load", "absent.kivi"), "", "absent.kivi: expected a cache file, got: No such file or directory"),
        (("--turns", "absent.txt"), "", "absent.txt: expected a file to read"),
        (("--save", "/dev/null"), "", "/dev/null: expected a place where the cache can be written"),
        (("--beams", "two"), "", "--beams: expected a number >= 0, got two"),
        (("--beams",), "", "expected an option and its value, got --beams"),
        (("--color", "1"), "", "expected an option and its value, got --color"),
        ((), "1 -2", "token: expected a number >= 0, got -2"),
        ((), "1 2x", "token: expected a number >= 0, got 2x"),
        ((), "1000000", "indices element out of data bounds"),
    ],
)
def test_it_says_what_is_wrong(
    program: Path, model: Path, options: tuple[str, ...], turn: str, message: str, tmp_path: Path
) -> None:
    command = [program, model, native.library_path(), *options]
    done = subprocess.run(command, input=turn, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_model_that_is_absent_and_no_arguments_are_said(program: Path, tmp_path: Path) -> None:
    for arguments, message in (([], "usage: chat"), ([tmp_path / "absent.onnx", native.library_path()], "absent.onnx")):
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, input="")
        assert done.returncode == 1
        assert message in done.stderr

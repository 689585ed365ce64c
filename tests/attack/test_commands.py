"""Every command with every number out of range: exit code 2 and one line, from a sweep over the parser's options."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

from onnx_kivi.cli.parser import build_parser, main
from refusals import refusal

WRONG = ("-1", "-7", str(10**20), "1.5", "nan", "inf", "-inf", "1e400", "", "x", "0x10")
REAL = ("--tolerance", "--temperature", "--top-p", "--max-kl", "--target-bits")


def commands() -> dict[str, argparse.ArgumentParser]:
    (choice,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(choice.choices)


def numbers() -> Iterator[tuple[str, str]]:
    """(command, option) of every option that takes a number."""
    for name, parser in commands().items():
        for action in parser._actions:
            if action.option_strings and action.nargs is None and action.type is not None:
                yield name, action.option_strings[-1]


def arguments(name: str, tiny: Path, out: Path) -> list[str]:
    """What the command needs beside the option."""
    given: list[str] = []
    for action in commands()[name]._actions:
        if action.required and action.option_strings:
            given += [action.option_strings[-1], str(out) if action.dest == "output" else str(tiny.parent)]
        elif not action.option_strings and action.dest != "help":
            given.append(str(tiny))
    return given


@pytest.mark.parametrize(("name", "option"), list(numbers()))
def test_a_number_out_of_range_is_refused_in_one_line(
    name: str, option: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(name, tiny, tmp_path / "out.onnx")
    for text in WRONG:
        if text == "1.5" and option in REAL:
            continue
        try:
            code = main([name, *given, f"{option}={text}"])
        except SystemExit as stop:
            code = int(stop.code or 0)
        assert code == 2, f"{option}={text}"
        assert option.strip("-")[:4] in refusal(capsys.readouterr().err).replace("_", "-"), f"{option}={text}"
    assert not any(tmp_path.iterdir())


def test_the_sweep_has_every_kind_of_command() -> None:
    assert {"rewrite", "verify", "generate", "ppl", "bench", "kernel-bench"} <= {name for name, _ in numbers()}
    assert len(list(numbers())) > 20


@pytest.mark.parametrize("name", sorted(commands()))
def test_no_file_is_a_file_that_is_not_there(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments(name, tmp_path / "absent" / "model.onnx", tmp_path / "out.onnx")
    if not any("absent" in word for word in given):
        return
    assert main([name, *given]) == 2
    assert "absent" in refusal(capsys.readouterr().err)

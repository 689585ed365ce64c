"""What a command says when it refuses: one line of its own, beside those that tell of its progress."""

from __future__ import annotations


def refusal(stderr: str) -> str:
    """The one line that says why; fails if there is a traceback, no such line, or more than one."""
    assert "Traceback" not in stderr, stderr
    lines = [line for line in stderr.splitlines() if line.startswith("onnx-kivi ")]
    assert len(lines) == 1, stderr
    return lines[0]

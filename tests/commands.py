"""What a command of the CLI gives: its exit code, what it prints, and the JSON in that."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

SMALL = ("--block-tokens", "16", "--residual", "8", "--sinks", "2")
"""Options with which the tests' tiny decoders seal something."""

Outcome = tuple[int, str, str]
"""(exit code, stdout, stderr)."""

Run = Callable[..., Outcome]


def json_of(outcome: Outcome) -> dict[str, Any]:
    """The object that a command printed, which must have succeeded."""
    code, out, err = outcome
    assert code == 0, err
    return dict(json.loads(out))

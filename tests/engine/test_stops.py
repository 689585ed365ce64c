"""Stop strings on an alphabet of a few tokens."""

from __future__ import annotations

import pytest

from onnx_kivi.engine.request import Token
from onnx_kivi.engine.stops import Stops

PIECES = ["a", "b", "ab", "ba", "c", "\N{REPLACEMENT CHARACTER}"]


def decode(ids: list[int]) -> str:
    return "".join(PIECES[i] for i in ids)


def given(strings: list[str], ids: list[int]) -> tuple[list[list[int]], bool]:
    """What each token releases, and whether the last completes a stop string."""
    stops = Stops(strings, decode)
    released, stopped = [], False
    for token in ids:
        assert not stopped
        tokens, stopped = stops.push(Token(token))
        released.append([each.id for each in tokens])
    return released, stopped


@pytest.mark.parametrize(
    ("strings", "ids", "released", "stopped"),
    [
        (["cc"], [0, 1, 4], [[0], [1], []], False),
        (["cc"], [0, 4, 0], [[0], [], [4, 0]], False),
        (["cc"], [0, 4, 4], [[0], [], []], True),
        (["bab"], [2, 2], [[], []], True),
        (["bab"], [0, 2, 4], [[0], [], [2, 4]], False),
        (["x", "b"], [0, 1], [[0], []], True),
        (["cc"], [0, 5, 4], [[0], [], [5]], False),
    ],
)
def test_tokens_wait_while_they_may_be_part_of_a_stop(
    strings: list[str], ids: list[int], released: list[list[int]], stopped: bool
) -> None:
    assert given(strings, ids) == (released, stopped)


def test_what_waits_is_given_at_another_end() -> None:
    stops = Stops(["cc"], decode)
    assert stops.push(Token(4)) == ([], False)
    assert [token.id for token in stops.rest()] == [4]
    assert stops.rest() == []

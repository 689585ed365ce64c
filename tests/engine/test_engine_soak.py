"""A soak of the engine: half a minute, as memory needs some time to show that it is flat."""

from __future__ import annotations

import pytest

from engine_soak import soak


@pytest.mark.slow
def test_random_use_gives_no_wrong_token_and_leaks_nothing() -> None:
    done = soak(30)
    assert min(done[way] for way in ("read", "cancel", "drop", "error", "hits", "evictions")) > 5

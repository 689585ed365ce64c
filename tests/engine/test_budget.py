"""What a cache will take is what it takes; what is kept of prompts is counted, and dropped in its order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import onnx_kivi as kivi
from onnx_kivi.engine.model import BatchedModel
from onnx_kivi.engine.prefixes import Conversation, PrefixCache
from onnx_kivi.run.stepper import Stepper
from serving import PROMPTS

Rewritten = Callable[[int], Path]
CHUNK = 16


@pytest.mark.parametrize("bits", [32, 8, 4, 2])
def test_the_size_of_a_cache_is_known_before_it_is_filled(rewritten: Rewritten, bits: int) -> None:
    session = kivi.Session(rewritten(bits), backend="native")
    sizes = BatchedModel(session).sizes
    for tokens in (1, 2, 25, 26, 41, 42, 100):
        with session.new_cache() as cache:
            Stepper(session, cache).last(PROMPTS[:1, :tokens])
            assert sizes.whole(tokens) == cache.nbytes
            assert (cache.sealed_tokens > 0) == (tokens >= 26 and bits < 32)
    assert sizes.whole(100) == sizes.sealed(100) + sizes.tail(100)


@pytest.mark.parametrize("preset", ["balanced", "small", "smallest"])
@pytest.mark.parametrize("backend", ["native", "numpy"])
def test_the_size_of_every_scheme_is_known(tiny: Path, tmp_path: Path, preset: str, backend: str) -> None:
    config = kivi.KiviConfig.of_preset(preset, block_tokens=16, residual_length=8, sink_length=2)
    kivi.save(kivi.rewrite(tiny, config)[0], tmp_path / "model.onnx")
    session = kivi.Session(tmp_path / "model.onnx", host="python", backend=backend)
    sizes = BatchedModel(session).sizes
    with session.new_cache() as cache:
        Stepper(session, cache).last(PROMPTS[:1, :150])
        assert cache.sealed_tokens == 128
        assert sizes.whole(150) == cache.nbytes


def kept(session: kivi.Session, prefixes: PrefixCache, ids: np.ndarray, room: int) -> Conversation:
    """A prompt whose snapshots are kept as it is fed."""
    conversation = Conversation(ids)
    with session.new_cache() as cache:
        stepper = Stepper(session, cache, prefill_chunk=CHUNK)
        for end in range(CHUNK, len(ids), CHUNK):
            stepper.last(ids[None, stepper.length : end])
            if prefixes.wants(conversation, end):
                prefixes.keep(conversation, end, cache, room)
    return conversation


def test_snapshots_lie_at_distances_that_double(rewritten: Rewritten) -> None:
    session = kivi.Session(rewritten(8))
    prefixes = PrefixCache(BatchedModel(session).sizes, CHUNK)
    assert sorted(kept(session, prefixes, PROMPTS[0, :193], 1 << 30).snapshots) == [5 * 16, 9 * 16, 11 * 16, 12 * 16]
    assert sorted(kept(session, prefixes, PROMPTS[1, :192], 1 << 30).snapshots) == [4 * 16, 8 * 16, 10 * 16, 11 * 16]
    assert sorted(kept(session, prefixes, PROMPTS[2, :16], 1 << 30).snapshots) == []


def test_the_longest_beginning_is_found_but_never_the_whole_prompt(rewritten: Rewritten) -> None:
    session = kivi.Session(rewritten(8))
    prefixes = PrefixCache(BatchedModel(session).sizes, CHUNK)
    ids = PROMPTS[0, :193]
    kept(session, prefixes, ids, 1 << 30)
    for count, expected in ((193, 192), (192, 176), (177, 176), (176, 144), (81, 80), (80, 0)):
        found = prefixes.find(np.concatenate([ids[:count], PROMPTS[1, :1]])[: max(count, 1)])
        assert (found[1] if found else 0) == expected
        if found:
            assert found[0].length == expected
    assert (prefixes.hits, prefixes.saved_tokens) == (5, 192 + 176 + 176 + 144 + 80)


def test_the_least_recently_used_is_dropped_first(rewritten: Rewritten) -> None:
    session = kivi.Session(rewritten(8))
    prefixes = PrefixCache(BatchedModel(session).sizes, CHUNK)
    conversations = [kept(session, prefixes, PROMPTS[b, :100], 1 << 30) for b in range(3)]
    each = prefixes.nbytes // 3
    assert prefixes.find(PROMPTS[0, :100]) is not None
    caches = [*conversations[1].snapshots.values()]
    prefixes.shrink(2 * each)
    assert (prefixes.evictions, prefixes.nbytes) == (1, 2 * each)
    assert prefixes.find(PROMPTS[1, :100]) is None
    assert prefixes.find(PROMPTS[0, :100]) is not None
    with pytest.raises(kivi.CacheError, match="closed"):
        _ = caches[0].length
    prefixes.shrink(0)
    assert prefixes.nbytes == 0


def test_what_is_kept_counts_at_least_what_it_holds(rewritten: Rewritten) -> None:
    session = kivi.Session(rewritten(8), backend="native")
    prefixes = PrefixCache(BatchedModel(session).sizes, CHUNK)
    conversation = kept(session, prefixes, PROMPTS[0, :193], 1 << 30)
    caches = [conversation.snapshots[n] for n in sorted(conversation.snapshots)]
    alone = sum(cache.nbytes - cache.shared_nbytes for cache in caches)
    assert prefixes.nbytes >= alone + caches[-1].shared_nbytes
    assert prefixes.nbytes < sum(cache.nbytes for cache in caches)

"""Uses an engine at random: joins, leaves, cancels, drops, errors; no wrong token, and memory that stays flat.

    PYTHONPATH=.:models:tests python tests/engine_soak.py --seconds 600

Readers on threads of their own ask for prompts whose answers are known from lone runs, at 32 bits. Some cancel, some
drop the stream, and some prompts make the model fail. Resident memory is looked at after a quarter of the time, and at
the end: more than 6 MiB between is a leak.
"""

from __future__ import annotations

import argparse
import gc
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import onnx_kivi as kivi
from onnx_kivi_models.tiny import tiny_decoder
from serving import PROMPTS, Ids, alone, watch

POISON = 251
READERS = 6
MOST_GROWTH_MIB = 6
CONFIG = kivi.KiviConfig(32, 32, block_tokens=16, residual_length=8, sink_length=2)


@dataclass(frozen=True)
class Known:
    """A request and what a lone run answers."""

    ids: Ids
    seed: int
    expected: list[int]

    @property
    def fails(self) -> bool:
        """Whether a run of its prompt or of its answer fails."""
        return POISON in self.ids or POISON in self.expected[:-1]


class Setter:
    """What pytest's monkeypatch is for `watch`."""

    setattr = staticmethod(setattr)


def soak(seconds: float, seed: int = 0) -> Counter[str]:
    """How often what happened. Raises AssertionError for a wrong token or memory that grew."""
    with tempfile.TemporaryDirectory() as name:
        original, path = Path(name) / "model.onnx", Path(name) / "small.onnx"
        onnx.save(tiny_decoder(sharpness=1.4), original)
        kivi.save(kivi.rewrite(original, CONFIG)[0], path)
        session = kivi.Session(path)
    chance = random.Random(seed)
    known = [_known(session, chance, n) for n in range(40)]
    watch(session, Setter, _fail_on_poison)
    done: Counter[str] = Counter()
    wrong: list[str] = []
    ends = time.monotonic() + seconds
    with kivi.Engine(session, 4, 600_000, prefill_chunk=16) as engine:
        readers = [_Reader(engine, known, random.Random(seed + n), ends, done, wrong) for n in range(READERS)]
        for reader in readers:
            reader.start()
        time.sleep(seconds / 4)
        settled = resident_mib()
        for reader in readers:
            reader.join()
        grown = resident_mib() - settled
        stats = engine.stats()
    assert not wrong, wrong[:3]
    assert grown <= MOST_GROWTH_MIB, f"{grown:.1f} MiB more at the end: something leaks"
    done.update(hits=stats.prefix_hits, evictions=stats.evictions)
    return done


class _Reader(threading.Thread):
    """Asks for one thing after another."""

    def __init__(
        self,
        engine: kivi.Engine,
        known: Sequence[Known],
        chance: random.Random,
        ends: float,
        done: Counter[str],
        wrong: list[str],
    ) -> None:
        super().__init__(daemon=True)
        self._engine, self._known, self._chance, self._ends = engine, known, chance, ends
        self._done, self._wrong = done, wrong

    def run(self) -> None:
        while time.monotonic() < self._ends and not self._wrong:
            wanted = self._chance.choice(self._known)
            try:
                self._done[self._ask(wanted)] += 1
            except Exception as error:
                self._wrong.append(repr(error))

    def _ask(self, wanted: Known) -> str:
        stream = self._engine.submit(wanted.ids, max_new_tokens=len(wanted.expected), temperature=8.0, seed=wanted.seed)
        way = self._chance.choice(("read", "read", "read", "cancel", "drop"))
        count = self._chance.randint(0, 5) if way != "read" else len(wanted.expected) + 1
        got: list[int] = []
        try:
            for token in stream:
                got.append(token)
                if len(got) >= count:
                    break
        except kivi.CacheError:
            assert wanted.fails
            way = "error"
        assert got == wanted.expected[: len(got)], f"{wanted}: got {got}"
        if way == "read":
            assert len(got) == len(wanted.expected), f"{wanted}: got {got}, {stream.reason}"
            assert not wanted.fails
        if way == "cancel":
            stream.cancel()
        return way


def _known(session: kivi.Session, chance: random.Random, n: int) -> Known:
    row, common, own = chance.randrange(3), chance.randrange(100), chance.randint(1, 40)
    ids = np.concatenate([PROMPTS[row, :common], PROMPTS[3 + n % 5, :own]])
    ids[ids == POISON] = 0
    if n % 8 == 0:
        ids[-1] = POISON
    return Known(ids, n, alone(session, ids, chance.randint(1, 30), temperature=8.0, seed=n))


def _fail_on_poison(ids: Ids, run: Any) -> Any:
    if POISON in ids:
        raise kivi.CacheError("poison")
    return run()


def resident_mib() -> float:
    """Memory of this process that is in use."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(dict(soak(options.seconds, options.seed)))

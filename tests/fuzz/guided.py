"""A fuzzer of one function on bytes, guided by atheris where it is installed, with a mutator that knows the format."""

from __future__ import annotations

import argparse
import faulthandler
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Check = Callable[[bytes], None]
Mutate = Callable[[bytes, random.Random], bytes]

LONGEST_SECONDS = 20
MOST_MIB = 4096
LONGEST_INPUT = 1 << 16


def fuzz(args: argparse.Namespace, corpus: Path, check: Callable[[], Check], mutate: Mutate) -> None:
    """Run what `check` gives on mutants of the corpus; it raises for what is a finding."""
    if args.replay:
        run = check()
        for path in args.replay:
            run(path.read_bytes())
        return
    try:
        import atheris
    except ImportError:
        _at_random(args, corpus, check(), mutate)
        return
    with atheris.instrument_imports(include=["onnx_kivi"]):
        run = check()

    def custom(data: bytes, most: int, seed: int) -> bytes:
        chance = random.Random(seed)
        mutant = mutate(data, chance) if chance.random() < 0.7 else atheris.Mutate(data, most)
        return mutant[:most]

    kept = args.findings / "corpus"
    kept.mkdir(exist_ok=True)
    flags = [
        f"-max_total_time={args.seconds}",
        f"-seed={args.seed or 1}",
        f"-timeout={LONGEST_SECONDS}",
        f"-rss_limit_mb={MOST_MIB}",
        f"-max_len={LONGEST_INPUT}",
        f"-artifact_prefix={args.findings}/",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *flags, str(kept), str(corpus)], run, custom_mutator=custom)
    atheris.Fuzz()


def _at_random(args: argparse.Namespace, corpus: Path, run: Check, mutate: Mutate) -> None:
    seeds: Sequence[bytes] = [path.read_bytes() for path in sorted(corpus.iterdir())]
    chance, end, count = random.Random(args.seed), time.monotonic() + args.seconds, 0
    while time.monotonic() < end:
        data = mutate(chance.choice(seeds), chance)
        count += 1
        faulthandler.dump_traceback_later(LONGEST_SECONDS, exit=True)
        try:
            run(data)
        except BaseException:
            (args.findings / f"crash-{args.seed}-{count}").write_bytes(data)
            raise
    faulthandler.cancel_dump_traceback_later()
    print(f"{count} executions, nothing found")


def flipped(data: bytes, chance: random.Random) -> bytes:
    """Bytes changed, cut out or repeated at some place."""
    content = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(content) + 1)
        match chance.randrange(3):
            case 0:
                content[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del content[at : at + chance.randint(1, 20)]
            case 2:
                content[at:at] = content[at : at + chance.randint(1, 20)]
    return bytes(content)

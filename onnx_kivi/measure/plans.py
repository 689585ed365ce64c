"""What a verification runs: on which tokens, and in which blocks, at each of its levels.

full: the file as it is, as users open it, past the point where every slot holds sealed blocks, and its 32-bit sibling
on the same tokens. quick: one sibling with small blocks and many first tokens in float32. It takes the file's place in
both parts: on the short run, which ends within those first tokens, nothing is quantized, and on the long one nearly all
is. The graph, and so any error in it, is the file's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..rewrite.report import Report
from ..spec import CROSS, DENSE_BITS, SdpaAttributes
from .reference import Choice, Run
from .synthetic import ENCODER_TOKENS

QUICK, FULL = "quick", "full"
LEVELS = (QUICK, FULL)
# A prefill, a chunk and the block that a quick run takes; the second for originals whose buffers are smaller.
QUICK_SHAPES = ((24, 8, 16), (8, 3, 8))
CHUNK = 8
STEPS = {QUICK: 2, FULL: 4}
DENSE_PROMPTS = (24, 8)
# A window is looked behind if it is no wider. Beyond a full run's prompt tokens come in parts, for memory.
FARTHEST = {QUICK: 512, FULL: 4096}
BEYOND = 8
PART = 512


@dataclass(frozen=True, slots=True)
class Plan:
    """choices: of runs, as Reference takes them; so many of them are needed. sinks, block: of the sibling, at `quick`.

    windows: what the model's attention sees at most. quantizes: whether any slot does.
    """

    level: str
    choices: tuple[Choice, ...]
    needed: int
    sinks: int
    block: int
    windows: frozenset[int]
    quantizes: bool

    @property
    def quick(self) -> bool:
        """Whether it is the quick one."""
        return self.level == QUICK

    @property
    def sessions(self) -> int:
        """How many are opened to compare two models."""
        return 2 + (self.quantizes and not self.quick)

    @property
    def work(self) -> int:
        """Tokens of all rows, as far as can be foreseen."""
        return sum(choice[0].work for choice in self.choices)


def plan(
    level: str, slots: Sequence[SdpaAttributes], report: Report, prompt: int | None, steps: int | None, rows: int
) -> Plan:
    """The plan for a rewritten model with these slots. prompt: of a full run's prefill, None = enough to seal."""
    steps = STEPS[level] if steps is None else steps
    windows = frozenset({a.window for a in slots} | {site.window for site in report.sites}) - {0}
    made = _quick(slots, report, windows, steps, rows) if level == QUICK else _full(slots, windows, prompt, steps, rows)
    return Plan(level, *made, windows, _quantizes(slots))


def _quick(
    slots: Sequence[SdpaAttributes], report: Report, windows: frozenset[int], steps: int, rows: int
) -> tuple[tuple[Choice, ...], int, int, int]:
    room = min(report.cache_facts.capacities.values(), default=None)
    exact, block = _shape(room, max((w for w in windows if w <= FARTHEST[QUICK]), default=-BEYOND) + BEYOND, steps)
    sinks = sum(exact)
    short = [Run(rows, True, exact), Run(1, False, exact)]
    long = [
        Run(n, padded, (sinks + blocks * block, *exact[1:]), _encoder_tokens(slots, sinks, block))
        for n, padded in ((1, False), (rows, True))
        for blocks in (2, 1)
    ]
    choices = (short, long) if _quantizes(slots) else (short,)
    return choices, len(choices), sinks, block


def _shape(room: int | None, first: int, steps: int) -> tuple[tuple[int, ...], int]:
    """The lengths of the short run, `first` if it can be, and the block of the long one, that a buffer has room for."""
    for least in (first, 0):
        for prefill, chunk, block in QUICK_SHAPES:
            exact = (max(prefill, least), chunk, *[1] * steps)
            if room is None or 2 * sum(exact) - exact[0] + 2 * block <= room:
                return exact, block
    return exact, block


def _full(
    slots: Sequence[SdpaAttributes], windows: frozenset[int], prompt: int | None, steps: int, rows: int
) -> tuple[tuple[Choice, ...], int, int, int]:
    encoder = max(_encoder_tokens([a], a.sink_length, a.block_tokens) for a in slots)
    lengths = [(p, CHUNK, *[1] * steps) for p in _prompts(slots, prompt)]
    window = max((w for w in windows if w <= FARTHEST[FULL]), default=0)
    if prompt is None and window + BEYOND > lengths[0][0]:
        first, *rest = lengths[0]
        lengths.insert(0, (first, *_parts(window + BEYOND - first), *rest))
    choices = tuple([Run(n, padded, each, encoder) for each in lengths] for n, padded in ((rows, True), (1, False)))
    return choices, 1, 0, 0


def _parts(tokens: int) -> Iterator[int]:
    yield from [PART] * (tokens // PART)
    if tokens % PART:
        yield tokens % PART


def _prompts(slots: Sequence[SdpaAttributes], prompt: int | None) -> list[int]:
    """Prefill lengths to try, longest first; all but a dense model's last ones seal blocks in every slot."""
    if prompt is not None:
        return [prompt]
    dense = max(a.sink_length + a.residual_length for a in slots)
    block = max(a.block_tokens for a in slots)
    lengths = [dense + blocks * block for blocks in (4, 2, 1)]
    return lengths if _quantizes(slots) else [*lengths, *DENSE_PROMPTS]


def _quantizes(slots: Sequence[SdpaAttributes]) -> bool:
    return any(min(a.k_bits, a.v_bits) < DENSE_BITS for a in slots)


def _encoder_tokens(slots: Sequence[SdpaAttributes], sinks: int, block: int) -> int:
    """Tokens of the encoder: enough to seal several blocks in the slots that store its keys and values."""
    return ENCODER_TOKENS + (sinks + 2 * block) * any(a.kind == CROSS for a in slots)

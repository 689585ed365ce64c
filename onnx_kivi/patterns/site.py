"""What every attention family returns: a `Site` of plain facts, or a `Miss` that says why not.

A `Site` says which tensors the op consumes and in which layout they lie, which nodes vanish with it, and what the
attributes are; the rewriter emits it without knowing the family. A layout has a letter per axis: B batch, H heads,
S new tokens, D head size, T all tokens; K and G are kv heads and query heads per kv head, where H is split so; 1 is an
axis of size 1, and so is what has no letter. Axes in parentheses are merged into one, the first letter varying slowest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from ..spec import CROSS, SELF

Number = int | float
SCORES = "BHST"
SIZE_1 = "1"
LARGEST_FLOAT32 = 3.4028235e38


def letters(layout: str) -> tuple[str, ...]:
    """The letters of each axis: "(BH)SD" gives BH, S, D."""
    return tuple(merged or single for merged, single in re.findall(r"\((\w+)\)|(\w)", layout))


def joined(axes: Iterable[str]) -> str:
    """The layout that has these letters on its axes."""
    return "".join(axis if len(axis) == 1 else f"({axis})" for axis in axes)


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor and how it lies, as "BHSD" or "(BH)SD"."""

    tensor: str
    layout: str = "BHSD"


@dataclass(frozen=True, slots=True)
class Added:
    """Mask term `factor * tensor`, which lies as `layout`; each of its axes may have size 1, and is then broadcast."""

    tensor: str
    layout: str = SCORES
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Filled:
    """Mask term `factor * fill` wherever the boolean `condition` differs from `keep`, else 0; otherwise as `Added`."""

    condition: str
    keep: bool
    fill: float
    layout: str = SCORES
    factor: float = 1.0


MaskTerm = Added | Filled


@dataclass(frozen=True, slots=True)
class NewNode:
    """A node that a family needs in front of the op: op, tensors, attributes; its outputs are new names."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...] = ()
    domain: str = ""


@dataclass(frozen=True, slots=True)
class NewConstant:
    """An initializer that a family's new nodes read: int64, or float32 for floats; a plain number has no axes."""

    name: str
    values: Number | tuple[Number, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One attention over a cache. Sizes are None where the model leaves them open; `covered` are node indices.

    capacity: tokens that the original's cache inputs must have room for before anything is in them; 0 = they grow.
    kind: of the slot that takes the caches' place; the inputs of a `cross` one stay, to fill it.
    """

    layer: int
    family: str
    node: str
    query: Operand
    key: Operand
    value: Operand
    output: Operand
    cache_inputs: tuple[str, ...]
    cache_outputs: tuple[str, ...]
    covered: frozenset[int]
    q_heads: int
    kv_heads: int
    k_head_size: int | None
    v_head_size: int | None
    element: str
    scale: float
    mask: tuple[MaskTerm, ...] = ()
    head_sink: str = ""
    softcap: float = 0.0
    is_causal: bool = False
    window: int = 0
    nan_to_zero: bool = False
    prologue: tuple[NewNode | NewConstant, ...] = ()
    capacity: int = 0
    kind: str = SELF

    @property
    def removed_inputs(self) -> tuple[str, ...]:
        """The cache inputs that a rewritten model no longer has."""
        return () if self.kind == CROSS else self.cache_inputs

    def __post_init__(self) -> None:
        """Raise MissError for numbers that float32 can't hold."""
        for name, number in (("scale", self.scale), ("softcap", self.softcap)):
            if not abs(number) <= LARGEST_FLOAT32:
                raise MissError(
                    f"{name} of the scores is {number}, which float32 can't hold; look for a constant factor that is "
                    "infinite, NaN or 0, and export again without it"
                )

    def to_dict(self) -> dict[str, Any]:
        """The facts that `inspect --json` prints."""
        facts = asdict(self)
        keep = (
            "layer",
            "kind",
            "family",
            "node",
            "q_heads",
            "kv_heads",
            "k_head_size",
            "v_head_size",
            "scale",
            "window",
        )
        return {name: facts[name] for name in keep} | {
            "softcap": self.softcap,
            "causal": self.is_causal,
            "mask": [t.tensor if isinstance(t, Added) else t.condition for t in self.mask],
            "cache_inputs": list(self.cache_inputs),
            "cache_outputs": list(self.cache_outputs),
        }


@dataclass(frozen=True, slots=True)
class Miss:
    """A node, or cache input, that could not be matched, and the reason in one line."""

    node: str
    reason: str


class MissError(Exception):
    """Raised inside a family when a guard fails; the inspector turns it into a Miss."""

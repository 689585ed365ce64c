"""What every attention family returns: a `Match` of plain facts, or a MissError that says why not.

A `Match` says which tensors the op consumes and in which layout they lie, which nodes vanish with it, and what the
attributes are; `rewrite` makes a site of it, and emits it, without knowing the family.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..graph import NewPart
from .caches import CacheTensor
from .layouts import HEADS_FIRST, SCORES

LARGEST_FLOAT32 = 3.4028235e38


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor and how it lies, see `layouts`."""

    tensor: str
    layout: str = HEADS_FIRST


@dataclass(frozen=True, slots=True)
class Added:
    """Mask term `factor * tensor`, which lies as `layout`; each of its axes may have size 1, and is then broadcast."""

    tensor: str
    layout: str = SCORES
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Filled:
    """Mask term `factor * fill` wherever the boolean `tensor` differs from `keep`, else 0; otherwise as `Added`."""

    tensor: str
    keep: bool
    fill: float
    layout: str = SCORES
    factor: float = 1.0


MaskTerm = Added | Filled


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """One attention over caches, as a family proves it. Sizes are None where the model leaves them open.

    caches: those of keys and of values, or the one that holds both. nodes: indices of those that vanish with it,
    beside the caches' own. prologue: what must be emitted in front of the op. capacity: tokens that the original's
    cache inputs must have room for before anything is in them; 0 = they grow. pads_right: the original wants padding
    behind a row's tokens. one_length: why all rows must hold equally many tokens; "" if the family knows no reason.
    """

    query: Operand
    key: Operand
    value: Operand
    output: Operand
    caches: tuple[CacheTensor, ...]
    nodes: frozenset[int]
    q_heads: int
    kv_heads: int
    k_head_size: int | None
    v_head_size: int | None
    scale: float
    mask: tuple[MaskTerm, ...] = ()
    head_sink: str = ""
    softcap: float = 0.0
    is_causal: bool = False
    window: int = 0
    nan_to_zero: bool = False
    prologue: tuple[NewPart, ...] = ()
    capacity: int = 0
    pads_right: bool = False
    one_length: str = ""

    def __post_init__(self) -> None:
        """Raise MissError for numbers that float32 can't hold."""
        for name, number in (("scale", self.scale), ("softcap", self.softcap)):
            if not abs(number) <= LARGEST_FLOAT32:
                raise MissError(
                    f"{name} of the scores is {number}, which float32 can't hold; look for a constant factor that is "
                    "infinite, NaN or 0, and export again without it"
                )

    @property
    def cache_inputs(self) -> tuple[str, ...]:
        """The model's inputs that are the caches."""
        return tuple(cache.input for cache in self.caches)

    @property
    def cache_outputs(self) -> tuple[str, ...]:
        """The model's outputs that return them, "" where none does."""
        return tuple(cache.output for cache in self.caches)

    @property
    def element(self) -> str:
        """Element type of the caches."""
        return self.caches[0].element

    @property
    def covered(self) -> frozenset[int]:
        """Indices of all nodes that vanish."""
        return self.nodes.union(*(cache.nodes for cache in self.caches))


@dataclass(frozen=True, slots=True)
class Miss:
    """A node, or cache input, that could not be matched, and the reason in one line."""

    node: str
    reason: str


class MissError(Exception):
    """Raised inside a family when a guard fails; `rewrite` turns it into a Miss."""

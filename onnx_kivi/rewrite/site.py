"""What becomes of a family's `Match` on its way through the pipeline: a `Candidate`, then a `Site`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from ..patterns import Match
from ..spec import CROSS

AMatch = TypeVar("AMatch", bound=Match)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate(Match):
    """A match with the family and the anchor node it was found by, and the kind of slot its caches become."""

    family: str
    node: str
    kind: str

    @property
    def removed_inputs(self) -> tuple[str, ...]:
        """The cache inputs that a rewritten model no longer has; those of a `cross` slot stay, to fill it."""
        return () if self.kind == CROSS else self.cache_inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Site(Candidate):
    """An attention that can be rewritten, with the number of its layer."""

    layer: int

    def to_dict(self) -> dict[str, Any]:
        """The facts that `inspect --json` prints."""
        return {
            "layer": self.layer,
            "kind": self.kind,
            "family": self.family,
            "node": self.node,
            "q_heads": self.q_heads,
            "kv_heads": self.kv_heads,
            "k_head_size": self.k_head_size,
            "v_head_size": self.v_head_size,
            "scale": self.scale,
            "window": self.window,
            "softcap": self.softcap,
            "causal": self.is_causal,
            "mask": [term.tensor for term in self.mask],
            "cache_inputs": list(self.cache_inputs),
            "cache_outputs": list(self.cache_outputs),
        }


def extended(into: type[AMatch], known: Match, **more: Any) -> AMatch:
    """A match with what has been learned of it since."""
    return into(**{field.name: getattr(known, field.name) for field in fields(known)}, **more)

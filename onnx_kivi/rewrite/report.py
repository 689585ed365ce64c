"""What an inspection found, as data and as a table for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..cache_facts import CacheFacts
from ..patterns import Miss
from ..spec import CROSS, SELF
from .leftovers import NO_CACHE
from .savings import CONTEXTS, ENCODER_CONTEXTS, savings
from .site import Site


@dataclass(frozen=True)
class Report:
    """Sites and misses of one model; `str()` is a table for people.

    element: the roughest type of its caches and of what attends to them. int8_activations: whether the model itself
    rounds activations to 8 bits as it runs. one_length: why the rows of a run must hold equally many tokens; "" if they
    may differ. no_ghost: why it can't have ghost I/O; "" if it can.
    """

    sites: tuple[Site, ...]
    misses: tuple[Miss, ...]
    element: str
    int8_activations: bool = False
    one_length: str = ""
    no_ghost: str = ""

    @property
    def has_cache(self) -> bool:
        """Whether the model has a float cache, rewritable or not; false for an encoder, say."""
        return bool(self.sites or self.misses) and not any(miss.reason.startswith(NO_CACHE) for miss in self.misses)

    @property
    def removed_inputs(self) -> list[str]:
        """The cache inputs that a rewrite takes away."""
        return [name for site in self.sites for name in site.removed_inputs]

    @property
    def removed_outputs(self) -> list[str]:
        """The cache outputs that a rewrite takes away."""
        return [name for site in self.sites for name in site.cache_outputs if name]

    @property
    def cache_facts(self) -> CacheFacts:
        """What running the original takes beyond what its inputs and outputs say."""
        outputs, head_sizes, capacities = dict[str, str](), dict[str, int](), dict[str, int]()
        for site in self.sites:
            outputs |= zip(site.cache_inputs, site.cache_outputs, strict=True)
            sizes = zip(site.cache_inputs, (site.k_head_size, site.v_head_size), strict=False)
            head_sizes |= {name: size for name, size in sizes if size}
            capacities |= {name: site.capacity for name in site.cache_inputs if site.capacity}
        crossed = {name for site in self._of(CROSS) for name in site.cache_inputs}
        return CacheFacts(outputs, head_sizes, capacities, crossed)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        return {
            "sites": [site.to_dict() for site in self.sites],
            "misses": [{"node": miss.node, "reason": miss.reason} for miss in self.misses],
            "element": self.element,
            "ragged": not self.one_length,
            "one_length": self.one_length,
            "ghost": not self.no_ghost,
            "no_ghost": self.no_ghost,
            "savings": savings(self._of(SELF), CONTEXTS),
            "cross_savings": savings(self._of(CROSS), ENCODER_CONTEXTS),
        }

    def __str__(self) -> str:
        head = ("layer", "cache", "family", "heads", "head size", "scale", "mask terms", "node")
        rows = [head, *map(_row, self.sites)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if not self.sites:
            lines = ["no attention over a cache was matched"]
        lines += [_saving("cache", row) for row in savings(self._of(SELF), CONTEXTS)]
        lines += [_saving("encoder's cache", row) for row in savings(self._of(CROSS), ENCODER_CONTEXTS)]
        if self.sites:
            lines.append(f"rows of different lengths in one run: {_yes_unless(self.one_length)}")
            lines.append(f"ghost I/O, for hosts that carry a past: {_yes_unless(self.no_ghost)}")
        lines += [f"missed {miss.node}: {miss.reason}" for miss in self.misses]
        return "\n".join(lines)

    def _of(self, kind: str) -> list[Site]:
        return [site for site in self.sites if site.kind == kind]


def _yes_unless(reason: str) -> str:
    return f"no, {reason}" if reason else "yes"


def _row(site: Site) -> tuple[str, ...]:
    heads = f"{site.q_heads}/{site.kv_heads}"
    sizes = f"{site.k_head_size or '?'}/{site.v_head_size or '?'}"
    terms = ["causal"] * site.is_causal + [f"window {site.window}"] * bool(site.window)
    terms += [f"softcap {site.softcap:g}"] * bool(site.softcap) + ["sinks"] * bool(site.head_sink)
    terms += [f"{len(site.mask)} tensor{'s' * (len(site.mask) > 1)}"] * bool(site.mask)
    return (
        str(site.layer),
        site.kind,
        site.family,
        heads,
        sizes,
        f"{site.scale:.6g}",
        ", ".join(terms) or "none",
        site.node,
    )


def _saving(what: str, row: dict[str, int]) -> str:
    small = ", ".join(
        f"{row[key] / 1e6:,.1f} MB at {key.removeprefix('bits_')} bits ({row['original'] / row[key]:.1f}x smaller)"
        for key in row
        if key.startswith("bits_")
    )
    return f"{what} of {row['tokens']:,} tokens, per row: {row['original'] / 1e6:,.1f} MB now, {small}"

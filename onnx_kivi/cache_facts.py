"""What must be known of an original's caches to run it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """By past input: its present output, its head size where the model leaves that open, and its capacity.

    capacities: tokens that it must have room for from the start, of those that don't grow. crossed: those that hold an
    encoder's keys and values.
    """

    outputs: Mapping[str, str] = field(default_factory=dict)
    head_sizes: Mapping[str, int] = field(default_factory=dict)
    capacities: Mapping[str, int] = field(default_factory=dict)
    crossed: Collection[str] = ()

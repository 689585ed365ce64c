"""Numbers the layers: as the caches' names do if each has a number of its own, else in graph order."""

from __future__ import annotations

from collections.abc import Sequence

from ..naming import layer_of
from .site import Candidate, Site, extended


def numbered(candidates: Sequence[Candidate]) -> tuple[Site, ...]:
    """The candidates as sites."""
    layers = [layer_of(each.cache_inputs[0]) for each in candidates]
    named = [layer for layer in layers if layer is not None]
    once = len({(each.kind, layer) for each, layer in zip(candidates, layers, strict=True)}) == len(candidates)
    numbers = named if once and len(named) == len(candidates) else range(len(candidates))
    return tuple(extended(Site, each, layer=layer) for each, layer in zip(candidates, numbers, strict=True))

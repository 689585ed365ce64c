"""How many bytes the caches of a model take per row, as it is and inside the op; exact for block-sized contexts.

Counts what the cache holds (KIVI, arXiv 2402.02750, with float16 parameters): the parts of sealed blocks, and sinks and
recent tokens as float32.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..block_parts import key_parts, side_bytes, value_parts
from ..config import KiviConfig
from ..spec import DENSE_BITS, SELF, SdpaAttributes
from .site import Site

CONTEXTS = (4096, 32768, 131072)
ENCODER_CONTEXTS = (512, 1500)
SHOWN_BITS = (8, 4, 2)
ELEMENT_BYTES = {"float": 4, "float16": 2, "bfloat16": 2}
DENSE_BYTES = 4


def original_bytes(sites: Sequence[Site], tokens: int) -> int | None:
    """Bytes of the original's cache inputs for one row; None if a head size is not known."""
    total = 0
    for site in sites:
        if site.k_head_size is None or site.v_head_size is None:
            return None
        total += tokens * site.kv_heads * (site.k_head_size + site.v_head_size) * ELEMENT_BYTES[site.element]
    return total


def cache_bytes(sites: Sequence[Site], config: KiviConfig, tokens: int) -> int | None:
    """Bytes of the op's cache for one row of `tokens` tokens; None if a head size is not known."""
    total = 0
    for site in sites:
        if site.k_head_size is None or site.v_head_size is None:
            return None
        window, _ = config.windowed(site.window, site.kind)
        past = max(0, tokens - config.sink_length - config.residual(site.kind))
        sealed = past // config.block_tokens * config.block_tokens
        hidden = max(0, tokens + 1 - window - config.sink_length) if window and site.kind == SELF else 0
        freed = min(sealed, hidden // config.block_tokens * config.block_tokens)
        dense = (tokens - sealed) * site.kv_heads * (site.k_head_size + site.v_head_size) * DENSE_BYTES
        total += dense + (sealed - freed) // config.block_tokens * _block_bytes(site, config)
    return total


def _block_bytes(site: Site, config: KiviConfig) -> int:
    """Bytes of a sealed block of one row, both sides."""
    attributes = SdpaAttributes.least(
        slot=0, block_tokens=config.block_tokens, v_group_size=config.v_group_size, **config.sides(site.layer)
    )
    sides = (
        (attributes.k_bits, site.k_head_size or 0, key_parts),
        (attributes.v_bits, site.v_head_size or 0, value_parts),
    )
    return sum(
        site.kv_heads * config.block_tokens * size * DENSE_BYTES
        if bits == DENSE_BITS
        else side_bytes(parts(attributes, site.kv_heads, size))
        for bits, size, parts in sides
    )


def savings(sites: Sequence[Site], contexts: Sequence[int] = CONTEXTS) -> list[dict[str, int]]:
    """A row per context: bytes of the original and of the op's cache at each of SHOWN_BITS, else defaults."""
    rows = []
    for tokens in contexts:
        original = original_bytes(sites, tokens)
        if not sites or original is None:
            return []
        row = {"tokens": tokens, "original": original}
        for bits in SHOWN_BITS:
            row[f"bits_{bits}"] = cache_bytes(sites, KiviConfig(bits, bits), tokens) or 0
        rows.append(row)
    return rows


def bits_of(sites: Sequence[Site], config: KiviConfig, tokens: int) -> float | None:
    """Bits of a growing cache for each number of its keys and values, all told; None if a head size is not known."""
    growing = [site for site in sites if site.kind == SELF]
    held, numbers = cache_bytes(growing, config, tokens), 0
    for site in growing:
        numbers += tokens * site.kv_heads * ((site.k_head_size or 0) + (site.v_head_size or 0))
    return None if held is None or not numbers else 8 * held / numbers

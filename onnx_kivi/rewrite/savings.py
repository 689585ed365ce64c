"""How many bytes the caches of a model take per row, as it is and inside the op; exact for block-sized contexts.

Counts what the cache holds (KIVI, arXiv 2402.02750, with float16 parameters): codes, one pair of parameters per key
channel and block and per value token and group, and sinks and recent tokens as float32.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..config import KiviConfig
from ..spec import DENSE_BITS, SELF
from .site import Site

CONTEXTS = (4096, 32768, 131072)
ENCODER_CONTEXTS = (512, 1500)
SHOWN_BITS = (8, 4, 2)
ELEMENT_BYTES = {"float": 4, "float16": 2, "bfloat16": 2}
PARAMETER_BYTES = 4
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
        k_bits, v_bits = config.bits(site.layer)
        window, _ = config.windowed(site.window, site.kind)
        past = max(0, tokens - config.sink_length - config.residual(site.kind))
        sealed = past // config.block_tokens * config.block_tokens
        hidden = max(0, tokens + 1 - window - config.sink_length) if window and site.kind == SELF else 0
        freed = min(sealed, hidden // config.block_tokens * config.block_tokens)
        sides = (
            (_key_block(k_bits, site.k_head_size, config), site.k_head_size),
            (_value_block(v_bits, site.v_head_size, config), site.v_head_size),
        )
        for block, size in sides:
            dense = (tokens - sealed) * size * DENSE_BYTES
            total += site.kv_heads * (dense + (sealed - freed) // config.block_tokens * block)
    return total


def _key_block(bits: int, size: int, config: KiviConfig) -> int:
    if bits == DENSE_BITS:
        return config.block_tokens * size * DENSE_BYTES
    return size * (-(-config.block_tokens * bits // 8) + PARAMETER_BYTES)


def _value_block(bits: int, size: int, config: KiviConfig) -> int:
    if bits == DENSE_BITS:
        return config.block_tokens * size * DENSE_BYTES
    groups = -(-size // (config.v_group_size or size))
    return config.block_tokens * (-(-size * bits // 8) + groups * PARAMETER_BYTES)


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

"""How exporters name caches: what is one, of which layer and side, and which output carries an input onward.

`past_key_values.3.key` comes back as `present.3.key`, and `past_3_key` as `present_3_key`.
"""

from __future__ import annotations

import re
from collections.abc import Collection

PAST = "past"
KEEP_INPUTS = ("num_logits_to_keep", "logits_to_keep")
"""Inputs that say of how many of the last tokens a run gives logits; 0 = of all."""
CACHE_PREFIXES = (PAST, "cache")
PRESENT_PREFIXES = ("present", *CACHE_PREFIXES)
SIDES = re.compile("key_value|key|value")
BOTH_SIDES = "key_value"
# What a past input's name becomes in its present output's, likeliest first.
PRESENT_SPELLINGS = (
    ("past_key_values", "present"),
    ("past_key_values", "present_key_values"),
    (PAST, "present"),
    (PAST, "out"),
)


def is_cache_name(name: str) -> bool:
    """Whether an input is named like a cache."""
    return name.startswith(CACHE_PREFIXES)


def is_past_name(name: str) -> bool:
    """Whether an input is named like a cache that a run carries from step to step."""
    return name.startswith(PAST)


def is_encoder_name(name: str) -> bool:
    """Whether a cache is named as an encoder's, which no step adds to."""
    return "encoder" in name


def layer_of(name: str) -> int | None:
    """The layer that a cache's name has, which is its first number."""
    number = re.search(r"\d+", name)
    return int(number[0]) if number else None


def side_of(name: str) -> str | None:
    """`key` or `value`, as a cache's name says."""
    return next((word for word in SIDES.findall(name)[::-1] if word != BOTH_SIDES), None)


def of_one_layer(names: Collection[str]) -> bool:
    """Whether no two of these caches are named as of different layers."""
    return len({layer_of(name) for name in names} - {None}) <= 1


def may_be_present_of(past: str, present: str) -> bool:
    """Whether an output may carry an input onward: false if it is named like a cache of another layer or side."""
    names = past, present
    if not present.startswith(PRESENT_PREFIXES):
        return True
    return of_one_layer(names) and len({side_of(name) for name in names} - {None}) <= 1


def present_of(past: str, outputs: Collection[str]) -> str | None:
    """The output that carries an input onward; None if no output is named so."""
    candidates = (past.replace(old, new) for old, new in PRESENT_SPELLINGS)
    return next((name for name in candidates if name in outputs), None)

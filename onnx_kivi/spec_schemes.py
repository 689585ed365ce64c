"""The schemes in which the codes of a sealed block are made, by the names that `k_scheme` and `v_scheme` take."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError
from .spec_types import one_of

AFFINE = "affine"
SYMMETRIC = "symmetric+rotated"
DIGIT_BITS = 2
MOST_DIGITS = 3
AVERAGES = ("2", "2.25", "2.5", "3")
TOKEN_SCALES = (1, 255)
"""The least and the largest token scale, in units of the block."""

STARTS = {2: 0.996, 3: 0.586, 4: 0.335}
FACTORS = (0.8, 0.9, 1.0, 1.1, 1.2, 1.35)
"""The scales tried of a symmetric group, in its rms: by bits, times each factor."""

K_SCHEMES = (
    AFFINE,
    *(f"digits:{average}{token}" for average in AVERAGES for token in ("", "+token")),
    f"{AFFINE}+token",
    f"{AFFINE}+token+rotated",
)
V_SCHEMES = (AFFINE, SYMMETRIC)
AFFINE_BITS = (2, 4, 8, 32)
TOKEN_BITS = (2, 4)
"""Of keys with a token scale: the 16-bit weights of the kernels carry no codes of 8 bits besides."""

V_BITS = {AFFINE: AFFINE_BITS, SYMMETRIC: (2, 3, 4)}


@dataclass(frozen=True, slots=True)
class KeyScheme:
    """How keys are coded. average: bits of a channel's codes where they are digits, 0 = as many as k_bits."""

    average: float
    token: bool
    rotated: bool

    def digits(self, head_size: int) -> int:
        """Two-bit digits that a block spends on one head; 0 where each channel has a code of k_bits."""
        return round(head_size * self.average / DIGIT_BITS)


def key_scheme(name: str) -> KeyScheme:
    """The scheme of that name, one of K_SCHEMES."""
    kind, *more = name.split("+")
    average = float(kind.removeprefix("digits:")) if kind != AFFINE else 0.0
    return KeyScheme(average, "token" in more, "rotated" in more)


def k_bits_of(name: str) -> tuple[int, ...]:
    """The bits that a key scheme takes."""
    if name == AFFINE:
        return AFFINE_BITS
    return (DIGIT_BITS,) if key_scheme(name).average else TOKEN_BITS


def check_schemes(k_scheme: str, k_bits: int, v_scheme: str, v_bits: int) -> None:
    """Raise ConfigError unless the schemes are known, and make codes of so many bits."""
    one_of("k_scheme", k_scheme, K_SCHEMES)
    one_of("v_scheme", v_scheme, V_SCHEMES)
    sides = (("k", k_scheme, k_bits, k_bits_of(k_scheme)), ("v", v_scheme, v_bits, V_BITS[v_scheme]))
    for side, scheme, bits, known in sides:
        if bits not in known:
            listed = ", ".join(map(str, known))
            raise ConfigError(f"{side}_bits: expected one of {listed} with {side}_scheme {scheme}, got {bits}")


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` packed codes."""
    return -(-count * bits // 8)


def group_count(head_size: int, group_size: int) -> int:
    """Value groups of one token; the last may be short."""
    return -(-head_size // group_size) if group_size else 1

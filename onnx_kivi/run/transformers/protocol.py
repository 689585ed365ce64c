"""What differs between versions of transformers: the only place that knows. A version that differs is a new row."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import ExtraUnavailableError


@dataclass(frozen=True, slots=True)
class Protocol:
    """What transformers calls from version `first` (major, minor) on.

    cache_name: the argument of forward that brings the cache, and the field of its output that carries it on.
    crop_0_keeps_all: crop(0) removes 0 tokens; else it keeps 0. crop(n > 0) keeps n and crop(-n) removes n in all.
    """

    first: tuple[int, int]
    cache_name: str
    crop_0_keeps_all: bool


PROTOCOLS = (
    Protocol((4, 57), "past_key_values", crop_0_keeps_all=False),
    Protocol((5, 14), "past_key_values", crop_0_keeps_all=True),
    Protocol((5, 24), "cache", crop_0_keeps_all=True),
)
END = (6, 0)


def protocol_of(version: str) -> Protocol:
    """The protocol of a version of transformers. Raises ExtraUnavailableError for one that is too old or too new."""
    major, minor = map(int, version.split(".")[:2])
    known = [p for p in PROTOCOLS if p.first <= (major, minor) < END]
    if not known:
        oldest = ".".join(map(str, PROTOCOLS[0].first))
        raise ExtraUnavailableError(
            f"onnx_kivi.hf: expected transformers {oldest} to {END[0] - 1}.x, got {version}; "
            f"pip install 'transformers>={oldest},<{END[0]}'"
        )
    return known[-1]


def _installed() -> str:
    """The version of transformers here, with torch beside it. Raises ExtraUnavailableError."""
    try:
        import torch  # noqa: F401
        from transformers import __version__
    except ImportError as error:
        raise ExtraUnavailableError(
            f"onnx_kivi.hf: expected transformers and torch, got: {error}; pip install 'onnx_kivi[hf]' torch"
        ) from error
    return str(__version__)


PROTOCOL = protocol_of(_installed())

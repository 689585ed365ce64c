"""Copies of a rewritten model that keep their caches otherwise, so that a comparison can be exact, or short."""

from __future__ import annotations

from collections.abc import Mapping

from ..graph import Model, copied, fingerprint, set_attribute
from ..spec import ATTENTION_OPS, DENSE_BITS, GHOST_OPS, STEP_OPS
from ..spec_schemes import AFFINE

DENSE: Mapping[str, int | str] = {"bits": DENSE_BITS, "scheme": AFFINE}


def dense(rewritten: Model) -> Model:
    """A copy that keeps its caches in float32."""
    return _with(rewritten, {f"{side}_{what}": value for side in "kv" for what, value in DENSE.items()})


def compact(rewritten: Model, *, sinks: int, block: int) -> Model:
    """A copy in the bits that it has, with so many first tokens in float32 and all behind them in blocks of `block`."""
    return _with(rewritten, {"sink_length": sinks, "residual_length": 0, "block_tokens": block})


def _with(rewritten: Model, attributes: Mapping[str, int | str]) -> Model:
    model = copied(rewritten)
    for name, value in attributes.items():
        set_attribute(model, ATTENTION_OPS, name, value)
    set_attribute(model, (*STEP_OPS, *GHOST_OPS), "model_id", fingerprint(model))
    return model

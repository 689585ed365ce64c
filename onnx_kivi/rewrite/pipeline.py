"""From a model to the same model with its caches inside the op, step by step; see `rewrite` for the order."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..config import KiviConfig
from ..errors import ConfigError, UnsupportedModelError
from ..graph import Model, copied, fingerprint, load, set_attribute
from ..patterns import DecoderGraph
from ..spec import ATTENTION_OPS, DENSE_BITS, STEP_OPS
from ..spec_schemes import AFFINE
from .admit import admit
from .check import check
from .emit import emit
from .leftovers import leftovers
from .numbering import numbered
from .plan import Plan
from .precision import roughest_element, rounds_activations
from .ragged import one_length_reason
from .readable import readable
from .report import Report

SHOWN_MISSES = 3

ModelOrPath = Model | str | os.PathLike[str]


@dataclass(frozen=True)
class Findings:
    """The report, and what it rests on."""

    decoder: DecoderGraph
    plan: Plan
    report: Report


def rewrite(model: ModelOrPath, config: KiviConfig | None = None, *, partial: bool = False) -> tuple[Model, Report]:
    """Move the caches of a model, or model file, into QuantizedKvSdpa nodes. A `Model` given is not changed.

    config.cross: also the caches that no step adds to, an encoder's. Their inputs stay, with `tokens_to_store` tokens:
    a run that feeds some fills the slots, or fills them anew; one that feeds 0 tokens attends to what they hold.
    partial: rewrite the sites that match and leave other caches as they are. Raises UnsupportedModelError naming the
    misses if there are any (or, with `partial`, if nothing matches).
    """
    config = config or KiviConfig()
    model = copied(model) if isinstance(model, Model) else load(model)
    findings = examine(model, cross=config.cross)
    carry_out(findings, model, config, partial=partial)
    return model, findings.report


def carry_out(findings: Findings, model: Model, config: KiviConfig, *, partial: bool = False) -> None:
    """Rewrite the model that was examined, in place. Raises as `rewrite` does."""
    _require(findings.report, config, partial)
    gone = emit(model, findings.decoder, findings.plan, findings.report, config)
    check(model, gone)


def inspect(model: ModelOrPath, *, cross: bool = False) -> Report:
    """Sites and misses of a model or model file; with `cross` also those of attention over an encoder's caches.

    Raises UnsupportedModelError if it is no model to look into.
    """
    return examine(model if isinstance(model, Model) else load(model), cross=cross).report


def examine(model: Model, *, cross: bool = False) -> Findings:
    """The report on a model, which is not changed, with the decoder and the plan that it rests on."""
    graph = readable(model)
    admitted = admit(graph, cross=cross)
    decoder, sites = admitted.decoder, numbered(admitted.candidates)
    misses = (*admitted.misses, *leftovers(decoder, sites, explained=bool(admitted.misses)))
    one_length = one_length_reason(decoder, sites, partial=bool(misses))
    report = Report(sites, misses, roughest_element(decoder, sites), rounds_activations(graph), one_length)
    return Findings(decoder, admitted.plan, report)


def dense(rewritten: Model) -> Model:
    """A copy of a rewritten model that keeps its caches in float32."""
    model = copied(rewritten)
    for side in "kv":
        set_attribute(model, ATTENTION_OPS, f"{side}_bits", DENSE_BITS)
        set_attribute(model, ATTENTION_OPS, f"{side}_scheme", AFFINE)
    set_attribute(model, STEP_OPS, "model_id", fingerprint(model))
    return model


def _require(report: Report, config: KiviConfig, partial: bool) -> None:
    """Raise UnsupportedModelError for misses that are not accepted, ConfigError for layers that the model lacks."""
    if report.misses and not (partial and report.sites):
        raise UnsupportedModelError(_refusal(report, partial))
    layers = {site.layer for site in report.sites}
    if unknown := sorted(set(config.layer_bits) - layers):
        raise ConfigError(
            f"layer_bits: expected layers that the model has, {min(layers)} to {max(layers)}, got {unknown}"
        )


def _refusal(report: Report, partial: bool) -> str:
    shown = "; ".join(f"{miss.node}: {miss.reason}" for miss in report.misses[:SHOWN_MISSES])
    more = len(report.misses) - SHOWN_MISSES
    rest = f"; and {more} more" if more > 0 else ""
    hint = "" if partial or not report.sites else f"; {len(report.sites)} sites match: --partial rewrites those alone"
    return f"can't rewrite: {shown}{rest}{hint}"

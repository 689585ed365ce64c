"""From a model to the same model with its caches inside the op, step by step; see `rewrite` for the order."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from ..config import KiviConfig
from ..errors import ConfigError, UnsupportedModelError
from ..graph import Graph, Model, copied, load, rounds_activations
from ..paths import model_path
from ..patterns import DecoderGraph, MissError
from ..spec import GHOST_IO
from .admit import admit
from .beside import beside
from .check import check
from .emit import emit
from .ghost import Carried, carried
from .leftovers import leftovers
from .merged import Merged, put_back, unlike, unmerged
from .numbering import numbered
from .plan import Plan
from .precision import roughest_element
from .ragged import one_length_reason
from .readable import readable
from .report import Report

SHOWN_MISSES = 3
MERGED_GHOST = "it is a merged decoder, whose branch without a past would carry none"

ModelOrPath = Model | str | os.PathLike[str]


@dataclass(frozen=True)
class Findings:
    """The report, and what it rests on. ghost: what ghost I/O would keep, None if the model can't have it."""

    decoder: DecoderGraph
    plan: Plan
    report: Report
    ghost: Carried | None
    merged: Merged | None = None


def rewrite(model: ModelOrPath, config: KiviConfig | None = None, *, partial: bool = False) -> tuple[Model, Report]:
    """Move the caches of a model, or model file, into QuantizedKvSdpa nodes. A `Model` given is not changed.

    config.cross: also the caches that no step adds to, an encoder's. Their inputs stay, with `tokens_to_store` tokens:
    a run that feeds some fills the slots, or fills them anew; one that feeds 0 tokens attends to what they hold.
    config.io "ghost": past and present of the first layer keep their names, and carry stamps that name the caches, so
    that hosts which carry a past run the model. partial: rewrite the sites that match and leave other caches as they
    are. Raises UnsupportedModelError naming the misses if there are any (or, with `partial`, if nothing matches), or
    why a model can't have ghost I/O.
    """
    config = config or KiviConfig()
    source = None if isinstance(model, Model) else model
    model = copied(model) if isinstance(model, Model) else load(model)
    findings = examine(model, cross=config.cross, source=source)
    carry_out(findings, model, config, partial=partial)
    return model, findings.report


def carry_out(findings: Findings, model: Model, config: KiviConfig, *, partial: bool = False) -> None:
    """Rewrite the model that was examined, in place. Raises as `rewrite` does."""
    _require(findings.report, config, partial)
    if findings.merged:
        model.CopyFrom(findings.merged.plain)
    ghost = findings.ghost if config.io == GHOST_IO else None
    gone = emit(model, findings.decoder, findings.plan, findings.report, config, ghost)
    if findings.merged:
        put_back(findings.merged, model, findings.report.sites)
    check(model, gone)


def inspect(model: ModelOrPath, *, cross: bool = False) -> Report:
    """Sites and misses of a model or model file; with `cross` also those of attention over an encoder's caches.

    Raises UnsupportedModelError if it is no model to look into.
    """
    if isinstance(model, Model):
        return examine(model, cross=cross).report
    return examine(load(model), cross=cross, source=model).report


def examine(model: Model, *, cross: bool = False, source: str | os.PathLike[str] | None = None) -> Findings:
    """The report on a model, which is not changed, with the decoder and the plan that it rests on.

    source: its file, where other files may be named that can be rewritten if it can't.
    """
    graph, elsewhere = readable(model), "" if source is None else beside(model_path(source))
    try:
        merged = unmerged(graph, cross=cross)
    except (MissError, UnsupportedModelError) as error:
        return _as_it_is(graph, cross, elsewhere, merged=str(error))
    if merged is None:
        return _as_it_is(graph, cross, elsewhere)
    found = _as_it_is(Graph(merged.plain), cross, elsewhere)
    differing = tuple(unlike(merged, found.report.sites, elsewhere))
    report = replace(found.report, no_ghost=MERGED_GHOST)
    if differing:
        report = replace(report, sites=(), misses=differing)
    return replace(found, report=report, merged=merged, ghost=None)


def _as_it_is(graph: Graph, cross: bool, elsewhere: str, merged: str = "") -> Findings:
    """What is found in a model that is not to be taken apart, or could not be, for the reason `merged`."""
    admitted = admit(graph, cross=cross)
    decoder, sites = admitted.decoder, numbered(admitted.candidates)
    explained = bool(admitted.misses)
    left = leftovers(decoder, sites, explained=explained, merged=merged, elsewhere=elsewhere)
    misses = (*admitted.misses, *left)
    one_length = one_length_reason(decoder, sites, partial=bool(misses))
    kept = carried(decoder, sites, partial=bool(misses))
    ghost, no_ghost = (None, kept) if isinstance(kept, str) else (kept, "")
    report = Report(sites, misses, roughest_element(decoder, sites), rounds_activations(graph), one_length, no_ghost)
    return Findings(decoder, admitted.plan, report, ghost)


def _require(report: Report, config: KiviConfig, partial: bool) -> None:
    """Raise UnsupportedModelError for misses that are not accepted, ConfigError for layers that the model lacks."""
    if report.misses and not (partial and report.sites):
        raise UnsupportedModelError(_refusal(report, partial))
    if config.io == GHOST_IO and report.no_ghost:
        raise UnsupportedModelError(f"ghost I/O: {report.no_ghost}; rewrite with --io none")
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

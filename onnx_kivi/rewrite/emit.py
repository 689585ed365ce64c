"""Puts the sites of a model into the op: with `emit_site`, the only place that writes onnx_kivi nodes.

Everything that does not belong to a site stays as it is. The result is deterministic: the same model and
configuration give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..config import KiviConfig
from ..errors import UnsupportedModelError
from ..graph import Builder, Changes, FreeNames, Graph, Model, Node, apply, fingerprint, set_attribute
from ..patterns import PAST_LENGTH, ROW_PAST_LENGTH, DecoderGraph
from ..spec import (
    CACHE_OPEN,
    CACHE_STAMP,
    CONTROL_INPUTS,
    CROSS,
    DOMAIN,
    GHOST_OPS,
    HANDLE_INPUT,
    KV_CACHE_STEP_V2,
    MIN_IR_VERSION,
    OPSET_VERSION,
    STEP_OPS,
    STORED_TOKENS,
    GhostAttributes,
    StepAttributes,
)
from .emit_shapes import emit_shapes
from .emit_site import SiteEmitter
from .ghost import Carried
from .last_logits import KEEP_INPUT, KEPT_TOKENS, LOGITS, TOKENS_AXIS, emit_last_logits, head_nodes
from .plan import Plan
from .report import Report
from .site import Site

PENDING_ID = "pending"


def emit(
    model: Model, decoder: DecoderGraph, plan: Plan, report: Report, config: KiviConfig, ghost: Carried | None
) -> frozenset[str]:
    """Change `model`, of which `decoder` was read; gives the names of the tensors that it no longer has.

    ghost: the past and present that stay, to carry stamps.
    """
    graph = decoder.graph
    _check_names(graph)
    live = [site for site in report.sites if site.output.tensor not in plan.idle]
    if not live:
        raise UnsupportedModelError("no output of the model depends on attention over a cache; there is nothing to do")
    builder = _build(decoder, plan, live, report.one_length, config, ghost)
    head = head_nodes(decoder) if config.last_logits else []
    emit_last_logits(builder, head)
    changes = _changes(builder, plan, report, live, head, ghost)
    apply(changes, graph, model)
    set_attribute(model, (*STEP_OPS, *GHOST_OPS), "model_id", fingerprint(model))
    return changes.gone(graph)


def _check_names(graph: Graph) -> None:
    clash = CONTROL_INPUTS.keys() & graph.tensor_names
    if clash:
        raise UnsupportedModelError(f"tensor {min(clash)!r}: expected no tensor of this name; rename it")


def _build(
    decoder: DecoderGraph,
    plan: Plan,
    live: Sequence[Site],
    one_length: str,
    config: KiviConfig,
    ghost: Carried | None,
) -> Builder:
    """All new nodes and constants, in order."""
    names = FreeNames(decoder.graph.tensor_names)
    builder = Builder(decoder.graph.opset, names)
    attributes = StepAttributes(model_id=PENDING_ID, layers=len(live), one_length=one_length, spec_version=2)
    wire: dict[str, Any] = dict(attributes.to_wire())
    outputs = tuple(names.tensor(output.name) for output in KV_CACHE_STEP_V2.outputs)
    past_length, row_past_length, step = outputs
    controls = _emit_ghosts(builder, ghost, step, config.kv_bytes) if ghost else CONTROL_INPUTS
    builder.nodes(KV_CACHE_STEP_V2.name, *controls, outputs=outputs, domain=DOMAIN, **wire)
    parts = [part for site in live for part in site.prologue]
    builder.take(parts, {PAST_LENGTH: past_length, ROW_PAST_LENGTH: row_past_length})
    emitter = SiteEmitter(builder, decoder, config, step)
    for slot, site in enumerate(live):
        emitter.emit(site, slot)
    emit_shapes(builder, decoder.graph, plan, past_length)
    return builder


def _emit_ghosts(builder: Builder, ghost: Carried, step: str, kv_bytes: int) -> tuple[str, ...]:
    """The nodes that read and write stamps; gives what the step takes."""
    wire: dict[str, Any] = dict(GhostAttributes(model_id=PENDING_ID, kv_bytes=kv_bytes).to_wire())
    controls = tuple(CONTROL_INPUTS)
    carried = (*ghost.shapes(builder), *ghost.past)
    given = len(CACHE_OPEN.outputs)
    opened = builder.nodes(CACHE_OPEN.name, *controls[:given], *carried, outputs=given, domain=DOMAIN, **wire)
    builder.nodes(CACHE_STAMP.name, HANDLE_INPUT, step, *carried, outputs=tuple(ghost.present), domain=DOMAIN, **wire)
    return (*opened, *controls[given:])


def _changes(
    builder: Builder,
    plan: Plan,
    report: Report,
    live: Sequence[Site],
    head: Sequence[Node],
    ghost: Carried | None,
) -> Changes:
    stored = [operand for site in live if site.kind == CROSS for operand in (site.key, site.value)]
    renamed = {operand.tensor: (operand.layout.index("S"), STORED_TOKENS) for operand in stored}
    controls = {name: np.array([default], np.int64) for name, default in CONTROL_INPUTS.items()}
    if head:
        renamed[LOGITS] = (TOKENS_AXIS, KEPT_TOKENS)
        controls[KEEP_INPUT] = np.array(0, np.int64)
    return Changes(
        new=builder.parts,
        removed_nodes=frozenset({*plan.shapes, *(n.index for n in head)}).union(*(s.covered for s in report.sites)),
        removed_inputs=frozenset(report.removed_inputs),
        removed_outputs=frozenset(report.removed_outputs),
        new_inputs=controls,
        floats_in=ghost.past if ghost else {},
        floats_out=ghost.present if ghost else {},
        renamed_axes=renamed,
        opset=(DOMAIN, OPSET_VERSION),
        least_ir_version=MIN_IR_VERSION,
    )

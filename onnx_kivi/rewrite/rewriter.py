"""From a model to the same model with its caches inside the op: the only place that emits onnx_kivi nodes.

Everything that does not belong to a site stays as it is. The result is deterministic: the same model and
configuration give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from ..config import KiviConfig
from ..errors import ConfigError, UnsupportedModelError
from ..graph import Dim, Edit, Graph, Model, Source, apply, fingerprint, load, set_attribute
from ..patterns import Added, MaskTerm, NewConstant, NewNode, Site
from ..patterns.caches import PAST_LENGTH, DecoderGraph
from ..spec import (
    COMMITTED_LENGTH,
    CROSS,
    DEFAULT_HANDLE,
    DENSE_BITS,
    DOMAIN,
    HANDLE_INPUT,
    KV_CACHE_STEP,
    MIN_IR_VERSION,
    OPSET_VERSION,
    PAST_LENGTH_INPUT,
    QUANTIZED_KV_SDPA,
    STORED_TOKENS,
    SdpaAttributes,
    StepAttributes,
)
from .inspector import Findings, examine
from .layout_nodes import heads_first, laid_out
from .removal import Plan
from .report import Report

FLOAT, FLOAT16, BFLOAT16 = 1, 10, 16
ELEMENTS = {"float": FLOAT, "float16": FLOAT16, "bfloat16": BFLOAT16}
SHOWN_MISSES = 3


def rewrite(
    model: Model | str | os.PathLike[str], config: KiviConfig | None = None, *, partial: bool = False
) -> tuple[Model, Report]:
    """Move the caches of a model, or model file, into QuantizedKvSdpa nodes. A `Model` given is not changed.

    config.cross: also the caches that no step adds to, an encoder's. Their inputs stay, with `tokens_to_store` tokens:
    a run that feeds some fills the slots, or fills them anew; one that feeds 0 tokens attends to what they hold.
    partial: rewrite the sites that match and leave other caches as they are. Raises UnsupportedModelError naming the
    misses if there are any (or, with `partial`, if nothing matches).
    """
    if isinstance(model, Model):
        original, model = model, Model()
        model.CopyFrom(original)
    else:
        model = load(model)
    config = config or KiviConfig()
    findings = examine(model, cross=config.cross)
    report = findings.report
    if report.misses and not (partial and report.sites):
        raise UnsupportedModelError(_refusal(report, partial))
    layers = {site.layer for site in report.sites}
    if unknown := sorted(set(config.layer_bits) - layers):
        raise ConfigError(
            f"layer_bits: expected layers that the model has, {min(layers)} to {max(layers)}, got {unknown}"
        )
    _emit(model, findings, config)
    return model, report


def dense(rewritten: Model) -> Model:
    """A copy of a rewritten model that keeps its caches in float32."""
    model = Model()
    model.CopyFrom(rewritten)
    for name in ("k_bits", "v_bits"):
        set_attribute(model, QUANTIZED_KV_SDPA.name, name, DENSE_BITS)
    set_attribute(model, KV_CACHE_STEP.name, "model_id", fingerprint(model))
    return model


def _refusal(report: Report, partial: bool) -> str:
    shown = "; ".join(f"{miss.node}: {miss.reason}" for miss in report.misses[:SHOWN_MISSES])
    more = len(report.misses) - SHOWN_MISSES
    rest = f"; and {more} more" if more > 0 else ""
    hint = "" if partial or not report.sites else f"; {len(report.sites)} sites match: --partial rewrites those alone"
    return f"can't rewrite: {shown}{rest}{hint}"


def _emit(model: Model, findings: Findings, config: KiviConfig) -> None:
    sites, graph = findings.report.sites, findings.decoder.graph
    clash = {HANDLE_INPUT, PAST_LENGTH_INPUT} & graph.tensor_names
    if clash:
        raise UnsupportedModelError(f"tensor {min(clash)!r}: expected no tensor of this name; rename it")
    live = [site for site in sites if site.output.tensor not in findings.plan.idle]
    if not live:
        raise UnsupportedModelError("no output of the model depends on attention over a cache; there is nothing to do")
    edit = Edit(graph)
    past_length, step = edit.name("past_length"), edit.name("step")
    placeholder = StepAttributes(model_id="pending", layers=len(live)).to_wire()
    edit.node(
        KV_CACHE_STEP.name,
        [HANDLE_INPUT, PAST_LENGTH_INPUT],
        placeholder,
        outputs=[past_length, step],
        domain=DOMAIN,
    )
    for new in dict.fromkeys(new for site in live for new in site.prologue):
        _emit_prologue(edit, new, past_length)
    masks: dict[tuple[object, ...], str] = {}
    for slot, site in enumerate(live):
        key = (site.mask, site.element, site.q_heads)
        if key not in masks:
            masks[key] = _mask(edit, findings.decoder, site)
        _emit_site(edit, findings.decoder, site, slot, step, masks[key], config)
    removed = {i for site in sites for i in site.covered} | findings.plan.shapes.keys()
    _emit_shapes(edit, graph, findings.plan, past_length)
    apply(
        edit,
        model,
        removed_nodes=removed,
        removed_inputs={name for site in sites for name in site.removed_inputs},
        removed_outputs={name for site in sites for name in site.cache_outputs if name},
        new_inputs={
            HANDLE_INPUT: np.array([DEFAULT_HANDLE], np.int64),
            PAST_LENGTH_INPUT: np.array([COMMITTED_LENGTH], np.int64),
        },
        renamed_axes={
            operand.tensor: (operand.layout.index("S"), STORED_TOKENS)
            for site in live
            if site.kind == CROSS
            for operand in (site.key, site.value)
        },
        opset=(DOMAIN, OPSET_VERSION),
        least_ir_version=MIN_IR_VERSION,
    )
    set_attribute(model, KV_CACHE_STEP.name, "model_id", fingerprint(model))


def _emit_prologue(edit: Edit, new: NewNode | NewConstant, past_length: str) -> None:
    if isinstance(new, NewNode):
        inputs = [past_length if name == PAST_LENGTH else name for name in new.inputs]
        edit.node(new.op, inputs, dict(new.attributes), outputs=new.outputs, domain=new.domain)
        return
    array = np.array(new.values)
    edit.named_constant(new.name, array.astype(np.int64 if array.dtype.kind == "i" or not array.size else np.float32))


def _emit_site(
    edit: Edit, decoder: DecoderGraph, site: Site, slot: int, step: str, mask: str, config: KiviConfig
) -> None:
    k_bits, v_bits = config.bits(site.layer)
    attributes = SdpaAttributes(
        slot=slot,
        kind=site.kind,
        k_bits=k_bits,
        v_bits=v_bits,
        block_tokens=config.block_tokens,
        v_group_size=config.v_group_size,
        residual_length=config.residual(site.kind),
        sink_length=config.sink_length,
        scale=site.scale,
        softcap=site.softcap,
        is_causal=int(site.is_causal),
        window=site.window,
        nan_to_zero=int(site.nan_to_zero),
    )
    inputs = [
        heads_first(edit, _to_float(edit, decoder, site, operand.tensor), operand.layout, heads, site.kv_heads)
        for operand, heads in ((site.query, site.q_heads), (site.key, site.kv_heads), (site.value, site.kv_heads))
    ]
    nothing = edit.constant(np.zeros(0, np.float32))
    sink = nothing
    if site.head_sink:
        sink = edit.node("Reshape", [_to_float(edit, decoder, site, site.head_sink), edit.ints(-1)])
    inputs += [mask or nothing, sink, step]
    result = edit.node(
        QUANTIZED_KV_SDPA.name, inputs, attributes.to_wire(), outputs=[edit.name(f"sdpa.{slot}")], domain=DOMAIN
    )
    element = decoder.element(site.output.tensor, site.element)
    if element != "float":
        result = edit.node("Cast", [result], {"to": ELEMENTS[element]})
    laid_out(edit, result, site.output, site.q_heads, site.kv_heads)


def _to_float(edit: Edit, decoder: DecoderGraph, site: Site, tensor: str) -> str:
    return tensor if decoder.element(tensor, site.element) == "float" else edit.node("Cast", [tensor], {"to": FLOAT})


def _mask(edit: Edit, decoder: DecoderGraph, site: Site) -> str:
    """The sum of the mask terms as a float tensor of 4 axes; "" if there are none."""
    terms = [_term(edit, decoder, site, term) for term in site.mask]
    total = terms[0] if terms else ""
    for term in terms[1:]:
        total = edit.node("Add", [total, term])
    return total


def _term(edit: Edit, decoder: DecoderGraph, site: Site, term: MaskTerm) -> str:
    if isinstance(term, Added):
        tensor = _to_float(edit, decoder, site, term.tensor)
        if term.factor != 1.0:
            tensor = edit.node("Mul", [tensor, edit.constant(np.array(term.factor, np.float32))])
    else:
        with np.errstate(over="ignore"):  # a fill below float32's range is as good as -inf
            zero, fill = (edit.constant(np.array(x, np.float32)) for x in (0.0, term.factor * term.fill))
        tensor = edit.node("Where", [term.condition, zero, fill] if term.keep else [term.condition, fill, zero])
    return heads_first(edit, tensor, term.layout, site.q_heads, site.kv_heads)


def _emit_shapes(edit: Edit, graph: Graph, plan: Plan, past_length: str) -> None:
    pieces: dict[int | Dim, str] = {}

    def read(name: str) -> str:
        if name == PAST_LENGTH:
            return past_length
        source: Source = plan.sources[name]
        if source.is_size:
            whole = edit.node("Shape", [source.tensor])
        else:
            whole = edit.node("Reshape", [source.tensor, edit.ints(-1)])
        return edit.node("Gather", [whole, edit.ints(source.place)])

    def piece(size: int | Dim) -> str:
        if size not in pieces:
            pieces[size] = edit.ints(size) if isinstance(size, int) else polynomial(size)
        return pieces[size]

    def polynomial(size: Dim) -> str:
        if size.name is not None:
            return read(size.name)
        return _chain(edit, "Add", [_chain(edit, "Mul", [piece(f) for f in term]) for term in size.factors()])

    for index, sizes in sorted(plan.shapes.items()):
        outputs = graph.nodes[index].outputs
        edit.node("Concat", [piece(size) for size in sizes] or [edit.ints()], {"axis": 0}, outputs=outputs)


def _chain(edit: Edit, op: str, tensors: Sequence[str]) -> str:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = edit.node(op, [total, tensor])
    return total

"""Writes the node of one site, with what brings its operands into shape and its result back."""

from __future__ import annotations

from typing import Any

from ..config import KiviConfig
from ..graph import Builder
from ..patterns import Added, DecoderGraph, MaskTerm
from ..spec import DOMAIN, SELF, SdpaAttributes
from .layout_nodes import heads_first, laid_out
from .site import Site

FLOAT = "float"


class SiteEmitter:
    """Writes sites of one model one after another; masks that several have are made once."""

    def __init__(self, builder: Builder, decoder: DecoderGraph, config: KiviConfig, step: str) -> None:
        self._builder = builder
        self._decoder = decoder
        self._config = config
        self._step = step
        self._masks: dict[tuple[object, ...], str] = {}

    def emit(self, site: Site, slot: int) -> None:
        """Give `slot` to a site and write its node."""
        nothing, attributes = self._builder.floats(), self._attributes(site, slot)
        wire: dict[str, Any] = dict(attributes.to_wire())
        result = self._builder.node(
            attributes.op.name,
            *self._operands(site),
            self._mask(site) or nothing,
            self._head_sink(site) or nothing,
            self._step,
            stem=f"sdpa.{slot}",
            domain=DOMAIN,
            **wire,
        )
        element = self._decoder.element(site.output.tensor, site.element)
        if element != FLOAT:
            result = self._builder.cast(result, element)
        laid_out(self._builder, result, site.output, site.q_heads, site.kv_heads)

    def _attributes(self, site: Site, slot: int) -> SdpaAttributes:
        config = self._config
        window, window_sinks = config.windowed(site.window, site.kind)
        return SdpaAttributes.least(
            slot=slot,
            kind=site.kind,
            **config.sides(site.layer),
            block_tokens=config.block_tokens,
            v_group_size=config.v_group_size,
            residual_length=config.residual(site.kind),
            sink_length=config.sink_length,
            scale=site.scale,
            softcap=site.softcap,
            is_causal=int(site.is_causal),
            window=window,
            nan_to_zero=int(site.nan_to_zero),
            evict=int(window > 0 and site.kind == SELF),
            window_sinks=window_sinks,
        )

    def _operands(self, site: Site) -> list[str]:
        """Query, key and value as float, (B, heads, S, D)."""
        of_heads = ((site.query, site.q_heads), (site.key, site.kv_heads), (site.value, site.kv_heads))
        return [
            heads_first(self._builder, self._float(site, operand.tensor), operand.layout, heads, site.kv_heads)
            for operand, heads in of_heads
        ]

    def _head_sink(self, site: Site) -> str:
        if not site.head_sink:
            return ""
        return self._builder.node("Reshape", self._float(site, site.head_sink), self._builder.ints(-1))

    def _mask(self, site: Site) -> str:
        """The sum of the mask terms as a float tensor of 4 axes; "" if there are none."""
        key = (site.mask, site.element, site.q_heads)
        if key not in self._masks:
            terms = [self._term(site, term) for term in site.mask]
            total = terms[0] if terms else ""
            for term in terms[1:]:
                total = self._builder.node("Add", total, term)
            self._masks[key] = total
        return self._masks[key]

    def _term(self, site: Site, term: MaskTerm) -> str:
        builder = self._builder
        if isinstance(term, Added):
            tensor = self._float(site, term.tensor)
            if term.factor != 1.0:
                tensor = builder.node("Mul", tensor, builder.scalar(term.factor))
        else:
            choices = builder.scalar(0.0), builder.scalar(float(term.factor * term.fill))
            tensor = builder.node("Where", term.tensor, *(choices if term.keep else choices[::-1]))
        return heads_first(builder, tensor, term.layout, site.q_heads, site.kv_heads)

    def _float(self, site: Site, tensor: str) -> str:
        is_float = self._decoder.element(tensor, site.element) == FLOAT
        return tensor if is_float else self._builder.cast(tensor, FLOAT)

"""Runs an original, its rewrite, and the copies of both that tell one kind of difference from another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..graph import Model, load, nudged, save, unrounded
from ..progress import Progress
from ..rewrite.report import Report
from ..rewrite.siblings import compact, dense
from .meter import Meter
from .plans import Plan
from .reference import Opening, Reference
from .replay import Divergence, joined

FLOAT = "float"
PACKED = "MatMulNBits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """exact: the graph with nothing quantized; actual: as quantized (the same if nothing is), both to the original.

    Where the model rounds activations to 8 bits, own is how far the original is from itself when rounding moves it; and
    as_is the same as actual, which is then of copies that don't round, None if there can be none. unoptimized: measures
    how far the original is from itself without onnxruntime's optimizations. unreached_window: the widest that no run
    reached beyond.
    """

    level: str
    element: str
    exact: Divergence
    actual: Divergence
    unoptimized: Callable[[], float]
    unreached_window: int
    own: Divergence | None = None
    as_is: Divergence | None = None


class Comparison:
    """Compares as `plan` says, with copies in `folder`."""

    def __init__(self, report: Report, plan: Plan, seed: int, folder: Path, progress: Progress) -> None:
        self._report, self._plan, self._seed, self._folder = report, plan, seed, folder
        comparisons = 2 if report.int8_activations else 1
        self._meter = Meter(progress, comparisons * plan.sessions + report.int8_activations, plan.work)

    def run(self, original: Path, rewritten: Path) -> Compared:
        """Compare two files. Raises UnsupportedModelError if either can't be run."""
        mine, theirs = load(rewritten), load(original)
        reference = self._reference(original, theirs)
        as_is = self._compared(reference, mine, rewritten)
        if not self._report.int8_activations:
            return as_is
        self._meter.begin("verify: the original, moved by a rounding")
        own = joined(reference.original(self._nudged(theirs)))
        smooth, my_smooth = unrounded(theirs), unrounded(mine)
        if smooth is None or my_smooth is None:
            return replace(as_is, own=own)
        reference = self._reference(self._saved(smooth, "smooth_original"), smooth, plain=True)
        compared = self._compared(reference, my_smooth, self._saved(my_smooth, "smooth"))
        return replace(compared, own=own, as_is=as_is.actual)

    def _reference(self, original: Path, model: Model, *, plain: bool = False) -> Reference:
        opening = Opening(self._plan.quick, packed=_holds_packed_weights(model), plain=plain)
        self._meter.begin("verify: running the original")
        plan = self._plan
        return Reference(
            original,
            self._report,
            plan.choices,
            self._seed,
            self._meter.tick,
            opening=opening,
            needed=plan.needed,
        )

    def _compared(self, reference: Reference, model: Model, file: Path) -> Compared:
        """A rewritten model, which lies in `file`."""
        exact, actual = (self._quick if self._plan.quick else self._full)(reference, model, file)
        return Compared(
            level=self._plan.level,
            element=self._report.element,
            exact=exact,
            actual=actual,
            unoptimized=lambda: joined(reference.original(optimized=False)).max_rel_diff,
            unreached_window=max((w for w in self._plan.windows if w >= reference.longest), default=0),
        )

    def _quick(self, reference: Reference, model: Model, file: Path) -> tuple[Divergence, Divergence]:
        if self._plan.quantizes:
            sibling = compact(model, sinks=self._plan.sinks, block=self._plan.block)
            file = self._saved(sibling, f"{file.stem}_compact")
        self._meter.begin("verify: running the rewritten model")
        short, *long = reference.rewritten(file)
        return short, long[0] if long else short

    def _full(self, reference: Reference, model: Model, file: Path) -> tuple[Divergence, Divergence]:
        if self._plan.quantizes:
            self._meter.begin("verify: running its 32-bit sibling")
            exact = joined(reference.rewritten(self._saved(dense(model), f"{file.stem}_dense")))
        self._meter.begin("verify: running the rewritten model")
        actual = joined(reference.rewritten(file))
        return exact if self._plan.quantizes else actual, actual

    def _nudged(self, original: Model) -> Path:
        """The original with the results of its attention moved, where they are float32."""
        tensors = {site.output.tensor for site in self._report.sites} if self._report.element == FLOAT else set()
        return self._saved(nudged(original, tensors), "nudged")

    def _saved(self, model: Model, name: str) -> Path:
        path = self._folder / f"{name}.onnx"
        save(model, path, link=True)
        return path


def _holds_packed_weights(model: Model) -> bool:
    return any(node.op_type == PACKED for node in model.graph.node)

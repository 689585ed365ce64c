"""What must be so of every rewritten model, whatever its original: the last step before it may be written."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from ..errors import UnsupportedModelError
from ..graph import Graph, Model, Node
from ..spec import ATTENTION_OPS, DOMAIN, GHOST_OPS, STEP_OPS

STEP, SDPA, GHOST = ([f"{DOMAIN}.{name}" for name in names] for names in (STEP_OPS, ATTENTION_OPS, GHOST_OPS))
TICKET = -1
REPORT = "this is an error of onnx_kivi, not of the model; nothing was written; report it with the model"


def check(model: Model, gone: Collection[str]) -> None:
    """Raise UnsupportedModelError if a node is not as a rewrite must leave it. gone: tensors that were removed."""
    try:
        graph = Graph(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"rewritten model: {error}; {REPORT}") from error
    for problem in (*_removed(graph, gone), *_slots(graph), *_steps(graph), *_ghosts(graph)):
        raise UnsupportedModelError(f"rewritten model: {problem}; {REPORT}")


def _removed(graph: Graph, gone: Collection[str]) -> Iterator[str]:
    """No removed tensor is read, or is an input or output."""
    for node in graph.nodes:
        for name in sorted(node.captured.union(node.inputs).intersection(gone)):
            yield f"{node}: expected no removed tensor to be read, got {name!r}"
    for name in sorted({*graph.inputs, *graph.outputs}.intersection(gone)):
        yield f"{name!r}: expected no removed tensor as input or output of the model"


def _slots(graph: Graph) -> Iterator[str]:
    """Each slot, from 0 on, belongs to one node."""
    for slot, node in enumerate(sorted(_nodes(graph, SDPA), key=lambda node: int(node.attr("slot")))):
        if node.attr("slot") != slot:
            yield f"{node}: expected slot {slot}, the next that no node has, got {node.attr('slot')}"


def _steps(graph: Graph) -> Iterator[str]:
    """One node opens the step, counts the others, and gives each its ticket."""
    steps, readers = _nodes(graph, STEP), _nodes(graph, SDPA)
    if len(steps) != 1:
        yield f"{', '.join(map(str, steps)) or 'no node'}: expected one {STEP[-1]}"
        return
    (step,) = steps
    if step.attr("layers") != len(readers):
        yield f"{step}: expected layers={len(readers)}, the number of {SDPA[0]} nodes, got {step.attr('layers')}"
    for node in readers:
        if node.inputs[-1] != step.outputs[TICKET]:
            yield f"{node}: expected the ticket {step.outputs[TICKET]!r}, got {node.inputs[-1]!r}"


def _ghosts(graph: Graph) -> Iterator[str]:
    """With ghost I/O one node opens the caches before the step, and one stamps behind it; without there are none."""
    ghosts = _nodes(graph, GHOST)
    if ghosts and [node.op for node in ghosts] != GHOST:
        yield f"{', '.join(map(str, ghosts))}: expected one {GHOST[0]}, and one {GHOST[1]} behind it"
        return
    for step in _nodes(graph, STEP) if ghosts else ():
        opens, stamps = ghosts
        if [*step.inputs[: len(opens.outputs)]] != [*opens.outputs] or step.outputs[TICKET] not in stamps.inputs:
            yield f"{step}: expected what {opens} gives, and its ticket to be read by {stamps}"


def _nodes(graph: Graph, ops: Collection[str]) -> list[Node]:
    return [node for node in graph.nodes if node.op in ops]

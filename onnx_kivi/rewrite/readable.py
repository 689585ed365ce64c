"""Which models can be looked into at all."""

from __future__ import annotations

from ..errors import UnsupportedModelError
from ..graph import Graph, Model, check_wellformed
from ..spec import DOMAIN, GHOST_IO, GHOST_OPS, NO_IO

OPSETS = range(11, 27)


def readable(model: Model) -> Graph:
    """The index of a model. Raises UnsupportedModelError for other opsets, damage, and what is rewritten."""
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), None)
    if opset not in OPSETS:
        raise UnsupportedModelError(
            f"opset: expected ai.onnx {OPSETS.start} to {OPSETS.stop - 1} (softmax and shapes mean other things "
            f"outside), got {opset}; export again or convert with onnx.version_converter"
        )
    check_wellformed(model)
    graph = Graph(model)
    ours = {node.op.removeprefix(f"{DOMAIN}.") for node in graph.nodes if node.op.startswith(f"{DOMAIN}.")}
    if ours:
        io = GHOST_IO if ours.intersection(GHOST_OPS) else NO_IO
        raise UnsupportedModelError(
            f"the model has {DOMAIN} nodes: it is already rewritten, with --io {io}; start from the original"
        )
    return graph

"""Mutants of exported decoders: whatever `rewrite` accepts must, at 32 bits, give the logits of its original.

A mutant has one or two edits of its graph: inputs exchanged or taken from elsewhere, attributes, constants and
operators changed, nodes put in or left out. Refusing one is always right. A finding is an accepted mutant whose
original runs, steadily (its own optimizations move it by rounding only), and whose rewrite gives other logits. What an
original makes of padding is nobody's, so one whose real tokens depend on the ids of padding proves nothing.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

import onnx_kivi as kivi
from onnx_kivi.errors import CacheError
from onnx_kivi.measure.reference import Opening, Reference, Run
from onnx_kivi.measure.replay import joined, unheard
from onnx_kivi.run.session import open_model
from zoo import MODELS, REFUSED

STEADY = 1e-4
LIMIT = 1e-3
PROMPT, CHUNK, STEPS, BATCH = 11, 8, 2, 2
DENSE = kivi.KiviConfig(32, 32, block_tokens=4, residual_length=3, sink_length=2)
EXCHANGED = (
    ("Add", "Sub", "Mul", "Div", "Max", "Min"),
    ("Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Equal"),
    ("And", "Or", "Xor"),
    ("Softmax", "LogSoftmax", "Hardmax"),
    ("Sigmoid", "Tanh", "Relu", "Neg", "Identity", "Abs"),
)
# Both branches of a merged decoder would need the same edit; what one_model.py lets differ is for verify to find.
LEFT_OUT = {*REFUSED, *(name for name in MODELS if "merged" in name)}
INSERTED = ("Identity", "Neg", "Relu", "Abs", "Tanh", "Transpose", "Not")


def fuzz(args: argparse.Namespace) -> None:
    """Run this fuzzer."""
    folder = Path(tempfile.mkdtemp())
    if args.replay:
        for path in args.replay:
            print(path, outcome(onnx.load(path), folder))
        return
    seeds = [onnx.load(path) for name, path in MODELS.items() if name not in LEFT_OUT and "16" not in name]
    chance, end = random.Random(args.seed), time.monotonic() + args.seconds
    outcomes: collections.Counter[str] = collections.Counter()
    while time.monotonic() < end:
        model = onnx.ModelProto()
        model.CopyFrom(chance.choice(seeds))
        for _ in range(chance.choice((1, 1, 2))):
            mutate(model, chance)
        what = outcome(model, folder)
        outcomes[what.split(":")[0]] += 1
        if what.startswith("differs"):
            found = args.findings / f"mutant-{args.seed}-{outcomes.total()}.onnx"
            onnx.save(model, found)
            print(f"{found}: {what}", flush=True)
    print(f"{outcomes.total()} mutants: {dict(outcomes)}")
    raise SystemExit(outcomes["differs"] > 0)


def outcome(model: onnx.ModelProto, folder: Path) -> str:
    """What became of a mutant."""
    original, path = folder / "original.onnx", folder / "rewritten.onnx"
    try:
        rewritten, report = kivi.rewrite(model, DENSE)
    except kivi.KiviError:
        return "refused"
    onnx.save(model, original)
    kivi.save(rewritten, path)
    try:
        difference = compared(original, path, report)
    except kivi.UnsupportedModelError as error:
        return f"does not run: {error}"
    except Exception as error:
        return f"refused at the run: {error}"
    if difference is None:
        return "proves nothing: unsteady, not finite, or reads padding"
    return "equal" if difference <= LIMIT else f"differs: by {difference:.1e} of the range"


def compared(original: Path, path: Path, report: kivi.Report, chunk: int = CHUNK) -> float | None:
    """How far a rewrite is from its original, as a share of its range; None if the original proves nothing."""
    lengths = (PROMPT, chunk, *[1] * STEPS)
    choices = [[Run(BATCH, True, lengths)], [Run(1, False, lengths)]]
    reference = Reference(original, report, choices, 0, unheard, opening=Opening(lean=False), needed=1)
    if not joined(reference.original(optimized=False)).max_rel_diff <= STEADY:
        return None
    difference = joined(reference.rewritten(path)).max_rel_diff
    chunks = difference <= LIMIT or takes_chunks(reference, open_model(original))
    if difference > LIMIT and chunks and not takes_chunks(reference, kivi.Session(path)):
        raise CacheError("a chunk that the original takes")  # which verification then feeds token by token
    if not chunks:
        return compared(original, path, report, chunk=1)  # it takes one token at a time after its prefill
    if difference > LIMIT and (holds_infinities(reference, original) or reads_padding(reference, original)):
        return None
    return difference


def takes_chunks(reference: Reference, session: ort.InferenceSession | kivi.Session) -> bool:
    """Whether a model runs several tokens behind others at once; else verification feeds them one by one."""
    for tokens, _ in reference._runs:
        cache = session.new_cache() if isinstance(session, kivi.Session) else None
        stepper = reference._stepper(session, tokens, cache)
        begin, end = 0, 0
        for end in tokens.ends[:2]:
            try:
                stepper.step(tokens.ids[:, begin:end], tokens.mask[:, :end])
            except Exception:
                return end - begin == 1
            begin = end
    return True


def holds_infinities(reference: Reference, original: Path) -> bool:
    """Whether a key or value is not finite: a mask's finite fill hides no infinite score, but the op's does."""
    session = open_model(original)
    for tokens, _ in reference._runs:
        stepper = reference._stepper(session, tokens)
        stepper.step(tokens.ids[:, :PROMPT], tokens.mask[:, :PROMPT])
        carried = (np.asarray(array, np.float64) for array in (stepper._known or {}).values())
        if not all(np.isfinite(array).all() for array in carried):
            return True
    return False


def reads_padding(reference: Reference, original: Path) -> bool:
    """Whether the logits of real tokens change with the ids of padding."""
    session = open_model(original)
    for tokens, expected in reference._runs:
        others = dataclasses.replace(
            tokens, ids=np.where(tokens.mask == 1, tokens.ids, (tokens.ids + 7) % tokens.ids.max())
        )
        real = tokens.mask[:, tokens.kept] == 1
        got = others.replay(reference._stepper(session, others))
        if not np.abs(got - expected)[real].max() <= STEADY * np.ptp(expected[real]):
            return True
    return False


def mutate(model: onnx.ModelProto, chance: random.Random) -> None:
    """Edit the graph once; an edit that has nothing to edit is tried again."""
    edits = (
        swap_inputs,
        redirect,
        change_attribute,
        change_integers,
        change_integers,
        scale,
        insert,
        leave_out,
        exchange,
    )
    while not chance.choice(edits)(model.graph, chance):
        pass


def swap_inputs(graph: onnx.GraphProto, chance: random.Random) -> bool:
    """Exchange two inputs of a node."""
    node = chance.choice([n for n in graph.node if len(n.input) > 1])
    i, j = chance.sample(range(len(node.input)), 2)
    node.input[i], node.input[j] = node.input[j], node.input[i]
    return bool(node.input[i] != node.input[j])


def redirect(graph: onnx.GraphProto, chance: random.Random) -> bool:
    """Have a node read the input of another node before it."""
    at = chance.randrange(1, len(graph.node))
    node, other = graph.node[at], graph.node[chance.randrange(at)]
    source = [*other.input, *other.output]
    if not node.input or not any(source):
        return False
    node.input[chance.randrange(len(node.input))] = chance.choice([name for name in source if name])
    return True


def change_attribute(graph: onnx.GraphProto, chance: random.Random) -> bool:
    """Another axis, permutation, factor or text."""
    held = [a for n in graph.node for a in n.attribute if n.op_type not in ("Constant", "If", "Loop")]
    attribute = chance.choice(held)
    if attribute.type == onnx.AttributeProto.INT:
        attribute.i += chance.choice((-2, -1, 1, 2))
    elif attribute.type == onnx.AttributeProto.INTS and len(attribute.ints) > 1:
        i, j = chance.sample(range(len(attribute.ints)), 2)
        attribute.ints[i], attribute.ints[j] = attribute.ints[j], attribute.ints[i]
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f *= chance.choice((0.5, 2, -1))
    else:
        return False
    return True


def constants(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """Small stored tensors."""
    inner = [a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
    return [t for t in (*graph.initializer, *inner) if np.prod(t.dims) <= 16]


def change_integers(graph: onnx.GraphProto, chance: random.Random) -> bool:
    """Another number in a constant of integers or truths."""
    held = [t for t in constants(graph) if t.data_type in (6, 7, 9)]
    tensor = chance.choice(held)
    array = numpy_helper.to_array(tensor).copy()
    if not array.size:
        return False
    at = chance.randrange(array.size)
    array.flat[at] = array.flat[at] == 0 if array.dtype == bool else array.flat[at] + chance.choice((-2, -1, 1, 2))
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return True


def scale(graph: onnx.GraphProto, chance: random.Random) -> bool:
    """A small constant of floats becomes another."""
    held = [t for t in constants(graph) if t.data_type == 1]
    if not held:
        return False
    tensor = chance.choice(held)
    with np.errstate(all="ignore"):
        array = numpy_helper.to_array(tensor) * np.float32(chance.choice((0.5, 2, -1, 0)))
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return True


def insert(graph: onnx.GraphProto, chance: random.Random) -> bool:
    """Put a node of one input between a tensor and one of its readers."""
    at = chance.randrange(len(graph.node))
    node = graph.node[at]
    places = [i for i, name in enumerate(node.input) if name]
    if not places:
        return False
    i = chance.choice(places)
    new = f"inserted.{len(graph.node)}.{chance.randrange(1 << 30)}"
    op = chance.choice(INSERTED)
    made = helper.make_node(op, [node.input[i]], [new])
    if op == "Transpose":
        made.attribute.append(helper.make_attribute("perm", [0, 1, 3, 2]))
    node.input[i] = new
    graph.node.insert(at, made)
    return True


def leave_out(graph: onnx.GraphProto, chance: random.Random) -> bool:
    """Have the readers of a node read one of its inputs."""
    at = chance.randrange(len(graph.node))
    node = graph.node[at]
    if len(node.output) != 1 or not any(node.input) or any(o.name == node.output[0] for o in graph.output):
        return False
    instead, gone = chance.choice([name for name in node.input if name]), node.output[0]
    del graph.node[at]
    for reader in graph.node:
        reader.input[:] = [instead if name == gone else name for name in reader.input]
    return True


def exchange(graph: onnx.GraphProto, chance: random.Random) -> bool:
    """Another operator of the same kind."""
    known = {op: group for group in EXCHANGED for op in group}
    held = [n for n in graph.node if n.op_type in known]
    if not held:
        return False
    node = chance.choice(held)
    node.op_type = chance.choice([op for op in known[node.op_type] if op != node.op_type])
    return True

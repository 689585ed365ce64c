"""The ops' schemas, made from `spec`, registered with onnx so that its checker and shape inference know them."""

from __future__ import annotations

import atexit

import onnx
from onnx import defs

from ..spec import DOMAIN, OPS, OPSET_VERSION
from ..spec_types import OpSpec
from .elements import ELEMENT_CODES


def register_schemas() -> None:
    """Register the ops of the domain, once per process."""
    for op in OPS:
        if not defs.has(op.name, OPSET_VERSION, DOMAIN):
            defs.register_schema(_schema(op))
            # onnx before 1.23 crashes or hangs if it still holds a Python function when the interpreter is gone.
            atexit.register(defs.deregister_schema, op.name, OPSET_VERSION, DOMAIN)


def _schema(op: OpSpec) -> defs.OpSchema:
    parameter, attribute = defs.OpSchema.FormalParameter, defs.OpSchema.Attribute
    kinds = {"int": defs.OpSchema.AttrType.INT, "string": defs.OpSchema.AttrType.STRING}
    schema = defs.OpSchema(
        op.name,
        DOMAIN,
        OPSET_VERSION,
        doc=op.doc,
        inputs=[parameter(t.name, f"tensor({t.element})", t.meaning) for t in op.inputs],
        outputs=[parameter(t.name, f"tensor({t.element})", t.meaning) for t in op.outputs],
        attributes=[
            attribute(a.name, kinds[a.wire], a.meaning)
            if a.default is None
            else attribute(a.name, onnx.helper.make_attribute(a.name, a.default), a.meaning)
            for a in op.attributes
        ],
    )
    schema.set_type_and_shape_inference_function(lambda context: _infer(op, context))
    return schema


def _infer(op: OpSpec, context: onnx.shape_inference.InferenceContext) -> None:
    """Bind the spec's dimension letters to the inputs' dimensions and read the outputs off them."""
    letters: dict[str, onnx.TensorShapeProto.Dimension] = {}
    for i, spec in enumerate(op.inputs):
        given = context.get_input_type(i)
        if spec.broadcast or given is None or not given.tensor_type.HasField("shape"):
            continue
        for letter, dim in zip(spec.shape, given.tensor_type.shape.dim, strict=False):
            letters.setdefault(letter, dim)
    for i, spec in enumerate(op.outputs):
        proto = onnx.helper.make_tensor_type_proto(ELEMENT_CODES[spec.element], [None] * len(spec.shape))
        for letter, dim in zip(spec.shape, proto.tensor_type.shape.dim, strict=True):
            if letter.isdigit():
                dim.dim_value = int(letter)
            elif letter in letters:
                dim.CopyFrom(letters[letter])
        context.set_output_type(i, proto)

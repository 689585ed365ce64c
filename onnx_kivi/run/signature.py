"""What a decoder takes and gives, by the names that exporters use: its caches and states, and their shapes."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..cache_facts import CacheFacts
from ..errors import UnsupportedModelError
from ..naming import KEEP_INPUTS, is_encoder_name, is_past_name, present_of
from ..spec import PAST_LENGTH_INPUT, STORED_TOKENS

MERGED_FLAG = "use_cache_branch"
ELEMENTS: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


class Signature:
    """A decoder's inputs and outputs by the part that they play in a step.

    session: an onnxruntime session, or a Session. present: a past input -> the output that carries it onward, None if
    there is none. stored: the inputs that slots of a rewritten model store, an encoder's keys and values. keep: the
    input that says of how many of the last tokens there are logits; None if there is none.
    """

    def __init__(self, session: Any, facts: CacheFacts | None = None) -> None:
        self._facts = facts or CacheFacts()
        self.inputs = {i.name: i for i in session.get_inputs()}
        self.outputs = {o.name: o for o in session.get_outputs()}
        paired = self._facts.outputs
        past = [name for name in self.inputs if name in paired or is_past_name(name)]
        self.present = {
            name: paired.get(name) or present_of(name, self.outputs) for name in past if name != PAST_LENGTH_INPUT
        }
        self.stored = {name for name, i in self.inputs.items() if STORED_TOKENS in i.shape}
        named = {i.name: i for i in (*self.inputs.values(), *session.get_overridable_initializers())}
        self.keep = next((named[name] for name in KEEP_INPUTS if name in named), None)

    @property
    def vocabulary(self) -> int | None:
        """Tokens that the model knows, where it says."""
        size = self.outputs["logits"].shape[-1] if "logits" in self.outputs else None
        return size if isinstance(size, int) else None

    def is_encoders(self, past: str) -> bool:
        """Whether a past input holds an encoder's keys or values: no token adds to them."""
        return self.present[past] is None or is_encoder_name(past) or past in self._facts.crossed

    def makes(self, past: str) -> bool:
        """Whether the model makes an encoder's keys or values itself, in a first step, as merged decoders do."""
        return MERGED_FLAG in self.inputs and self.present[past] is not None

    def past_shape(self, name: str, batch: int, tokens: int) -> list[int]:
        """Shape of a past input that holds `tokens` tokens, or of its buffer or state where that has a fixed size."""
        sizes = self.inputs[name].shape
        token_batch = self.inputs["input_ids"].shape[0] if "input_ids" in self.inputs else None
        shape = [d if isinstance(d, int) else None for d in sizes]
        for axis, size in enumerate(sizes):
            if shape[axis] is None and (axis == 0 or size == token_batch or "batch" in str(size)):
                shape[axis] = batch
        if shape[-1] is None and shape.count(None) > 1:
            shape[-1] = self._facts.head_sizes.get(name)
        tokens = self._facts.capacities.get(name, tokens)
        return [tokens if d is None else d for d in shape]

    def element(self, name: str) -> Any:
        """NumPy type of an input. Raises UnsupportedModelError if NumPy has none."""
        kind = self.inputs[name].type
        if kind not in ELEMENTS:
            raise UnsupportedModelError(
                f"input {name}: expected a type NumPy can hold, got {kind}; run the model with onnxruntime's io_binding"
            )
        return ELEMENTS[kind]

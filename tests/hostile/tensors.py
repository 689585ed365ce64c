"""What may reach the op itself: a model of one node is fed tensors of every wrong shape, size and type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .case import ONNXRUNTIMES, OURS, Scene, cases

# A step of 2 rows, 4 query heads over 2 kv heads, 3 tokens, keys of 8 and values of 6 channels, behind 9 tokens.
SHAPES = {"query": (2, 4, 3, 8), "key": (2, 2, 3, 8), "value": (2, 2, 3, 6), "attn_mask": (0,), "head_sink": (0,)}
HELD = 9
ANY = (*OURS, *ONNXRUNTIMES)


def tensors(**shapes: tuple[int, ...]) -> dict[str, Any]:
    """Feeds of these shapes, else of the right ones."""
    return {name: np.ones(shape, np.float32) for name, shape in (SHAPES | shapes).items()}


def step(changes: Mapping[str, Any], held: int = HELD) -> Callable[[Scene], object]:
    """A run with other shapes or arrays behind `held` tokens; what is refused must leave these."""

    def act(scene: Scene) -> object:
        cache = scene.bare.new_cache()
        if held:
            first = {name: (*shape[:2], held, shape[3]) for name, shape in SHAPES.items() if len(shape) == 4}
            scene.bare.run(None, tensors(**first), cache=cache)
            assert cache.sealed_tokens > 0
        shapes = {name: change for name, change in changes.items() if isinstance(change, tuple)}
        arrays = {name: change for name, change in changes.items() if not isinstance(change, tuple)}
        try:
            return scene.bare.run(None, tensors(**shapes) | arrays, cache=cache)
        finally:
            assert cache.length == held, f"{cache.length} tokens of {held} are left"

    return act


def with_axis(name: str, axis: int, size: int) -> tuple[int, ...]:
    shape = list(SHAPES[name])
    shape[axis] = size
    return tuple(shape)


SIZES = {
    f"{name}, axis {axis}, of {size}": (step({name: with_axis(name, axis, size)}), "expected", OURS)
    for name in ("query", "key", "value")
    for axis in range(4)
    for size in (0, SHAPES[name][axis] + 1)
    if (name, axis) != ("query", 2)  # queries may be fewer or more than keys: they stand from the first new token on
}
FIRST = {
    f"{name}, axis {axis}, of none in the first run": (step({name: with_axis(name, axis, 0)}, 0), "expected", OURS)
    for name in ("query", "key", "value")
    for axis in (0, 1, 3)
}
RANKS = {
    f"{name} of {len(shape)} dimensions": (step({name: shape}), "expected", ANY)
    for name in ("query", "key", "value")
    for shape in ((), (2,), (2, 4, 24), (1, 2, 4, 3, 8))
}
MASKS = {
    f"a mask of {shape}": (step({"attn_mask": shape}), "attn_mask: expected shape", OURS)
    for shape in (
        (1, 1, 3, 11),
        (1, 1, 3, 13),
        (1, 1, 2, 12),
        (1, 3, 3, 12),
        (3, 1, 3, 12),
        (3, 12),
        (1, 3, 12),
        (12,),
        (1, 1, 1, 3, 12),
        (1, 1, 3, 0),
        (0, 1, 3, 12),
        (2, 4, 12, 3),
        (0, 0),
    )
}
SINKS = {
    f"a head sink of {shape}": (step({"head_sink": shape}), "head_sink: expected shape", OURS)
    for shape in ((1,), (3,), (5,), (1, 4), (4, 1), (2, 4), (0, 0))
}
TYPES = {
    f"{name} in {kind}": (step({name: np.ones(SHAPES[name] or (1,), kind)}), "data type|expected", ONNXRUNTIMES)
    for name in SHAPES
    for kind in ("float64", "float16", "int64", "bool")
}
ODD = (*ANY, "TypeError", "ValueError", "RuntimeError")
OBJECTS = {
    "no key": (step({"key": None}), "key: expected an array, got None", OURS),
    "no mask": (step({"attn_mask": None}), "attn_mask: expected an array, got None", OURS),
    "a key of text": (step({"key": np.full((2, 2, 3, 8), "a")}), "data type", ONNXRUNTIMES),
    "a key that is a list": (step({"key": [[1.0]]}), "", ODD),
    "a key that is a dict": (step({"key": {1: 1.0}}), "", ODD),
    "a key that is an object": (step({"key": object()}), "", ODD),
    "a key that is a number": (step({"key": 1.0}), "", ODD),
    "a key that is text": (step({"key": "key"}), "", ODD),
}

CASES = [
    *cases("size", SIZES),
    *cases("size", FIRST),
    *cases("rank", RANKS),
    *cases("mask", MASKS),
    *cases("sink", SINKS),
    *cases("type", TYPES),
    *cases("object", OBJECTS),
]

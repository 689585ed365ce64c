"""States that contradict themselves: both stores refuse them in the same words, and read no array beyond its end."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_kivi.errors import CacheError
from onnx_kivi.runtime.backend import BlockState, CacheState, DenseState, QuantizedBlock, RowState
from onnx_kivi.runtime.select import get_backend
from stepping import assert_same, assert_sealed, filled, run, sdpa, tokens

pytest.importorskip("onnx_kivi._native", reason="nothing is compiled here", exc_type=ImportError)

STORES = ("numpy", "native")


def outcome(name: str, state: CacheState) -> CacheState | str:
    """What the store holds after the import, or what it refused the state with."""
    backend = get_backend(name)
    try:
        handle = backend.import_state(state)
    except CacheError as error:
        return str(error)
    held = backend.export_state(handle)
    backend.close(handle)
    return held


def refusal(state: CacheState) -> str:
    """What both stores refuse the state with."""
    words = [outcome(name, state) for name in STORES]
    assert isinstance(words[0], str)
    assert words[0] == words[1]
    return words[0]


@pytest.fixture
def state(rng: np.random.Generator) -> CacheState:
    """A cache of two rows whose blocks are sealed, in two slots."""
    backend = get_backend("numpy")
    handle = filled(backend, rng, 14, [sdpa(0, residual_length=3), sdpa(1, k_bits=32, sink_length=2)], batch=2)
    assert_sealed(backend, handle)
    return backend.export_state(handle)


def with_rows(state: CacheState, *rows: RowState) -> CacheState:
    return replace(state, slots=(replace(state.slots[0], rows=rows), *state.slots[1:]))


def sized(row: RowState, heads: int, k_size: int, v_size: int) -> RowState:
    """A row of the same tokens with other sizes, zeros throughout, its blocks dense."""

    def key(tokens: int) -> np.ndarray:
        return np.zeros((heads, tokens, k_size), np.float32)

    def value(tokens: int) -> np.ndarray:
        return np.zeros((heads, tokens, v_size), np.float32)

    sinks, residual = row.sinks.tokens, row.residual.tokens
    blocks = tuple(BlockState(key(4), value(4)) for _ in row.blocks)
    return RowState(DenseState(key(sinks), value(sinks)), 0, blocks, DenseState(key(residual), value(residual)))


def changed(row: RowState, name: str, array: object) -> RowState:
    """The row with one of its dense arrays, named like `sinks.key`, replaced."""
    end, side = name.split(".")
    return replace(row, **{end: replace(getattr(row, end), **{side: array})})


@pytest.mark.parametrize("sizes", [(0, 6, 6), (2, 0, 6), (2, 6, 0), (2, 6, (1 << 16) + 1)])
def test_heads_and_sizes_are_from_one_to_the_most(state: CacheState, sizes: tuple[int, int, int]) -> None:
    row = sized(state.slots[0].rows[0], *sizes)
    assert refusal(with_rows(state, row, row)) == (
        f"cache state, slot 0: expected heads and head sizes from 1 to 65536, got {sizes[0]}, {sizes[1]} and {sizes[2]}"
    )


@pytest.mark.parametrize("sizes", [(1, 6, 6), (3, 6, 6), (2, 4, 6), (2, 9, 6), (2, 6, 4), (2, 6, 99)])
@pytest.mark.parametrize("first", [True, False])
def test_the_rows_of_a_slot_have_the_same_sizes(state: CacheState, sizes: tuple[int, int, int], first: bool) -> None:
    row, other = state.slots[0].rows[0], sized(state.slots[0].rows[0], *sizes)
    assert "slot 0, residual: expected float32 (" in refusal(
        with_rows(state, *((other, row) if first else (row, other)))
    )


def lies(state: CacheState) -> list[CacheState]:
    """States that each contradict themselves in one way."""
    first, second = state.slots
    row, block = first.rows[0], first.rows[0].blocks[0]
    assert isinstance(block.key, QuantizedBlock)
    inf = np.full_like(block.key.lo, np.inf)

    def with_key(**changes: Any) -> CacheState:
        key = replace(block.key, **changes)  # type: ignore[type-var]
        return with_rows(state, replace(row, blocks=(replace(block, key=key), *row.blocks[1:])), first.rows[1])

    def with_first(name: str, array: object) -> CacheState:
        return with_rows(state, changed(row, name, array), first.rows[1])

    return [
        replace(state, lengths=(-1, 14)),
        replace(state, lengths=(14, 13)),
        replace(state, lengths=(2**62, 2**62)),
        replace(state, lengths=(14,)),
        replace(state, lengths=()),
        replace(state, lengths=(14, 14, 14)),
        replace(state, step=None),
        replace(state, slots=()),
        replace(state, slots=(second, first)),
        replace(state, slots=(first, first)),
        replace(state, slots=(replace(first, rows=()), second)),
        replace(state, slots=(replace(first, rows=()), replace(second, rows=()))),
        with_rows(state, row),
        with_rows(state, replace(row, blocks=row.blocks[1:]), first.rows[1]),
        with_rows(state, replace(row, blocks=(*row.blocks, block)), first.rows[1]),
        with_rows(state, replace(row, blocks=row.blocks[1:], freed=4), first.rows[1]),
        with_rows(state, replace(row, freed=4), first.rows[1]),
        with_rows(state, replace(row, freed=-4), first.rows[1]),
        with_rows(state, replace(row, freed=2**63 - 1), first.rows[1]),
        with_rows(state, replace(row, freed=-(2**63)), first.rows[1]),
        with_rows(state, replace(row, sinks=DenseState(row.sinks.key[:, :0], row.sinks.value[:, :0])), row),
        with_first("sinks.key", row.sinks.key[0]),
        with_first("sinks.value", row.sinks.value.astype(np.float64)),
        with_first("residual.key", row.residual.key.astype(np.int32)),
        with_first("residual.value", [[[1.0]]]),
        with_first("residual.value", row.residual.value[:, :1]),
        with_key(codes=block.key.codes[:, :, :1]),
        with_key(codes=block.key.codes.astype(np.int8)),
        with_key(lo=inf),
        with_key(scale=inf),
        with_key(scale=np.zeros_like(inf)),
        with_key(scale=-np.ones_like(inf)),
        with_key(lo=block.key.lo.astype(np.float32)),
        with_key(scale=block.key.scale[:1]),
        replace(state, slots=(first, replace(second, rows=first.rows))),
    ]


LIES = 35


@pytest.mark.parametrize("number", range(LIES))
def test_a_state_that_contradicts_itself_is_refused_in_the_same_words(state: CacheState, number: int) -> None:
    assert len(lies(state)) == LIES
    assert refusal(lies(state)[number]).startswith("cache state")


def test_arrays_of_any_strides_are_taken_for_what_they_show(state: CacheState) -> None:
    row = state.slots[0].rows[0]
    spread = np.repeat(row.residual.key, 2, axis=2)[:, :, ::2]
    backward = np.flip(np.flip(row.sinks.value, 0).copy(), 0)
    assert not spread.flags.c_contiguous
    assert not backward.flags.c_contiguous
    odd = changed(changed(row, "residual.key", spread), "sinks.value", backward)
    given = with_rows(state, odd, state.slots[0].rows[1])
    held = outcome("native", given)
    assert isinstance(held, CacheState)
    assert_same(held, state)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_change_of_shape_leaves_both_stores_with_the_same_cache_or_the_same_words(data: st.DataObject) -> None:
    """One array of a state gets another shape, or another type: the stores agree, and what they took they hold."""
    backend = get_backend("numpy")
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    kind = data.draw(st.sampled_from(["self", "cross"]))
    node = sdpa(0, kind=kind, residual_length=data.draw(st.integers(0, 3)), v_group_size=data.draw(st.integers(0, 4)))
    handle = filled(backend, rng, data.draw(st.integers(1, 14)), [node], batch=2)
    state = backend.export_state(handle)
    backend.close(handle)
    row = state.slots[0].rows[0]
    name = data.draw(st.sampled_from(["sinks.key", "sinks.value", "residual.key", "residual.value"]))
    shape = data.draw(st.lists(st.integers(0, 7), min_size=3, max_size=3))
    array = np.zeros(shape, data.draw(st.sampled_from([np.float32, np.float64])))
    odd, other = changed(row, name, array), state.slots[0].rows[1]
    rows = (odd, odd) if data.draw(st.booleans()) else (odd, other)
    first, second = (outcome(store, with_rows(state, *rows)) for store in STORES)
    if isinstance(first, str) or isinstance(second, str):
        assert first == second, array.shape
    else:
        assert_same(first, second)


def test_a_file_that_lies_with_a_right_checksum_does_not_end_the_process(state: CacheState, tmp_path: Path) -> None:
    """In a process of its own, because what this guards against is a crash."""
    row = state.slots[0].rows[0]
    small, large = sized(row, 1, 1, 1), sized(row, 4, 40, 40)
    states = [with_rows(state, *(sized(row, *s),) * 2) for s in ((0, 6, 6), (2, 0, 6), (2, 6, 0))]
    states += [with_rows(state, small, large), with_rows(state, large, small)]
    from onnx_kivi.runtime.cache_file import save_state

    for i, lie in enumerate(states):
        save_state(tmp_path / f"{i}.kv", lie)
    code = """
import sys
from onnx_kivi.errors import CacheError
from onnx_kivi.runtime.cache import Cache
from onnx_kivi.runtime.select import get_backend
for path in sys.argv[1:]:
    for name in ("numpy", "native"):
        try:
            Cache.load(path, get_backend(name))
        except CacheError:
            continue
        sys.exit(path + " was taken")
"""
    files = [str(tmp_path / f"{i}.kv") for i in range(len(states))]
    subprocess.run([sys.executable, "-c", code, *files], check=True, timeout=60)


@pytest.mark.parametrize(("side", "bits"), [("key", 2), ("key", 4), ("value", 2), ("value", 4)])
def test_what_stands_behind_the_last_code_must_be_zeros(rng: np.random.Generator, side: str, bits: int) -> None:
    backend = get_backend("numpy")
    node = sdpa(0, k_bits=bits, v_bits=bits, block_tokens=5, residual_length=2)
    handle = backend.new_cache()
    key = tokens(rng, 14, size=7)
    run(backend, handle, [node], key, key)
    assert_sealed(backend, handle)
    state = backend.export_state(handle)
    row = state.slots[0].rows[0]
    block = row.blocks[0]
    packed: QuantizedBlock = getattr(block, side)
    codes = packed.codes.copy()
    codes[0, 0, -1] |= 0x80
    changed_block = replace(block, **{side: replace(packed, codes=codes)})
    lie = with_rows(state, replace(row, blocks=(changed_block, *row.blocks[1:])))
    assert "expected zeros behind the last code of each row" in refusal(lie)
    assert_same(state, outcome("native", state))  # type: ignore[arg-type]


COUNT = "expected 6 digits for each head, and scales of channels that have some, got others"
TOKENS = "expected token scales from 1 on and a unit of at least 6.103515625e-05, got others"


@pytest.mark.parametrize(
    ("side", "part", "at", "put", "words"),
    [
        ("key", "digits", (0, 0), 0xFF, COUNT),
        ("key", "digits", (1, 1), 0xF0, "expected zeros behind the last code of each row"),
        ("key", "scale", (0, slice(None)), 0, COUNT),
        ("key", "token", (1, 2), 0, TOKENS),
        ("key", "unit", (0,), np.inf, TOKENS),
        ("key", "lo", (0, 0), np.nan, "expected finite parameters and scales of at least 0.0, got others"),
        ("value", "scale", (0, 0, 0), -0.0, "expected finite parameters and scales of at least 0.0, got others"),
        ("value", "codes", (0, 0, -1), 0xFF, "expected zeros behind the last code of each row"),
    ],
)
def test_parts_of_a_scheme_are_what_sealing_leaves(
    rng: np.random.Generator, side: str, part: str, at: Any, put: float, words: str
) -> None:
    backend = get_backend("numpy")
    node = sdpa(k_bits=2, k_scheme="digits:2+token", v_bits=3, v_scheme="symmetric+rotated", spec_version=2)
    state = backend.export_state(filled(backend, rng, 14, [node]))
    assert_same(state, outcome("native", state))  # type: ignore[arg-type]
    row = state.slots[0].rows[0]
    block = getattr(row.blocks[1], side)
    array = getattr(block, part).copy()
    array[at] = put
    blocks = (row.blocks[0], replace(row.blocks[1], **{side: replace(block, **{part: array})}), *row.blocks[2:])
    assert words in refusal(with_rows(state, replace(row, blocks=blocks)))
    empty = replace(row.blocks[1], **{side: replace(block, **{part: array[:0]})})
    assert "expected" in refusal(with_rows(state, replace(row, blocks=(empty, *row.blocks[1:]))))

"""Ghost I/O under the native host: whatever a host does to stamps is done to the caches that they name, or refused."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from ghosts import NARROW, WIDE, Past, ghost_feeds, nothing, step
from nodes import feeds, model, native_session
from onnx_kivi.errors import CacheError, ConfigError, KiviError
from onnx_kivi.runtime.select import get_backend
from onnx_kivi.spec import SdpaAttributes
from stepping import assert_sealed, sdpa, tokens

native = pytest.importorskip("onnx_kivi.runtime.native", reason="nothing is compiled here", exc_type=ImportError)

Array = npt.NDArray[Any]
DENSE = [sdpa(slot, spec_version=2, is_causal=1, k_bits=32, v_bits=32) for slot in range(2)]
QUANTIZED = [sdpa(slot, spec_version=2, is_causal=1) for slot in range(2)]
# Outputs are averages of some hundred numbers of size one, in float32.
ROUNDING = 1e-5


def served(nodes: list[SdpaAttributes], name: str, **ghost_wire: Any) -> ort.InferenceSession:
    return native_session(model(nodes, name, version=2, ghost_wire=ghost_wire))


@pytest.fixture(scope="module")
def dense() -> ort.InferenceSession:
    return served(DENSE, "dense")


def assert_right(outputs: list[Array], past: Past, new: int) -> None:
    """The outputs are those of attention over all tokens of `past`, the last `new` of which were fed."""
    position = past.tokens.shape[2] - new
    for output in outputs:
        for row, all_tokens in zip(output, past.tokens, strict=True):
            expected = oracle.attention(
                DENSE[0], position, all_tokens[:, position:], all_tokens, all_tokens, None, None
            )
            np.testing.assert_allclose(row, expected, rtol=0, atol=ROUNDING)


def refusal(of: ort.InferenceSession, fed: dict[str, Array]) -> KiviError:
    with pytest.raises(Exception, match="onnx_kivi") as caught:
        of.run(None, fed)
    error: KiviError | None = native.error_from(caught.value)
    assert error is not None
    assert "\n" not in str(error)
    return error


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([NARROW, WIDE]))
def test_whatever_a_host_does_to_stamps_is_done_to_caches(
    dense: ort.InferenceSession, seed: int, width: tuple[int, int]
) -> None:
    """Pasts are gone on with, kept, cut, and their rows selected, repeated and joined, at random."""
    rng = np.random.default_rng(seed)
    first = tokens(rng, 5, batch=2)
    outputs, past = step(dense, nothing(first, width), first)
    assert_right(outputs, past, 5)
    pasts = [past]
    for _ in range(25):
        past = pasts[rng.integers(len(pasts))]
        rows, length = past.tokens.shape[0], past.tokens.shape[2]
        action = rng.choice(["go on", "select", "permute", "cut", "join"], p=[0.4, 0.2, 0.1, 0.1, 0.2])
        if action == "select":
            past = past.select(rng.integers(0, rows, rng.integers(1, 4)).tolist())
        elif action == "permute":
            past = past.select(rng.permutation(rows).tolist())
        elif action == "cut":
            past = past.cut(int(rng.integers(1, length + 1)))
        elif action == "join":
            other = pasts[rng.integers(len(pasts))]
            length = min(length, other.tokens.shape[2])
            past = past.cut(length).join(other.cut(length)).select(range(min(4, rows + other.tokens.shape[0])))
        new = tokens(rng, int(rng.integers(1, 4)), batch=past.tokens.shape[0])
        outputs, after = step(dense, past, new)
        assert_right(outputs, after, new.shape[2])
        pasts = [*pasts[-5:], after]


def test_steps_are_those_of_a_cache_that_is_given(rng: np.random.Generator) -> None:
    """Also past sealed blocks; and a cache that is given needs no stamps, and changes none."""
    quantized, backend = served(QUANTIZED, "quantized"), get_backend("native")
    handle, past = backend.new_cache(), nothing(tokens(rng, 1, batch=2))
    for count in (9, 1, 1, 4, 1):
        new = tokens(rng, count, batch=2)
        given = ghost_feeds(nothing(new), new, cache_handle=handle)
        *expected, key, value = quantized.run(None, given)
        assert key.shape == value.shape == (2, 1, 0, 4)
        outputs, past = step(quantized, past, new)
        for output, same in zip(outputs, expected[2:], strict=True):
            np.testing.assert_array_equal(output, same)
    assert_sealed(backend, handle)


def test_a_buffer_is_stamped_in_place(dense: ort.InferenceSession, rng: np.random.Generator) -> None:
    """As onnxruntime-genai shares one buffer between past and present."""
    buffers = [ort.OrtValue.ortvalue_from_numpy(np.zeros((1, *NARROW[:1], 12, 4), np.float32)) for _ in "kv"]
    everything = tokens(rng, 0)
    for count in (5, 1, 3):
        new = tokens(rng, count)
        past = Past((buffers[0].numpy(), buffers[1].numpy()), everything)
        binding = dense.io_binding()
        for name, array in ghost_feeds(past, new).items():
            if name not in {"past_key", "past_value"}:
                binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for side, buffer in zip(("key", "value"), buffers, strict=True):
            binding.bind_ortvalue_input(f"past_{side}", buffer)
            binding.bind_ortvalue_output(f"present_{side}", buffer)
        for name in ("out0", "out1"):
            binding.bind_output(name)
        dense.run_with_iobinding(binding)
        everything = np.concatenate((everything, new), 2)
        assert_right(binding.copy_outputs_to_cpu()[-2:], Past(past.stamps, everything), count)


def test_threads_that_go_on_from_one_past_do_not_meet(dense: ort.InferenceSession, rng: np.random.Generator) -> None:
    failures: list[BaseException] = []
    ready = threading.Barrier(3)

    def go_on(past: Past, new: Array) -> None:
        try:
            ready.wait()
            outputs, after = step(dense, past, new)
            assert_right(outputs, after, new.shape[2])
        except BaseException as error:
            failures.append(error)

    for _ in range(10):
        first = tokens(rng, 8, heads=1)
        _, past = step(dense, nothing(first), first)
        threads = [threading.Thread(target=go_on, args=(past, tokens(rng, 60, heads=1))) for _ in range(ready.parties)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_a_run_that_fails_leaves_its_past_usable(dense: ort.InferenceSession, rng: np.random.Generator) -> None:
    first = tokens(rng, 5)
    _, past = step(dense, nothing(first), first)
    new = tokens(rng, 2)
    wrong = ghost_feeds(past, new) | {"value": new[:, :1]}
    assert isinstance(refusal(dense, wrong), CacheError)
    outputs, after = step(dense, past, new)
    assert_right(outputs, after, 2)


def key(change: Callable[[Array], object]) -> Callable[[Past, dict[str, Array]], object]:
    """Changes the stamps of past keys."""

    def changed(past: Past, fed: dict[str, Array]) -> None:
        fed["past_key"] = past.stamps[0].copy()
        change(fed["past_key"])

    return changed


def both(change: Callable[[Array], Array]) -> Callable[[Past, dict[str, Array]], object]:
    return lambda past, fed: fed.update(past_key=change(past.stamps[0]), past_value=change(past.stamps[1]))


def zeros(stamps: Array) -> None:
    stamps[...] = 0


def not_numbers(stamps: Array) -> None:
    stamps[0, 0, 2] = np.nan


def keys(stamps: Array) -> None:
    stamps[...] = np.random.default_rng(0).standard_normal(stamps.shape)


def random_stamps(stamps: Array) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 29, stamps.shape)
    stamps[...] = (bits | 1 << 30).astype(np.uint32).view(np.float32)


def halves(stamps: Array) -> None:
    with np.errstate(over="ignore"):
        stamps[...] = stamps.astype(np.float16)


def swapped_tokens(stamps: Array) -> None:
    stamps[:, :, [1, 3]] = stamps[:, :, [3, 1]]


def repeated_token(stamps: Array) -> None:
    stamps[:, :, 3] = stamps[:, :, 2]


def other_row(stamps: Array) -> None:
    stamps[0, :, 1] = stamps[1, :, 1]


NO_STAMP = "expected what a run of this model wrote there, got other numbers; hand the present outputs"
CUT_UP = "expected the token that was there when the last one of the row came, got another; a past may be cut"
BAD_PASTS: dict[str, tuple[Callable[[Past, dict[str, Array]], object], str]] = {
    "zeros": (key(zeros), f"past_key, row 0, token 5: {NO_STAMP}"),
    "NaN": (key(not_numbers), f"past_key, row 0, token 2: {NO_STAMP}"),
    "real keys": (key(keys), NO_STAMP),
    "random stamps": (key(random_stamps), "CacheOpen: past_key, row 0, token 5: expected a p"),
    "float16": (key(halves), "past_key, row 0, token 5: expected "),
    "tokens swapped": (key(swapped_tokens), f"past_key, row 0, token 1: {CUT_UP}"),
    "a token twice": (key(repeated_token), f"past_key, row 0, token 3: {CUT_UP}"),
    "a token of another row": (key(other_row), f"past_key, row 0, token 1: {CUT_UP}"),
    "cut at the start": (
        lambda past, fed: both(lambda stamps: stamps[:, :, 2:])(past, fed) or fed.update(mask_shape=np.array([2, 5])),
        "expected a past whose cache is held, got one that was freed to stay within the budget, or that was cut at its",
    ),
    "sides swapped": (
        lambda past, fed: fed.update(past_key=past.stamps[1], past_value=past.stamps[0]),
        "past_key, row 0, token 5: expected a present of its own side, got one of the other",
    ),
    "rows of keys alone": (
        lambda past, fed: fed.update(past_key=past.stamps[0][::-1].copy()),
        f"past_value, row 0, token 0: {CUT_UP}",
    ),
    "fewer tokens than the mask": (
        both(lambda stamps: stamps[:, :, :4]),
        "past_key: expected 6 tokens, those of the mask less the new ones, or a buffer of 7 or more, got 4",
    ),
    "other rows than tokens": (both(lambda stamps: stamps[:1]), "past_key: expected 2 rows of at least 4 channels"),
    "too narrow": (both(lambda stamps: stamps[..., :3]), "at least 4 channels, over all heads, got shape (2, 1, 6, 3)"),
    "three axes": (both(lambda stamps: stamps[0]), "of one shape (B, heads, tokens, channels), got (1, 6, 4)"),
    "two shapes": (
        lambda past, fed: fed.update(past_value=past.stamps[1][:, :, :5]),
        "expected past_key and past_value of one shape",
    ),
    "a mask of other rows": (
        lambda _, fed: fed.update(mask_shape=np.array([3, 7])),
        "attention_mask: expected shape (2, tokens of the past and 1 new ones), got (3, 7)",
    ),
    "a mask that is too short": (lambda _, fed: fed.update(mask_shape=np.array([2, 0])), "attention_mask: expected"),
    "a past_length": (
        lambda _, fed: fed.update(past_length=np.array([3])),
        "past_length: expected -1 where the past comes with the inputs, got [3]",
    ),
}


@pytest.mark.parametrize("case", BAD_PASTS)
def test_what_is_no_past_of_this_model_is_refused_in_words(
    dense: ort.InferenceSession, rng: np.random.Generator, case: str
) -> None:
    change, message = BAD_PASTS[case]
    first = tokens(rng, 4, batch=2)
    _, past = step(dense, nothing(first), first)
    second = tokens(rng, 2, batch=2)
    _, past = step(dense, past, second)
    new = tokens(rng, 1, batch=2)
    fed = ghost_feeds(past, new)
    change(past, fed)
    error = refusal(dense, fed)
    assert isinstance(error, CacheError)
    assert message in str(error)
    outputs, after = step(dense, past, new)
    assert_right(outputs, after, 1)


def test_a_past_of_another_model_is_refused(dense: ort.InferenceSession, rng: np.random.Generator) -> None:
    first = tokens(rng, 4)
    _, past = step(dense, nothing(first), first)
    other = served(DENSE, "another")
    message = "row 0: expected a past of model another, got one of model dense; start with none"
    assert message in str(refusal(other, ghost_feeds(past, first)))


def test_a_past_of_another_process_is_refused(dense: ort.InferenceSession, rng: np.random.Generator) -> None:
    first = tokens(rng, 4)
    _, past = step(dense, nothing(first), first)
    read, write = os.pipe()
    if (child := os.fork()) == 0:  # it has all memory of this one, but not its stamps
        try:
            dense.run(None, ghost_feeds(past, first))
            os.write(write, b"went well")
        except BaseException as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    assert b"expected a past that this process made, got one of another process" in os.read(read, 4096)


def at_the_budget(of: ort.InferenceSession, new: Array) -> str:
    """What a model says whose caches have no room: in its first run if others take it all, else in its second."""
    past = nothing(new)
    try:
        _, past = step(of, past, new)
        return str(refusal(of, ghost_feeds(past, new)))
    except ort.capi.onnxruntime_pybind11_state.RuntimeException as error:
        return str(error)


def test_caches_used_longest_ago_are_freed_to_stay_within_the_budget(rng: np.random.Generator) -> None:
    first = tokens(rng, 4)
    text = at_the_budget(served(DENSE, "nobody", kv_bytes=1), first)
    in_use = int(text.partition("in use, ")[2].partition(" bytes")[0])
    small = served(DENSE, "small", kv_bytes=in_use + 150_000)
    (_, old), (_, kept) = (step(small, nothing(first), first) for _ in range(2))
    for _ in range(120):
        _, kept = step(small, kept, tokens(rng, 1))
        step(small, nothing(first), first)
    outputs, after = step(small, kept, first)
    assert_right(outputs, after, 4)
    error = refusal(small, ghost_feeds(old, first))
    assert "row 0: expected a past whose cache is held, got one that was freed to stay within the budget" in str(error)
    assert "ONNX_KIVI_KV_BYTES" in str(error)


def test_a_budget_that_holds_no_sequence_is_refused(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_KIVI_KV_BYTES", "1000")
    error = at_the_budget(served(DENSE, "tiny budget"), tokens(rng, 4))
    assert "expected a budget that holds what is in use, " in error
    assert "bytes, got 1000; raise ONNX_KIVI_KV_BYTES" in error


@pytest.mark.parametrize("text", ["", "0", "-1", "many", "1e9", "12 "])
def test_a_budget_that_is_no_number_is_refused_when_the_model_loads(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_KIVI_KV_BYTES", text)
    with pytest.raises(Exception, match="onnx_kivi") as caught:
        served(DENSE, "no budget")
    error = native.error_from(caught.value)
    assert isinstance(error, ConfigError)
    assert f"ONNX_KIVI_KV_BYTES: expected a number of bytes, 1 or more, got '{text}'" in str(error)
    served(DENSE, "its own budget", kv_bytes=1 << 30)


def test_a_model_of_no_ghosts_is_not_touched_by_the_budget(rng: np.random.Generator) -> None:
    """Only caches that stamps name are freed."""
    plain, backend = native_session(model(DENSE, "plain", version=2)), get_backend("native")
    handle, first = backend.new_cache(), tokens(rng, 4)
    plain.run(None, feeds(first, first, cache_handle=handle))
    assert "expected a budget that holds" in at_the_budget(served(DENSE, "greedy", kv_bytes=1), first)
    assert backend.length(handle) == 4

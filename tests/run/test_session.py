"""Session and plain InferenceSession on a tiny decoder: the same logits as the original's, caches, real errors."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest

import onnx_kivi as kivi
from graphs import decoder as hand_written
from onnx_kivi.measure.synthetic import synthetic_stepper
from onnx_kivi.run.session import open_model, quiet_options
from onnx_kivi.run.stepper import Stepper
from onnx_kivi.runtime.select import get_backend

IDS = np.random.default_rng(3).integers(0, 256, (1, 60))
# Two float32 evaluations of the same sums in another order; logits are of order 10.
ROUNDING = 1e-4


Opener = Callable[[Path], kivi.Session]


def feeds(ids: npt.NDArray[np.int64], past: int) -> dict[str, npt.NDArray[np.int64]]:
    B, S = ids.shape
    return {
        "input_ids": ids,
        "attention_mask": np.ones((B, past + S), np.int64),
        "position_ids": np.tile(np.arange(past, past + S), (B, 1)),
    }


def original_logits(tiny: Path, *ends: int) -> list[npt.NDArray[np.float32]]:
    decoder = Stepper(open_model(tiny))
    starts = (0, *ends)
    return [decoder.step(IDS[:, a:b]) for a, b in zip(starts, ends, strict=False)]


def test_a_cache_whose_tokens_are_last_is_filled_along_them(tmp_path: Path) -> None:
    model = hand_written(
        inputs={"past_key": "float[B,2,8,P] past_0_key"},
        outputs={"present_key": "float[B,2,8,T] present_0_key"},
        join_key="turned = Transpose<perm=[0,1,3,2]>(key) present_0_key = Concat<axis=3>(past_0_key, turned)",
        repeat_key="k5 = Unsqueeze(present_0_key, i(2)) k6 = Expand(k5, i(1,1,2,1,1)) kt = Reshape(k6, i(0,4,8,-1))",
        transpose=None,
    )
    onnx.save(model, tmp_path / "model.onnx")
    facts = kivi.inspect(model).cache_facts
    decoder = synthetic_stepper(open_model(tmp_path / "model.onnx"), facts=facts, length=5)
    assert decoder.cache_bytes == 2 * 2 * 5 * 8 * 4


def test_options_serve_many_sessions_of_one_host(rewritten: Callable[[int], Path]) -> None:
    options = quiet_options()
    kivi.register(options, host="python", backend="numpy")
    for _ in range(2):
        kivi.Session(rewritten(8), options, host="python", backend="numpy")
    if get_backend().name == "native":
        with pytest.raises(kivi.ConfigError, match="got some of host python, backend numpy"):
            kivi.register(options, host="native")
        options = quiet_options()
        for _ in range(2):
            kivi.Session(rewritten(8), options, host="native")


def test_dense_session_gives_the_originals_logits(
    open_session: Opener, tiny: Path, rewritten: Callable[[int], Path]
) -> None:
    session = open_session(rewritten(32))
    begin = 0
    for end, expected in zip((30, 41, 42, 43), original_logits(tiny, 30, 41, 42, 43), strict=True):
        (logits,) = session.run(["logits"], feeds(IDS[:, begin:end], begin))
        np.testing.assert_allclose(logits, expected, atol=float(ROUNDING * np.ptp(expected)))
        begin = end
    assert session.cache.length == 43


def test_quantized_session_is_close_and_not_identical(
    open_session: Opener, tiny: Path, rewritten: Callable[[int], Path]
) -> None:
    session = open_session(rewritten(8))
    session.run(None, feeds(IDS[:, :50], 0))
    assert session.cache.sealed_tokens == 32
    (logits,) = session.run(None, feeds(IDS[:, 50:51], 50))
    expected = original_logits(tiny, 50, 51)[1]
    difference = np.abs(logits - expected).max() / np.ptp(expected)
    # 8 bits on unit-scale keys: a step is about 0.02 of a standard deviation.
    assert 1e-6 < difference < 2e-2
    assert session.cache.nbytes < 0.75 * session.cache.dense_nbytes


@pytest.mark.parametrize("host", ["python", "auto"])
def test_plain_inference_session_steps_without_cache_inputs(
    tiny: Path, rewritten: Callable[[int], Path], host: str
) -> None:
    options = quiet_options()
    kivi.register(options, host=host)
    session = ort.InferenceSession(str(rewritten(32)), options, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["input_ids", "attention_mask", "position_ids"]
    start_over = {"past_length": np.zeros(1, np.int64)}
    first = session.run(None, feeds(IDS[:, :10], 0) | start_over)[0]
    second = session.run(None, feeds(IDS[:, 10:12], 10))[0]
    for logits, expected in zip((first, second), original_logits(tiny, 10, 12), strict=True):
        np.testing.assert_allclose(logits, expected, atol=float(ROUNDING * np.ptp(expected)))
    again = session.run(None, feeds(IDS[:, 10:12], 10) | {"past_length": np.array([10])})[0]
    np.testing.assert_array_equal(again, second)


def test_caches_are_independent(open_session: Opener, rewritten: Callable[[int], Path]) -> None:
    session = open_session(rewritten(8))
    one, two = session.new_cache(), session.new_cache()
    alone = session.run(None, feeds(IDS[:, :20], 0), cache=one)[0]
    session.run(None, feeds(IDS[:, 20:50], 0), cache=two)
    assert (one.length, two.length, session.cache.length) == (20, 30, 0)
    one.crop(5)
    np.testing.assert_allclose(session.run(None, feeds(IDS[:, 5:20], 5), cache=one)[0], alone[:, 5:], atol=1e-4)


def test_generate_is_the_originals_greedy_text(
    open_session: Opener, tiny: Path, rewritten: Callable[[int], Path]
) -> None:
    from onnx_kivi.run.generate import generate

    expected = list(generate(Stepper(open_model(tiny)), IDS[0, :20], max_new_tokens=12))
    session = open_session(rewritten(32))
    assert list(session.generate(IDS[0, :20], max_new_tokens=12)) == expected
    assert session.cache.length == 0


def test_generate_continues_a_given_cache(open_session: Opener, rewritten: Callable[[int], Path]) -> None:
    session = open_session(rewritten(8))
    whole = list(session.generate(IDS[0, :40], max_new_tokens=6))
    cache = session.new_cache()
    session.run(None, feeds(IDS[:, :30], 0), cache=cache)
    assert list(session.generate(IDS[0, 30:40], max_new_tokens=6, cache=cache)) == whole
    assert cache.length == 45


def test_generate_samples_reproducibly(open_session: Opener, rewritten: Callable[[int], Path]) -> None:
    session = open_session(rewritten(8))
    runs = [list(session.generate([1, 2], max_new_tokens=8, temperature=20.0, seed=s)) for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_failed_run_raises_and_leaves_the_cache(open_session: Opener, rewritten: Callable[[int], Path]) -> None:
    session = open_session(rewritten(8))
    session.run(None, feeds(IDS[:, :20], 0))
    with pytest.raises(kivi.CacheError, match=r"past_length: expected .* got 21"):
        session.run(None, feeds(IDS[:, 20:21], 20) | {"past_length": np.array([21])})
    assert session.cache.length == 20
    session.run(None, feeds(IDS[:, 20:21], 20))
    assert session.cache.length == 21


def test_other_batch_on_a_cache_in_use_is_refused(open_session: Opener, rewritten: Callable[[int], Path]) -> None:
    session = open_session(rewritten(8))
    session.run(None, feeds(IDS[:, :5], 0))
    with pytest.raises(kivi.CacheError, match="expected"):
        session.run(None, feeds(np.repeat(IDS[:, 5:6], 2, 0), 5))
    assert session.cache.length == 5


def test_closed_cache_is_refused(open_session: Opener, rewritten: Callable[[int], Path]) -> None:
    session = open_session(rewritten(8))
    cache = session.new_cache()
    cache.close()
    with pytest.raises(kivi.CacheError, match="closed"):
        session.run(None, feeds(IDS[:, :5], 0), cache=cache)


def test_cache_of_another_model_is_refused(open_session: Opener, rewritten: Callable[[int], Path]) -> None:
    cache = open_session(rewritten(8)).new_cache()
    open_session(rewritten(8)).run(None, feeds(IDS[:, :5], 0), cache=cache)
    with pytest.raises(kivi.CacheError, match="model"):
        open_session(rewritten(4)).run(None, feeds(IDS[:, 5:6], 5), cache=cache)
    assert cache.length == 5


def test_cache_that_another_run_uses_is_refused(open_session: Opener, rewritten: Callable[[int], Path]) -> None:
    session = open_session(rewritten(8))
    session.run(None, feeds(IDS[:, :5], 0))
    with session.cache.run_lock, pytest.raises(kivi.CacheError, match="got one in use"):
        session.run(None, feeds(IDS[:, 5:6], 5))
    session.run(None, feeds(IDS[:, 5:6], 5))
    assert session.cache.length == 6


def test_threads_with_caches_of_their_own_do_not_meet(open_session: Opener, rewritten: Callable[[int], Path]) -> None:
    session = open_session(rewritten(8))

    def tokens(seed: int) -> list[int]:
        return list(session.generate(IDS[0, seed : seed + 40], max_new_tokens=10))

    alone = [tokens(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(tokens, range(4)))
    assert together == alone


def test_not_a_rewritten_model(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(kivi.UnsupportedModelError, match="expected a rewritten model"):
        kivi.Session(tiny)
    with pytest.raises(kivi.UnsupportedModelError, match="got nothing there"):
        kivi.Session(tmp_path / "absent.onnx")
    (tmp_path / "model.onnx").write_bytes(tiny.read_bytes()[:2000])
    with pytest.raises(kivi.UnsupportedModelError, match="expected an ONNX model"):
        kivi.Session(tmp_path)


def test_session_has_what_an_inference_session_has(open_session: Opener, rewritten: Callable[[int], Path]) -> None:
    session = open_session(rewritten(8))
    assert [o.name for o in session.get_outputs()] == ["logits"]
    assert session.get_providers() == ["CPUExecutionProvider"]
    with pytest.raises(AttributeError):
        session.no_such_thing  # noqa: B018


@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_a_cache_whose_run_failed_is_freed_with_its_last_reference(
    rewritten: Callable[[int], Path], backend: str
) -> None:
    try:
        session = kivi.Session(rewritten(8), host="python", backend=backend)
    except kivi.BackendUnavailableError as error:
        pytest.skip(str(error))
    cache = session.new_cache()
    with pytest.raises(kivi.CacheError, match="attn_mask") as refusal:
        session.run(None, feeds(IDS[:, :3], 0) | {"attention_mask": np.ones((1, 2), np.int64)}, cache=cache)
    handle = cache.handle
    del cache, refusal
    gc.collect()
    with pytest.raises(kivi.CacheError, match="closed"):
        session.backend.length(handle)

"""install: sessions that any code makes load rewritten models, and all else stays as it was."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest

import onnx_kivi as kivi
import onnx_kivi.runtime.install as home
from onnx_kivi.run.session import quiet_options
from onnx_kivi.runtime import hosts

FEEDS = {"input_ids": np.array([[7]]), "attention_mask": np.ones((1, 1), np.int64), "position_ids": np.array([[0]])}
PLAIN = ort.InferenceSession.__init__


@pytest.fixture
def restored() -> Iterator[None]:
    """Leaves InferenceSession as it was, whatever failed."""
    yield
    ort.InferenceSession.__init__ = PLAIN
    home._installed.clear()


@pytest.fixture(params=["python", "native"])
def installed(request: pytest.FixtureRequest, restored: None) -> Iterator[str]:  # noqa: ARG001
    """Installed with each host that this machine has."""
    try:
        kivi.install(host=request.param)
    except kivi.BackendUnavailableError as error:
        pytest.skip(str(error))
    yield request.param
    kivi.uninstall()


@pytest.fixture
def model(rewritten: Callable[[int], Path]) -> str:
    """Path of a rewritten model."""
    return str(rewritten(8))


def runs(session: ort.InferenceSession) -> bool:
    (logits,) = session.run(["logits"], FEEDS | {"past_length": np.array([0])})
    return bool(np.isfinite(logits).all())


@pytest.mark.usefixtures("installed")
def test_any_way_to_make_a_session_loads_a_rewritten_model(model: str) -> None:
    assert runs(ort.InferenceSession(model))
    assert runs(ort.InferenceSession(Path(model), quiet_options(), ["CPUExecutionProvider"]))
    assert runs(ort.InferenceSession(path_or_bytes=Path(model).read_bytes(), sess_options=quiet_options()))
    assert runs(type("Derived", (ort.InferenceSession,), {})(model, providers=["CPUExecutionProvider"]))


@pytest.mark.usefixtures("installed")
def test_options_are_used_again_whoever_registered_them(model: str) -> None:
    options = quiet_options()
    assert all(runs(ort.InferenceSession(model, options)) for _ in range(2))
    assert runs(ort.InferenceSession(model, options))
    registered = quiet_options()
    kivi.register(registered)
    assert runs(ort.InferenceSession(model, registered))
    assert len([*kivi.Session(model).generate([1, 2], max_new_tokens=3)]) == 3


@pytest.mark.usefixtures("restored")
def test_options_with_the_library_registered_by_hand_go_on_working(model: str) -> None:
    pytest.importorskip("onnx_kivi.runtime.native", reason="nothing is compiled here", exc_type=ImportError)
    kivi.install()
    options = quiet_options()
    with pytest.raises(Exception, match="absent"):
        ort.InferenceSession("absent.onnx", options)  # is no reason to register with them
    options.register_custom_ops_library(kivi.library_path())
    assert runs(ort.InferenceSession(model, options))


@pytest.mark.usefixtures("installed")
def test_other_models_are_loaded_as_ever(tiny: Path, tmp_path: Path) -> None:
    options = quiet_options()
    assert ort.InferenceSession(tiny, options).get_inputs()[0].name == "input_ids"
    with pytest.raises(Exception, match="absent"):
        ort.InferenceSession(tmp_path / "absent.onnx", options)
    with pytest.raises(TypeError):
        ort.InferenceSession(3)


@pytest.mark.usefixtures("installed")
def test_an_op_of_ours_that_does_not_exist_is_the_models_error(model: str, tmp_path: Path) -> None:
    content = Path(model).read_bytes()
    assert content.count(b"QuantizedKvSdpa") > 0
    (tmp_path / "model.onnx").write_bytes(content.replace(b"QuantizedKvSdpa", b"QuantizedKvSdpb"))
    with pytest.raises(Exception, match=r"QuantizedKvSdpb.* is not a registered"):
        ort.InferenceSession(tmp_path / "model.onnx", quiet_options())


def test_sessions_outlive_it_and_no_more_are_made(restored: None, model: str) -> None:  # noqa: ARG001
    kivi.install()
    session = ort.InferenceSession(model, quiet_options())
    kivi.uninstall()
    assert runs(session)
    assert ort.InferenceSession.__init__ is PLAIN
    with pytest.raises(Exception, match=r"KvCacheStep.* is not a registered"):
        ort.InferenceSession(model, quiet_options())


@pytest.mark.usefixtures("restored")
def test_twice_is_once() -> None:
    kivi.install()
    patched = ort.InferenceSession.__init__
    kivi.install()
    assert ort.InferenceSession.__init__ is patched
    kivi.uninstall()
    kivi.uninstall()
    assert ort.InferenceSession.__init__ is PLAIN


@pytest.mark.usefixtures("restored")
def test_a_patch_on_top_has_to_go_first() -> None:
    kivi.install()
    patched = ort.InferenceSession.__init__
    ort.InferenceSession.__init__ = functools.partialmethod(patched)
    with pytest.raises(kivi.ConfigError, match="undo that first"):
        kivi.uninstall()
    ort.InferenceSession.__init__ = patched
    kivi.uninstall()
    assert ort.InferenceSession.__init__ is PLAIN


@pytest.mark.usefixtures("restored")
def test_a_host_that_does_not_exist_is_refused_at_once() -> None:
    with pytest.raises(kivi.ConfigError, match="host: expected one of"):
        kivi.install(host="cuda")
    assert ort.InferenceSession.__init__ is PLAIN


@pytest.mark.usefixtures("restored")
def test_threads_may_do_all_of_it_at_once(model: str) -> None:
    def work(options: ort.SessionOptions) -> ort.InferenceSession:
        kivi.install()
        return ort.InferenceSession(model, options)

    for _ in range(5):
        shared = quiet_options()
        with ThreadPoolExecutor(8) as pool:
            sessions = [*pool.map(work, [shared, quiet_options()] * 8)]
        assert all(map(runs, sessions))
    kivi.uninstall()
    assert ort.InferenceSession.__init__ is PLAIN


def test_options_that_threads_share_are_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[ort.SessionOptions] = []

    def register(options: ort.SessionOptions) -> None:
        started.append(options)
        time.sleep(0.1)

    monkeypatch.setattr(hosts, "_native", lambda: SimpleNamespace(register=register))
    monkeypatch.setattr(hosts, "choose", lambda *_: ("native", SimpleNamespace(name="native")))
    options = quiet_options()
    with ThreadPoolExecutor(4) as pool:
        [*pool.map(kivi.register, [options] * 4)]
    assert started == [options]

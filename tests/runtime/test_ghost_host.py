"""Ghost I/O under the Python host: it serves caches that are given, and says that it reads no stamps."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from ghosts import ghost_feeds, nothing
from nodes import feeds, model, session
from onnx_kivi.runtime.backend import Backend
from stepping import assert_sealed, sdpa, tokens

NODES = [sdpa(0, spec_version=2, is_causal=1)]


def test_a_cache_that_is_given_is_used(backend: Backend, rng: np.random.Generator) -> None:
    ghost = session(model(NODES, "model", version=2, ghost_wire={}), backend.name)
    plain = session(model(NODES, "model", version=2), backend.name)
    own, same = backend.new_cache(), backend.new_cache()
    for count in (9, 1):
        new = tokens(rng, count)
        *outputs, key, value = ghost.run(None, ghost_feeds(nothing(new), new, cache_handle=own))
        for output, expected in zip(outputs, plain.run(None, feeds(new, new, cache_handle=same)), strict=True):
            np.testing.assert_array_equal(output, expected)
        assert key.shape == value.shape == (1, 1, 0, 4)
    assert_sealed(backend, own)


def test_without_a_cache_it_refuses_in_words(
    backend: Backend, rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    ghost = session(model(NODES, "model", version=2, ghost_wire={}), backend.name)
    new = tokens(rng, 3)
    with caplog.at_level(logging.ERROR, "onnx_kivi"):
        output = ghost.run(["out0"], ghost_feeds(nothing(new), new))[0]
    assert np.isnan(output).all()
    assert "CacheOpen: expected a cache_handle under the Python host, which reads no stamps, got none" in caplog.text

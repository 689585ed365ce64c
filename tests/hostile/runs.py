"""What may be fed to a run of a whole model, to its cache, and to the cache's own methods."""

from __future__ import annotations

from typing import Any

import numpy as np

import onnx_kivi as kivi

from .case import HELD, ONNXRUNTIMES, OURS, PYTHONS, Scene, cases

ANY = (*OURS, *ONNXRUNTIMES, *PYTHONS)


def past(value: Any) -> Any:
    return lambda s: s.run(past_length=value)


def closed(scene: Scene) -> kivi.Cache:
    cache = scene.session.new_cache()
    cache.close()
    return cache


def of_another_model(scene: Scene) -> object:
    other = scene.bare.new_cache()
    tensors = np.ones((1, 2, 3, 8), np.float32)
    none = np.zeros(0, np.float32)
    feeds = {"query": tensors, "key": tensors, "value": tensors, "attn_mask": none, "head_sink": none}
    scene.bare.run(None, feeds, cache=other)
    return scene.session.run(None, scene.feeds(3), cache=other)


def of_the_other_backend(scene: Scene) -> object:
    from onnx_kivi.runtime.cache import Cache
    from onnx_kivi.runtime.select import get_backend

    backend = get_backend("numpy" if scene.backend == "native" else "native")
    with Cache(backend, backend.new_cache()) as cache:
        scene.session.run(None, scene.feeds(0), cache=cache)
        return cache.length


def in_use(scene: Scene) -> object:
    with scene.cache.run_lock:
        return scene.run()


FEEDS = {
    "ids of no dimension": (lambda s: s.run(input_ids=np.array(3)), "Invalid rank|rank", ONNXRUNTIMES),
    "ids of three dimensions": (lambda s: s.run(input_ids=np.ones((1, 1, 1), np.int64)), "rank", ONNXRUNTIMES),
    "ids that are floats": (lambda s: s.run(input_ids=np.ones((1, 1), np.float32)), "data type", ONNXRUNTIMES),
    "ids that are text": (lambda s: s.run(input_ids=np.array([["a"]])), "data type|type", ANY),
    "ids that are objects": (lambda s: s.run(input_ids=np.array([[None]])), "", ANY),
    "ids beyond the vocabulary": (
        lambda s: s.run(input_ids=np.array([[10**6]])),
        "out of data bounds|bounds",
        ONNXRUNTIMES,
    ),
    "ids far below zero": (lambda s: s.run(input_ids=np.array([[-(10**6)]])), "bounds", ONNXRUNTIMES),
    "no ids": (lambda s: s.run(input_ids=None), "input_ids: expected an array, got None", OURS),
    "ids missing": (
        lambda s: s.session.run(None, {"attention_mask": np.ones((1, 41), np.int64)}, cache=s.cache),
        "",
        ANY,
    ),
    "nothing fed": (lambda s: s.session.run(None, {}, cache=s.cache), "", ANY),
    "an unknown input": (lambda s: s.run(more=np.ones(1)), "Invalid (input|feed)|more", ANY),
    "a mask that is short": (
        lambda s: s.run(attention_mask=np.ones((1, HELD), np.int64)),
        "attn_mask: expected shape",
        OURS,
    ),
    "a mask without columns": (lambda s: s.run(attention_mask=np.ones((1, 0), np.int64)), "attn_mask: expected", OURS),
    "a mask of one dimension": (lambda s: s.run(attention_mask=np.ones(41, np.int64)), "rank", ONNXRUNTIMES),
    "a mask of more rows": (lambda s: s.run(attention_mask=np.ones((3, 41), np.int64)), "", ANY),
    "positions of more rows": (lambda s: s.run(position_ids=np.ones((3, 1), np.int64)), "", ANY),
    "no row": (lambda s: s.run(rows=0), "", ANY),
    "other rows than the cache has": (lambda s: s.run(rows=2), "expected shape", OURS),
    "past_length below -1": (past(np.array([-2])), "past_length: expected -1 or 0 to 40", OURS),
    "past_length beyond the cache": (past(np.array([41])), "past_length: expected", OURS),
    "past_length of 2^62": (past(np.array([2**62])), "past_length: expected", OURS),
    "past_length of -2^63": (past(np.array([-(2**63)])), "past_length: expected", OURS),
    "past_length of two": (past(np.array([3, 3])), "past_length: expected 1 number", OURS),
    "past_length of none": (past(np.zeros(0, np.int64)), "expected shape .1. or .rows., got .0", OURS),
    "past_length without dimension": (past(np.array(3)), "expected shape|rank", ANY),
    "new_length of none": (lambda s: s.run(new_length=np.zeros(0, np.int64)), "expected", OURS),
    "new_length of two": (lambda s: s.run(new_length=np.array([1, 1])), "new_length: expected", OURS),
    "new_length below -1": (lambda s: s.run(new_length=np.array([-2])), "new_length: expected", OURS),
    "new_length beyond what is fed": (lambda s: s.run(new_length=np.array([2])), "expected", OURS),
    "new_length of 2^62": (lambda s: s.run(new_length=np.array([2**62])), "expected", OURS),
    "new_length without dimension": (lambda s: s.run(new_length=np.array(1)), "rank|expected", ANY),
    "a cache twice": (lambda s: s.session.run(None, s.feeds(rows=2), cache=[s.cache, s.cache]), "expected", OURS),
    "no cache in a list": (lambda s: s.session.run(None, s.feeds(), cache=[]), "at least one in a list", OURS),
    "fewer caches than rows": (lambda s: s.session.run(None, s.feeds(rows=2), cache=[s.cache]), "expected", OURS),
    "more caches than rows": (
        lambda s: s.session.run(None, s.feeds(), cache=[s.cache, s.cache.fork()]),
        "expected",
        OURS,
    ),
    "a closed cache in a list": (
        lambda s: s.session.run(None, s.feeds(rows=2), cache=[s.cache, closed(s)]),
        "closed",
        OURS,
    ),
    "past_length as a float": (past(np.array([3.0])), "data type", ONNXRUNTIMES),
    "past_length as int32": (past(np.array([3], np.int32)), "data type", ONNXRUNTIMES),
    "an output that is not there": (lambda s: s.session.run(["other"], s.feeds(), cache=s.cache), "", ANY),
    "feeds that are a list": (lambda s: s.session.run(None, [1], cache=s.cache), "", (*ANY, "AttributeError")),
    "options that are none": (lambda s: s.session.run(None, s.feeds(), 3, cache=s.cache), "", ANY),
    "a closed cache": (lambda s: s.session.run(None, s.feeds(0), cache=closed(s)), "closed", OURS),
    "a cache of another model": (of_another_model, "expected model bare", OURS),
    "a cache that is a number": (lambda s: s.session.run(None, s.feeds(0), cache=3), "", (*ANY, "AttributeError")),
    "a cache in use": (in_use, "got one in use", OURS),
}

CACHES = {
    "crop below 0": (lambda s: s.cache.crop(-1), "crop: expected a length of 0 to 40", OURS),
    "crop beyond the end": (lambda s: s.cache.crop(41), "crop: expected", OURS),
    "crop to 2^31": (lambda s: s.cache.crop(2**31), "crop: expected", OURS),
    "crop to 2^63": (lambda s: s.cache.crop(2**63), "expected an integer of 64 bits", OURS),
    "crop to 10^30": (lambda s: s.cache.crop(10**30), "expected an integer of 64 bits", OURS),
    "crop to a half": (lambda s: s.cache.crop(1.5), "expected an integer of 64 bits", OURS),
    "crop to NaN": (lambda s: s.cache.crop(float("nan")), "expected an integer of 64 bits", OURS),
    "crop to text": (lambda s: s.cache.crop("3"), "expected an integer of 64 bits", OURS),
    "crop to nothing": (lambda s: s.cache.crop(None), "expected an integer of 64 bits", OURS),
    "crop to a list of none": (lambda s: s.cache.crop([]), "expected", OURS),
    "crop to a list of two": (lambda s: s.cache.crop([3, 3]), "expected", OURS),
    "crop to a list of text": (lambda s: s.cache.crop(["3"]), "expected an integer of 64 bits", OURS),
    "select no row": (lambda s: s.cache.select([]), "expected", OURS),
    "select row 1 of 1": (lambda s: s.cache.select([1]), "expected", OURS),
    "select row -1": (lambda s: s.cache.select([-1]), "expected", OURS),
    "select row 2^70": (lambda s: s.cache.select([2**70]), "expected", OURS),
    "select text": (lambda s: s.cache.select(["a"]), "expected", OURS),
    "repeat no times": (lambda s: s.cache.repeat(0), "expected", OURS),
    "repeat a half": (lambda s: s.cache.repeat(float("0.5")), "expected", OURS),
    "repeat 10^30 times": (lambda s: s.cache.repeat(10**30), "expected", OURS),
    "join nothing": (lambda _: kivi.Cache.join([]), "at least one cache", OURS),
    "join an empty cache": (lambda s: kivi.Cache.join([s.cache, s.session.new_cache()]), "expected", OURS),
    "join a closed cache": (lambda s: kivi.Cache.join([s.cache, closed(s)]), "closed", OURS),
    "split a closed cache": (lambda s: closed(s).split(), "closed", OURS),
    "reorder to no row": (lambda s: s.cache.reorder([]), "one or more row numbers", OURS),
    "reorder to row -1": (lambda s: s.cache.reorder([-1]), "row numbers", OURS),
    "reorder to a row beyond": (lambda s: s.cache.reorder([0, 1]), "row numbers", OURS),
    "reorder to row 2^70": (lambda s: s.cache.reorder([2**70]), "expected an integer of 64 bits", OURS),
    "reorder to text": (lambda s: s.cache.reorder(["a"]), "expected an integer of 64 bits", OURS),
    "reorder to a number": (lambda s: s.cache.reorder(0), "a list of row numbers", OURS),
    "reorder an empty cache": (lambda s: s.session.new_cache().reorder([0]), "expected a cache that holds", OURS),
    "crop an empty cache": (lambda s: s.session.new_cache().crop(1), "crop: expected", OURS),
    "close twice": (lambda s: closed(s).close(), "closed", OURS),
    "length when closed": (lambda s: closed(s).length, "closed", OURS),
    "sealed_tokens when closed": (lambda s: closed(s).sealed_tokens, "closed", OURS),
    "nbytes when closed": (lambda s: closed(s).nbytes, "closed", OURS),
    "dense_nbytes when closed": (lambda s: closed(s).dense_nbytes, "closed", OURS),
    "crop when closed": (lambda s: closed(s).crop(0), "closed", OURS),
    "reset when closed": (lambda s: closed(s).reset(), "closed", OURS),
    "fork when closed": (lambda s: closed(s).fork(), "closed", OURS),
    "reorder when closed": (lambda s: closed(s).reorder([0]), "closed", OURS),
    "save when closed": (lambda s: closed(s).save(s.folder / "x"), "closed", OURS),
    "save into a missing folder": (lambda s: s.cache.save(s.folder / "a" / "b"), "existing folder", OURS),
    "save onto a folder": (lambda s: s.cache.save(s.folder), "got a folder", OURS),
    "save below a file": (lambda s: s.cache.save(s.model / "x"), "expected a place", OURS),
    "save to a device": (lambda s: s.cache.save("/dev/null"), "got a device", OURS),
    "save to no name": (lambda s: s.cache.save(""), "expected", OURS),
    "save to NUL": (lambda s: s.cache.save("a\0b"), "expected", OURS),
    "save to a long name": (lambda s: s.cache.save(s.folder / ("x" * 300)), "name too long", OURS),
    "save to nothing": (lambda s: s.cache.save(None), "", ANY),
    "load nothing": (lambda s: s.session.load_cache(s.folder / "absent"), "No such file", OURS),
    "load a folder": (lambda s: s.session.load_cache(s.folder), "got a folder", OURS),
    "load a model": (lambda s: s.session.load_cache(s.model), "expected a cache file", OURS),
    "load a device": (lambda s: s.session.load_cache("/dev/zero"), "got a device", OURS),
    "load NUL": (lambda s: s.session.load_cache("a\0b"), "null", OURS),
    "load no name": (lambda s: s.session.load_cache(""), "got a folder", OURS),
    "load a number": (lambda s: s.session.load_cache(3), "", ANY),
}

GENERATE: dict[str, Any] = {
    name: (lambda s, o=options: list(s.session.generate(o.pop("ids", [1, 2]), **o)), words, ANY)
    for name, options, words in (
        ("no ids", {"ids": []}, "ids: expected"),
        ("ids of two rows", {"ids": [[1], [2]]}, "ids: expected"),
        ("ids that are text", {"ids": "ab"}, ""),
        ("ids that are floats", {"ids": [1.5]}, "ids"),
        ("ids below zero", {"ids": [-1]}, "ids"),
        ("ids beyond the vocabulary", {"ids": [10**6]}, ""),
        ("fewer than no tokens", {"max_new_tokens": -1}, "max_new_tokens: expected"),
        ("tokens by the half", {"max_new_tokens": 1.5}, ""),
        ("temperature below zero", {"temperature": -1.0}, "temperature: expected"),
        ("temperature NaN", {"temperature": float("nan")}, "temperature: expected"),
        ("temperature infinite", {"temperature": float("inf")}, "temperature: expected"),
        ("top_p of zero", {"top_p": 0.0}, "top_p: expected"),
        ("top_p above one", {"top_p": 1.1}, "top_p: expected"),
        ("top_p NaN", {"top_p": float("nan")}, "top_p: expected"),
        ("a seed below zero", {"seed": -1, "temperature": 1.0}, "seed: expected"),
        ("a seed that is text", {"seed": "a", "temperature": 1.0}, ""),
        ("unknown inputs", {"inputs": {"other": np.ones(1)}}, "other"),
        ("a number for stop tokens", {"stop_tokens": 3}, ""),
    )
}

SESSIONS = {
    "an unknown host": (lambda s: kivi.Session(s.model, host="other"), "host: expected one of", OURS),
    "an unknown backend": (lambda s: kivi.Session(s.model, backend="other"), "backend: expected one of", OURS),
    "a host that the backend can't have": (
        lambda s: kivi.Session(s.model, host="native", backend="numpy"),
        "expected backend native",
        ("BackendUnavailableError",),
    ),
    "no path": (lambda _: kivi.Session(""), "", ANY),
    "a path that is a number": (lambda s: s.open(3), "", ANY),
    "nothing": (lambda s: s.open(None), "", ANY),
    "no bytes": (lambda _: kivi.Session(b""), "expected a rewritten model", ("NotRewrittenError",)),
    "an original": (lambda s: kivi.Session(s.original), "expected a rewritten model", ("NotRewrittenError",)),
    "a folder without a model": (lambda _: kivi.Session("/"), "nothing there", OURS),
    "options that are text": (lambda s: kivi.Session(s.model, "options"), "", ANY),
}

CASES = [
    *cases("run", FEEDS),
    *cases("cache", CACHES),
    *cases("generate", GENERATE),
    *cases("session", SESSIONS),
]

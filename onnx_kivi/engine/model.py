"""A rewritten model as the engine runs it: rows of one cache each, and which of them it takes together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..arrays import FloatArray, IntArray
from ..errors import UnsupportedModelError
from ..run.session import Session
from ..run.signature import Signature
from ..run.stepper import POSITIONS, logits_of, token_feeds
from ..runtime.cache import Cache
from .budget import CacheSizes
from .scheduler import EQUAL, RAGGED, SINGLE


class BatchedModel:
    """A session, with what it takes in one run (`mode`, and `reason` where that is not everything) and its `sizes`.

    Raises UnsupportedModelError for a model that takes more than tokens, or carries a cache itself.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._signature = Signature(session)
        own = [*self._signature.present, *self._signature.stored]
        if own:
            raise UnsupportedModelError(
                f"inputs: expected a decoder that takes tokens and keeps all its caches, got one that is fed "
                f"{', '.join(own)}; use Session.generate"
            )
        self.vocabulary = self._signature.vocabulary
        self.mode, self.reason = self._mode()
        self.sizes = self._probe()

    def new_cache(self) -> Cache:
        """An empty cache."""
        return self._session.new_cache()

    def run(self, caches: Sequence[Cache], lengths: Sequence[int], ids: IntArray) -> FloatArray:
        """Logits (B, vocabulary) of the last of the new tokens `ids` (B, S), behind lengths[b] others in caches[b].

        Raises what Session.run does, and then no cache has changed.
        """
        B, S = ids.shape
        past = np.array(lengths, np.int64)[:, None]
        total = int(past.max()) + S
        mask = (np.arange(total) >= total - S - past).astype(np.int64)
        known = {}
        if POSITIONS in self._signature.inputs:
            known[POSITIONS] = (past + np.arange(S)).astype(self._signature.element(POSITIONS))
        feeds = token_feeds(self._signature, ids, mask, known, keep=1)
        results = self._session.run(None, feeds, cache=caches[0] if B == 1 else caches)
        return logits_of(dict(zip(self._signature.outputs, results, strict=True)))[:, -1]

    def _mode(self) -> tuple[str, str]:
        ids = self._signature.inputs.get("input_ids")
        if not self._session.takes_rows:
            return SINGLE, "it was rewritten by version 1 of the op; rewrite the original again"
        if ids is not None and isinstance(ids.shape[0], int):
            return SINGLE, f"its batch is fixed at {ids.shape[0]}"
        one_length = self._session.nodes.step.one_length
        return (EQUAL, one_length) if one_length else (RAGGED, "")

    def _probe(self) -> CacheSizes:
        """Run one token, to learn what a cache takes, and that the inputs can be filled."""
        with self.new_cache() as cache:
            self.run([cache], [0], np.zeros((1, 1), np.int64))
            return CacheSizes.measured(self._session.backend, cache.handle)

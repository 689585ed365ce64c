"""KiviCache: a cache as generate() handles one. Keys and values never leave the session."""

from __future__ import annotations

from typing import Any

from ...runtime.cache import Cache
from .protocol import PROTOCOL


class KiviCache:
    """What a model's output carries to its next step; `cache` is the kivi.Cache in it, to save or to ask for bytes.

    cache: an empty one, or one that Session.load_cache read. generate() continues it if it is given as
    `past_key_values` (`cache` since transformers 5.24). copy.deepcopy gives an independent copy that shares what is
    sealed. It is no transformers Cache: whatever that class would do to tensors in layers is done here or missing.
    """

    layers = ()
    is_compileable = False
    is_croppable = True
    is_linear = (False,)
    _is_user_defined = False

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Tokens held, padding included."""
        return self.cache.length

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens`, or remove the last `-tokens`; 0 means what this version of transformers means by it.

        Keeping more than there are is no error: transformers often asks for it.
        """
        length = self.cache.length
        keep = tokens if tokens > 0 or (tokens == 0 and not PROTOCOL.crop_0_keeps_all) else length + tokens
        if keep < length:
            self.cache.crop(max(keep, 0))

    def reset(self) -> None:
        """Drop all tokens."""
        self.cache.reset()

    def reorder_cache(self, beam_idx: Any) -> None:
        """Row i becomes the old row beam_idx[i]; `beam_idx` is an integer tensor, of any length."""
        self.cache.reorder(beam_idx.tolist())

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the rows of an integer tensor."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows, side by side."""
        self.cache.reorder([row for row in range(len(self.cache.lengths)) for _ in range(repeats)])

    def activate_past_recording(self) -> None:
        """Nothing to do: what crop needs is always there."""

    def __deepcopy__(self, memo: dict[int, Any]) -> KiviCache:
        return KiviCache(self.cache.fork())

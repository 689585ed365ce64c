"""Stop strings: which tokens of an answer may be given out, and where it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .request import Token

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Stops:
    """Holds tokens back while their text may be the beginning of a stop string, or of a character.

    decode: token ids -> text. At a stop string the tokens that have part in it, or follow it, are not given.
    """

    def __init__(self, strings: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        self._strings = strings
        self._decode = decode
        self._ids: list[int] = []
        self._held: list[Token] = []

    def push(self, token: Token) -> tuple[list[Token], bool]:
        """Tokens that may be given out now, and whether a stop string is complete."""
        self._ids.append(token.id)
        self._held.append(token)
        text = self._decode(self._ids)
        found = [at for string in self._strings if (at := text.find(string)) >= 0]
        if found:
            return self._release(min(found)), True
        if text.endswith(UNFINISHED):
            return [], False
        return self._release(len(text) - self._begun(text)), False

    def rest(self) -> list[Token]:
        """What is held back, once it can't become a stop string any more."""
        held, self._held = self._held, []
        return held

    def _begun(self, text: str) -> int:
        """Characters at the end of the text that a stop string may begin with."""
        longest = max(map(len, self._strings))
        ends = range(min(longest - 1, len(text)), 0, -1)
        return next((n for n in ends if any(string.startswith(text[-n:]) for string in self._strings)), 0)

    def _release(self, characters: int) -> list[Token]:
        """The held tokens whose text ends within the first so many characters."""
        given = len(self._ids) - len(self._held)
        fitting = 0
        while fitting < len(self._held) and len(self._decode(self._ids[: given + fitting + 1])) <= characters:
            fitting += 1
        released, self._held = self._held[:fitting], self._held[fitting:]
        return released

"""Token ids to text while they arrive: whole characters only, and stop strings across token borders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

CONTEXT = 4  # prompt tokens decoded along, because some tokenizers drop the first token's leading space


class TextTokenizer(Protocol):
    """What the engine needs of a tokenizer; `sateen.data.tokenizer.Tokenizer` has it."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str: ...


class Detokenizer:
    """The growing text of one request, decoded when somebody looks; at once where stop strings may end it.

    `min_tokens` tokens come before one that may complete a stop string; `keeps_stop` leaves it in the text.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        prompt_ids: Sequence[int],
        stop: Sequence[str],
        *,
        min_tokens: int = 0,
        keeps_stop: bool = False,
        skips_special: bool = True,
    ):
        self._text = ""
        self._tokenizer = tokenizer
        self._stop = stop
        self._quiet = min_tokens  # tokens still to come that end nothing
        self._keeps_stop, self._skips_special = keeps_stop, skips_special
        self._hold = max((len(s) for s in stop), default=1) - 1
        self._ids = list(prompt_ids[-CONTEXT:])
        self._begin = 0  # ids before this one have left
        self._shown = len(self._ids)  # ids from `_begin` up to here are in `text`
        self._is_final = False

    def push(self, token: int) -> str | None:
        """Adds a token; returns the stop string that now stands in the text, if one does."""
        self._ids.append(token)
        if not self._stop:
            return None
        found = self._advance()
        self._quiet -= 1
        return found

    def _advance(self) -> str | None:
        """Moves what became whole characters into the text."""
        if self._is_final or self._shown == len(self._ids):
            return None
        # Decoding a little context before the new token and cutting it off again keeps bytes that make a
        # character only together, and spaces that depend on the token before.
        before = self._decode(self._ids[self._begin : self._shown])
        after = self._decode(self._ids[self._begin :])
        if len(after) <= len(before) or after.endswith("\ufffd"):
            return None
        return self._add(after[len(before) :])

    def finish(self) -> None:
        """Adds what an unfinished character left behind; nothing is held back afterwards."""
        if not self._is_final and self._shown < len(self._ids):
            before = self._decode(self._ids[self._begin : self._shown])
            self._add(self._decode(self._ids[self._begin :])[len(before) :])
        self._is_final = True

    @property
    def text(self) -> str:
        """What is decoded so far, cut before a stop string."""
        self._advance()
        return self._text

    def sendable(self) -> int:
        """Characters of `text` that no stop string can take back."""
        return len(self.text) if self._is_final else max(0, len(self.text) - self._hold)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skips_special)

    def _add(self, piece: str) -> str | None:
        known = len(self._text)
        self._text += piece
        self._begin, self._shown = self._shown, len(self._ids)
        if self._quiet > 0:
            return None
        starts = [(s, self._text.find(s, max(0, known - len(s) + 1))) for s in self._stop]
        hits = [(at + len(s), at, s) for s, at in starts if at >= 0]
        if not hits:
            return None
        end, at, found = min(hits)  # the first to be complete, wherever the borders of tokens are
        self._text = self._text[: end if self._keeps_stop else at]
        self._is_final = True
        return found

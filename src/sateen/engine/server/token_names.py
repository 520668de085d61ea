"""Log-probabilities in OpenAI's two forms, and what tokens are called in them."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sateen.data.tokenizer import Tokenizer
from sateen.engine.request import Logprob

LOWEST = -9999.0  # OpenAI's stand-in for minus infinity, which JSON has no word for


class TokenNames:
    """Names tokens: their text, or `bytes:\\xNN...` where they are no whole characters."""

    def __init__(self, tokenizer: Tokenizer | None):
        self.tokenizer = tokenizer
        self._specials = frozenset(tokenizer.special_ids.values()) if tokenizer is not None else frozenset()
        self._known: dict[int, tuple[str, bytes]] = {}

    def name(self, token: int) -> tuple[str, bytes]:
        """The name and the bytes of a token; without a tokenizer `token_id:N` and nothing."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._look_up(token)
        return found

    def is_special(self, token: int) -> bool:
        """Left out of texts."""
        return token in self._specials

    def _look_up(self, token: int) -> tuple[str, bytes]:
        if self.tokenizer is None:
            return f"token_id:{token}", b""
        data = self.tokenizer.token_text(token)
        try:
            return data.decode(), data
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data

    def chat(
        self, tokens: Sequence[int], entries: Sequence[Mapping[int, Logprob]], best: int
    ) -> list[dict[str, Any]]:
        """`choices[].logprobs.content` of a chat: an object per token."""
        return [
            {**self._entry(token, entry[token]), "top_logprobs": [
                self._entry(other, value) for other, value in _ranked(entry) if value.rank <= best
            ]}
            for token, entry in zip(tokens, entries, strict=True)
        ]  # fmt: skip

    def _entry(self, token: int, value: Logprob) -> dict[str, Any]:
        name, data = self.name(token)
        return {"token": name, "logprob": finite(value.logprob), "bytes": list(data)}


class CompletionLogprobs:
    """`choices[].logprobs` of one text completion, piece by piece."""

    def __init__(self, names: TokenNames):
        self._names = names
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def piece(
        self,
        tokens: Iterable[int],
        entries: Iterable[Mapping[int, Logprob] | None],
        *,
        is_prompt: bool = False,
    ) -> dict[str, list[Any]]:
        """The four lists for the next tokens; `text_offset` counts characters from the first token on.

        Args:
            tokens: in order.
            entries: their log-probabilities; None for a prompt's first token.
            is_prompt: the tokens stand in the text even when they are special.
        """
        told: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token, entry in zip(tokens, entries, strict=True):
            name, data = self._names.name(token)
            told["tokens"].append(name)
            told["token_logprobs"].append(None if entry is None else finite(entry[token].logprob))
            told["top_logprobs"].append(None if entry is None else self._best(entry))
            told["text_offset"].append(self._offset)
            if is_prompt or not self._names.is_special(token):
                self._offset += len(self._decoder.decode(data))
        return told

    def _best(self, entry: Mapping[int, Logprob]) -> dict[str, float]:
        best: dict[str, float] = {}
        for token, value in _ranked(entry):  # of two tokens with one name the likelier stays
            best.setdefault(self._names.name(token)[0], finite(value.logprob))
        return best


def finite(logprob: float) -> float:
    """A number that JSON can hold."""
    return max(logprob, LOWEST)


def _ranked(entry: Mapping[int, Logprob]) -> list[tuple[int, Logprob]]:
    return sorted(entry.items(), key=lambda item: item[1].rank)

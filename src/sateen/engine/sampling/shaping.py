"""What changes a request's logits before the temperature: grammar, bias, penalties, a least length.

`shape` serves plain decoding and verification alike: the row at a draft counts the drafts before it, so that
verified tokens are those of plain decoding. Requests that ask for none of this cost one look. Shape letters:
M rows, V vocabulary, U different tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sateen.engine.request import SamplingParams

if TYPE_CHECKING:
    from sateen.engine.sampling.structured import GrammarState
    from sateen.engine.state import Request

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


class TokenCounts:
    """How often each token stands in one request's output, kept token by token; the prompt's count 0.

    Only tokens that occur take room, so neither memory nor time grows with the vocabulary.
    """

    def __init__(self, prompt: Sequence[int] = ()):
        """Of an empty output; what `read` gives first are the tokens of this prompt."""
        ids = np.unique(np.asarray(prompt, dtype=np.int64))
        self._place = {token: place for place, token in enumerate(ids.tolist())}
        self._ids = np.concatenate([ids, np.zeros(len(ids) // 2 + 16, dtype=np.int64)])
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._num_prompt = len(ids)

    def push(self, token: int) -> None:
        """Counts one more token of the output."""
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token
        self._counts[place] += 1

    def pop(self, token: int) -> None:
        """Takes back the newest `push`, which was of this token."""
        place = self._place[token]
        self._counts[place] -= 1
        if place >= self._num_prompt and self._counts[place] == 0:
            del self._place[token]  # it came with that push, so it has the last place

    def read(self) -> tuple[Ids, Floats]:
        """The tokens [U] and their counts [U], in arrays of their own."""
        size = len(self._place)
        return self._ids[:size].copy(), self._counts[:size].copy()


class Shaper:
    """One request's changes to its logits.

    Attributes:
        failure: why its grammar gave up, so that only the end is allowed any more; None while it works.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt: Sequence[int],
        stop_ids: Iterable[int],
        grammar: GrammarState | None = None,
    ):
        self._params, self._num_prompt, self._grammar = params, len(prompt), grammar
        # Only the repetition penalty looks at the prompt.
        counted = prompt if params.repetition_penalty != 1 else ()
        self._counts = TokenCounts(counted) if params.has_penalties else None
        self._num_counted = len(prompt)
        bias = params.logit_bias or {}
        self._bias_ids = np.asarray(list(bias), dtype=np.int64)
        self._bias = np.asarray(list(bias.values()), dtype=np.float32)
        self._stop_ids = np.asarray(sorted(stop_ids), dtype=np.int64)

    @classmethod
    def of(
        cls,
        params: SamplingParams,
        *,
        prompt: Sequence[int],
        stop_ids: Iterable[int],
        grammar: GrammarState | None = None,
    ) -> Shaper | None:
        """The shaper that these settings need, or None."""
        if not (params.has_penalties or params.logit_bias or params.min_tokens or grammar):
            return None
        return cls(params, prompt=prompt, stop_ids=stop_ids, grammar=grammar)

    @property
    def failure(self) -> str | None:
        return self._grammar.failure if self._grammar else None

    def collect(
        self, tokens: Sequence[int], drafts: Sequence[int], row: int, edits: Edits, first: int = 0
    ) -> None:
        """Notes what changes in the logits at the newest token and at each draft, in rows from `row` on.

        Args:
            tokens: prompt and output so far; the counts and the grammar catch up with them.
            drafts: tokens that may follow.
            first: leaves out the logits at the newest token and the drafts before this one.
        """
        if self._counts is not None:
            for token in tokens[self._num_counted :]:
                self._counts.push(token)
            self._num_counted = len(tokens)
        row -= first
        for j in range(len(drafts) + 1):
            if self._counts is not None and j:
                self._counts.push(drafts[j - 1])
            if j < first:
                continue
            edits.add(row + j, self._bias_ids, self._bias)
            if self._counts is not None:
                ids, counts = self._counts.read()
                minus = self._params.frequency_penalty * counts
                minus[counts > 0] += self._params.presence_penalty
                edits.penalize(row + j, ids, self._params.repetition_penalty, minus)
            if len(tokens) - self._num_prompt + j < self._params.min_tokens:
                edits.add(row + j, self._stop_ids, np.full(len(self._stop_ids), -np.inf, dtype=np.float32))
        if self._counts is not None:
            for token in reversed(drafts):
                self._counts.pop(token)
        if self._grammar is not None:
            for j, allowed in enumerate(self._grammar.allowed(tokens, drafts)):
                if j >= first:
                    edits.allow(row + j, allowed)


class Edits:
    """Changes of single logits in many rows, applied in a few operations for all of them."""

    def __init__(self, vocab_size: int):
        self._V = vocab_size
        self._added: list[tuple[Ids, Floats]] = []
        self._penalized: list[tuple[Ids, Floats, Floats]] = []
        self._allowed: list[tuple[int, NDArray[np.bool_]]] = []

    def add(self, row: int, ids: Ids, values: Floats) -> None:
        """Adds to these different tokens' logits."""
        if len(ids):
            self._added.append((ids + row * self._V, values))

    def penalize(self, row: int, ids: Ids, repetition: float, minus: Floats) -> None:
        """Divides or multiplies these different tokens' logits, then takes something off."""
        if len(ids):
            self._penalized.append(
                (ids + row * self._V, np.full(len(ids), repetition, dtype=np.float32), minus)
            )

    def allow(self, row: int, allowed: NDArray[np.bool_]) -> None:
        """Removes all tokens of a row but these; the mask may be shorter or longer than the vocabulary."""
        self._allowed.append((row, allowed[: self._V]))

    def apply(self, logits_MV: Tensor) -> None:
        """Changes the logits in place."""
        device, flat = logits_MV.device, logits_MV.view(-1)
        for row, allowed in self._allowed:
            logits_MV[row, : len(allowed)].masked_fill_(~torch.from_numpy(allowed).to(device), -torch.inf)
            logits_MV[row, len(allowed) :] = -torch.inf
        if self._added:
            at, values = _joined(self._added, device)
            flat.index_add_(0, at, values)
        if self._penalized:
            at, repetition, minus = _joined(self._penalized, device)
            x = flat[at]
            flat[at] = torch.where(x > 0, x / repetition, x * repetition) - minus


def _joined(parts: Sequence[tuple[NDArray[Any], ...]], device: torch.device) -> list[Tensor]:
    """The first members of all parts as one tensor, then the second ones, and so on."""
    return [torch.from_numpy(np.concatenate(column)).to(device) for column in zip(*parts, strict=True)]


def shape(
    logits_MV: Tensor, requests: Sequence[Request], drafts: Sequence[list[int]], *, only_last: bool = False
) -> Tensor:
    """The logits that tokens are chosen from; the given ones themselves when no request changes any.

    Args:
        logits_MV: for each request at its newest token and then at each of its drafts.
        drafts: tokens that may follow each request's own.
        only_last: there is one row per request, at its last draft.

    Returns:
        Logits [M, V], float32 where something changed.
    """
    if all(request.shaper is None for request in requests):
        return logits_MV
    edits, row = Edits(logits_MV.shape[1]), 0
    for request, ahead in zip(requests, drafts, strict=True):
        if request.shaper is not None:
            request.shaper.collect(request.tokens, ahead, row, edits, len(ahead) if only_last else 0)
        row += 1 if only_last else len(ahead) + 1
    shaped = logits_MV.to(torch.float32, copy=True)
    edits.apply(shaped)
    return shaped

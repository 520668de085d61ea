"""A request inside the engine: what the scheduler and the runner move forward, and what leaves at the end.

A prompt of which several completions are wanted is several requests that know each other. Shape letters:
J draft tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sateen.engine.cache.kv_cache import CacheEntry
from sateen.engine.detokenizer import Detokenizer
from sateen.engine.drafts.stats import DraftStats
from sateen.engine.recording import Recording
from sateen.engine.request import CompletionOutput, Logprob, RequestOutput, SamplingParams, StreamChunk
from sateen.engine.sampling.shaping import Shaper


@dataclass(eq=False)
class Request:
    """A request inside the engine; see `RequestOutput` for what leaves.

    Attributes:
        tokens: prompt and generated tokens; the last one is usually not in the trunk's cache yet.
        num_prompt: how many of them are the prompt's.
        max_new: tokens it may generate, by `max_tokens` and by the context.
        stop_ids: tokens that end it.
        generator: its random numbers, on the CPU; None when greedy.
        detokenizer: its text; None without a tokenizer.
        shaper: what changes its logits before the temperature; None when nothing does.
        index: which of the prompt's completions it is.
        siblings: the requests of all completions of the prompt in order, itself included.
        entry: its rows in the caches; None while waiting.
        wants_drafts: the MTP heads follow it; once they have stopped they cannot catch up.
        drafts: tokens guessed to follow `tokens`.
        draft_probs: the distributions they were drawn from [J, V]; None when greedy.
        logprobs: as in `CompletionOutput`.
        prompt_logprobs: as in `RequestOutput`, as far as they are known; only the first completion has some.
        weights_version: of its first token.
        routes: expert ids [tokens, layers, A] of its tokens so far; None unless the engine records them.
        selections: the same of key blocks [tokens, layers, K, n].
        page_keys: what the pages of its tokens are published under, as far as somebody asked.
        num_cached_tokens: as in `RequestOutput`; None before it has started.
        deadline: the clock's time at which it expires; None for never.
    """

    request_id: int
    params: SamplingParams
    tokens: list[int]
    num_prompt: int
    max_new: int
    weights_version: int = 0
    prompt: str | None = None
    stop_ids: frozenset[int] = frozenset()
    generator: torch.Generator | None = None
    detokenizer: Detokenizer | None = None
    shaper: Shaper | None = None
    index: int = 0
    siblings: list[Request] = field(default_factory=list, repr=False)
    entry: CacheEntry | None = None
    wants_drafts: bool = True
    drafts: list[int] = field(default_factory=list)
    draft_probs: Tensor | None = None
    draft: DraftStats = field(default_factory=DraftStats)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "abort"] | None = None
    stop_reason: str | int | None = None
    routes: Recording | None = None
    selections: Recording | None = None
    page_keys: list[bytes] = field(default_factory=list, repr=False)
    num_cached_tokens: int | None = None
    deadline: float | None = None
    stream_tokens: int = 0
    stream_text: int = 0

    def __post_init__(self) -> None:
        self.siblings = self.siblings or [self]

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def remaining(self) -> int:
        """Tokens it may still generate."""
        return self.max_new - self.num_generated

    @property
    def num_prompt_scored(self) -> int:
        """Tokens of the prompt that need no logits any more: all of them where nobody asked."""
        if self.params.prompt_logprobs is None or self.index > 0:
            return self.num_prompt
        return len(self.prompt_logprobs)

    @property
    def needs_prompt_rows(self) -> bool:
        """Its prompt's rows must be computed even where a cache holds them: their logits are wanted."""
        return self.num_prompt_scored < self.num_prompt

    def emit(self, new_tokens: list[int], logprobs: list[dict[int, Logprob]]) -> int:
        """Appends new tokens up to the first that ends the request; returns how many were taken."""
        full = self.num_prompt + self.max_new
        for taken, token in enumerate(new_tokens, 1):
            self.tokens.append(token)
            if self.params.logprobs is not None:
                self.logprobs.append(logprobs[taken - 1])
            if token in self.stop_ids:  # a stop token, like a stop string, leaves no text
                self.finish_reason = "stop"
                self.stop_reason = token if token in self.params.stop_token_ids else None
                if self.detokenizer and self.params.include_stop_str_in_output:
                    self.detokenizer.push(token)
                if self.shaper and self.shaper.failure:
                    self.finish_reason, self.stop_reason = "abort", self.shaper.failure
            elif self.detokenizer and (ended := self.detokenizer.push(token)) is not None:
                self.finish_reason, self.stop_reason = "stop", ended
            elif len(self.tokens) == full:
                self.finish_reason = "length"
            if self.finish_reason is not None:
                if self.detokenizer:
                    self.detokenizer.finish()
                return taken
        return len(new_tokens)

    def abort(self, reason: str | None = None) -> None:
        """Ends it as it stands; what it generated stays."""
        self.finish_reason, self.stop_reason = "abort", reason
        if self.detokenizer:
            self.detokenizer.finish()

    def router_ids(self) -> dict[int, list[list[int]]] | None:
        """See `RequestOutput.router_ids`."""
        found = self.routes.by_layer(len(self.tokens)) if self.routes else None
        return None if found is None else {layer: ids.tolist() for layer, ids in found.items()}

    def news(self, index: int = 0) -> StreamChunk:
        """What it got since this was last asked; text that a stop string may take back is held.

        Args:
            index: its prompt's place in the call, for the chunk.
        """
        tokens = self.tokens[self.num_prompt + self.stream_tokens :]
        self.stream_tokens += len(tokens)
        text = ""
        if self.detokenizer:
            end = self.detokenizer.sendable()
            text, self.stream_text = self.detokenizer.text[self.stream_text : end], end
        return StreamChunk(index, text, tokens, self.finish_reason is not None, self.index)

    def completion(self) -> CompletionOutput:
        """What the user sees of this completion now."""
        return CompletionOutput(
            index=self.index,
            text=self.detokenizer.text if self.detokenizer else "",
            token_ids=self.tokens[self.num_prompt :],
            logprobs=list(self.logprobs) if self.params.logprobs is not None else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            draft=self.draft,
        )

    def output(self) -> RequestOutput:
        """What the user sees of it now, with all completions of the prompt."""
        first = self.siblings[0]
        return RequestOutput(
            first.request_id,
            first.prompt,
            first.tokens[: first.num_prompt],
            [sibling.completion() for sibling in self.siblings],
            all(sibling.finish_reason is not None for sibling in self.siblings),
            min(sibling.weights_version for sibling in self.siblings),
            first.router_ids(),
            list(first.prompt_logprobs) if self.params.prompt_logprobs is not None else None,
            first.num_cached_tokens or 0,
            first.selections.by_layer(len(first.tokens)) if first.selections else None,
        )

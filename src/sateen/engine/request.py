"""What users ask of the engine and what they get back, in vLLM's words. Nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from sateen.errors import RequestError

GREEDY_BELOW = 1e-5  # temperatures under this are greedy, as in vLLM: logits would overflow float32


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    Attributes:
        temperature: divides the logits; 0 picks the largest, ties to the lower index.
        top_p: keep the most likely tokens whose probabilities add up to this.
        top_k: keep this many most likely tokens; 0 or -1 for all.
        min_p: drop tokens less likely than this share of the likeliest one.
        max_tokens: most tokens to generate; the context may end earlier.
        seed: of this request's random numbers; None draws one from the engine's.
        stop: strings that end the text; they are not part of it.
        stop_token_ids: tokens that end the generation, beside the model's own end tokens.
        ignore_eos: do not stop at the model's own end tokens.
        logprobs: also return the raw log-probabilities of the chosen token and of this many best ones.
        n: completions per prompt; only 1 so far.
        detokenize: produce text where the model has a tokenizer.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 16
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    detokenize: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        )
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        _number("temperature", self.temperature, "a number from 0 on", lambda x: x >= 0)
        _number("top_p", self.top_p, "a number above 0 and at most 1", lambda x: 0 < x <= 1)
        _number("min_p", self.min_p, "a number from 0 to 1", lambda x: 0 <= x <= 1)
        _integer("top_k", self.top_k, "a whole number from 1 on, or 0 for all tokens", lambda x: x >= -1)
        _integer("max_tokens", self.max_tokens, "a whole number from 1 on", lambda x: x >= 1)
        if self.n != 1:
            raise RequestError(
                f"n is {self.n!r}; this engine gives one completion per request, so repeat the prompt"
            )
        if self.seed is not None:
            _integer("seed", self.seed, "a whole number from 0 to 2**63 - 1", lambda x: 0 <= x < 2**63)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, "a whole number from 0 on", lambda x: x >= 0)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError(f"stop is {list(self.stop)!r}; accepted: strings with at least one character")
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need text; set detokenize=True or use stop_token_ids")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, "whole numbers from 0 on", lambda x: x >= 0)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop)


def _number(name: str, value: Any, accepted: str, fits: Any) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not fits(value)
    ):
        raise RequestError(f"{name} is {value!r}; accepted: {accepted}")


def _integer(name: str, value: Any, accepted: str, fits: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not fits(value):
        raise RequestError(f"{name} is {value!r}; accepted: {accepted}")


class Logprob(NamedTuple):
    """A raw log-probability at temperature 1 and the token's rank, 1 for the likeliest."""

    logprob: float
    rank: int


@dataclass
class DraftStats:
    """How the drafts of one request, or of many, fared.

    Attributes:
        rounds: trunk passes that verified drafts.
        emitted: tokens that those passes emitted.
        drafted: per position, drafts that were verified.
        accepted: per position, drafts that were kept.
    """

    rounds: int = 0
    emitted: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def record(self, drafted: int, accepted: int, emitted: int) -> None:
        """Counts one pass."""
        self.rounds += 1
        self.emitted += emitted
        missing = drafted - len(self.drafted)
        self.drafted += [0] * missing
        self.accepted += [0] * missing
        for position in range(drafted):
            self.drafted[position] += 1
            self.accepted[position] += position < accepted

    def add(self, other: DraftStats) -> None:
        """Adds another request's counts."""
        for mine, theirs in ((self.drafted, other.drafted), (self.accepted, other.accepted)):
            mine += [0] * (len(theirs) - len(mine))
            for position, count in enumerate(theirs):
                mine[position] += count
        self.rounds += other.rounds
        self.emitted += other.emitted

    @property
    def acceptance_length(self) -> float:
        """Tokens emitted per trunk pass that verified drafts, the bonus token included; 1 without drafts."""
        return self.emitted / self.rounds if self.rounds else 1.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of the drafts at each position that were kept, all earlier ones having been kept too."""
        return [a / d if d else 0.0 for a, d in zip(self.accepted, self.drafted, strict=True)]


@dataclass
class CompletionOutput:
    """The generated part.

    Attributes:
        index: always 0.
        text: without stop strings and special tokens; empty where there is no tokenizer.
        token_ids: generated tokens, a stop token included.
        logprobs: per token a dictionary token id -> `Logprob`, the chosen token first; None if not asked for.
        finish_reason: `stop` or `length`; None while unfinished.
        stop_reason: the stop string or stop token that ended it; None for the model's own end token.
        draft: what speculative decoding did for it.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None = None
    draft: DraftStats = field(default_factory=DraftStats)

    @property
    def token_logprobs(self) -> list[float] | None:
        """The raw log-probability of each generated token."""
        if self.logprobs is None:
            return None
        return [entry[token].logprob for entry, token in zip(self.logprobs, self.token_ids, strict=True)]


@dataclass
class RequestOutput:
    """A request's result.

    Attributes:
        request_id: the engine's number for it.
        prompt: the prompt's text, or None when token ids were given.
        prompt_token_ids: the prompt's tokens.
        outputs: one completion.
        finished: the completion is complete.
        weights_version: oldest version of the weights that generated any of its tokens.
        router_ids: of an engine that records routing: layer index -> expert ids of every token of prompt and
            completion, as they were when its successor was sampled; -1 for tokens that were never computed,
            such as the newest.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    weights_version: int
    router_ids: dict[int, list[list[int]]] | None = None

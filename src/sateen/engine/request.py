"""What users ask of the engine and what they get back, in vLLM's words. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sateen.engine.drafts.stats import DraftStats
from sateen.engine.sampling.values import bias, integer, listed, number, schema
from sateen.errors import RequestError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor

GREEDY_BELOW = 1e-5  # temperatures under this are greedy, as in vLLM: logits would overflow float32
MOST_COMPLETIONS = 1024  # of one prompt; each is a request of its own (source: ours)


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    The logits are changed in this order: grammar, bias, repetition, frequency and presence penalties,
    temperature, min-p, top-k, top-p. Greedy choice takes the largest after the penalties.

    Attributes:
        temperature: divides the logits; 0 picks the largest, ties to the lower index.
        top_p: keep the most likely tokens whose probabilities add up to this.
        top_k: keep this many most likely tokens; 0 or -1 for all.
        min_p: drop tokens less likely than this share of the likeliest one.
        repetition_penalty: divides positive logits and multiplies negative ones of every token that stands in
            the prompt or the output; 1 for none.
        presence_penalty: taken off the logit of every token that stands in the output.
        frequency_penalty: taken off the same for each time that it stands there.
        logit_bias: added to the logits of these token ids.
        max_tokens: most tokens to generate; the context may end earlier.
        min_tokens: this many tokens come before one that may end the request.
        seed: of this request's random numbers; None draws one from the engine's. Completion i of several has
            a seed derived from it, the first one has it itself.
        stop: strings that end the text; they are not part of it.
        include_stop_str_in_output: the text keeps the stop string or stop token that ended it.
        stop_token_ids: tokens that end the generation, beside the model's own end tokens.
        ignore_eos: do not stop at the model's own end tokens.
        logprobs: also return the log-probabilities of the chosen token and of this many best ones.
        logprobs_mode: `raw`, the model's own at temperature 1, or `processed`, of what was sampled from:
            removed tokens have -inf. A greedy request has no temperature and no cuts.
        prompt_logprobs: return the same of the prompt's tokens, always raw.
        n: completions of the prompt.
        json_schema: the output is a JSON value that satisfies this schema, given as a mapping or as text.
        regex: the whole output matches this expression, in the syntax of Rust's regex crate.
        detokenize: produce text where the model has a tokenizer.
        skip_special_tokens: leave special tokens out of the text.
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
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    min_tokens: int = 0
    logprobs_mode: Literal["raw", "processed"] = "raw"
    prompt_logprobs: int | None = None
    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", listed("stop", self.stop, "strings with at least one character"))
        object.__setattr__(
            self, "stop_token_ids", listed("stop_token_ids", self.stop_token_ids, "whole numbers from 0 on")
        )
        number("temperature", self.temperature, "a number from 0 on", lambda x: x >= 0)
        number("top_p", self.top_p, "a number above 0 and at most 1", lambda x: 0 < x <= 1)
        number("min_p", self.min_p, "a number from 0 to 1", lambda x: 0 <= x <= 1)
        number(
            "repetition_penalty", self.repetition_penalty, "a number from 0.01 to 100",
            lambda x: 0.01 <= x <= 100,
        )  # fmt: skip
        for name in ("presence_penalty", "frequency_penalty"):
            number(name, getattr(self, name), "a number from -2 to 2", lambda x: -2 <= x <= 2)
        integer("top_k", self.top_k, "a whole number from 1 on, or 0 for all tokens", lambda x: x >= -1)
        integer("max_tokens", self.max_tokens, "a whole number from 1 on", lambda x: x >= 1)
        integer(
            "min_tokens", self.min_tokens, f"a whole number from 0 to max_tokens, {self.max_tokens}",
            lambda x: 0 <= x <= self.max_tokens,
        )  # fmt: skip
        integer(
            "n", self.n, f"a whole number from 1 to {MOST_COMPLETIONS}", lambda x: 1 <= x <= MOST_COMPLETIONS
        )
        if self.seed is not None:
            integer("seed", self.seed, "a whole number from 0 to 2**63 - 1", lambda x: 0 <= x < 2**63)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), "a whole number from 0 on", lambda x: x >= 0)
        if self.logprobs_mode not in ("raw", "processed"):
            raise RequestError(unknown_name("logprobs_mode", str(self.logprobs_mode), ("raw", "processed")))
        for name in ("ignore_eos", "detokenize", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}; accepted: True or False")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise RequestError(
                    f"stop is {list(self.stop)!r}; accepted: strings with at least one character"
                )
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need text; set detokenize=True or use stop_token_ids")
        for token in self.stop_token_ids:
            integer("stop_token_ids", token, "whole numbers from 0 on", lambda x: x >= 0)
        object.__setattr__(self, "logit_bias", bias(self.logit_bias))
        object.__setattr__(self, "json_schema", schema(self.json_schema))
        self._check_grammar()

    def _check_grammar(self) -> None:
        if self.regex is not None and not isinstance(self.regex, str):
            raise RequestError(f"regex is {self.regex!r}; accepted: a regular expression as text")
        given = [name for name in ("json_schema", "regex") if getattr(self, name) is not None]
        if len(given) > 1:
            raise RequestError("json_schema and regex both set the form of the output; give one")
        clash = "ignore_eos" if self.ignore_eos else "min_tokens" if self.min_tokens else None
        if given and clash:
            raise RequestError(f"{given[0]} decides where the output ends, so {clash} cannot; leave it out")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def is_repeatable(self) -> bool:
        """Sampled with a seed: its tokens must not depend on what the engine measures."""
        return self.seed is not None and not self.is_greedy

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop)

    @property
    def has_penalties(self) -> bool:
        """Some logits depend on the tokens so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


class Logprob(NamedTuple):
    """A log-probability, raw unless asked otherwise, and the token's rank, 1 for the likeliest."""

    logprob: float
    rank: int


@dataclass
class CompletionOutput:
    """The generated part.

    Attributes:
        index: its place among the prompt's completions.
        text: without stop strings and special tokens unless asked for; empty where there is no tokenizer.
        token_ids: generated tokens, a stop token included.
        logprobs: per token a dictionary token id -> `Logprob`, the chosen token first; None if not asked for.
        finish_reason: `stop`, `length` or `abort`; None while unfinished.
        stop_reason: the stop string or stop token that ended it, None for the model's own end token; of
            `abort` what caused it, where nobody asked for it.
        draft: what speculative decoding did for it.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: Literal["stop", "length", "abort"] | None
    stop_reason: str | int | None = None
    draft: DraftStats = field(default_factory=DraftStats)

    @property
    def token_logprobs(self) -> list[float] | None:
        """The log-probability of each generated token."""
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
        outputs: the completions, `n` of them.
        finished: all of them are complete.
        weights_version: oldest version of the weights that generated any of its tokens.
        router_ids: of an engine that records routing: layer index -> expert ids of every token of prompt and
            completion, as they were when its successor was sampled; -1 for tokens that were never computed,
            such as the newest. Of the first completion.
        prompt_logprobs: None for the prompt's first token, then as in `CompletionOutput.logprobs`; as far as
            they are computed, None if not asked for.
        num_cached_tokens: tokens of the prompt that were not computed, because an earlier request had the
            same; of the first completion.
        selections: of an engine that records selections: oracle layer -> int32 [tokens, K, n] key blocks that
            every token's query kept, -1 throughout for tokens that were never computed. Of the first
            completion.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    weights_version: int
    router_ids: dict[int, list[list[int]]] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    selections: dict[int, Tensor] | None = None


@dataclass(frozen=True)
class StreamChunk:
    """News of one completion: its prompt's place in the call, new text and tokens, whether it is complete.

    `completion` is its place among the prompt's, as in `CompletionOutput.index`.
    """

    index: int
    text: str
    token_ids: list[int]
    finished: bool
    completion: int = 0

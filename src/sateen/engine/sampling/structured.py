"""Outputs of a given form: JSON schemas and regular expressions, through the library llguidance.

A grammar says which tokens may come next. Compiled grammars are kept, each request walks a copy of its own.
The state follows the request's tokens; drafts are walked and taken back, so that verification sees the same
masks as plain decoding. `Shaper` applies them.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sateen.data.tokenizer import Tokenizer
from sateen.engine.request import SamplingParams
from sateen.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

log = logging.getLogger("sateen.engine")

KEPT = 64  # compiled grammars (source: ours)
# At most one space between the parts of a JSON value: models that may write any number of them sometimes
# write nothing else (source: ours).
JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": "[ ]?"}


class GrammarState:
    """Where one request stands in its grammar.

    Attributes:
        failure: why the grammar gave up, for example beyond its limits; then only the end is allowed.
    """

    def __init__(self, matcher: LLMatcher, end_ids: frozenset[int], num_prompt: int):
        self._matcher, self._end_ids = matcher, end_ids
        self._num_walked = num_prompt
        self.failure: str | None = None

    def allowed(self, tokens: Sequence[int], drafts: Sequence[int]) -> list[NDArray[np.bool_]]:
        """Masks [tokens of the tokenizer, padded]: what may follow the tokens, then each of the drafts.

        They end at the first draft that is not allowed or is the end, since nothing behind it will stand.
        """
        self._matcher.consume_tokens(list(tokens[self._num_walked :]))
        self._num_walked = len(tokens)
        masks = [self._mask()]
        walked = 0
        for draft in drafts:
            # The matcher takes end tokens without counting all of them, so none is walked and taken back.
            if draft in self._end_ids or draft >= len(masks[-1]) or not masks[-1][draft]:
                break
            if not self._matcher.consume_token(draft):
                break
            walked += 1
            masks.append(self._mask())
        if self._matcher.is_error():
            self._give_up()
        elif walked:
            self._matcher.rollback(walked)
        return masks

    def _mask(self) -> NDArray[np.bool_]:
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(packed, bitorder="little").view(np.bool_)

    def _give_up(self) -> None:
        if self.failure is None:
            self.failure = _one_line(self._matcher.get_error())
            log.warning("a grammar cannot go on, its request ends: %s", self.failure)


class Grammars:
    """Compiles the grammars of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None, end_ids: Iterable[int]):
        self._tokenizer = tokenizer
        self._end_ids = sorted(i for i in end_ids if tokenizer is not None and i < tokenizer.vocab_size)
        self._walker: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()

    def start(self, params: SamplingParams, num_prompt: int) -> GrammarState | None:
        """The state of a new request, or None when its output may have any form.

        Raises:
            RequestError: the schema or expression is not accepted, llguidance is not installed, or there is
                no tokenizer or no end token.
        """
        if params.json_schema is not None:
            key = "json_schema", str(params.json_schema)
        elif params.regex is not None:
            key = "regex", params.regex
        else:
            return None
        if key not in self._compiled:
            self._compiled[key] = self._compile(*key)
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return GrammarState(self._compiled[key].deep_copy(), frozenset(self._end_ids), num_prompt)

    def _compile(self, kind: str, source: str) -> LLMatcher:
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ModuleNotFoundError:
            raise RequestError(f"{kind} needs llguidance: pip install 'sateen[structured]'") from None
        try:
            if kind == "json_schema":
                grammar = LLMatcher.grammar_from_json_schema(source, defaults=JSON_OPTIONS)
            else:
                grammar = LLMatcher.grammar_from_regex(source)
            matcher = LLMatcher(
                self._walked(kind), grammar, log_level=0, limits=LLParserLimits(verbose_errors=False)
            )
            matcher.compute_bitmask()  # what fails at once is refused, and the copies share this work
            problem = matcher.get_error()
        except ValueError as error:
            problem = str(error)
        if problem:
            raise RequestError(f"{kind} is not accepted: {_one_line(problem)}")
        return matcher

    def _walked(self, kind: str) -> LLTokenizer:
        """The tokenizer as llguidance reads it, made once."""
        from llguidance import LLTokenizer

        if self._tokenizer is None:
            raise RequestError(f"{kind} needs a tokenizer and this model has none")
        if not self._end_ids:
            raise RequestError(f"{kind} needs an end token and this model names none; set eos_token_id")
        if self._walker is None:
            self._walker = LLTokenizer(self._tokenizer.to_json(), eos_token=self._end_ids)
        return self._walker


def _one_line(message: str) -> str:
    return " ".join(message.replace("<non-verbose/>", "").split())

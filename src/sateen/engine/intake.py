"""From prompts to requests: everything a user can get wrong is refused here, before anything runs."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from numbers import Integral
from typing import cast

import torch

from sateen.checkpoint.gguf import is_gguf, load_gguf_tokenizer
from sateen.data.tokenizer import Tokenizer, check_vocab
from sateen.engine.contract import Prompt
from sateen.engine.detokenizer import Detokenizer
from sateen.engine.request import SamplingParams
from sateen.engine.sampling.shaping import Shaper
from sateen.engine.sampling.structured import Grammars
from sateen.engine.state import Request
from sateen.errors import RequestError
from sateen.models.decoder import Decoder


class Intake:
    """Makes requests for one model.

    Attributes:
        tokenizer: between text and ids, or None.
        max_model_len: most tokens of a prompt and its completion together.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer | None, max_model_len: int, seed: int):
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self._vocab_size = model.config.vocab_size
        self._context = model.config.max_position_embeddings
        self._end_ids = _end_ids(model, tokenizer)
        self._grammars = Grammars(tokenizer, self._end_ids)
        self._seeds = torch.Generator().manual_seed(seed)
        self._next_id = 0

    def requests(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Request]:
        """One request per prompt; a text or a list of ids alone is one prompt.

        Raises:
            RequestError: something cannot be served; nothing has been queued then.
        """
        if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Integral)):
            listed = [cast(Prompt, prompts)]
        else:
            listed = list(cast(Sequence[Prompt], prompts))
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(listed)
        if len(each) != len(listed):
            counts = f"{len(listed)} prompts came with {len(each)} sampling params"
            raise RequestError(f"{counts}; give one for all, or one for each prompt")
        return [self.request(prompt, one) for prompt, one in zip(listed, each, strict=True)]

    def request(self, prompt: Prompt, params: SamplingParams) -> Request:
        """The first of the requests of a prompt's `n` completions; its `siblings` are all of them.

        Raises:
            RequestError: the prompt or a setting cannot be served.
        """
        ids = self._ids(prompt)
        if len(ids) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(ids)} tokens but the context holds {self.max_model_len}, one of them "
                "generated; shorten the prompt or raise max_model_len"
            )
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer and this model has none; use stop_token_ids")
        self._check_tokens(params)
        siblings: list[Request] = []
        for index in range(params.n):
            siblings.append(self._completion(prompt, ids, params, index))
            siblings[-1].siblings = siblings
        return siblings[0]

    def _completion(self, prompt: Prompt, ids: list[int], params: SamplingParams, index: int) -> Request:
        detokenizer = None
        if self.tokenizer is not None and params.detokenize:
            detokenizer = Detokenizer(
                self.tokenizer, ids, params.stop_strings, min_tokens=params.min_tokens,
                keeps_stop=params.include_stop_str_in_output, skips_special=params.skip_special_tokens,
            )  # fmt: skip
        stop_ids = self._stop_ids(params)
        grammar = self._grammars.start(params, len(ids))
        self._next_id += 1
        return Request(
            request_id=self._next_id,
            params=params,
            tokens=list(ids),
            num_prompt=len(ids),
            max_new=min(params.max_tokens, self.max_model_len - len(ids)),
            prompt=prompt if isinstance(prompt, str) else None,
            stop_ids=stop_ids,
            generator=None if params.is_greedy else self._generator(params.seed, index),
            detokenizer=detokenizer,
            shaper=Shaper.of(params, prompt=ids, stop_ids=stop_ids, grammar=grammar),
            index=index,
            prompt_logprobs=[None] if params.prompt_logprobs is not None and index == 0 else [],
        )

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._end_ids)

    def _generator(self, seed: int | None, index: int) -> torch.Generator:
        if seed is None:
            seed = int(torch.randint(2**62, (), generator=self._seeds))
        elif index:
            seed = int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8], "little") >> 1
        return torch.Generator().manual_seed(seed)

    def _check_tokens(self, params: SamplingParams) -> None:
        """Nothing, when the settings name tokens of the vocabulary and leave some to choose from."""
        for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias or {})):
            for token in ids:
                if token >= self._vocab_size:
                    accepted = f"0 to {self._vocab_size - 1}"
                    raise RequestError(
                        f"{name} has token id {token}, out of the vocabulary; accepted: {accepted}"
                    )
        num_tokens = self.tokenizer.vocab_size if self.tokenizer is not None else self._vocab_size
        if params.min_tokens and len(self._stop_ids(params)) >= num_tokens:
            raise RequestError("min_tokens needs a token that is not among stop_token_ids; every one is")

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("this model has no tokenizer, so it takes token ids only; got a text")
            ids = self.tokenizer.encode(prompt)
        else:
            try:
                ids = [operator.index(token) for token in prompt]
            except TypeError:
                raise RequestError(f"a prompt is a text or a list of token ids; got {prompt!r:.80}") from None
        self.check_ids(ids)
        return ids

    def check_sequence(self, ids: Sequence[int]) -> None:
        """Nothing, when these can be scored.

        Raises:
            RequestError: as for `check_ids`; more tokens than the model's context.
        """
        self.check_ids(ids)
        if len(ids) > self._context:
            raise RequestError(
                f"a sequence of {len(ids)} tokens is beyond the model's context of {self._context}"
            )

    def check_ids(self, ids: Sequence[int]) -> None:
        """Nothing, when these are some token ids of the vocabulary.

        Raises:
            RequestError: none at all, or an id that the model has no row for.
        """
        if len(ids) == 0:
            raise RequestError("the prompt is empty; give at least one token")
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self._vocab_size)
            raise RequestError(
                f"token id {wrong} is out of the vocabulary; accepted: 0 to {self._vocab_size - 1}"
            )


def find_tokenizer(model: Decoder) -> Tokenizer | None:
    """The tokenizer beside the model's weights or in its GGUF file, or None.

    Raises:
        ConfigError: it has more tokens than the model, or a GGUF file has one of a kind we do not rebuild.
    """
    tokenizer: Tokenizer | None = None
    if model.source is not None and is_gguf(model.source):
        tokenizer = load_gguf_tokenizer(model.source)
    elif model.source is not None and (model.source / "tokenizer.json").is_file():
        tokenizer = Tokenizer.load(model.source)
    if tokenizer is None:
        return None
    check_vocab(tokenizer, model.config.vocab_size)
    return tokenizer


def _end_ids(model: Decoder, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's and `eos_token_id` of the config, where they are tokens."""
    eos = model.config.raw.get("eos_token_id")
    named = eos if isinstance(eos, list) else [] if eos is None else [eos]
    ends = {*named, *(tokenizer.stop_ids if tokenizer is not None else ())}
    return frozenset(end for end in ends if 0 <= end < model.config.vocab_size)

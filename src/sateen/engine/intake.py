"""From prompts to requests: everything a user can get wrong is refused here, before anything runs."""

from __future__ import annotations

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
        self._end_ids = _end_ids(model, tokenizer)
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
        """One request.

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
        generator = None
        if not params.is_greedy:
            seed = params.seed
            if seed is None:
                seed = int(torch.randint(2**62, (), generator=self._seeds))
            generator = torch.Generator().manual_seed(seed)
        detokenizer = None
        if self.tokenizer is not None and params.detokenize:
            detokenizer = Detokenizer(self.tokenizer, ids, params.stop_strings)
        self._next_id += 1
        return Request(
            request_id=self._next_id,
            params=params,
            tokens=ids,
            num_prompt=len(ids),
            max_new=min(params.max_tokens, self.max_model_len - len(ids)),
            prompt=prompt if isinstance(prompt, str) else None,
            stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._end_ids),
            generator=generator,
            detokenizer=detokenizer,
        )

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
    """Tokens that end a text: the tokenizer's and `eos_token_id` of the config."""
    eos = model.config.raw.get("eos_token_id")
    named = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return frozenset(tokenizer.stop_ids if tokenizer is not None else ()) | frozenset(named)

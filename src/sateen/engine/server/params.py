"""From a request's body to `SamplingParams`, whose own checks and messages the client gets to see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sateen.engine.request import SamplingParams
from sateen.engine.server.problem import bad_request
from sateen.engine.server.schema import Body, ChatBody, CompletionBody

MAX_LOGPROBS = 20
# Fields that carry over by name where they are given.
_SAME = (
    "temperature top_p top_k min_p n seed stop stop_token_ids ignore_eos presence_penalty frequency_penalty "
    "repetition_penalty regex logprobs_mode"
).split()


def completion_params(body: CompletionBody) -> SamplingParams:
    """The settings of a text completion.

    Raises:
        Problem: a value or a combination that is not served.
        RequestError: a value that the engine refuses.
    """
    settings = _shared(body)
    if body.max_tokens is not None:
        # Scoring a prompt needs no new token, but the engine always makes one; the answer drops it.
        settings["max_tokens"] = 1 if body.echo and body.max_tokens == 0 else body.max_tokens
    if body.logprobs is not None:
        settings["logprobs"] = _bounded("logprobs", body.logprobs)
        if body.echo:
            settings["prompt_logprobs"] = body.logprobs
    return SamplingParams(**settings)


def chat_params(body: ChatBody, max_model_len: int, *, skip_special_tokens: bool = True) -> SamplingParams:
    """The settings of a chat's next turn, which may fill the context when no limit is given.

    Raises:
        Problem: a value or a combination that is not served.
        RequestError: a value that the engine refuses.
    """
    settings = _shared(body) | {"skip_special_tokens": skip_special_tokens}
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise bad_request("max_tokens and max_completion_tokens differ; give one", "max_tokens")
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    settings["max_tokens"] = max_model_len if limit is None else limit
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    if body.logprobs:
        settings["logprobs"] = _bounded("top_logprobs", body.top_logprobs or 0)
    return SamplingParams(**settings)


def _shared(body: Body) -> dict[str, Any]:
    settings = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    if body.logit_bias:
        settings["logit_bias"] = _token_keys(body.logit_bias)
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return settings
    if body.regex is not None:
        raise bad_request("regex and response_format both shape the answer; give one", "response_format")
    if wanted.type == "json_object":
        settings["json_schema"] = {"type": "object"}
    else:
        if wanted.json_schema is None or wanted.json_schema.schema_ is None:
            raise bad_request("json_schema needs a schema in json_schema.schema", "response_format")
        settings["json_schema"] = wanted.json_schema.schema_
    return settings


def _bounded(name: str, value: int) -> int:
    if value > MAX_LOGPROBS:
        raise bad_request(f"{name} is {value}; accepted: 0 to {MAX_LOGPROBS}", name)
    return value


def _token_keys(bias: Mapping[str, float]) -> dict[int, float]:
    """OpenAI writes token ids as the texts that JSON wants for keys."""
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise bad_request(f"logit_bias has the key {key!r}; accepted: token ids as texts", "logit_bias")
    return {int(key): value for key, value in bias.items()}

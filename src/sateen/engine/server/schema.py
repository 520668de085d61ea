"""The bodies of requests, field by field, in OpenAI's words; a few more fields are in vLLM's.

Types are strict and numbers finite. A field that is not here is either one of OpenAI's that changes no
answer, or it is refused: nothing that a client asks for is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from sateen.errors import nearest

# OpenAI's fields that name the caller or the caching of the call; they change no answer.
IGNORED = frozenset(("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"))
# OpenAI's fields that we do not serve, with the values that ask for nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": (),
    "functions": (),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
MAX_CHOICES = 128

Finite = Annotated[float, Field(allow_inf_nan=False)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
# The first wrong entry is enough: a list may be as long as the body.
TokenIds = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]


class _Part(BaseModel):
    """An object inside a body; unknown fields are refused by name."""

    model_config = ConfigDict(strict=True, extra="forbid")


class StreamOptions(_Part):
    """What a stream tells besides its text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # OpenAI's padding against eavesdroppers; we never send any


class JsonSchema(_Part):
    """A schema that the answer must follow; `strict` false is served strictly as well."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Part):
    """Free text, some JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Body(BaseModel):
    """What both kinds of completion take; None everywhere means the default."""

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra={"additionalProperties": False})

    model: str | None = None
    temperature: Finite | None = None
    top_p: Finite | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    max_tokens: int | None = None
    seed: int | None = None
    presence_penalty: Finite | None = None
    frequency_penalty: Finite | None = None
    logit_bias: dict[str, Finite] | None = None
    response_format: ResponseFormat | None = None
    # vLLM's words.
    top_k: int | None = None
    min_p: Finite | None = None
    repetition_penalty: Finite | None = None
    stop_token_ids: Annotated[list[Token], Field(fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    regex: str | None = None
    logprobs_mode: Literal["raw", "processed"] | None = None

    @model_validator(mode="after")
    def _no_field_is_dropped(self, info: ValidationInfo) -> Body:
        for name, value in (self.model_extra or {}).items():
            if name in IGNORED or value is None:
                continue
            if name not in NEUTRAL:
                known = sorted({*type(self).model_fields, *IGNORED, *NEUTRAL})
                message = f"{name!r} is not a field of this request{nearest(name, known)}"
                raise PydanticCustomError("unknown_field", "{message}", {"message": message, "param": name})
            if not any(
                value is same or (value == same and type(value) is type(same)) for same in NEUTRAL[name]
            ):
                accepted = " or ".join(["null", *(repr(same) for same in NEUTRAL[name])])
                message = f"{name} is not supported; leave it out (accepted: {accepted})"
                raise PydanticCustomError("unsupported", "{message}", {"message": message, "param": name})
        if self.stream_options is not None and not self.stream:
            message = "stream_options needs stream to be true"
            raise PydanticCustomError(
                "no_stream", "{message}", {"message": message, "param": "stream_options"}
            )
        return self

    @property
    def includes_usage(self) -> bool:
        """A last chunk tells the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionBody(Body):
    """The body of `/v1/completions`."""

    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None


class TextPart(_Part):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class CalledFunction(_Part):
    """A call's function, its arguments as JSON text."""

    name: str
    arguments: str


class Call(_Part):
    """A call that the assistant made earlier."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ChatMessage(_Part):
    """One turn. Fields that our own answers carry are taken back as they are."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    type: Literal["text", "message"] | None = None  # some clients write what OpenAI's other interface has
    # OpenAI's client sends these back empty.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class Function(_Part):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(_Part):
    """OpenAI's wrapper of a function."""

    type: Literal["function"]
    function: Function


class ChatBody(Body):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

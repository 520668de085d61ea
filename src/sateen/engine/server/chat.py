"""Chats in the model's own words: messages and tools through its template, answers taken apart again."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

from sateen.data.dialogue import CALL, THINK, ReplyParser, ToolCall
from sateen.data.tokenizer import Tokenizer
from sateen.engine.server.problem import bad_request
from sateen.engine.server.schema import ChatBody, ChatMessage
from sateen.errors import ConfigError, RequestError

# What a template may raise on input that it was not written for, beside jinja's own errors.
_TEMPLATE_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class ChatPrompt(NamedTuple):
    """A conversation ready for the model.

    Attributes:
        token_ids: the prompt.
        tools: the functions that were offered, for the parser of the answer.
        is_thinking: the prompt ends inside the reasoning, so the answer begins there.
    """

    token_ids: list[int]
    tools: list[dict[str, Any]]
    is_thinking: bool

    def parser(self) -> ReplyParser:
        """A parser for one answer."""
        return ReplyParser(self.tools, is_thinking=self.is_thinking, reads_calls=bool(self.tools))


def render(body: ChatBody, tokenizer: Tokenizer) -> ChatPrompt:
    """The prompt of a chat; may take a while for a long one, so it is called in a thread of its own.

    Raises:
        Problem: something that the template or we do not serve.
        RequestError: the template refuses the messages.
    """
    try:
        source = tokenizer.template.source
    except ConfigError as error:
        raise bad_request(f"this model cannot chat: {error}") from error
    tools = _offered(body, source)
    variables = _variables(body, source)
    if tools:
        variables["tools"] = tools
    messages = [_message(message) for message in body.messages]
    try:
        text = tokenizer.render_chat(messages, add_generation_prompt=True, is_escaped=True, **variables)
        token_ids = tokenizer.encode_rendered(text)
    except RequestError:
        raise
    except _TEMPLATE_ERRORS as error:
        raise bad_request(
            f"the chat template cannot render these messages: {error!r:.200}", "messages"
        ) from error
    is_thinking = text.rstrip().endswith(THINK)
    wanted = body.response_format
    if is_thinking and (body.regex or (wanted is not None and wanted.type != "text")):
        raise bad_request(
            "the prompt opens the model's reasoning, where an answer of a given form has no place; turn "
            "reasoning off with chat_template_kwargs", "response_format",
        )  # fmt: skip
    return ChatPrompt(token_ids, tools, is_thinking)


def call_object(call: ToolCall) -> dict[str, Any]:
    """A call in OpenAI's form, with an id of its own."""
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    function = {"name": call.name, "arguments": arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _offered(body: ChatBody, source: str) -> list[dict[str, Any]]:
    """The tools that the model gets to see."""
    choice = body.tool_choice
    if choice not in (None, "none", "auto"):
        raise bad_request(f"tool_choice is {choice!r:.80}; accepted: 'none' or 'auto'", "tool_choice")
    if not body.tools:
        if choice == "auto":
            raise bad_request("tool_choice needs tools", "tool_choice")
        return []
    if choice == "none":
        return []
    if body.parallel_tool_calls is False:
        raise bad_request(
            "parallel_tool_calls is False; the model decides that, leave it out", "parallel_tool_calls"
        )
    if "tools" not in source:
        raise bad_request("this model's chat template takes no tools", "tools")
    wanted = body.response_format
    if body.regex or (wanted is not None and wanted.type != "text"):
        raise bad_request(
            "tools and an answer of a given form exclude each other; give one", "response_format"
        )
    return [tool.model_dump(exclude_none=True) for tool in body.tools]


def _variables(body: ChatBody, source: str) -> dict[str, Any]:
    """What the client sets of the template's own names; a name that it never reads is refused."""
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
    for name in variables:
        if name in ("messages", "tools", "add_generation_prompt"):
            raise bad_request(f"chat_template_kwargs cannot set {name}", "chat_template_kwargs")
        if name not in source:
            raise bad_request(f"this model's chat template does not read {name!r}", name)
    return variables


def _message(message: ChatMessage) -> dict[str, Any]:
    """A message as templates read it: texts as one string, arguments of calls as dictionaries."""
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    if content is None and not message.tool_calls and not message.reasoning_content:
        raise bad_request(f"a message of the {message.role} has no content", "messages")
    if message.tool_calls and message.role != "assistant":
        raise bad_request(f"a message of the {message.role} has tool_calls", "messages")
    # Templates know `system` for what OpenAI now calls `developer`.
    role = "system" if message.role == "developer" else message.role
    told: dict[str, Any] = {"role": role, "content": content or ""}
    told |= message.model_dump(include={"name", "tool_call_id", "reasoning_content"}, exclude_none=True)
    if message.tool_calls:
        told["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return told


def _arguments(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise bad_request(
            f"arguments of a tool call are {text!r:.80}; accepted: a JSON object as text", "messages"
        )
    return arguments


def hidden_tags(tokenizer: Tokenizer) -> Sequence[str]:
    """Tags of the answer's format that this tokenizer drops from texts, so that they cannot be found."""
    return [tag for tag in (THINK, CALL) if tag in tokenizer.special_ids]

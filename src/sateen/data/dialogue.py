"""A model's reply taken apart: its reasoning, what it says, and the tools it calls.

The formats are those of MiMo-V2-Flash's chat template: reasoning between `<think>` and `</think>` at the
start, calls as `<tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>`. What
does not follow them is text and stays text; nothing a model writes raises. Values are read as in the parser
published with the model (SGLang's MiMo detector); where we depart, `parse_value` says so.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

THINK, THINK_END = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"\s*<function=([^<>]+)>\s*")
_PARAMETER = re.compile(r"<parameter=([^<>]+)>(.*?)</parameter>\s*", re.DOTALL)
_FUNCTION_END = re.compile(r"</function>\s*")
_JSON_TYPES: dict[str, type | tuple[type, ...]] = {
    "integer": int, "number": (int, float), "boolean": bool, "object": dict, "array": list,
}  # fmt: skip


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called, with its arguments by name."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class ReplyPart:
    """News of a reply: more reasoning, more content, or one call; exactly one of them is there."""

    reasoning: str = ""
    content: str = ""
    call: ToolCall | None = None


@dataclass(frozen=True)
class Reply:
    """A whole reply."""

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]


def parse_reply(text: str, tools: Sequence[Mapping[str, Any]] = (), *, is_thinking: bool = False) -> Reply:
    """The parts of a complete reply; see `ReplyParser` for the arguments."""
    parser = ReplyParser(tools, is_thinking=is_thinking)
    parts = [*parser.feed(text), *parser.finish()]
    return Reply(
        reasoning="".join(part.reasoning for part in parts),
        content="".join(part.content for part in parts),
        tool_calls=tuple(part.call for part in parts if part.call is not None),
    )


class ReplyParser:
    """Takes a reply apart while it comes. How it is cut into pieces changes nothing but when it is told.

    Text that may still become a tag is held until it is clear. Line breaks next to a tag belong to the format
    and are dropped. Reasoning that is never closed is reasoning; a call that is never closed is content.
    """

    def __init__(
        self, tools: Sequence[Mapping[str, Any]] = (), *, is_thinking: bool = False, reads_calls: bool = True
    ):
        """
        Args:
            tools: the functions that were offered, as OpenAI's API or the chat template takes them; their
                JSON schemas give the arguments' types. A call of another function is told all the same, with
                texts as arguments.
            is_thinking: the prompt already opened `<think>`, so the reply begins inside it.
            reads_calls: look for calls; without, what looks like one is content.
        """
        self._types = {name: _parameter_types(schema) for name, schema in map(_signature, tools)}
        self._is_thinking = is_thinking
        self._reads_calls = reads_calls
        self._state: Literal["start", "reasoning", "content"] = "start"
        self._text = ""  # what came and is not told yet
        self._after_tag = False  # line breaks at the front of `_text` are to be dropped

    def feed(self, text: str) -> list[ReplyPart]:
        """What has become clear with the next piece of text."""
        self._text += text
        return list(self._advance(is_last=False))

    def finish(self) -> list[ReplyPart]:
        """The rest, when no more text comes."""
        return list(self._advance(is_last=True))

    def _advance(self, is_last: bool) -> Iterator[ReplyPart]:
        if self._state == "start" and not self._begin(is_last):
            return
        if self._state == "reasoning":
            self._drop_breaks()
            said, tag, rest = self._text.partition(THINK_END)
            if not tag:
                yield from _reasoning(self._release(THINK_END, is_last))
                return
            yield from _reasoning(said.rstrip("\n"))
            self._enter("content", rest)
        while True:
            self._drop_breaks()
            if not self._reads_calls:
                said, self._text = self._text, ""
                yield from _content(said)
                return
            said, tag, rest = self._text.partition(CALL)
            if not tag:
                yield from _content(self._release(CALL, is_last))
                return
            body, end, after = rest.partition(CALL_END)
            if not end:
                clear = len(self._text) if is_last else len(said.rstrip("\n"))
                yield from _content(self._text[:clear])
                self._text = self._text[clear:]
                return
            call = self._read_call(body)
            if call is None:
                # The opening tag turns out to be text; a call may still follow it.
                yield from _content(said + tag)
                self._text = rest
            else:
                yield from _content(said.rstrip("\n"))
                yield ReplyPart(call=call)
                self._enter("content", after)

    def _begin(self, is_last: bool) -> bool:
        """Whether it is clear if the reply begins with reasoning; only spaces may stand before the tag."""
        text = self._text.lstrip()
        if len(text) < len(THINK) and THINK.startswith(text) and not is_last:
            return False
        if text.startswith(THINK):
            self._enter("reasoning", text.removeprefix(THINK))
        elif self._is_thinking:
            self._enter("reasoning", self._text)
        else:
            self._state = "content"
        return True

    def _enter(self, state: Literal["reasoning", "content"], text: str) -> None:
        self._state, self._text, self._after_tag = state, text, True

    def _drop_breaks(self) -> None:
        if self._after_tag:
            self._text = self._text.lstrip("\n")
            self._after_tag = not self._text

    def _release(self, tag: str, is_last: bool) -> str:
        """The text that no later piece can make part of `tag` or of the line breaks before it."""
        end = len(self._text)
        if not is_last:
            longest = min(len(tag) - 1, end)
            held = next((n for n in range(longest, 0, -1) if tag.startswith(self._text[-n:])), 0)
            end = len(self._text[: end - held].rstrip("\n"))
        said, self._text = self._text[:end], self._text[end:]
        return said

    def _read_call(self, body: str) -> ToolCall | None:
        """The call that stands between the tags, or None where the format is not kept."""
        head = _FUNCTION.match(body)
        if head is None or not head[1].strip():
            return None
        name, position = head[1].strip(), head.end()
        types = self._types.get(name, {})
        arguments: dict[str, Any] = {}
        while found := _PARAMETER.match(body, position):
            key = found[1].strip()
            arguments[key] = parse_value(found[2], types.get(key, ()))
            position = found.end()
        return ToolCall(name, arguments) if _FUNCTION_END.fullmatch(body, position) else None


def parse_value(text: str, types: Sequence[str] = ()) -> Any:
    """An argument's text as the first JSON type that it can be read as, and as text otherwise.

    `null` is None whatever the type. SGLang also takes `NULL` for null, and any other word for false where
    the type is boolean; we keep them as text, so that nothing is lost. Infinite numbers stay text too.

    Args:
        text: as the model wrote it, with HTML's escapes.
        types: JSON-schema types that the argument may have.
    """
    text = html.unescape(text)
    if text == "null":
        return None
    for kind in types:
        try:
            value = json.loads(
                text.lower() if kind == "boolean" else text, parse_constant=_refuse, parse_float=_finite
            )
        except (ValueError, RecursionError):
            continue
        if isinstance(value, _JSON_TYPES.get(kind, ())) and isinstance(value, bool) == (kind == "boolean"):
            return value
    return text


def _reasoning(text: str) -> Iterator[ReplyPart]:
    if text:
        yield ReplyPart(reasoning=text)


def _content(text: str) -> Iterator[ReplyPart]:
    if text:
        yield ReplyPart(content=text)


def _signature(tool: Mapping[str, Any]) -> tuple[str, Any]:
    """A tool's name and its parameters' schema; OpenAI's API wraps them in `function`."""
    inner = tool.get("function", tool)
    return (str(inner.get("name", "")), inner.get("parameters")) if isinstance(inner, Mapping) else ("", None)


def _parameter_types(schema: Any) -> dict[str, tuple[str, ...]]:
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return (
        {key: _types(value) for key, value in properties.items()} if isinstance(properties, Mapping) else {}
    )


def _types(schema: Any) -> tuple[str, ...]:
    """The types that a schema allows, unions in their order."""
    if not isinstance(schema, Mapping):
        return ()
    kind = schema.get("type")
    kinds = [kind] if isinstance(kind, str) else kind if isinstance(kind, list) else []
    unions = [part for key in ("anyOf", "oneOf") for part in schema.get(key) or ()]
    return tuple(str(kind) for kind in kinds) + tuple(kind for part in unions for kind in _types(part))


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is not a finite number")

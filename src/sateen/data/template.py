"""Chat templates: the Jinja text of a tokenizer's own files, rendered in a sandbox.

A template decides where special tokens stand, and message contents may spell the same strings. Rendering
therefore replaces such strings in contents by escape pairs first; `split_rendered` tells the two apart later.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sateen.errors import ConfigError, RequestError

Message = dict[str, Any]

CHATML = """{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

# A private-use character that opens an escape pair; contents that hold it are escaped themselves.
_ESCAPE = "\U000f0000"
_FIRST = ord(_ESCAPE) + 1


class _Generation(Extension):
    """Accepts the `{% generation %}` blocks that some templates put around assistant turns."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance attribute

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled chat template.

    Attributes:
        source: the template's text.
        specials: strings of the special tokens that contents must not be able to produce.
    """

    def __init__(self, source: str, specials: Sequence[str]):
        self.source = source
        self.specials = list(specials)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"chat_template does not parse: {error}; it must be Jinja") from error
        alternatives = sorted(map(re.escape, [_ESCAPE, *self.specials]), key=len, reverse=True)
        self._protected = re.compile("|".join(alternatives))

    def render(self, messages: Sequence[Message], variables: dict[str, Any], *, is_escaped: bool) -> str:
        """The conversation as the template writes it; with `is_escaped`, contents' specials are escape pairs.

        Raises:
            RequestError: the template refuses these messages or they lack a key it reads.
        """
        given = self._escape(list(messages)) if is_escaped else list(messages)
        try:
            return self._template.render(messages=given, **variables)
        except (TemplateError, TypeError, KeyError) as error:
            raise RequestError(f"the chat template cannot render these messages: {error}") from error

    def split_rendered(self, text: str) -> Iterator[tuple[str, bool]]:
        """The pieces of an escaped rendering with whether special tokens may be read in each."""
        cursor = 0
        for match in re.finditer(f"{_ESCAPE}(.)", text, re.DOTALL):
            if match.start() > cursor:
                yield text[cursor : match.start()], True
            index = ord(match[1]) - _FIRST
            yield (_ESCAPE if index < 0 else self.specials[index]), False
            cursor = match.end()
        if cursor < len(text):
            yield text[cursor:], True

    def _escape(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._protected.sub(self._pair, value)
        if isinstance(value, dict):
            return {key: self._escape(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._escape(item) for item in value]
        return value

    def _pair(self, match: re.Match[str]) -> str:
        special = match[0]
        return _ESCAPE + (_ESCAPE if special == _ESCAPE else chr(_FIRST + self.specials.index(special)))


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    # jinja2's own filter escapes <, > and & for HTML, which models were not trained on.
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise(message: str) -> None:
    raise RequestError(f"the chat template refuses these messages: {message}")

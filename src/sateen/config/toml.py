"""Writes TOML, which the standard library only reads: run folders keep their settings in people's words."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from sateen.config.base import Config

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def as_table(config: Config) -> dict[str, Any]:
    """The settings as plain dicts, lists and scalars, without empty tables and None, which TOML lacks."""
    return {
        name: _plain(value)
        for name in type(config).model_fields
        if (value := getattr(config, name)) is not None and value != {}
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return as_table(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, PurePath) else value


def to_toml(table: Mapping[str, Any]) -> str:
    """TOML text that `tomllib` reads back as `table`: str, bool, int, float, list and dict values."""
    return "\n".join(_lines(table, ())).lstrip("\n") + "\n"


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    """Scalars first, then subtables, as TOML wants; a list of tables becomes `[[...]]`."""
    lines = [f"{_key(k)} = {_value(v)}" for k, v in table.items() if not _is_table(v)]
    for key, value in table.items():
        inner = (*path, key)
        name = ".".join(_key(part) for part in inner)
        if isinstance(value, Mapping):
            only_tables = value and all(isinstance(item, Mapping) for item in value.values())
            lines += [*([] if only_tables else ["", f"[{name}]"]), *_lines(value, inner)]
        elif _is_table(value):
            for item in value:
                lines += ["", f"[[{name}]]", *_lines(item, inner)]
    return lines


def _is_table(value: Any) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    return isinstance(value, Mapping) or (is_list and all(isinstance(v, Mapping) for v in value))


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    # JSON's escapes are TOML's, except that TOML wants U+007F escaped as well.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float():
            return repr(value) if math.isfinite(value) else str(value)
        case str():
            return _string(value)
        case Mapping():
            return "{" + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + "}"
        case Sequence():
            return "[" + ", ".join(map(_value, value)) + "]"
    raise TypeError(f"TOML has no place for {type(value).__name__} {value!r}")

"""The receipt: what a model was measured to do, hold and cost, and the commands that measure it again.

It lies in the run folder and beside the weights, as `receipt.json` for programs and `RECEIPT.md` for people.
This file owns its keys; whoever measures fills them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sateen.errors import SateenError, nearest
from sateen.receipt.markdown import render

SCHEMA = 1
JSON_NAME = "receipt.json"
MARKDOWN_NAME = "RECEIPT.md"

NUMBER = (int, float, type(None))  # None: not measured
TEXT = (str, type(None))
_TASK = {"accuracy": NUMBER, "n": NUMBER, "chance": NUMBER}
_INT8 = {
    "attention": TEXT,
    "kv_cache_dtype": TEXT,
    "budget": NUMBER,
    "probe_tokens": NUMBER,
    "errors": {"*": NUMBER},
    "float_layers": [(str,)],
}
_MEASURES = {
    "bits_per_byte": NUMBER,
    "perplexity": NUMBER,
    "tasks": {"*": _TASK},
    "baselines": {"*": NUMBER},
}
# Per key: the accepted types, a dict of inner keys ("*" stands for any name), or a list's item. A receipt may
# leave out any inner key that was not measured, but no top-level one.
_SHAPE: dict[str, Any] = {
    "schema": (int,),
    "source": {"kind": TEXT, "path": TEXT, "sha256": TEXT},
    "seeds": {"*": (int,)},
    "hardware": {"cpu": TEXT, "cores": NUMBER, "memory_bytes": NUMBER, "gpu": TEXT},
    "versions": {"*": (str,)},
    "quality": {**_MEASURES, "twin": _MEASURES, "int8_attention": _INT8},
    "bytes": {
        "weights": NUMBER,
        "kv_bytes_per_token": [
            {"layer_kind": TEXT, "num_layers": NUMBER, "context": NUMBER, "bytes": NUMBER}
        ],
        "kv_allocated": [{"context": NUMBER, "bytes": NUMBER}],
    },
    "speed": [{"what": TEXT, "unit": TEXT, "median": NUMBER, "p25": NUMBER, "p75": NUMBER, "n": NUMBER}],
    "draft": {"acceptance_length": NUMBER, "acceptance_by_position": [NUMBER]},
    "worse": [{"what": TEXT, "before": NUMBER, "after": NUMBER}],
    "commands": [(str,)],
}


class ReceiptError(SateenError, ValueError):
    """A receipt with a key, value or schema that this version does not know."""

    exit_code = 2


@dataclass(frozen=True)
class Receipt:
    """What was measured; an inner key that is absent or None was not.

    Attributes:
        source: kind and path of what the model was made from, and its sha256.
        seeds: name -> seed.
        hardware: cpu, cores, memory_bytes, gpu; see `hardware()`.
        versions: package -> version; see `versions()`.
        quality: bits_per_byte, perplexity, tasks (accuracy, n, chance), baselines in bits per byte, and the
            same of the `twin`, a model that differs in the measured method alone; int8_attention: what ran,
            relative L2 errors by layer, and which of them are above the budget and compute in floating point.
        bytes: weights, kv_bytes_per_token by kind of layer and context, kv_allocated by context.
        speed: what, unit, median, p25, p75 and n repeats.
        draft: acceptance_length in tokens per pass of the main model, bonus token included, and the accepted
            share by position.
        worse: what got worse, before and after.
        commands: shell lines that measure all of this again.
        schema: version of these keys.
    """

    source: dict[str, Any]
    seeds: dict[str, int] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)
    bytes: dict[str, Any] = field(default_factory=dict)
    speed: list[dict[str, Any]] = field(default_factory=list)
    draft: dict[str, Any] = field(default_factory=dict)
    worse: list[dict[str, Any]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    schema: int = SCHEMA

    def to_json(self) -> str:
        """The receipt as JSON text, keys in the documented order.

        Raises:
            ReceiptError: a part has an unknown key, a wrong type or a number that is not finite.
        """
        table = {key: getattr(self, key) for key in _SHAPE}
        _check(table, "receipt")
        try:
            return json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        except ValueError:
            raise ReceiptError(
                "receipt: a value is nan or infinite; leave out what could not be measured"
            ) from None

    @classmethod
    def from_json(cls, text: str, origin: str = "receipt") -> Receipt:
        """The receipt in this JSON text.

        Args:
            text: what `to_json` wrote.
            origin: the file's name, for messages.

        Raises:
            ReceiptError: not JSON, another schema, an unknown or missing key, or a wrong type.
        """
        try:
            table = json.loads(text)
        except json.JSONDecodeError as error:
            raise ReceiptError(f"{origin}: not valid JSON: {error}") from None
        _check(table, origin)
        return cls(**table)

    def write(self, folder: str | Path) -> None:
        """Writes `receipt.json` and `RECEIPT.md` into an existing folder, each in one piece or not at all."""
        text = self.to_json()
        write_atomically(Path(folder) / JSON_NAME, text)
        write_atomically(Path(folder) / MARKDOWN_NAME, self.to_markdown())

    @classmethod
    def read(cls, path: str | Path) -> Receipt:
        """The receipt at a path: the JSON file, or a folder that holds one (a run or a model directory).

        Raises:
            ReceiptError: there is none, or it does not follow the schema.
        """
        file = Path(path)
        file = file / JSON_NAME if file.is_dir() else file
        if not file.is_file():
            raise ReceiptError(f"{path}: no {JSON_NAME} here; give one, or a run or model folder that has it")
        return cls.from_json(file.read_text(encoding="utf-8"), str(file))

    def to_markdown(self) -> str:
        """The receipt as tables for people."""
        return render({key: getattr(self, key) for key in _SHAPE})


assert {f.name for f in fields(Receipt)} == set(_SHAPE)


def _check(table: Any, origin: str) -> None:
    """Raises ReceiptError unless `table` has the keys and types of `_SHAPE`."""
    if not isinstance(table, dict):
        raise ReceiptError(f"{origin}: a receipt is a JSON object, not {_kind(table)}")
    if "schema" in table and table["schema"] != SCHEMA:
        raise ReceiptError(f"{origin}: schema {table['schema']!r} is not known; this version reads {SCHEMA}")
    _check_part(table, _SHAPE, origin, "")
    missing = [key for key in _SHAPE if key not in table]
    if missing:
        raise ReceiptError(f"{origin}: no {', '.join(missing)}; a receipt has {', '.join(_SHAPE)}")


def _check_part(value: Any, shape: Any, origin: str, path: str) -> None:
    if isinstance(shape, dict):
        if not isinstance(value, Mapping):
            raise ReceiptError(f"{origin}: {path} should be an object, not {_kind(value)}")
        for key, item in value.items():
            if key not in shape and "*" not in shape:
                raise ReceiptError(
                    f"{origin}: {path}{'.' if path else ''}{key} is not a receipt key"
                    f"{nearest(key, shape)} (known: {', '.join(shape)})"
                )
            _check_part(item, shape.get(key, shape.get("*")), origin, f"{path}.{key}".lstrip("."))
    elif isinstance(shape, list):
        if not isinstance(value, (list, tuple)):
            raise ReceiptError(f"{origin}: {path} should be a list, not {_kind(value)}")
        for index, item in enumerate(value):
            _check_part(item, shape[0], origin, f"{path}.{index}")
    elif not isinstance(value, shape) or isinstance(value, bool):
        raise ReceiptError(f"{origin}: {path} should be {_accepted(shape)}, not {_kind(value)}")


def _accepted(shape: tuple[type, ...]) -> str:
    return "text" if str in shape else "a number" if float in shape else "a whole number"


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file by this text; a reader sees the old text or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)

"""The values that users give with a request: what is accepted, and the sentence for what is not.

Everything here raises `RequestError`. Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sateen.errors import RequestError


def number(name: str, value: Any, accepted: str, fits: Callable[[float], bool]) -> None:
    """Nothing, when the value is a finite number that fits."""
    try:
        is_fine = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of floats
        is_fine = False
    if not is_fine or not fits(value):
        raise RequestError(f"{name} is {value!r:.80}; accepted: {accepted}")


def integer(name: str, value: Any, accepted: str, fits: Callable[[int], bool]) -> None:
    """Nothing, when the value is a whole number that fits; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int) or not fits(value):
        raise RequestError(f"{name} is {value!r:.80}; accepted: {accepted}")


def listed(name: str, value: Any, accepted: str) -> tuple[Any, ...]:
    """The values of a sequence; one string is a list of one, None an empty list."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Sequence | set | frozenset):
        raise RequestError(f"{name} is {value!r:.80}; accepted: {accepted}")
    return tuple(value)


def bias(value: Any) -> dict[int, float] | None:
    """Token ids and what is added to their logits; None where there are none."""
    if value is None or (isinstance(value, Mapping) and not value):
        return None
    if not isinstance(value, Mapping):
        raise RequestError(f"logit_bias is {value!r:.80}; accepted: a mapping from token ids to numbers")
    for token, added in value.items():
        integer("a token id of logit_bias", token, "whole numbers from 0 on", lambda x: x >= 0)
        number(f"logit_bias of token {token}", added, "a number from -100 to 100", lambda x: -100 <= x <= 100)
    return {int(token): float(added) for token, added in value.items()}


def schema(value: Any) -> str | None:
    """The schema as one JSON text; its properties keep their order, which is that of the output."""
    if value is None:
        return None
    try:
        parsed = json.loads(value) if isinstance(value, str | bytes) else dict(value)
        text = json.dumps(parsed, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"json_schema is not JSON: {error}; give a mapping or its JSON text") from None
    if not isinstance(parsed, dict):
        raise RequestError(f'json_schema is {text:.80}; accepted: an object, such as {{"type": "object"}}')
    return text

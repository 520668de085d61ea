"""Reading a demo's `evaluation.json`, of which any part may be missing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sateen.report.page import finite

Table = Mapping[str, Any]
MODELS = ("hybrid", "twin")
KINDS = {"full_attention": "full", "sliding_attention": "sliding", "sparse_attention": "sparse"}
WITH_DRAFTS, NO_DRAFT = "decode, drafts", "decode, no draft"
TWO_SIGMA = 2.0  # an accuracy this many standard errors from chance, or closer, is at chance


def dig(table: Any, *keys: str, kind: type | None = None) -> Any:
    """The value below these keys: a finite number, or of `kind` and not empty; None when there is none."""
    for key in keys:
        if not isinstance(table, Mapping) or key not in table:
            return None
        table = table[key]
    return finite(table) if kind is None else table if isinstance(table, kind) and table else None


def kind_colour(attention: Any) -> str:
    """The palette's name for a kind of attention."""
    return KINDS.get(str(attention), "other")


def at_chance(task: Mapping[str, Any]) -> bool:
    """Whether an accuracy cannot be told from guessing: within two standard errors of chance."""
    accuracy, chance, n = (finite(task.get(key)) for key in ("accuracy", "chance", "n"))
    if accuracy is None or chance is None:
        return False
    error = math.sqrt(max(chance * (1 - chance), 0.0) / n) if n else 0.0
    return accuracy <= chance + TWO_SIGMA * error


def speeds(model: Mapping[str, Any]) -> dict[str, float | int | None]:
    """Median speed by what was measured."""
    return {str(row.get("what")): finite(row.get("median")) for row in model.get("speed") or []}


def train_speed(model: Mapping[str, Any]) -> float | None:
    """Tokens trained per second over all stages; None when either number is missing."""
    tokens, seconds = finite(model.get("train_tokens")), finite(model.get("train_s"))
    return tokens / seconds if tokens is not None and seconds else None

"""What got worse: the rows a demo's evaluation lists, and those its numbers show besides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sateen.report.evaluation import NO_DRAFT, WITH_DRAFTS, at_chance, speeds, train_speed
from sateen.report.page import finite


class Worse(NamedTuple):
    """A row: what, the better value, ours, and what it is compared with."""

    what: str
    before: Any
    after: Any
    compared_with: str


def worse_rows(evaluation: Mapping[str, Any]) -> list[Worse]:
    """The rows of "What got worse": those the evaluation lists, then those its numbers show besides."""
    listed = [
        Worse(str(row.get("what")), row.get("before"), row.get("after"), "as evaluated")
        for row in evaluation.get("worse") or []
    ]
    known = {row.what for row in listed}
    return listed + [row for row in _computed(evaluation) if row.what not in known]


def _computed(evaluation: Mapping[str, Any]) -> Iterator[Worse]:
    models = evaluation.get("models") or {}
    hybrid, twin = models.get("hybrid") or {}, models.get("twin") or {}
    ours, theirs = hybrid.get("quality") or {}, twin.get("quality") or {}
    bits = ours.get("bits_per_byte")
    if _exceeds(bits, theirs.get("bits_per_byte")):
        yield Worse("bits per byte", theirs["bits_per_byte"], bits, "twin")
    for name, value in (evaluation.get("baselines") or {}).items():
        if _exceeds(bits, value):
            yield Worse(f"bits per byte against {name}", value, bits, name)
    for name, task in (ours.get("tasks") or {}).items():
        other = ((theirs.get("tasks") or {}).get(name) or {}).get("accuracy")
        if _exceeds(other, task.get("accuracy")):
            yield Worse(f"{name} accuracy", other, task["accuracy"], "twin")
        if at_chance(task):
            yield Worse(
                f"{name} accuracy is at chance",
                task["chance"],
                task["accuracy"],
                "guessing",
            )
    held, other_held = ((m.get("kv") or {}).get("bytes") for m in (hybrid, twin))
    if _exceeds(held, other_held):
        yield Worse("KV bytes", other_held, held, "twin")
    fast, other_fast = speeds(hybrid), speeds(twin)
    if _exceeds(fast.get(NO_DRAFT), fast.get(WITH_DRAFTS)):
        yield Worse("decode tokens/s with drafts", fast[NO_DRAFT], fast[WITH_DRAFTS], "no draft")
    if _exceeds(other_fast.get(NO_DRAFT), fast.get(NO_DRAFT)):
        yield Worse("decode tokens/s, no draft", other_fast[NO_DRAFT], fast[NO_DRAFT], "twin")
    trained, other_trained = train_speed(hybrid), train_speed(twin)
    if _exceeds(other_trained, trained):
        yield Worse("training tokens/s", other_trained, trained, "twin")


def _exceeds(first: Any, second: Any) -> bool:
    """Whether both were measured and the first is larger."""
    a, b = finite(first), finite(second)
    return a is not None and b is not None and a > b

"""Interleaved measurements and when a bar holds: the arithmetic of `engine.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from _results import quartiles

MIN_PAIRS = 9
LOWER_QUARTILE = 0.93  # of the bar: a median that stands on a few lucky pairs does not hold it


def interleave(
    sides: Mapping[str, Callable[[int], float]], rounds: int, *, warmup: int = 1
) -> dict[str, list[float]]:
    """What each side measured in each round, in the order of the rounds.

    Args:
        sides: name -> measurement of one round; it gets the round's number, so that all sides of a round can
            do the same work; warm-up rounds have numbers too and are not kept.
        rounds: that are kept.
        warmup: rounds before them.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmup + rounds):
        # The order alternates, so that neither side always runs on what the other left behind.
        for name in sides if number % 2 == 0 else reversed(list(sides)):
            value = sides[name](number)
            if number >= warmup:
                found[name].append(value)
    return found


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours over theirs, pair by pair."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def verdict(values: Sequence[float], bar: float | None) -> str:
    """`holds`, `fails`, or why neither can be said of these ratios; larger is better.

    A bar holds when the median of at least 9 pairs meets it and the lower quartile is at least 0.93 of it.
    """
    if bar is None:
        return "no bar"
    if len(values) < MIN_PAIRS:
        return f"too few pairs ({len(values)} of {MIN_PAIRS})"
    found = quartiles(values)
    return "holds" if found["median"] >= bar and found["p25"] >= LOWER_QUARTILE * bar else "fails"


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median and quartiles with so many digits; one value is all three."""
    found = quartiles(values) if len(values) > 1 else dict.fromkeys(("median", "p25", "p75"), values[0])
    return {key: float(f"{value:.{digits}g}") for key, value in found.items()}


def row(
    what: str, ours: tuple[str, Sequence[float]], peer: tuple[str, Sequence[float]], *,
    unit: str, bar: float | None = None, target: float | None = None, ratio: Sequence[float] | None = None,
    **notes: Any,
) -> dict[str, Any]:  # fmt: skip
    """A comparison with the quartiles of both sides and of the pairs' ratio.

    Args:
        ours: name and what was measured, a value per round.
        peer: the same of the other side.
        ratio: what the bar is for, larger is better; ours over theirs when None.
        notes: kept beside the numbers.
    """
    found = ratios(ours[1], peer[1]) if ratio is None else ratio
    return {
        "what": what, "unit": unit, "pairs": len(found),
        "ours": {"name": ours[0], **spread(ours[1])}, "peer": {"name": peer[0], **spread(peer[1])},
        "ratio": spread(found), "bar": bar, "target": target, "verdict": verdict(found, bar), **notes,
    }  # fmt: skip


def missing(
    what: str, ours: str, peer: str, state: str, why: str, *, bar: float | None = None
) -> dict[str, Any]:
    """The row of a comparison that could not be made; `state` is `not measured`, `not built` or `failed`."""
    names = {"ours": {"name": ours}, "peer": {"name": peer}}
    return {"what": what, **names, "bar": bar, "verdict": state, "why": why}


def limit(what: str, value: float, allowed: float, *, unit: str, **notes: Any) -> dict[str, Any]:
    """A number that is measured once and must not be larger than what is allowed."""
    return {
        "what": what, "unit": unit, "value": float(f"{value:.5g}"), "allowed": float(f"{allowed:.5g}"),
        "verdict": "holds" if value <= allowed else "fails", **notes,
    }  # fmt: skip


def line(found: Mapping[str, Any]) -> str:
    """A row for people."""
    if "ratio" in found:
        a, b, r = found["ours"], found["peer"], found["ratio"]
        sides = f"{a['name']} {_range(a)} | {b['name']} {_range(b)} {found['unit']}"
        bar = "" if found["bar"] is None else f" (bar {found['bar']:g}"
        bar += f", target {found['target']:g})" if bar and found["target"] else ")" if bar else ""
        words = f"{sides} | ratio {r['median']:.3f}, lower quartile {r['p25']:.3f}{bar}"
    elif "value" in found:
        words = f"{found['value']:g} {found['unit']}, allowed {found['allowed']:g}"
    else:
        words = f"{found['ours']['name']} | {found['peer']['name']}: {found['why']}"
    return f"{found['what']}: {words}: {found['verdict'].upper()}"


def _range(values: Mapping[str, Any]) -> str:
    return f"{values['median']:g} ({values['p25']:g} to {values['p75']:g})"

"""`sateen receipt A [B]`: one receipt as tables, or two side by side."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from sateen.receipt.markdown import number, quality_rows, table
from sateen.receipt.schema import Receipt


def main(first: str, second: str | None = None, *, json: bool = False) -> int:
    """Prints a receipt, or compares two, and returns the exit code.

    Args:
        first: a receipt file, or a run or model folder that holds one.
        second: another to compare it with.
        json: print JSON: the receipt, or a list of `{"what", "first", "second"}`.
    """
    a = Receipt.read(first)
    if second is None:
        sys.stdout.write(a.to_json() if json else a.to_markdown())
        return 0
    rows = compare(a, Receipt.read(second))
    if json:
        import json as codec

        print(codec.dumps(rows, indent=2))
    else:
        cells = [[r["what"], number(r["first"]), number(r["second"]), _ratio(r)] for r in rows]
        print(table(["what", first, second, "ratio"], cells))
    return 0


def compare(first: Receipt, second: Receipt) -> list[dict[str, Any]]:
    """`{"what", "first", "second"}` for every number that either receipt has; None where one lacks it."""
    a, b = dict(_numbers(first)), dict(_numbers(second))
    return [{"what": key, "first": a.get(key), "second": b.get(key)} for key in {**a, **b}]


def _numbers(receipt: Receipt) -> Iterator[tuple[str, Any]]:
    yield from quality_rows(receipt.quality)
    if "weights" in receipt.bytes:
        yield "weights (bytes)", receipt.bytes["weights"]
    for kv in receipt.bytes.get("kv_allocated", []):
        yield f"KV allocated at context {kv.get('context')} (bytes)", kv.get("bytes")
    for speed in receipt.speed:
        yield f"{speed.get('what')} ({speed.get('unit')})", speed.get("median")
    if "acceptance_length" in receipt.draft:
        yield "acceptance length (tokens)", receipt.draft["acceptance_length"]


def _ratio(row: dict[str, Any]) -> str:
    a, b = row["first"], row["second"]
    return f"{b / a:.3f}" if a and b is not None else "-"

"""The prompts of `int8_attention.py`: full and half INT8 beside torch's attention, in several goes if needed.

Long prompts take minutes a row, so every round is kept in a file as soon as it is measured. The same command
goes on where an earlier one was ended, or stopped by `--seconds`. Rounds of another revision or number of
threads do not count.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _int8_speed import seconds, show
from _pairs import ratios, row
from torch.nn import functional as F

from sateen import ops
from sateen.receipt import write_atomically

HEADS = 8
BAR = {64: 1.5, 128: 1.3}  # at 2,048 tokens and more
TARGET = {64: 2.5, 128: None}
LONG = 8192  # tokens from which a round takes so long that it needs none before it to warm up
COMPARED = (
    ("int8 float32", "sdpa float32"),
    ("int8 bfloat16", "sdpa bfloat16"),
    ("half float32", "sdpa float32"),
)
Times = dict[str, list[float]]


class Rounds:
    """What was measured so far: milliseconds of each side of each row, a value per round.

    Attributes:
        revision: the commit; None for a checkout with changes, whose rounds do not count later.
        threads: that torch and the kernels use.
        tested: the kernels' tests passed at this revision.
    """

    def __init__(self, file: Path, revision: str | None, *, is_dirty: bool):
        self._file, self.revision = file, None if is_dirty else revision
        found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        self.threads = torch.get_num_threads()
        is_same = self.revision is not None and found.get("revision") == self.revision
        is_alike = is_same and found["threads"] == self.threads
        self._rows: dict[str, Times] = found["rows"] if is_alike else {}
        self.tested: bool = is_same and found["tested"]

    def of(self, what: str) -> Times:
        """The times of one row; empty where there are none."""
        return self._rows.get(what, {})

    def add(self, what: str, times: dict[str, float]) -> None:
        """Keeps one more round of a row."""
        kept = self._rows.setdefault(what, {})
        for name, value in times.items():
            kept.setdefault(name, []).append(value)
        self.save()

    def save(self) -> None:
        """Writes the file."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        table = {"revision": self.revision, "threads": self.threads, "tested": self.tested}
        table["rows"] = self._rows
        write_atomically(self._file, json.dumps(table) + "\n")


def attentions(N: int, H: int, causal: bool) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, N, H, generator=generator) for _ in range(3))
    low = [x.bfloat16() for x in (q, k, v)]
    return {
        "sdpa float32": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
        "sdpa bfloat16": lambda: F.scaled_dot_product_attention(*low, is_causal=causal),
        "int8 float32": lambda: ops.int8_sdpa(q, k, v, causal=causal),
        "int8 bfloat16": lambda: ops.int8_sdpa(*low, causal=causal),
        "half float32": lambda: ops.int8_sdpa(q, k, v, causal=causal, pv="float"),
    }


def words(N: int, H: int, causal: bool) -> str:
    return f"{N} tokens, {HEADS} heads of {H}, {'causal' if causal else 'no mask'}"


def prefill(
    tokens: Sequence[int], channels: Sequence[int], pairs: int, rounds: Rounds, stop_s: float | None = None
) -> list[dict[str, Any]]:
    """Rows of full and half INT8 against torch in float32 and bfloat16, short prompts first.

    Args:
        tokens, channels: of the rows; each with and without a causal mask.
        pairs: of each comparison.
        rounds: gets every round, and has those of earlier runs.
        stop_s: seconds after which no round begins; a row that is not complete says so in its verdict.
    """
    began = time.monotonic()
    rows = []
    for N, H, causal in product(tokens, channels, (False, True)):
        what = words(N, H, causal)
        measure(what, N, H, causal, pairs, rounds, None if stop_s is None else began + stop_s)
        times = rounds.of(what)
        if len(next(iter(times.values()), [])) < 2:
            print(f"{what}: not measured in this time; the same command goes on", file=sys.stderr, flush=True)
            continue
        for ours, peer in COMPARED:
            counts = ours != "half float32" and N >= 2048
            rows.append(
                row(
                    what, (ours, times[ours]), (peer, times[peer]), unit="ms",
                    bar=BAR.get(H) if counts else None, target=TARGET.get(H) if counts else None,
                    ratio=ratios(times[peer], times[ours]), revision=rounds.revision,
                    threads=rounds.threads,
                )
            )  # fmt: skip
            show(rows[-1])
    return rows


def measure(
    what: str, N: int, H: int, causal: bool, pairs: int, rounds: Rounds, deadline: float | None
) -> None:
    """Adds the rounds that a row still lacks, as far as there is time."""
    sides: dict[str, Callable[[int], float]] = {}
    for number in range(len(next(iter(rounds.of(what).values()), [])), pairs):
        if deadline is not None and time.monotonic() > deadline:
            return
        if not sides:
            sides = {name: seconds(run) for name, run in attentions(N, H, causal).items()}
            for side in sides.values() if N < LONG else ():
                side(0)
        # The order alternates, so that neither side always runs on what the other left behind.
        names = list(sides) if number % 2 == 0 else list(reversed(sides))
        rounds.add(what, {name: sides[name](number) for name in names})
        print(f"    {what}: round {number + 1} of {pairs}", file=sys.stderr, flush=True)

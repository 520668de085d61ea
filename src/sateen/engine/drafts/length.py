"""How many drafts pay: a choice from measured step times and acceptance, revised while the engine runs.

With B sequences and k drafts each, a round takes about `a + b B (1 + k)` seconds in the trunk and `c` in the
heads, which all run as soon as one of them drafts, and emits `1 + p1 + p1 p2 + ... + p1...pk` tokens per
sequence. The best k has the most tokens per second; 0 leaves the heads out. Source of the trade-off:
Leviathan et al. 2023 (arXiv 2211.17192, theorem 3.8); the linear step cost and the constants are ours.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

log = logging.getLogger("sateen.engine")

WARM_ROUNDS = 8  # first rounds of every kind are slow (allocation, code paths) and not believed
DECIDE_ROUNDS = 32  # rounds between decisions
MEMORY = 0.98  # weight of the past per round: about fifty rounds count
MARGIN = 1.03  # drafts must beat plain decoding by this much, or timing noise would decide
PROBE_REQUESTS = 16  # while drafts are off, one request in so many tries them again


@dataclass
class StepCost:
    """A decayed least-squares line of seconds over rows."""

    weight: float = 0.0
    rows: float = 0.0
    rows2: float = 0.0
    seconds: float = 0.0
    product: float = 0.0

    def add(self, rows: int, seconds: float) -> None:
        """Counts one step."""
        self.weight = MEMORY * self.weight + 1.0
        self.rows = MEMORY * self.rows + rows
        self.rows2 = MEMORY * self.rows2 + rows * rows
        self.seconds = MEMORY * self.seconds + seconds
        self.product = MEMORY * self.product + rows * seconds

    def line(self) -> tuple[float, float]:
        """Seconds of a step and of each row in it; a slope below 0 is noise and counts as 0."""
        spread = self.weight * self.rows2 - self.rows**2
        mean = self.seconds / self.weight if self.weight else 0.0
        if spread <= 1e-9 * self.weight * self.rows2:
            return mean, 0.0
        slope = max(0.0, (self.weight * self.product - self.rows * self.seconds) / spread)
        return max(0.0, mean - slope * self.rows / self.weight), slope


@dataclass
class DraftLength:
    """The running choice.

    Attributes:
        num_heads: most drafts per round.
        length: drafts that the next rounds verify; 0 when they do not pay.
        decisions: what was decided when, for statistics and receipts: dictionaries with `round`, `length`,
            `sequences`, `acceptance` by position and the `tokens_per_s` promised for 0, 1, ... drafts.
    """

    num_heads: int
    length: int = -1
    decisions: list[dict[str, object]] = field(default_factory=list)
    trunk: StepCost = field(default_factory=StepCost)
    _heads_s: float = 0.0
    _heads_weight: float = 0.0
    _drafted: list[float] = field(default_factory=list)
    _accepted: list[float] = field(default_factory=list)
    _rounds: int = 0
    _requests_off: int = 0

    def __post_init__(self) -> None:
        self.length = self.num_heads if self.length < 0 else self.length
        self._drafted = [0.0] * self.num_heads
        self._accepted = [0.0] * self.num_heads

    def wants_drafts(self) -> bool:
        """Whether a request that starts now runs the heads: always while drafts pay, else now and then."""
        if self.length:
            return True
        self._requests_off += 1
        return self._requests_off % PROBE_REQUESTS == 0

    def verify_length(self) -> int:
        """Drafts that the next round verifies; now and then one fewer, or none, to see what rows cost."""
        wanted = self.length or self.num_heads
        if self._rounds % 8 != 7:
            return wanted
        return wanted - 1 if self._rounds % 16 == 7 else 0

    def record(
        self, *, sequences: int, rows: int, trunk_s: float, heads_s: float, drafts: Sequence[tuple[int, int]]
    ) -> bool:
        """Counts one round in which every sequence decoded; true where `length` was decided after it.

        Args:
            sequences: in the round.
            rows: of the trunk's pass, drafts included.
            trunk_s: seconds of the trunk and of choosing tokens.
            heads_s: seconds of the heads; 0 when they did not run.
            drafts: for each sequence the drafts it verified and those it kept.
        """
        self._rounds += 1
        if self._rounds <= WARM_ROUNDS:
            return False
        self.trunk.add(rows, trunk_s)
        if heads_s:
            self._heads_s = MEMORY * self._heads_s + heads_s
            self._heads_weight = MEMORY * self._heads_weight + 1.0
        for verified, kept in drafts:
            # Position j was put to the test only if all drafts before it were kept.
            for j in range(min(verified, kept + 1)):
                self._drafted[j] = MEMORY * self._drafted[j] + 1.0
                self._accepted[j] = MEMORY * self._accepted[j] + (j < kept)
        if self._rounds % DECIDE_ROUNDS:
            return False
        self._decide(sequences)
        return True

    def tokens_per_s(self, length: int, sequences: int) -> float:
        """What the measurements promise for a number of drafts, over all sequences."""
        step, row = self.trunk.line()
        seconds = step + row * sequences * (1 + length)
        if length and self._heads_weight:
            seconds += self._heads_s / self._heads_weight
        tokens, chain = 1.0, 1.0
        for p in self.acceptance()[:length]:
            chain *= p
            tokens += chain
        return sequences * tokens / seconds if seconds else 0.0

    def acceptance(self) -> list[float]:
        """Share of drafts at each position that were kept, of those whose predecessors were."""
        return [a / d if d else 0.0 for a, d in zip(self._accepted, self._drafted, strict=True)]

    def _decide(self, sequences: int) -> None:
        promised = [self.tokens_per_s(k, sequences) for k in range(self.num_heads + 1)]
        best = max(range(1, self.num_heads + 1), key=promised.__getitem__)
        chosen = best if promised[best] > MARGIN * promised[0] else 0
        if chosen == self.length:
            return
        self.decisions.append(
            {
                "round": self._rounds,
                "sequences": sequences,
                "length": chosen,
                "acceptance": self.acceptance(),
                "tokens_per_s": promised,
            }
        )
        log.info(
            "drafts: %d to %d per round; %d sequences promise %s tokens/s for 0 to %d drafts, acceptance %s",
            self.length,
            chosen,
            sequences,
            ", ".join(f"{x:.0f}" for x in promised),
            self.num_heads,
            ", ".join(f"{p:.0%}" for p in self.acceptance()),
        )
        self.length = chosen

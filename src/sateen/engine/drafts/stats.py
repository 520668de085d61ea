"""Counts of how speculative decoding fared. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class DraftStats:
    """How the drafts of one request, or of many, fared.

    Attributes:
        rounds: trunk passes that verified drafts.
        emitted: tokens that those passes emitted.
        drafted: per position, drafts that were verified.
        accepted: per position, drafts that were kept.
    """

    rounds: int = 0
    emitted: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def record(self, drafted: int, accepted: int, emitted: int) -> None:
        """Counts one pass."""
        self.rounds += 1
        self.emitted += emitted
        missing = drafted - len(self.drafted)
        self.drafted += [0] * missing
        self.accepted += [0] * missing
        for position in range(drafted):
            self.drafted[position] += 1
            self.accepted[position] += position < accepted

    def add(self, other: DraftStats) -> None:
        """Adds another request's counts."""
        for mine, theirs in ((self.drafted, other.drafted), (self.accepted, other.accepted)):
            mine += [0] * (len(theirs) - len(mine))
            for position, count in enumerate(theirs):
                mine[position] += count
        self.rounds += other.rounds
        self.emitted += other.emitted

    @property
    def acceptance_length(self) -> float:
        """Tokens emitted per trunk pass that verified drafts, the bonus token included; 1 without drafts."""
        return self.emitted / self.rounds if self.rounds else 1.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of the drafts at each position that were kept, all earlier ones having been kept too."""
        return [a / d if d else 0.0 for a, d in zip(self.accepted, self.drafted, strict=True)]

"""What passed tests of a programming problem are worth, by difficulty (MiMo-7B §3.3.1).

Tests that few sampled solutions pass are hard. Grouping them into levels once, offline, lets a solution earn
part of the reward for the easy ones. Everything here is arithmetic; `code.py` runs the programs.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal, get_args

from sateen.errors import RewardError, unknown_name

Scheme = Literal["strict", "soft", "vanilla"]

# The report prints no thresholds; these fit the bar colours of its figure 5. Source: ours.
EDGES = (0.3, 0.7)


def difficulty_reward(
    passed: Sequence[bool],
    levels: Sequence[int],
    scheme: Scheme = "strict",
    level_scores: Sequence[float] | None = None,
) -> float:
    """The reward of one solution in [0, 1]; all tests passed is 1 in every scheme.

    Args:
        passed: one verdict per test.
        levels: one level per test, 0 = easiest. Levels without a test do not count.
        scheme: `strict` pays a level only when it and every easier one are passed in full; `soft` pays each
            level by its share of passed tests; `vanilla` is 1 when every test passed, otherwise 0.
        level_scores: the worth of level 0, 1, ...; scaled to a sum of 1 over the levels that have tests.
            Equal when None (the report gives none. Source: ours).

    Raises:
        RewardError: no tests, lengths that differ, a level below 0 or without a score, an unknown scheme, or
            scores that are negative, not finite or all 0.

    Source: MiMo-7B technical report, §3.3.1.
    """
    if not passed or len(passed) != len(levels):
        raise RewardError(
            f"{len(passed)} verdicts and {len(levels)} levels; give one level per test, at least one"
        )
    if min(levels) < 0:
        raise RewardError(f"level {min(levels)} is below 0, the easiest")
    if scheme not in get_args(Scheme):
        raise RewardError(unknown_name("reward scheme", scheme, get_args(Scheme)))
    present = sorted(set(levels))
    scores = _scores(present, level_scores)
    if scheme == "vanilla":
        return float(all(passed))
    shares = [_share_passed(passed, levels, level) for level in present]
    if scheme == "soft":
        return math.fsum(score * share for score, share in zip(scores, shares, strict=True))
    in_full = next((i for i, share in enumerate(shares) if share < 1), len(shares))
    return math.fsum(scores[:in_full])


def levels_from_pass_rates(pass_rates: Sequence[float], edges: Sequence[float] = EDGES) -> list[int]:
    """The level of each test, 0 = easiest: the number of edges above its pass rate.

    A rate equal to an edge belongs to the easier side: with edges (0.3, 0.7), 0.7 is level 0, 0.3 level 1.

    Raises:
        RewardError: a rate or an edge outside of [0, 1], or edges that do not ascend.
    """
    if any(low >= high for low, high in itertools.pairwise(edges)):
        raise RewardError(f"edges {tuple(edges)} should ascend")
    for value in (*pass_rates, *edges):
        if not 0 <= value <= 1:
            raise RewardError(f"{value} is no share of solutions; give pass rates and edges in [0, 1]")
    return [len(edges) - bisect_right(edges, rate) for rate in pass_rates]


def pass_rates(passed_by_solution: Sequence[Sequence[bool]]) -> list[float]:
    """The share of solutions, of all models together, that pass each test; rows are solutions.

    A rate of 0 may mean a broken test: leave such tests out unless a known good solution passes them.

    Raises:
        RewardError: no solutions, or rows of different lengths.
    """
    if not passed_by_solution or len({len(row) for row in passed_by_solution}) != 1:
        raise RewardError("pass rates need at least one solution and one verdict per test for each")
    return [sum(column) / len(column) for column in zip(*passed_by_solution, strict=True)]


def _share_passed(passed: Sequence[bool], levels: Sequence[int], level: int) -> float:
    verdicts = [bool(p) for p, own in zip(passed, levels, strict=True) if own == level]
    return sum(verdicts) / len(verdicts)


def _scores(present: Sequence[int], level_scores: Sequence[float] | None) -> list[float]:
    if level_scores is None:
        return [1 / len(present)] * len(present)
    if present[-1] >= len(level_scores):
        raise RewardError(f"level {present[-1]} has no score; level_scores holds {len(level_scores)}")
    if not all(0 <= score < math.inf for score in level_scores):
        raise RewardError(f"level_scores {tuple(level_scores)} should be finite and at least 0")
    total = math.fsum(level_scores[level] for level in present)
    if total == 0:
        raise RewardError(f"level_scores {tuple(level_scores)} give nothing to the levels that have tests")
    return [level_scores[level] / total for level in present]

"""`benchmarks/_pairs.py`: who runs when, ratios and quartiles, and when a bar holds."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from _pairs import interleave, limit, line, missing, ratios, row, spread, verdict


def test_rounds_go_through_the_sides_in_turn_and_warm_ups_are_not_kept():
    seen = []

    def one(name, number):
        seen.append((number, name))
        return number * 10.0

    found = interleave({name: partial(one, name) for name in "abc"}, 2, warmup=1)
    assert "".join(name for _, name in seen) == "abccbaabc"
    assert [number for number, _ in seen] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert found == {name: [10.0, 20.0] for name in "abc"}


@pytest.mark.parametrize(
    ("values", "bar", "said"),
    [
        ([1.0] * 9, None, "no bar"),
        ([2.0] * 8, 1.0, "too few pairs (8 of 9)"),
        ([1.0] * 9, 1.0, "holds"),
        # Lower quartile of nine, exclusive: halfway between the second and the third.
        ([0.5, 0.93, 0.93, 1, 1, 1, 1, 1, 1], 1.0, "holds"),
        ([0.5, 0.92, 0.93, 1, 1, 1, 1, 1, 1], 1.0, "fails"),
        ([0.99, 0.99, 0.99, 0.99, 0.99, 5, 5, 5, 5], 1.0, "fails"),
        ([1.2, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2, 0.1, 0.1], 1.2, "fails"),
    ],
)
def test_a_bar_holds_by_median_and_lower_quartile(values, bar, said):
    assert verdict(values, bar) == said


def test_ratios_are_pair_by_pair():
    """Medians 3 and 3 would give 1; the pairs' ratios say something else."""
    mine, theirs = [1.0, 3.0, 8.0], [4.0, 3.0, 2.0]
    assert ratios(mine, theirs) == [0.25, 1.0, 4.0]
    with pytest.raises(ValueError, match="zip"):
        ratios(mine, theirs[:2])


def test_spread_is_numpys_weibull_quartiles():
    values = np.random.default_rng(0).lognormal(size=11)
    wanted = np.quantile(values, [0.25, 0.5, 0.75], method="weibull")
    found = spread(list(values), digits=15)
    assert np.allclose([found["p25"], found["median"], found["p75"]], wanted)
    assert spread([123.456], digits=4) == {"median": 123.5, "p25": 123.5, "p75": 123.5}


def test_a_row_says_all_of_a_comparison():
    found = row("x", ("we", [2.0] * 9), ("they", [1.0] * 9), unit="tokens/s", bar=1.5, target=2.5, note=7)
    assert (found["ratio"]["median"], found["pairs"], found["verdict"], found["note"]) == (2.0, 9, "holds", 7)
    assert line(found) == (
        "x: we 2 (2 to 2) | they 1 (1 to 1) tokens/s | ratio 2.000, lower quartile 2.000 "
        "(bar 1.5, target 2.5): HOLDS"
    )
    # What is seconds on both sides has a ratio of its own.
    found = row("s", ("we", [2.0] * 9), ("torch", [1.0] * 9), unit="s", bar=1.0, ratio=[1.25] * 9)
    assert (found["ratio"]["median"], found["verdict"]) == (1.25, "holds")
    assert line(missing("x", "we", "they", "not built", "no such weights")).endswith(
        "no such weights: NOT BUILT"
    )


@pytest.mark.parametrize(("value", "said"), [(99.9, "holds"), (100.0, "holds"), (100.1, "fails")])
def test_a_limit_holds_up_to_what_is_allowed(value, said):
    found = limit("x", value, 100.0, unit="MB", parts=3)
    assert (found["verdict"], found["parts"]) == (said, 3)
    assert line(found) == f"x: {value:g} MB, allowed 100: {said.upper()}"

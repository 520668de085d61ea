"""The choice of a draft length, against rounds whose costs and acceptance are set by hand."""

from __future__ import annotations

import random

import pytest

from sateen.engine.drafts.length import DECIDE_ROUNDS, PROBE_REQUESTS, DraftLength, StepCost


def run(choice: DraftLength, rounds: int, *, step: float, row: float, heads: float, p: list[float]) -> None:
    """Rounds of one sequence on a machine with these costs and these chances of acceptance."""
    rng = random.Random(0)
    for _ in range(rounds):
        verified = choice.verify_length()
        kept = 0
        while kept < verified and rng.random() < p[kept]:
            kept += 1
        choice.record(
            sequences=1,
            rows=1 + verified,
            trunk_s=step + row * (1 + verified),
            heads_s=heads,
            drafts=[(verified, kept)],
        )


def test_a_line_is_found_from_its_points() -> None:
    cost = StepCost()
    for rows in (1, 2, 3, 2, 1, 4):
        cost.add(rows, 0.5 + 0.25 * rows)
    assert cost.line() == pytest.approx((0.5, 0.25))


def test_one_row_count_gives_a_flat_line_and_falling_costs_count_as_flat() -> None:
    flat = StepCost()
    for _ in range(5):
        flat.add(3, 2.0)
    assert flat.line() == pytest.approx((2.0, 0.0))
    falling = StepCost()
    for rows in (1, 2, 3):
        falling.add(rows, 4.0 - rows)
    step, row = falling.line()
    assert row == 0.0
    assert step == pytest.approx(falling.seconds / falling.weight)


def test_cheap_rows_and_good_heads_keep_all_drafts() -> None:
    choice = DraftLength(2)
    run(choice, 4 * DECIDE_ROUNDS, step=10.0, row=0.1, heads=1.0, p=[0.8, 0.7])
    assert choice.length == 2
    # By hand: (1 + 0.8 + 0.56) tokens in 10 + 0.3 + 1 seconds; chances are drawn, so within a tenth.
    assert choice.tokens_per_s(2, 1) == pytest.approx(2.36 / 11.3, rel=0.1)


def test_heads_that_cost_more_than_they_bring_are_turned_off() -> None:
    choice = DraftLength(2)
    run(choice, 2 * DECIDE_ROUNDS, step=1.0, row=0.0, heads=2.0, p=[0.8, 0.7])
    assert choice.length == 0
    assert choice.decisions[-1]["length"] == 0


def test_rows_that_cost_as_much_as_steps_turn_drafts_off() -> None:
    # Two rows take twice the time of one, and two tokens come out only sometimes.
    choice = DraftLength(1)
    run(choice, 2 * DECIDE_ROUNDS, step=0.0, row=1.0, heads=0.01, p=[0.9])
    assert choice.length == 0


def test_a_weak_second_head_is_not_verified() -> None:
    choice = DraftLength(2)
    run(choice, 4 * DECIDE_ROUNDS, step=1.0, row=0.2, heads=0.05, p=[0.9, 0.02])
    assert choice.length == 1


def test_when_off_some_requests_try_again_and_good_rounds_bring_drafts_back() -> None:
    choice = DraftLength(1, length=0)
    asked = [choice.wants_drafts() for _ in range(2 * PROBE_REQUESTS)]
    assert sum(asked) == 2
    run(choice, 2 * DECIDE_ROUNDS, step=10.0, row=0.1, heads=0.5, p=[0.9])
    assert choice.length == 1
    assert choice.wants_drafts()


def test_a_draft_behind_a_rejected_one_says_nothing_of_its_head() -> None:
    choice = DraftLength(3)
    for _ in range(DECIDE_ROUNDS):
        choice.record(sequences=1, rows=4, trunk_s=1.0, heads_s=0.1, drafts=[(3, 1)])
    assert choice.acceptance() == pytest.approx([1.0, 0.0, 0.0])

"""Difficulty levels: values worked by hand from the report's two schemes."""

import random

import pytest

from sateen.errors import RewardError
from sateen.rewards.code import difficulty_reward, levels_from_pass_rates, pass_rates

# Two easy tests, three medium ones, one hard.
LEVELS = [0, 0, 1, 1, 1, 2]
SCORES = [0.2, 0.3, 0.5]


@pytest.mark.parametrize("scheme", ["strict", "soft", "vanilla"])
def test_all_tests_passed_is_one(scheme):
    assert difficulty_reward([True] * 6, LEVELS, scheme) == 1
    assert difficulty_reward([True] * 6, LEVELS, scheme, SCORES) == 1
    assert difficulty_reward([False] * 6, LEVELS, scheme, SCORES) == 0


def test_one_medium_test_failed():
    passed = [True, True, True, False, True, True]
    assert difficulty_reward(passed, LEVELS, "strict", SCORES) == pytest.approx(0.2)
    assert difficulty_reward(passed, LEVELS, "soft", SCORES) == pytest.approx(0.2 + 0.5 + 0.3 * 2 / 3)
    assert difficulty_reward(passed, LEVELS, "vanilla", SCORES) == 0
    assert difficulty_reward(passed, LEVELS) == pytest.approx(1 / 3)  # strict, equal scores


@pytest.mark.parametrize(
    ("passed", "strict", "soft"),
    [
        ([1, 1, 1, 1, 1, 0], 0.5, 0.5),
        ([0, 1, 1, 1, 1, 1], 0.0, 0.1 + 0.3 + 0.5),
        ([1, 1, 0, 0, 0, 0], 0.2, 0.2),
        ([0, 0, 0, 0, 0, 1], 0.0, 0.5),
        ([1, 0, 1, 0, 0, 0], 0.0, 0.1 + 0.1),
    ],
)
def test_worked_by_hand(passed, strict, soft):
    assert difficulty_reward(passed, LEVELS, "strict", SCORES) == pytest.approx(strict)
    assert difficulty_reward(passed, LEVELS, "soft", SCORES) == pytest.approx(soft)


def test_scores_are_shared_among_levels_that_have_tests():
    # Level 1 is empty: 0.2 and 0.5 become 2/7 and 5/7.
    assert difficulty_reward([True, False], [0, 2], "strict", SCORES) == pytest.approx(2 / 7)
    assert difficulty_reward([False, True], [0, 2], "soft", SCORES) == pytest.approx(5 / 7)
    assert difficulty_reward([True, False], [0, 2]) == pytest.approx(1 / 2)
    # Only proportions matter.
    assert difficulty_reward([True, False], [0, 1], "soft", [3, 1]) == pytest.approx(3 / 4)


def test_properties_of_random_verdicts():
    rng = random.Random(0)
    partial = 0
    for _ in range(300):
        n = rng.randint(1, 12)
        levels = [rng.randrange(3) for _ in range(n)]
        passed = [rng.random() < 0.8 for _ in range(n)]
        strict, soft = (difficulty_reward(passed, levels, scheme, SCORES) for scheme in ("strict", "soft"))
        assert 0 <= strict <= soft <= 1 + 1e-12
        partial += 0 < strict < soft
        order = rng.sample(range(n), n)
        for scheme in ("strict", "soft", "vanilla"):
            permuted = difficulty_reward(
                [passed[i] for i in order], [levels[i] for i in order], scheme, SCORES
            )
            assert permuted == pytest.approx(difficulty_reward(passed, levels, scheme, SCORES))
        one_level = difficulty_reward(passed, [1] * n, "strict", SCORES)
        assert one_level == difficulty_reward(passed, [1] * n, "vanilla")
    assert partial > 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "0 verdicts and 0 levels"),
        (([True], [0, 1]), "1 verdicts and 2 levels"),
        (([True], [-1]), "level -1 is below 0"),
        (([True], [0], "strickt"), "did you mean strict"),
        (([True], [2], "soft", [0.5, 0.5]), "level 2 has no score"),
        (([True], [0], "soft", [float("nan")]), "finite"),
        (([True], [0], "soft", [-1.0]), "at least 0"),
        (([True], [0], "soft", [0.0, 1.0]), "give nothing"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(RewardError, match=message):
        difficulty_reward(*arguments)


def test_levels_come_from_pass_rates():
    rates = [1.0, 0.7, 0.69, 0.3, 0.29, 0.0]
    assert levels_from_pass_rates(rates) == [0, 0, 1, 1, 2, 2]
    assert levels_from_pass_rates(rates, edges=[0.5]) == [0, 0, 0, 1, 1, 1]
    assert levels_from_pass_rates(rates, edges=[]) == [0] * 6
    for wrong in ([0.7, 0.3], [0.3, 0.3]):
        with pytest.raises(RewardError, match="ascend"):
            levels_from_pass_rates(rates, edges=wrong)
    with pytest.raises(RewardError, match=r"1\.5 is no share"):
        levels_from_pass_rates([1.5])


def test_pass_rates_pool_all_solutions():
    assert pass_rates([[1, 0, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]]) == [1.0, 0.25, 0.25]
    for wrong in ([], [[True], [True, False]]):
        with pytest.raises(RewardError, match="one verdict per test"):
            pass_rates(wrong)

"""Schedules at hand-computed points."""

import pytest

from sateen.config import ConstantSchedule, CosineSchedule, WSDSchedule
from sateen.train.schedule import build_schedule


def test_constant_warms_up_linearly():
    factor = build_schedule(ConstantSchedule(warmup_tokens=100), 1000)
    assert [factor(t) for t in (0, 25, 100, 999, 5000)] == [0.0, 0.25, 1.0, 1.0, 1.0]


def test_constant_without_warmup_starts_at_the_peak():
    assert build_schedule(ConstantSchedule(), 10)(0) == 1.0


def test_cosine_by_hand():
    """Half way 0.1 + 0.9 / 2; a third of the way cos(60 deg) = 1/2, so 0.1 + 0.9 * 0.75."""
    factor = build_schedule(CosineSchedule(warmup_tokens=100, final_fraction=0.1), 1300)
    points = {50: 0.5, 100: 1.0, 500: 0.775, 700: 0.55, 1300: 0.1, 2000: 0.1}
    assert {t: factor(t) for t in points} == pytest.approx(points)


def test_warmup_stable_decay_by_hand():
    factor = build_schedule(WSDSchedule(warmup_tokens=10, decay_tokens=40, final_fraction=0.2), 100)
    points = {0: 0.0, 5: 0.5, 10: 1.0, 60: 1.0, 70: 0.8, 80: 0.6, 100: 0.2, 120: 0.2}
    assert {t: factor(t) for t in points} == pytest.approx(points)


def test_no_decay_stays_at_the_peak_to_the_end():
    factor = build_schedule(WSDSchedule(decay_tokens=0), 100)
    assert [factor(t) for t in (0, 50, 99.5)] == [1.0, 1.0, 1.0]

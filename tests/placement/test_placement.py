"""Placement against EPLB's published example, brute force, and its own promises."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sateen.errors import ConfigError, ShapeError
from sateen.placement import (
    balancedness_mean_of_ratios,
    balancedness_ratio_of_sums,
    contiguous,
    plan,
)
from sateen.placement.balance import bound, from_slots

README = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    float,
)


def test_eplb_readme():
    # The example in EPLB's README, deepseek-ai/EPLB (MIT).
    made = plan(README, 8, 16, method="eplb", groups=4, nodes=2)
    assert made.phy2log_LP.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert made.logcnt_LE.tolist() == [
        [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1],
        [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1],
    ]
    assert made.log2phy_LEC[0, 5].tolist() == [0, 2]
    assert made.log2phy_LEC[0, 7].tolist() == [3, -1]


def test_eplb_without_dividing_groups_is_global():
    a = plan(README, 8, 16, method="eplb", groups=3, nodes=2)
    b = plan(README, 8, 16, method="eplb")
    assert a.phy2log_LP.tolist() == b.phy2log_LP.tolist()


def test_hand_worked():
    # Loads 8 4 2 2 on two ranks of two slots: 8 sits with a 2, the best there is.
    made = plan(np.array([[8.0, 4, 2, 2]]), 2, 4)
    assert sorted(made.rank_loads(np.array([[8.0, 4, 2, 2]]))[0]) == [6, 10]
    assert bound(np.array([[8.0, 4, 2, 2]]), 2) == 1.0
    # Six slots: extra copies to 8 (4 each), then to 4: the first of the equal 4s is expert 0, capped at two.
    made = plan(np.array([[8.0, 4, 2, 2]]), 2, 6)
    assert made.logcnt_LE.tolist() == [[2, 2, 1, 1]]
    assert made.rank_loads(np.array([[8.0, 4, 2, 2]])).tolist() == [[8, 8]]


def test_both_words():
    loads = np.array([[[1.0, 3]], [[4.0, 4]]])
    assert balancedness_ratio_of_sums(loads) == pytest.approx((2 + 4) / (3 + 4))
    assert balancedness_mean_of_ratios(loads) == pytest.approx((2 / 3 + 1) / 2, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    experts=st.integers(1, 12), ranks=st.integers(1, 5), room=st.integers(0, 3), seed=st.integers(0, 2**16),
    ties=st.booleans(),
)  # fmt: skip
def test_promises(experts, ranks, room, seed, ties):
    slots = min(-(-experts // ranks) + room, experts) * ranks
    rng = np.random.default_rng(seed)
    load = rng.lognormal(0, 1.5, (2, experts)) if not ties else rng.integers(0, 3, (2, experts)).astype(float)
    made = plan(load, ranks, slots)
    assert made.phy2log_LP.shape == (2, slots)
    assert (made.logcnt_LE >= 1).all()
    assert (made.logcnt_LE.sum(1) == slots).all()
    np.testing.assert_allclose(made.rank_loads(load).sum(-1), load.sum(-1))
    for l in range(2):
        for rank in made.phy2log_LP[l].reshape(ranks, -1):
            assert len(set(rank)) == len(rank)
        for e in range(experts):
            at = made.log2phy_LEC[l, e]
            assert (made.phy2log_LP[l, at[at >= 0]] == e).all()
            assert (at >= 0).sum() == made.logcnt_LE[l, e]
    drifted = load * rng.lognormal(0, 0.5, load.shape)
    again = plan(drifted, ranks, slots, previous=made)
    assert (again.rank_loads(drifted).max(-1) <= made.rank_loads(drifted).max(-1) * (1 + 1e-9)).all()


def test_brute_force():
    rng = np.random.default_rng(3)
    for _ in range(20):
        load = rng.lognormal(0, 1, 8)
        best = min(
            max(load[np.array(side) == 1].sum(), load[np.array(side) == 0].sum())
            for side in product((0, 1), repeat=8)
            if sum(side) == 4
        )
        worst = plan(load[None], 2, 8).rank_loads(load[None]).max()
        assert best <= worst <= 1.03 * best  # pairwise swaps end in a local optimum


def test_swapping_beats_eplb_without_copies():
    load = np.random.default_rng(0).lognormal(0, 0.6, (5, 64))
    ours, theirs = (plan(load, 8, 64, method=m).rank_loads(load).max(-1) for m in ("ours", "eplb"))
    assert (ours <= theirs).all()
    assert (ours < theirs).any()


def test_relabelling_moves_nothing_that_can_stay():
    load = np.random.default_rng(1).lognormal(0, 1, (1, 16))
    made = plan(load, 4, 16)
    shuffled = from_slots(made.phy2log_LP.reshape(4, 4)[[2, 0, 3, 1]].reshape(1, -1), 16, 4)
    again = plan(load, 4, 16, previous=shuffled)
    assert again.moves_L.tolist() == [0]


def test_moves_are_counted():
    old = from_slots(np.array([[0, 1, 2, 3]]), 4, 2)
    load = np.array([[4.0, 3, 2, 1]])  # 0 and 3 together, 1 and 2: one exchange, two experts
    assert plan(load, 2, 4, previous=old).moves_L.tolist() == [2]


@pytest.mark.parametrize(
    ("ranks", "slots", "more", "words"),
    [
        (3, 8, {}, "multiple of ranks"),
        (2, 2, {}, "at least one per expert"),
        (2, 10, {}, "two copies"),
        (2, 4, {"method": "elpb"}, "did you mean eplb"),
        (2, 4, {"method": "eplb", "groups": 3}, "divide 4 experts"),
    ],
)
def test_bad_numbers(ranks, slots, more, words):
    with pytest.raises(ConfigError, match=words):
        plan(np.ones((1, 4)), ranks, slots, **more)


def test_bad_loads():
    with pytest.raises(ConfigError, match="not negative"):
        plan(np.array([[1.0, -1]]), 1, 2)
    with pytest.raises(ShapeError, match="expected"):
        plan(np.ones(4), 1, 4)
    with pytest.raises(ShapeError, match="earlier plan"):
        plan(np.ones((1, 4)), 2, 4, previous=contiguous(2, 4, 2, 4))

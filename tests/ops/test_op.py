"""Choosing among backends: priority, refusals, names."""

from __future__ import annotations

import logging

import pytest

from sateen.errors import BackendUnavailable, SateenError
from sateen.ops.op import Op


def double(x, *, by=2):
    return ("reference", x * by)


@pytest.fixture
def op():
    made = Op("double", double)

    @made.register("slow", priority=5, why_not=lambda x, *, by=2: None)
    def slow(x, *, by=2):
        return ("slow", x * by)

    @made.register("fast", priority=10, why_not=lambda x, *, by=2: None if x < 100 else f"{x} is too large")
    def fast(x, *, by=2):
        return ("fast", x * by)

    return made


def test_auto_takes_the_highest_priority_that_can_run(op):
    assert op(7) == ("fast", 14)
    assert op(100, by=3) == ("slow", 300)
    assert op.choose("auto", 100).name == "slow"


def test_a_named_backend_runs_even_if_a_faster_one_could(op):
    assert op(7, backend="reference") == ("reference", 14)
    assert op(7, backend="slow") == ("slow", 14)


def test_a_named_backend_that_cannot_run_is_refused_and_not_replaced(op):
    with pytest.raises(
        BackendUnavailable, match="double: backend 'fast' cannot run this call: 100 is too large"
    ):
        op(100, backend="fast")


def test_an_unknown_backend_lists_the_known_ones_and_the_nearest(op):
    with pytest.raises(SateenError, match=r"unknown double backend 'fats'; did you mean fast\?") as caught:
        op(7, backend="fats")
    assert "(known: auto, fast, reference, slow)" in str(caught.value)


def test_explain_gives_every_backend_its_reason_best_first(op):
    assert list(op.explain(100).items()) == [
        ("fast", "100 is too large"),
        ("slow", "ok"),
        ("reference", "ok"),
    ]


def test_auto_logs_each_choice_once(op, caplog):
    with caplog.at_level(logging.INFO, logger="sateen.ops"):
        for x in (1, 2, 100, 3, 200):
            op(x)
        op(4, backend="reference")
    assert [record.getMessage() for record in caplog.records] == [
        "double: auto chose backend fast",
        "double: auto chose backend slow",
    ]


def test_registering_a_name_twice_is_a_mistake_of_ours(op):
    with pytest.raises(AssertionError, match="registered twice"):
        op.register("fast", priority=1, why_not=lambda: None)(double)

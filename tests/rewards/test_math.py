"""The maths reward: math-verify's known edge cases as a table, and what an answer can do to the judge."""

import sys

import pytest

from sateen.errors import BackendUnavailable, RewardError
from sateen.rewards import math
from sateen.rewards.math import MathJudge, last_box


@pytest.fixture(scope="module")
def judge():
    with MathJudge() as judge:
        yield judge


@pytest.mark.parametrize(
    ("gold", "answer", "reason"),
    [
        (r"\frac12", "0.5", "correct"),
        (r"2\sqrt3", r"\sqrt{12}", "correct"),
        ("1,234", "1234", "correct"),
        ("x=5", "5", "correct"),
        ("5", "x=5", "correct"),
        (r"30^\circ", "30", "correct"),
        ("5", r"5 \text{ cm}", "correct"),
        (r"\text{A}", r"\text{A}", "correct"),
        ("A", "A", "correct"),
        ("10", r"10\%", "percent"),
        (r"10\%", "10", "percent"),
        (r"10\%", r"10\%", "correct"),
        ("(1,2)", "1<x<2", "wrong"),  # one way only, by math-verify's design: the key comes first
        ("1<x<2", "(1,2)", "correct"),
        ("1,2", "2,1", "correct"),  # a set
        (r"\pi", "3.14159", "wrong"),
        ("0.3333", r"\frac13", "wrong"),
        ("9.11", "9.110000001", "correct"),  # rounded near six decimals
        ("5", "4", "wrong"),
        ("5", "", "wrong"),
        ("5", "4 or 5", "wrong"),
        ("5", "4, 5", "wrong"),
        ("5", "4$ $5", "wrong"),
        ("5", "9" * 1001, "too long"),
    ],
)
def test_edge_cases(judge, gold, answer, reason):
    verdict = judge.score(gold, f"So the answer is $\\boxed{{{answer}}}$.")
    assert verdict.reason == reason
    assert verdict.score == float(reason == "correct")


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        (r"first \boxed{4}, no: \boxed{5}", "correct"),
        (r"first \boxed{5}, no: \boxed{4}", "wrong"),
        (r"<think>\boxed{5}</think> unsure", "no box"),
        (r"<think>\boxed{4}</think> \boxed{5}", "correct"),
        (r"\boxed{5}</think> a missing tag", "no box"),
        ("the answer is 5", "no box"),
        (r"\boxed{5", "no box"),
        ("", "no box"),
    ],
)
def test_only_the_last_box_behind_the_thoughts_counts(judge, completion, reason):
    assert judge.score("5", completion).reason == reason


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{\frac{1}{2}} and more}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{ 7 }", "7"),
        (r"\boxed{1} \boxed{2", None),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed 4", None),
        ("\\boxed{5\\", None),
    ],
)
def test_boxes_match_their_braces(text, box):
    assert last_box(text) == box


def test_a_key_that_cannot_be_read_is_an_error_and_no_wrong_answer(judge):
    assert judge.can_read("5")
    assert not judge.can_read("")
    with pytest.raises(RewardError, match="drop the problem"):
        judge.score("", r"\boxed{5}")
    assert judge.score("5", r"\boxed{5}").reason == "correct"


def test_an_answer_that_takes_too_long_is_cut_and_the_next_one_is_judged():
    with MathJudge(seconds=1.0) as judge:
        assert judge.score("3", r"\boxed{3}").reason == "correct"
        first = judge._worker
        assert judge.score("3", r"\boxed{9^{9^{9^9}}}").reason == "timeout"
        assert first is not None
        assert first.poll() is not None
        assert judge._worker is None
        assert judge.score("3", r"\boxed{3}").reason == "correct"
    assert judge._worker is None


def test_a_worker_that_dies_is_replaced():
    with MathJudge() as judge:
        judge.score("3", r"\boxed{3}")
        assert judge._worker is not None
        judge._worker.kill()
        judge._worker.wait()
        with pytest.raises(RewardError, match="ask again"):
            judge.score("3", r"\boxed{3}")
        assert judge.score("3", r"\boxed{3}").score == 1


def test_without_math_verify_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(math, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"install sateen\[rl\]"):
        MathJudge()


def test_a_worker_that_does_not_start_is_an_error(monkeypatch, tmp_path):
    broken = tmp_path / "worker.py"
    broken.write_text("raise SystemExit(1)\n")
    monkeypatch.setattr(math, "WORKER", broken)
    with pytest.raises(RewardError, match="does not start"):
        MathJudge().score("3", r"\boxed{3}")


def test_scoring_imports_no_algebra_into_this_process(judge):
    judge.score("3", r"\boxed{3}")
    assert "math_verify" not in sys.modules

"""The code reward: what counts as the program, what counts as its answer, and no way to cheat."""

import pytest

from sateen.errors import BackendUnavailable, RewardError
from sateen.rewards import code
from sateen.rewards.code import Case, code_reward, extract_program, run_cases, same_output

# Squares: small numbers are easy, negative ones medium, one beyond 64 bits hard.
CASES = [Case("2\n", "4\n"), Case("3\n", "9"), Case("-4\n", "16\n", 1), Case(f"{2**40}\n", f"{2**80}\n", 2)]
RIGHT = "n = int(input())\nprint(n * n)"
NO_NEGATIVES = "n = int(input())\nprint(n * n if n > 0 else -n * n)"
FIRST_ONLY = "print(4)"


def answer(program: str) -> str:
    return f"<think>\n```python\nprint('draft')\n```\n</think>\nHere it is:\n```python\n{program}\n```\n"


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize(
    ("program", "strict", "soft", "vanilla"),
    [
        (RIGHT, 1, 1, 1),
        (NO_NEGATIVES, 1 / 3, 2 / 3, 0),
        (FIRST_ONLY, 0, 1 / 6, 0),
        ("raise SystemExit", 0, 0, 0),
        (f"{RIGHT}\nraise SystemExit(1)", 0, 0, 0),
        ("import os\nos.write(1, b'4')\nos._exit(0)", 0, 1 / 6, 0),
        ("def f(:", 0, 0, 0),
    ],
)
def test_rewards_of_programs(program, strict, soft, vanilla):
    for scheme, expected in (("strict", strict), ("soft", soft), ("vanilla", vanilla)):
        assert code_reward(answer(program), CASES, scheme) == pytest.approx(expected)


@pytest.mark.usefixtures("sandbox")
def test_expected_outputs_are_not_where_a_program_can_find_them():
    search = "import gc, os, sys\nprint(open('/program.py').read(), os.environ, os.listdir('/tmp'), sys.argv)"
    result = code.run(search, b"2\n")
    assert "9876" not in result.stdout
    assert run_cases(search, [Case("2\n", "9876")]) == [False]


@pytest.mark.usefixtures("sandbox")
def test_a_program_that_takes_too_long_fails_its_test_only():
    program = "n = int(input())\nwhile n < 0: pass\nprint(n * n)"
    limits = code.Limits(wall_s=0.5)
    assert run_cases(program, CASES, limits=limits) == [True, True, False, True]


def test_tests_that_cannot_matter_are_not_run(monkeypatch):
    asked = []

    def run(program, stdin, limits):
        asked.append(stdin)
        passes = stdin in (b"a", b"c")
        return code.Result("ok", 0, "yes" if passes else "no", "", False, 0.0, 0.0, 0, {})

    monkeypatch.setattr(code, "run", run)
    cases = [Case("d", "yes", 2), Case("a", "yes"), Case("b", "yes", 1), Case("c", "yes", 1)]
    assert run_cases("", cases, stop="level") == [False, True, False, True]
    assert asked == [b"a", b"b", b"c"]
    asked.clear()
    assert run_cases("", cases, stop="first") == [False, True, False, False]
    assert asked == [b"a", b"b"]
    asked.clear()
    assert run_cases("", cases) == [False, True, False, True]
    assert asked == [b"a", b"b", b"c", b"d"]


def test_a_broken_sandbox_is_tried_twice_and_is_no_wrong_answer(monkeypatch):
    calls = []

    def run(program, stdin, limits):
        calls.append(stdin)
        raise RewardError("the sandbox broke")

    monkeypatch.setattr(code, "run", run)
    with pytest.raises(RewardError, match="the sandbox broke"):
        code_reward(answer(RIGHT), CASES)
    assert len(calls) == 2


def test_without_isolation_there_is_no_reward(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendUnavailable, match="bwrap"):
        code_reward(answer(f"open({str(tmp_path / 'ran')!r}, 'w')"), CASES)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```", "a\n"),
        ("```\na\n```", "a\n"),
        ("```py\na\n```\nthen\n```python\nb\nc\n```\n", "b\nc\n"),
        ("<think>```python\na\n```</think>no", None),
        ("<think>\n```python\na\n```\n</think>\n```python\nb\n```", "b\n"),
        ("```python\na\n", None),
        ("```cpp\na\n```", None),
        ("```python\na\n```\n```text\nout\n```", None),
        ("```python\n\n```", None),
        ("print(1)", None),
        ("", None),
    ],
)
def test_the_last_closed_block_is_the_program(text, program):
    assert extract_program(text) == program


def test_an_answer_without_a_program_earns_nothing_and_runs_nothing(monkeypatch):
    monkeypatch.delattr(code, "run")
    assert code_reward("I cannot.", CASES) == 0
    with pytest.raises(RewardError, match="0 verdicts"):
        code_reward("I cannot.", [])


@pytest.mark.parametrize(
    ("written", "expected", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("1  2 \n3\n\n\n", "1 2\n3", True),
        ("1 2 3", "1 2\n3", False),
        ("1\n\n2", "1\n2", False),
        ("1.0", "1", False),
        ("", "\n", True),
        ("", "1", False),
        ("Yes", "yes", False),
    ],
)
def test_outputs_are_compared_by_words_and_lines(written, expected, same):
    assert same_output(written, expected) is same


def test_numbers_may_be_close_where_the_problem_says_so():
    assert same_output("0.33333334 x", "0.3333333333 x", tolerance=1e-6)
    assert not same_output("0.34", "0.3333", tolerance=1e-6)
    assert not same_output("nan", "0.5", tolerance=1e-6)
    assert not same_output("one", "1", tolerance=1e-6)

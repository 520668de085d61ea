"""The reward of a written program: its tests run in the sandbox, and levels of difficulty weigh them.

Expected outputs never enter the sandbox: a program has its input and writes its output, and the comparison is
made here. Without isolation nothing runs and `BackendUnavailable` is raised; there is no weaker way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sateen.errors import RewardError
from sateen.rewards.levels import Scheme, difficulty_reward, levels_from_pass_rates, pass_rates
from sateen.rewards.limits import Limits, Result
from sateen.rewards.sandbox import run

__all__ = [
    "Case", "Scheme", "code_reward", "difficulty_reward", "extract_program", "levels_from_pass_rates",
    "pass_rates", "run_cases", "same_output",
]  # fmt: skip

# Two seconds per test with a grace of three times. Source: ours.
TEST_LIMITS = Limits(wall_s=6.0)


@dataclass(frozen=True)
class Case:
    """One test of a problem.

    Attributes:
        stdin: what the program reads.
        expected: what it should write.
        level: 0 = easiest.
    """

    stdin: str
    expected: str
    level: int = 0


def code_reward(
    completion: str,
    cases: Sequence[Case],
    scheme: Scheme = "strict",
    *,
    limits: Limits = TEST_LIMITS,
    level_scores: Sequence[float] | None = None,
    tolerance: float | None = None,
) -> float:
    """The reward in [0, 1] of an answer that holds a program; 0 when it holds none.

    Tests whose result cannot change the reward are not run: with `strict` those of the levels above a
    failure, with `vanilla` everything behind one.

    Args:
        completion: the model's text; its program is the last fenced block behind the last `</think>`.
        cases: the problem's tests.
        scheme, level_scores: as in `difficulty_reward`.
        limits: of each test.
        tolerance: relative and absolute, for numbers in the output; None compares them as text.

    Raises:
        BackendUnavailable: this machine has no sandbox.
        RewardError: no tests, or the sandbox itself broke twice; drop the sample, it says nothing about it.

    Source: MiMo-7B technical report, §3.3.1; extraction and comparison are ours.
    """
    levels = [case.level for case in cases]
    # Refuses bad levels and scores before anything runs, also when there is no program to run.
    nothing = difficulty_reward([False] * len(cases), levels, scheme, level_scores)
    program = extract_program(completion)
    if program is None:
        return nothing
    stop = {"strict": "level", "vanilla": "first"}.get(scheme, "never")
    passed = run_cases(program, cases, limits=limits, tolerance=tolerance, stop=stop)
    return difficulty_reward(passed, levels, scheme, level_scores)


def run_cases(
    program: str,
    cases: Sequence[Case],
    *,
    limits: Limits = TEST_LIMITS,
    tolerance: float | None = None,
    stop: str = "never",
) -> list[bool]:
    """Whether the program passes each test: it ended well within the limits and wrote what was expected.

    Args:
        stop: `never`; `level`: the levels above one with a failure are not run; `first`: nothing is run
            after a failure. Tests that are not run count as failed. Easy levels run first.

    Raises:
        BackendUnavailable, RewardError: as `code_reward`.
    """
    passed = [False] * len(cases)
    failed_level: int | None = None
    for i in sorted(range(len(cases)), key=lambda i: cases[i].level):
        case = cases[i]
        if failed_level is not None and (stop == "first" or (stop == "level" and case.level > failed_level)):
            break
        result = _run_twice_if_broken(program, case, limits)
        passed[i] = result.status == "ok" and same_output(result.stdout, case.expected, tolerance=tolerance)
        if not passed[i] and failed_level is None:
            failed_level = case.level
    return passed


def extract_program(completion: str) -> str | None:
    """The last fenced block behind the last `</think>`, if it is closed and says Python or nothing."""
    answer = completion.rpartition("</think>")[2]
    blocks = re.findall(r"^```([^\n`]*)\n(.*?)^```[ \t]*$", answer, re.DOTALL | re.MULTILINE)
    if not blocks:
        return None
    language, program = blocks[-1]
    is_python = language.strip().lower() in ("", "python", "python3", "py")
    return program if is_python and program.strip() else None


def same_output(written: str, expected: str, *, tolerance: float | None = None) -> bool:
    """Whether two outputs have the same words in the same lines, but for empty lines at the end."""
    ours, theirs = ([line.split() for line in text.rstrip().split("\n")] for text in (written, expected))
    return len(ours) == len(theirs) and all(
        len(a) == len(b) and all(_same_word(x, y, tolerance) for x, y in zip(a, b, strict=True))
        for a, b in zip(ours, theirs, strict=True)
    )


def _same_word(a: str, b: str, tolerance: float | None) -> bool:
    if a == b or tolerance is None:
        return a == b
    try:
        return math.isclose(float(a), float(b), rel_tol=tolerance, abs_tol=tolerance)
    except ValueError:
        return False


def _run_twice_if_broken(program: str, case: Case, limits: Limits) -> Result:
    try:
        return run(program, case.stdin.encode(), limits)
    except RewardError:
        return run(program, case.stdin.encode(), limits)

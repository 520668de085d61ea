"""The reward of a mathematical answer: math-verify compares its last box with the key, in its own process.

math-verify stops itself by an alarm signal, which needs a main thread and does not reach compiled code. A
worker process has the one and can be killed for the other. What an answer could exploit is refused first.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import threading
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from sateen.errors import BackendUnavailable, RewardError

Reason = Literal["correct", "wrong", "no box", "too long", "percent", "timeout"]
MAX_CHARS = 1000
START_S = 60.0  # importing a computer algebra system on a busy machine
WORKER = Path(__file__).with_name("math_worker.py")


@dataclass(frozen=True)
class MathVerdict:
    """A score, 1.0 or 0.0, and why."""

    score: float
    reason: Reason


class MathJudge:
    """Scores answers in a worker that is killed when one takes too long, and started again for the next.

    One worker serves all threads, one answer at a time; use several judges for several cores.

    Args:
        seconds: for one answer, from question to verdict. Source: ours.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        if find_spec("math_verify") is None:
            raise BackendUnavailable("the maths reward needs math-verify; install sateen[rl]")
        self.seconds = seconds
        self._worker: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def score(self, gold: str, completion: str) -> MathVerdict:
        """The verdict on the last box behind the last `</think>`; nothing else of the text counts.

        Args:
            gold: the key, LaTeX or a number, without dollars or box.
            completion: the model's text.

        Raises:
            RewardError: math-verify cannot read the key: every answer would be wrong, so drop the problem.
        """
        answer = last_box(completion.rpartition("</think>")[2])
        if answer is None:
            return MathVerdict(0.0, "no box")
        if len(answer) > MAX_CHARS:
            return MathVerdict(0.0, "too long")
        # math-verify drops percent signs, and 10 would equal 10 %.
        if ("%" in answer) != ("%" in gold):
            return MathVerdict(0.0, "percent")
        reply = self._ask({"gold": gold, "answer": answer})
        if reply is None:
            return MathVerdict(0.0, "timeout")
        return MathVerdict(1.0, "correct") if reply["same"] else MathVerdict(0.0, "wrong")

    def can_read(self, gold: str) -> bool:
        """Whether math-verify finds an expression in the key; ask once, when a data set is built."""
        reply = self._ask({"gold": gold, "answer": None})
        return reply is not None and reply["readable"]

    def close(self) -> None:
        """Ends the worker; the next score starts another one."""
        with self._lock:
            self._stop()

    def __enter__(self) -> MathJudge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, question: dict[str, str | None]) -> dict[str, Any] | None:
        """The worker's reply, or None when it took too long and was killed."""
        with self._lock:
            worker = self._worker or self._start()
            assert worker.stdin is not None
            assert worker.stdout is not None
            try:
                worker.stdin.write(json.dumps(question).encode() + b"\n")
            except BrokenPipeError:
                self._stop()
                raise RewardError("the maths worker ended between two answers; ask again") from None
            if not select.select([worker.stdout], [], [], self.seconds)[0]:
                self._stop()
                return None
            line = worker.stdout.readline()
            if not line:  # out of memory, or a crash in compiled code
                self._stop()
                return None
        reply: dict[str, Any] = json.loads(line)
        if not reply["readable"] and question["answer"] is not None:
            raise RewardError(
                f"math-verify finds no expression in the key {question['gold']!r}; drop the problem"
            )
        return reply

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: the folder of the worker holds a math.py, which must not hide Python's own.
        worker = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, bufsize=0,
        )  # fmt: skip
        assert worker.stdout is not None
        self._worker = worker
        if not select.select([worker.stdout], [], [], START_S)[0] or worker.stdout.readline() != b"ready\n":
            self._stop()
            raise RewardError(
                "the maths worker does not start; run `python -c 'import math_verify'` to see why"
            )
        return worker

    def _stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    pipe.close()


def last_box(text: str) -> str | None:
    """What stands in the last `\\boxed{...}`, braces matched; None without a closed one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    first = start + len("\\boxed{")
    depth = 1
    i = first
    while i < len(text):
        if text[i] == "\\":  # \{ and \} are characters
            i += 1
        else:
            depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[first:i].strip()
        i += 1
    return None

"""The progress bar in a log, where nothing moves: few lines, and the last one always."""

import io
import time

import pytest
from rich.console import Console

from sateen.progress import TerminalProgress


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 11.0, 11.0, 12.0, 13.0, 13.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    text = io.StringIO()
    bar = TerminalProgress(Console(file=text, width=20))
    bar.start("pretrain", 3000)
    bar.update(1000, loss=5.0)  # 1 s after the start: too early
    bar.update(2000, loss=4.12345)  # 11 s
    bar.update(2500)  # 1 s later
    bar.update(3000, loss=3.0, lr=1e-5)
    bar.stop()
    bar.note("[a] note that is longer than the log is wide")
    assert text.getvalue().splitlines() == [
        "pretrain: 2,000/3,000 tokens loss 4.123",
        "pretrain: 3,000/3,000 tokens loss 3 lr 1e-05",
        "[a] note that is longer than the log is wide",
    ]


def test_a_terminal_gets_a_bar_that_stop_closes() -> None:
    text = io.StringIO()
    console = Console(file=text, width=100, force_terminal=True, color_system=None)
    bar = TerminalProgress(console)
    bar.start("sft", 2000, 500)
    bar.update(1500, loss=2.5)
    bar.start("mtp", 10)  # a new bar closes the old one
    bar.stop()
    bar.stop()
    assert "1,500/2,000 tokens" in text.getvalue()
    assert "loss 2.5" in text.getvalue()
    assert text.getvalue().rfind("\x1b[?25h") > text.getvalue().rfind("\x1b[?25l")  # the cursor is back

"""The progress bar of a run, on stderr: a live one in a terminal, a line now and then in a log."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_LOG_EVERY_S = 10.0


class TerminalProgress:
    """A `sateen.config.Progress` that draws with rich."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._what, self._total = "", 0
        self._last_line = 0.0

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Opens a bar of `total` tokens, `done` of them from an earlier process."""
        self.stop()
        self._what, self._total, self._last_line = what, total, time.monotonic()
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[values]}"),
            )
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task(what, total=total, completed=done, values="")
            self._bar.start()

    def update(self, done: int, **values: float) -> None:
        """Moves the bar to `done` tokens and shows the newest values."""
        shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=done, values=shown)
        elif time.monotonic() - self._last_line >= _LOG_EVERY_S or done >= self._total:
            self._last_line = time.monotonic()
            self.note(f"{self._what}: {done:,}/{self._total:,} tokens {shown}".rstrip())

    def note(self, text: str) -> None:
        """One line of talk; above the bar where there is one."""
        self.console.print(text, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

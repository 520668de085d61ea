"""Ctrl-C and SIGTERM that let the running step finish."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C or SIGTERM into a flag, so that no step is torn; a second one acts at once.

    Yields a function that says whether one of them came.
    """
    was_asked = False
    at_once: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal was_asked
        was_asked = True
        signal.signal(number, at_once[number])

    # Only the main thread may set handlers; elsewhere Ctrl-C belongs to somebody else.
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, ask) for number in at_once}
    try:
        yield lambda: was_asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

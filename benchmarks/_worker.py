"""Engines in processes of their own: the driver's end of the line, and the peer's.

A peer is a script that calls `serve` with its functions and runs in whatever Python has the engine, so this
file needs the standard library alone. Requests and answers are JSON, one a line, through stdin and stdout;
whatever else a library prints goes to stderr, which the driver keeps in a file.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


class WorkerError(Exception):
    """A peer could not do what it was asked; `kind` is the name of its exception."""

    def __init__(self, kind: str, words: str, worker: str):
        super().__init__(f"{worker}: {words}")
        self.kind, self.worker = kind, worker


class Worker:
    """A running peer.

    Attributes:
        name: in tables and messages.
        log: where its stderr goes.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ):
        """Starts it.

        Raises:
            WorkerError: there is no such program.
        """
        self.name, self.log = name, log
        with log.open("w") as stderr:
            try:
                self._process = subprocess.Popen(
                    [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=stderr, text=True, env=os.environ | dict(environment or {}),
                )  # fmt: skip
            except OSError as error:
                words = f"{command[0]}: {error.strerror}"
                raise WorkerError(type(error).__name__, words, name) from error

    def ask(self, action: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one request; waits for it.

        Raises:
            WorkerError: the peer raised, or ended.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"do": action, **arguments}) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = process.wait()
            tail = self.log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            raise WorkerError("Ended", f"ended with {code} at `{action}`: {tail[0]} ({self.log})", self.name)
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            raise WorkerError(found["kind"], found["error"], self.name)
        return found

    def close(self) -> None:
        """Ends it; kills it when it does not end."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def serve(actions: Mapping[str, Callable[..., dict[str, Any] | None]]) -> None:
    """Answers requests until stdin ends; `usage` is there without being listed."""
    # Libraries print to descriptor 1 from C too: the line to the driver is a copy that they do not know.
    line = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    known = {"usage": usage, **actions}
    for request in sys.stdin:
        arguments = json.loads(request)
        try:
            answer = known[arguments.pop("do")](**arguments) or {}
        except Exception as error:
            import traceback

            traceback.print_exc()
            answer = {"kind": type(error).__name__, "error": str(error) or repr(error)}
        line.write(json.dumps(answer) + "\n")
        line.flush()


def usage() -> dict[str, float]:
    """Memory now and at most so far, and CPU seconds, of this process and its children together."""
    found = {"rss_bytes": 0, "peak_rss_bytes": 0, "cpu_s": 0.0}
    names = {"VmRSS": "rss_bytes", "VmHWM": "peak_rss_bytes"}
    for process in _family(os.getpid()):
        try:
            status = Path(f"/proc/{process}/status").read_text()
            times = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        found["cpu_s"] += (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
        for row in status.splitlines():
            key, _, value = row.partition(":")
            if key in names:
                found[names[key]] += int(value.split()[0]) * 1024
    return found


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _family(process: int) -> list[int]:
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return [process]
    return [process, *(member for child in children for member in _family(int(child)))]

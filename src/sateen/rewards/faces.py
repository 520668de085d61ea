"""`sateen sandbox run` and `sateen sandbox check`."""

from __future__ import annotations

import dataclasses
import json as codec
import sys
from pathlib import Path
from typing import Any

from sateen.errors import BackendUnavailable
from sateen.rewards.limits import MIB, Limits, Result
from sateen.rewards.sandbox import isolation, run

# Tries what the limits forbid; prints the name of each attempt that failed as it should.
ATTEMPTS = """
import os, sys
def refused(name, action):
    try:
        action()
    except (OSError, ValueError):
        print(name)
def fork():
    for _ in range(10000):
        if os.fork() == 0:
            import time
            time.sleep(60)
refused("network", lambda: __import__("socket").socket())
refused("files", lambda: open("/etc/passwd"))
refused("files_written", lambda: open("/usr/lib/x", "w"))
refused("file_bytes", lambda: open("/tmp/x", "wb").write(bytes(SIZE)))
refused("privileges", lambda: os.setuid(0))
refused("system_calls", lambda: os.memfd_create("x"))
refused("processes", fork)
"""


def main(action: str, **flags: Any) -> int:
    """The exit code of `sateen sandbox ACTION`; a machine that cannot isolate is refused, with 1."""
    return _check(**flags) if action == "check" else _run(**flags)


def _run(program: str, stdin: str | None, seconds: float, memory_mb: int) -> int:
    source = Path(program).read_bytes()
    data = Path(stdin).read_bytes() if stdin else b""
    result = run(source, data, Limits(wall_s=seconds, memory_bytes=memory_mb * MIB))
    print(codec.dumps(as_json(result)))
    return 0


def _check(json: bool) -> int:
    """Prints each limit, how it is enforced, and whether an attempt to break it was refused just now."""
    limits = Limits(wall_s=2.0)
    try:
        isolation()
    except BackendUnavailable as error:
        if json:
            print(codec.dumps({"available": False, "reason": str(error)}))
        print(f"sateen: error: {error}", file=sys.stderr)
        return 1
    result = run(ATTEMPTS.replace("SIZE", str(2 * limits.file_bytes)), limits=limits)
    held: dict[str, bool] = {name: name in result.stdout.split() for name in _ATTEMPTED}
    held["files"] = held["files"] and "files_written" in result.stdout.split()
    rows: dict[str, dict[str, Any]] = {
        name: {**row, "held": held.get(name)} for name, row in result.enforced.items()
    }
    broken = [name for name, ok in held.items() if not ok]
    if json:
        print(codec.dumps({"available": not broken, "limits": rows}))
    else:
        for name, row in rows.items():
            tried = {True: "tried, held", False: "tried, BROKEN", None: ""}[row["held"]]
            limit = (
                "" if row["limit"] is None else f"{row['limit']:g}" if name.endswith("_s") else row["limit"]
            )
            print(f"{name:14} {limit:>10}  {row['by']}{f'  ({tried})' if tried else ''}")
    if broken:
        print(
            f"sateen: error: the sandbox does not hold: {', '.join(broken)}; do not use it", file=sys.stderr
        )
    return 1 if broken else 0


_ATTEMPTED = ("network", "files", "file_bytes", "privileges", "system_calls", "processes")


def as_json(result: Result) -> dict[str, Any]:
    """A result as the object that `sateen sandbox run` prints."""
    return dataclasses.asdict(result)

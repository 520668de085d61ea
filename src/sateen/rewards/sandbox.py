"""Runs a Python program that nobody trusts: own namespaces, no network, nothing of the host but libraries.

bubblewrap makes the namespaces and an unprivileged user runs it; `seccomp.py` filters system calls,
`cgroup.py` counts processes and memory where groups can be made, and resource limits do where not. Where
isolation is missing nothing runs: `isolation` says why. `judge.py` watches one run; `code.py` scores with it.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys

from sateen.errors import BackendUnavailable
from sateen.rewards import cgroup
from sateen.rewards.bwrap import Isolation
from sateen.rewards.judge import watch
from sateen.rewards.limits import Limits, Result, enforced

__all__ = ["Limits", "Result", "isolation", "run"]

INSTALL = "install it (Debian and Ubuntu: apt-get install bubblewrap)"


def run(
    program: str | bytes,
    stdin: bytes = b"",
    limits: Limits | None = None,
    *,
    use_cgroups: bool = True,
) -> Result:
    """How a Python program ends that runs alone in a fresh sandbox.

    May be called from several threads at once. The program sees its own source, the interpreter, shared
    libraries, an empty temporary folder and three pipes; what it prints decides nothing about `status`.

    Args:
        program: its source.
        stdin: what it may read.
        limits: the defaults of `Limits` when None.
        use_cgroups: False takes the per-process limits even where groups could be made.

    Raises:
        BackendUnavailable: this machine cannot isolate; the message has the reason.
        RewardError: the sandbox itself broke; this says nothing about the program.
    """
    limits = limits or Limits()
    tools = isolation()
    groups = None
    if use_cgroups:  # one more process: bubblewrap's reaper
        groups = cgroup.create(processes=limits.processes + 1, memory_bytes=limits.memory_bytes)
    try:
        source = program.encode() if isinstance(program, str) else program
        return watch(tools, source, stdin, limits, groups, enforced(limits, has_groups=groups is not None))
    finally:
        if groups is not None:
            groups.remove()


def isolation() -> Isolation:
    """What to run programs with, after one trial run in this process.

    Raises:
        BackendUnavailable: something is missing or forbidden; the message says what, and what to do.
    """
    if not sys.platform.startswith("linux"):
        raise BackendUnavailable(f"the sandbox needs Linux namespaces; this is {sys.platform}")
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise BackendUnavailable(f"the sandbox needs bubblewrap, and `bwrap` is not in PATH; {INSTALL}")
    interpreter = next((p for p in ("/usr/bin/python3", "/usr/local/bin/python3") if os.path.exists(p)), None)
    if interpreter is None:
        raise BackendUnavailable("the sandbox needs a Python below /usr for its programs; install python3")
    prlimit = shutil.which("prlimit")
    if prlimit is None:
        raise BackendUnavailable("the sandbox needs `prlimit`, and it is not in PATH; install util-linux")
    paths = (bwrap, os.path.realpath(interpreter), os.path.realpath(prlimit))
    tools = Isolation(*paths, drops_root=os.geteuid() == 0)
    _try(tools)
    return tools


@functools.cache
def _try(tools: Isolation) -> None:
    """Nothing, if an empty program runs; cached, so that only the first run of a process pays for it."""
    result = watch(tools, b"print('in')", b"", Limits(), None, {})
    if (result.status, result.stdout) != ("ok", "in\n"):
        raise BackendUnavailable(
            f"the sandbox cannot run Python here: {result.status}, {result.stderr.strip() or 'no message'}"
        )

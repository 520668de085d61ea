"""What a sandboxed run may use, what holds it to that, and how a run ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from sateen.errors import ConfigError
from sateen.rewards import seccomp

Status = Literal["ok", "timeout", "memory", "output", "killed", "error"]
MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """What one run may use; every value is a setting of ours.

    Attributes:
        wall_s: seconds from start to end, on the clock and of CPU time.
        memory_bytes: memory of all processes together, files in the temporary folder included.
        processes: processes and threads; 1 where no control group can be made, so that the memory of one
            process bounds all of it.
        output_bytes: of standard output, and again of standard error; a run that writes more is stopped.
        file_bytes: the temporary folder.
    """

    wall_s: float = 10.0
    memory_bytes: int = 512 * MIB
    processes: int = 16
    output_bytes: int = MIB
    file_bytes: int = 16 * MIB

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < float("inf"):
                raise ConfigError(f"sandbox limit {name}={value} should be above 0")
        if self.memory_bytes < 32 * MIB:
            raise ConfigError(f"sandbox limit memory_bytes={self.memory_bytes}: Python needs 32 MiB to start")


@dataclass(frozen=True)
class Result:
    """How one run ended.

    Attributes:
        status: `ok` exit code 0; `error` another one; `killed` by a signal, its own or the filter's;
            `timeout`, `memory`, `output`: stopped at that limit.
        exit_code: the program's, 128 + signal as in a shell; None when the judge stopped it.
        stdout, stderr: what it wrote; bytes that are no UTF-8 as backslash escapes.
        truncated: it wrote more than was kept.
        wall_s, cpu_s: seconds from start to end, and of CPU time.
        max_rss_bytes: the most memory it held: of the control group where there is one, otherwise of the
            process, looked at every 10 ms, as `cpu_s` is (0 for one that ended before the first look).
        enforced: limit -> `{"limit": value or None, "by": mechanism}`.
    """

    status: Status
    exit_code: int | None
    stdout: str
    stderr: str
    truncated: bool
    wall_s: float
    cpu_s: float
    max_rss_bytes: int
    enforced: dict[str, dict[str, Any]] = field(repr=False)


def enforced(limits: Limits, *, has_groups: bool) -> dict[str, dict[str, Any]]:
    """Limit -> its value, None where there is nothing to set, and by what it holds."""
    user = "own user namespace as uid 65534, no capabilities, no new privileges"
    memory = "memory control group, swap included" if has_groups else "RLIMIT_AS, with one process"
    processes = "pids control group, RLIMIT_NPROC" if has_groups else "RLIMIT_NPROC in its own user namespace"
    cpu = "RLIMIT_CPU per process, cpuacct group in total" if has_groups else "RLIMIT_CPU, with one process"
    rows: dict[str, tuple[float | None, str]] = {
        "wall_s": (limits.wall_s, "the judge's clock, then SIGKILL to the whole pid namespace"),
        "cpu_s": (limits.wall_s, cpu),
        "memory_bytes": (limits.memory_bytes, memory),
        "processes": (limits.processes if has_groups else 1, processes),
        "output_bytes": (limits.output_bytes, "the judge stops reading, then SIGKILL"),
        "file_bytes": (limits.file_bytes, "size of the tmpfs, RLIMIT_FSIZE; everything else is read-only"),
        "network": (None, "own network namespace; socket() answers EPERM"),
        "files": (
            None,
            "own mount namespace: libraries and the interpreter read-only; no home, no /etc, no /proc",
        ),
        "privileges": (None, user),
        "system_calls": (None, f"seccomp filter, {len(seccomp.FORBIDDEN)} calls and new namespaces refused"),
        "survivors": (None, "own pid namespace, ended and waited for with the run"),
        "verdict": (None, "exit status on a descriptor that the program does not have"),
    }
    return {name: {"limit": limit, "by": by} for name, (limit, by) in rows.items()}

"""Watches one sandboxed run from outside: feeds and reads its pipes, keeps the clock, says how it ended.

bubblewrap reports the program's process and exit status on a descriptor of its own, which the program never
has. The program starts only when it is in its control groups: bubblewrap waits on another descriptor.
"""

from __future__ import annotations

import json
import os
import select
import selectors
import signal
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

from sateen.errors import BackendUnavailable, RewardError
from sateen.rewards import seccomp
from sateen.rewards.bwrap import NOBODY, Isolation, why_bwrap_failed
from sateen.rewards.cgroup import Groups
from sateen.rewards.limits import Limits, Result, Status

LOOK_S = 0.01  # between two looks at CPU time and memory
SET_UP_S = 20.0  # a sandbox that is not ready by then is broken
CHUNK = 65536


def watch(
    tools: Isolation,
    program: bytes,
    stdin: bytes,
    limits: Limits,
    groups: Groups | None,
    enforced: dict[str, dict[str, Any]],
) -> Result:
    """The result of one run; when this returns, none of its processes is left.

    Raises:
        BackendUnavailable: bubblewrap could not set the sandbox up.
        RewardError: bubblewrap died, or said nothing about the exit status.
    """
    with ExitStack() as stack:
        program_fd = _file_in_memory(stack, program)
        seccomp_fd = _file_in_memory(stack, seccomp.assemble())
        status_r, status_w = _pipe(stack)
        block_r, block_w = _pipe(stack)
        command = tools.command(
            program_fd=program_fd, seccomp_fd=seccomp_fd, status_fd=status_w.fileno(),
            block_fd=block_r.fileno(), limits=limits, has_groups=groups is not None,
        )  # fmt: skip
        ids: dict[str, Any] = (
            {"user": NOBODY, "group": NOBODY, "extra_groups": []} if tools.drops_root else {}
        )
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                cwd="/", env={}, **ids,
                pass_fds=(program_fd, seccomp_fd, status_w.fileno(), block_r.fileno()),
            )  # fmt: skip
        except OSError as error:
            who = "as nobody " if tools.drops_root else ""
            raise BackendUnavailable(f"bubblewrap does not start {who}here: {error}") from error
        stack.callback(_bury, process)
        status_w.close()
        block_r.close()
        first = _line(status_r)
        if first is None:
            process.kill()
            message = process.communicate()[1].decode(errors="replace").strip() or "it said nothing"
            raise BackendUnavailable(f"bubblewrap cannot isolate here: {why_bwrap_failed(message)}")
        init_pid = int(first["child-pid"])
        # Held from before the program exists, so that no other process can come by this number.
        init_fd = os.pidfd_open(init_pid)
        stack.callback(os.close, init_fd)
        stack.callback(_end, init_fd)
        if groups is not None:
            try:
                groups.add(init_pid)
            except OSError as error:
                raise BackendUnavailable(
                    f"a program cannot be put into its control group: {error}"
                ) from error
        run = _Run(process, init_pid, init_fd, limits, groups)
        block_w.write(b"g")
        block_w.close()
        run.watch(stdin, status_r)
        _end(init_fd)
        run.drain()
        exit_code = run.exit_code(status_r)
        if exit_code is None and run.stopped is None:
            message = bytes(run.streams["stderr"]).decode(errors="replace").strip()
            raise RewardError(f"the sandbox ended without an exit status: {message or 'it said nothing'}")
        return run.result(exit_code, enforced)


class _Run:
    """One run while it lasts.

    Attributes:
        stopped: the limit at which the judge stopped it, if it did.
        streams: what was read, at most `output_bytes` each.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        init_pid: int,
        init_fd: int,
        limits: Limits,
        groups: Groups | None,
    ) -> None:
        self.process, self.init_pid, self.init_fd = process, init_pid, init_fd
        self.limits, self.groups = limits, groups
        self.stopped: Status | None = None
        self.streams = {"stdout": bytearray(), "stderr": bytearray()}
        self.truncated = False
        self.cpu_s, self.peak_bytes = 0.0, 0
        self.start_s = time.monotonic()
        self.end_s = self.start_s
        self._told = b""

    def watch(self, stdin: bytes, status_r: IO[bytes]) -> None:
        """Returns when the program has ended or must be ended."""
        waiting = memoryview(stdin)
        with selectors.DefaultSelector() as pipes:
            for name in self.streams:
                pipe = getattr(self.process, name)
                os.set_blocking(pipe.fileno(), False)
                pipes.register(pipe, selectors.EVENT_READ, name)
            entry = self.process.stdin
            assert entry is not None
            os.set_blocking(entry.fileno(), False)
            pipes.register(entry, selectors.EVENT_WRITE, "stdin")
            pipes.register(status_r, selectors.EVENT_READ, "status")
            next_look_s = self.start_s
            while self.stopped is None:
                for key, _ in pipes.select(LOOK_S):
                    if key.data == "status":
                        self.end_s = time.monotonic()
                        return
                    if key.data == "stdin":
                        with suppress(BlockingIOError, BrokenPipeError):
                            waiting = waiting[os.write(key.fd, waiting[:CHUNK]) if waiting else 0 :]
                            if waiting:
                                continue
                        pipes.unregister(entry)
                        entry.close()
                    elif not self._read(key.data):
                        pipes.unregister(key.fileobj)
                if time.monotonic() >= next_look_s:
                    self._look()
                    next_look_s = time.monotonic() + LOOK_S
        self.end_s = time.monotonic()

    def drain(self) -> None:
        """Reads what is still in the pipes; nobody writes into them any more."""
        for name in self.streams:
            while self._read(name):
                pass

    def exit_code(self, status_r: IO[bytes]) -> int | None:
        """The program's exit code as bubblewrap tells it; None when it did not."""
        if self.stopped is not None:
            return None
        told = _line(status_r)
        return None if told is None or "exit-code" not in told else int(told["exit-code"])

    def result(self, exit_code: int | None, enforced: dict[str, dict[str, Any]]) -> Result:
        """The verdict; made of what bubblewrap, the kernel and the judge's own clock and counters say."""
        oom_kills = 0
        if self.groups is not None:
            self.cpu_s, self.peak_bytes = self.groups.cpu_s(), self.groups.peak_bytes()
            oom_kills = self.groups.num_oom_kills()
        out, err = (bytes(kept).decode("utf-8", "backslashreplace") for kept in self.streams.values())
        # Only without groups: there the kernel refuses memory, and Python says so. A program that only
        # pretends fails all the same.
        refused = self.groups is None and err.rstrip().rpartition("\n")[2].startswith("MemoryError")
        status: Status
        if self.stopped is not None:
            status, exit_code = self.stopped, None
        elif oom_kills or (exit_code and refused):
            status = "memory"
        elif exit_code == 128 + signal.SIGXCPU:
            status = "timeout"
        elif exit_code:
            status = "killed" if exit_code > 128 else "error"
        else:
            status = "ok"
        return Result(
            status, exit_code, out, err, self.truncated, self.end_s - self.start_s, self.cpu_s,
            self.peak_bytes, enforced,
        )  # fmt: skip

    def _read(self, name: str) -> bool:
        """Whether more may come; stops the run when it wrote too much."""
        try:
            data = os.read(getattr(self.process, name).fileno(), CHUNK)
        except BlockingIOError:
            return False
        kept = self.streams[name]
        room = self.limits.output_bytes - len(kept)
        kept += data[:room]
        if len(data) > room:
            self.truncated, self.stopped = True, self.stopped or "output"
            return False
        return bool(data)

    def _look(self) -> None:
        """Stops a run that is over its time; without groups, notes what its process used."""
        if self.groups is not None:
            self.cpu_s = self.groups.cpu_s()
        else:
            self._look_at_process()
        if max(time.monotonic() - self.start_s, self.cpu_s) > self.limits.wall_s:
            self.stopped = "timeout"

    def _look_at_process(self) -> None:
        with suppress(OSError, IndexError, ValueError):  # it may end while we look
            children = Path(f"/proc/{self.init_pid}/task/{self.init_pid}/children").read_text().split()
            status = Path(f"/proc/{children[0]}/status").read_text()
            peak_kib = int(status.partition("VmHWM:")[2].split()[0])
            ticks = Path(f"/proc/{children[0]}/stat").read_text().rpartition(")")[2].split()[11:13]
            self.peak_bytes = max(self.peak_bytes, peak_kib * 1024)
            self.cpu_s = max(self.cpu_s, sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"))


def _end(init_fd: int) -> None:
    """Kills the sandbox's first process, and with it the whole pid namespace, and waits until it is empty."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(init_fd, signal.SIGKILL)
    if not select.select([init_fd], [], [], SET_UP_S)[0]:
        raise RewardError("a sandbox does not end after SIGKILL")


def _bury(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def _line(status_r: IO[bytes]) -> dict[str, Any] | None:
    """The next document bubblewrap writes, or None at the end or when none comes in time."""
    if not select.select([status_r], [], [], SET_UP_S)[0]:
        return None
    text = status_r.readline()
    return json.loads(text) if text else None


def _file_in_memory(stack: ExitStack, data: bytes) -> int:
    fd = os.memfd_create("sateen", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _pipe(stack: ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    read, write = os.pipe()
    return stack.enter_context(open(read, "rb", buffering=0)), stack.enter_context(
        open(write, "wb", buffering=0)
    )

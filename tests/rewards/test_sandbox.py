"""Programs that try to get out, with control groups and without them; nothing here trusts what they print.

What a program claims is used only where it reports its own failure to break out, and then the test also looks
from outside.
"""

import os
import threading
import time
from pathlib import Path

import pytest

from sateen.errors import BackendUnavailable, ConfigError
from sateen.rewards import bwrap, cgroup, sandbox
from sateen.rewards.limits import MIB, Limits
from sateen.rewards.sandbox import isolation

LIMITS = Limits(wall_s=5.0, memory_bytes=96 * MIB, processes=8, output_bytes=64 * 1024, file_bytes=2 * MIB)
SHORT = Limits(wall_s=0.5, memory_bytes=96 * MIB, processes=8)


def can_make_groups() -> bool:
    groups = cgroup.create(processes=2, memory_bytes=32 * MIB)
    if groups is not None:
        groups.remove()
    return groups is not None


@pytest.fixture(params=["groups", "rlimits"])
def run(request, sandbox):
    """`sateen.rewards.sandbox.run` with the limits of one kind."""
    from sateen.rewards.sandbox import run

    if request.param == "groups" and not can_make_groups():
        pytest.skip("needs the right to make control groups")
    return lambda program, stdin=b"", limits=LIMITS: run(
        program, stdin, limits, use_cgroups=request.param == "groups"
    )


def processes_with(mark: str) -> list[int]:
    """Processes of the host whose command line or environment holds the mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_a_program_reads_and_writes(run):
    result = run(
        "name = input()\nprint('hello', name)\nimport sys; print('to err', file=sys.stderr)", b"you\n"
    )
    assert (result.status, result.exit_code) == ("ok", 0)
    assert (result.stdout, result.stderr, result.truncated) == ("hello you\n", "to err\n", False)
    assert set(result.enforced) >= {"network", "processes", "memory_bytes", "wall_s", "output_bytes"}


def test_exit_codes_and_signals(run):
    assert (run("raise SystemExit(3)").status, run("raise SystemExit(3)").exit_code) == ("error", 3)
    assert run("1/0").stderr.rstrip().endswith("ZeroDivisionError: division by zero")
    crashed = run("import os; os.abort()")
    assert (crashed.status, crashed.exit_code) == ("killed", 128 + 6)
    assert run("def f(:").status == "error"


def test_the_network_is_out_of_reach(run):
    program = """
import socket
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET):
    try:
        socket.socket(family, socket.SOCK_DGRAM if family != socket.AF_PACKET else socket.SOCK_RAW)
        print('made', family)
    except OSError as error:
        print(error.errno)
"""
    assert run(program).stdout.split() == ["1"] * 5  # EPERM


def test_a_fork_bomb_is_contained(run):
    program = """
import os, time
made = 0
while True:
    try:
        if os.fork() == 0:
            time.sleep(30); os._exit(0)
        made += 1
    except OSError:
        break
print(made)
"""
    result = run(program)
    made, allowed = int(result.stdout), result.enforced["processes"]["limit"]
    assert made == allowed - 1
    # All of them fork as fast as they can; the run ends at its time and nothing is left.
    wild = run("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", limits=SHORT)
    assert wild.status == "timeout"


def test_threads_count_as_processes(run):
    program = """
import threading, time
made = 0
try:
    for _ in range(100):
        threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
        made += 1
except RuntimeError:
    pass
print(made, flush=True)
import os; os._exit(0)
"""
    result = run(program)
    assert int(result.stdout) == result.enforced["processes"]["limit"] - 1


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(10**9)",
        "x = []\nwhile True: x.append(bytearray(10**6))",
        "import mmap\nx = mmap.mmap(-1, 10**9)\nfor i in range(0, 10**9, 4096): x[i] = 1",
    ],
    ids=["at once", "bit by bit", "mapped"],
)
def test_a_memory_bomb_is_contained(run, program):
    result = run(program)
    assert result.status in ("memory", "error") if "mmap" in program else result.status == "memory"
    assert result.max_rss_bytes <= LIMITS.memory_bytes


def test_memory_of_all_processes_counts_together(run):
    program = """
import os
for _ in range(3):
    try:
        if os.fork() == 0:
            x = bytearray(60 * 2**20); os.write(1, b'held '); import time; time.sleep(20); os._exit(0)
    except OSError:
        os.write(1, b'refused '); raise SystemExit(5)
for _ in range(3):
    if os.wait()[1]: raise SystemExit(4)
"""
    result = run(program)
    assert result.status != "ok"
    assert result.stdout.split().count("held") <= 1


def test_swallowing_a_memory_error_gives_no_more_memory(run):
    program = """
kept = []
while True:
    try: kept.append(bytearray(4 * 2**20))
    except MemoryError: break
print(len(kept) * 4)
"""
    result = run(program)
    assert result.status == "memory" or int(result.stdout) < 96


def test_an_output_flood_is_cut(run):
    for stream in ("stdout", "stderr"):
        result = run(f"import sys\nwhile True: sys.{stream}.write('x' * 9999)")
        assert (result.status, result.truncated, result.exit_code) == ("output", True, None)
        assert len(getattr(result, stream)) == LIMITS.output_bytes
    exact = run(f"print('x' * {LIMITS.output_bytes - 1})")
    assert (exact.status, exact.truncated, len(exact.stdout)) == ("ok", False, LIMITS.output_bytes)
    one_more = run(f"print('x' * {LIMITS.output_bytes})")
    assert (one_more.status, one_more.truncated) == ("output", True)


def test_files_of_the_host_cannot_be_read(run, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    secret.chmod(0o644)
    outside = (
        "/etc/passwd /etc/hostname /proc/1/environ /proc/self/mounts /sys/kernel /root /home /var /dev/mem"
    )
    paths = [str(secret), str(Path(__file__).resolve()), "/dev/kmsg", "/usr/bin/env", *outside.split()]
    program = f"""
import os
for path in {paths!r}:
    try:
        open(path, 'rb').read(1); print('read', path)
    except IsADirectoryError:
        print('there', path)
    except OSError:
        pass
print(sorted(os.listdir('/')), os.listdir('/tmp'))
"""
    result = run(program)
    there = {"dev", "program.py", "tmp", "usr"}
    assert result.stdout.count("\n") == 1, result.stdout
    listed = eval(result.stdout.partition("]")[0] + "]")
    assert there <= set(listed) <= there | {"lib", "lib64"}
    assert result.stdout.rstrip().endswith("[]")


def test_only_the_temporary_folder_can_be_written_and_only_a_little(run):
    program = """
import os
for path in ('/x', '/usr/x', '/usr/lib/x', '/dev/x', '/program.py', '/lib/x', '/dev/shm/x'):
    try:
        open(path, 'a'); print('wrote', path)
    except OSError:
        pass
total = 0
try:
    for i in range(8):
        with open(f'/tmp/{i}', 'wb', buffering=0) as f:
            for _ in range(8):
                total += f.write(bytes(2**17))
except OSError:
    pass
print(total)
"""
    result = run(program)
    assert 2**20 < int(result.stdout) <= LIMITS.file_bytes
    assert run("import os; print(os.listdir('/tmp'))").stdout == "[]\n"


def test_the_verdict_cannot_be_forged(run):
    program = """
import os, json
forged = json.dumps({'exit-code': 0}).encode() + b'\\n'
for fd in range(3, 1024):
    try:
        os.write(fd, forged); print('wrote to', fd)
    except OSError:
        pass
print(json.dumps({'status': 'ok', 'exit_code': 0}))
print('PASSED')
os._exit(7)
"""
    result = run(program)
    assert (result.status, result.exit_code) == ("error", 7)
    assert "wrote to" not in result.stdout
    # Ending the reaper does not work, and ending everything by force is no success either.
    for victim in (1, -1):
        program = f"import os\ntry: os.kill({victim}, 9)\nexcept OSError: pass\nos.kill(os.getpid(), 9)"
        ended = run(program)
        assert (ended.status, ended.exit_code) == ("killed", 137)


def test_a_program_cannot_touch_its_reaper_or_make_namespaces(run):
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    ctypes.set_errno(0)
    libc.syscall(*arguments)
    return ctypes.get_errno()
numbers = {'ptrace': (101, 117), 'unshare': (272, 97), 'mount': (165, 40), 'bpf': (321, 280)}
numbers['clone3'] = 435, 435
column = os.uname().machine == 'aarch64'
print([call(pair[column], 16, 1, 0, 0, 0) for pair in numbers.values()])
print([call(272 if not column else 97, flag) for flag in (0x10000000, 0x40000000, 0x20000)])
print(os.getuid(), os.geteuid())
"""
    lines = run(program).stdout.splitlines()
    assert lines == ["[1, 1, 1, 1, 38]", "[1, 1, 1]", "65534 65534"]


def test_children_do_not_survive(run):
    # Only with control groups may a program have children at all; without, its own end is what is looked at.
    mark = f"survivor-{os.getpid()}-{time.monotonic_ns()}"
    program = f"""
import os, signal, sys
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
try:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(60)', '{mark}'])
        os._exit(0)
    import time; time.sleep(0.3)
except OSError: pass
print('done')
"""
    result = run(program)
    assert (result.status, result.stdout) == ("ok", "done\n")
    assert processes_with(mark) == []


def test_no_group_is_left_behind(sandbox):
    from sateen.rewards.sandbox import run

    run("print(1)", limits=LIMITS)
    assert list(Path("/sys/fs/cgroup").glob(f"**/{cgroup.PREFIX}{os.getpid()}-*")) == []


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal as s\nfor n in (s.SIGXCPU, s.SIGTERM): s.signal(n, s.SIG_IGN)\nwhile True: pass",
        "import os\nos.close(0); os.close(1); os.close(2)\nwhile True: pass",
    ],
    ids=["busy", "asleep", "deaf", "closed"],
)
def test_an_endless_program_is_stopped(run, program):
    result = run(program, limits=SHORT)
    assert (result.status, result.exit_code) == ("timeout", None)
    assert result.wall_s >= 0.4


def test_cpu_time_of_processes_adds_up(sandbox):
    if not can_make_groups():
        pytest.skip("needs the right to make control groups")
    from sateen.rewards.sandbox import run

    result = run("import os\nos.fork(); os.fork()\nwhile True: pass", limits=SHORT)
    assert result.status == "timeout"
    assert result.cpu_s > 0.3


def test_a_huge_input_is_read_or_ignored(run):
    data = b"0123456789abcde\n" * (2**18)  # 4 MiB: many times what a pipe holds
    counted = run("import sys; print(len(sys.stdin.buffer.read()))", data)
    assert counted.stdout == f"{len(data)}\n"
    assert run("print('done')", data).stdout == "done\n"
    assert run("import os; os.close(0); print('done')", data).status == "ok"
    waiting = run("import sys\nsys.stdin.read(1)\nwhile True: pass", data, SHORT)
    assert waiting.status == "timeout"


def test_output_that_is_no_text_stays_readable(run):
    result = run("import os; os.write(1, b'a\\xff\\x00\\xc3\\xa9\\n'); os.write(2, b'\\xfe')")
    assert (result.status, result.stdout, result.stderr) == ("ok", "a\\xff\x00é\n", "\\xfe")


def test_a_huge_program_arrives_whole(run):
    result = run("x = 1\n" * 40_000 + "print(open('/program.py').read().count('x = 1'))")
    assert (result.status, result.stdout) == ("ok", "40001\n")


def test_nothing_of_the_environment_goes_in(run, monkeypatch):
    monkeypatch.setenv("SATEEN_SECRET", "the secret")
    result = run("import os; print(sorted(os.environ))")
    assert "SECRET" not in result.stdout
    assert set(eval(result.stdout)) <= {
        "HOME",
        "LANG",
        "LD_LIBRARY_PATH",
        "PWD",
        "PYTHONHASHSEED",
        "LC_CTYPE",
    }


def test_equal_runs_are_equal(run):
    program = "print({'a', 'b', 'c', 'd', 'e'}, hash('sateen'))"
    assert run(program).stdout == run(program).stdout


def test_runs_side_by_side_do_not_mix(run):
    results = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: run("print(int(input()) ** 2)", b"%d\n" % i)}))
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {i: result.stdout for i, result in results.items()} == {i: f"{i * i}\n" for i in range(6)}


def test_no_descriptor_is_left_open(run):
    run("print(1)")
    before = len(os.listdir("/proc/self/fd"))
    run("print(1)")
    run("while True: print('x' * 1000)")
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_bubblewrap_it_refuses(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    marker = tmp_path / "ran"
    with pytest.raises(BackendUnavailable, match="`bwrap` is not in PATH; install it"):
        sandbox.run(f"open({str(marker)!r}, 'w')")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'bwrap: No permissions to creating new namespace: Operation not permitted' >&2; exit 1",
         "Operation not permitted"),
        ("exit 0", "it said nothing"),
    ],
)  # fmt: skip
def test_a_bubblewrap_that_cannot_isolate_is_refused(monkeypatch, tmp_path, script, message):
    if not any(os.path.exists(f"/usr/{part}bin/python3") for part in ("", "local/")):
        pytest.skip("needs a Python below /usr")
    tools = tmp_path / "tools"
    tools.mkdir()
    tmp_path.chmod(0o755)
    for name in ("bwrap", "prlimit"):
        fake = tools / name
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    for parent in [tmp_path, *tmp_path.parents]:  # nobody must reach it; pytest makes its folders private
        if not os.access(parent, os.X_OK) or parent.stat().st_mode & 0o001 == 0:
            message = "does not start|cannot isolate"
    with pytest.raises(BackendUnavailable, match=message):
        isolation()


def test_settings_that_forbid_namespaces_are_named(monkeypatch, tmp_path):
    setting = tmp_path / "max_user_namespaces"
    setting.write_text("0\n")
    monkeypatch.setattr(
        bwrap, "SETTINGS", {str(setting): ("0", "user namespaces are off; raise it with sysctl")}
    )
    assert bwrap.why_bwrap_failed("bwrap: no").endswith(
        "is 0: user namespaces are off; raise it with sysctl)"
    )
    setting.write_text("1000\n")
    assert bwrap.why_bwrap_failed("bwrap: no") == "bwrap: no"
    assert "allow them for this one" in bwrap.why_bwrap_failed("bwrap: x: Operation not permitted")


@pytest.mark.parametrize(
    "wrong", [{"wall_s": 0}, {"processes": -1}, {"memory_bytes": MIB}, {"wall_s": float("nan")}]
)
def test_limits_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Limits(**wrong)

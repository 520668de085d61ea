"""The filter, run by a small interpreter of classic BPF that was written from the kernel's manual."""

import re
import struct
from pathlib import Path

import pytest

from sateen.errors import BackendUnavailable
from sateen.rewards.seccomp import FORBIDDEN, assemble

ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
X86, ARM = 0xC000003E, 0xC00000B7


def verdict(machine: str, arch: int, number: int, argument: int = 0) -> int:
    data = struct.pack("=IIQ6Q", number, arch, 0, argument, 0, 0, 0, 0, 0)
    program = list(struct.iter_unpack("=HBBI", assemble(machine)))
    i, a = 0, 0
    while True:
        code, true, false, k = program[i]
        i += 1
        if code == 0x20:
            a = struct.unpack_from("=I", data, k)[0]
        elif code == 0x06:
            return k
        else:
            holds = {0x15: a == k, 0x25: a > k, 0x45: bool(a & k)}[code]
            i += true if holds else false


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0, ALLOW), (59, ALLOW), (57, ALLOW), (53, ALLOW), (41, EPERM), (101, EPERM), (319, EPERM),
     (435, ENOSYS), (462, ALLOW), (463, ENOSYS), (0x40000000 + 1, KILL)],
)  # fmt: skip
def test_calls_of_x86_64(number, expected):
    assert verdict("x86_64", X86, number) == expected


@pytest.mark.parametrize(
    ("number", "expected"),
    [(63, ALLOW), (221, ALLOW), (198, EPERM), (117, EPERM), (279, EPERM), (435, ENOSYS)],
)
def test_calls_of_aarch64(number, expected):
    assert verdict("aarch64", ARM, number) == expected


def test_another_table_kills():
    assert verdict("x86_64", 0x40000003, 0) == KILL
    assert verdict("aarch64", X86, 0) == KILL


@pytest.mark.parametrize(("machine", "arch", "clone"), [("x86_64", X86, 56), ("aarch64", ARM, 220)])
def test_clone_makes_threads_and_processes_but_no_namespaces(machine, arch, clone):
    assert verdict(machine, arch, clone, 0x11) == ALLOW  # SIGCHLD: fork
    assert verdict(machine, arch, clone, 0x3D0F00) == ALLOW  # what pthread_create asks for
    for namespace in (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert verdict(machine, arch, clone, namespace | 0x11) == EPERM


def test_every_listed_call_is_refused():
    for column, (machine, arch) in enumerate((("x86_64", X86), ("aarch64", ARM))):
        numbers = {pair[column] for pair in FORBIDDEN.values() if pair[column] >= 0}
        assert {verdict(machine, arch, number) for number in numbers} == {EPERM}


def test_numbers_are_those_of_the_kernel_headers():
    tables = (
        "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
        "/usr/include/asm-generic/unistd.h",
    )
    compared = 0
    for column, file in enumerate(map(Path, tables)):
        if file.exists():
            found = dict(re.findall(r"#define __NR_(\w+)\s+(\d+)$", file.read_text(), re.MULTILINE))
            for name, pair in FORBIDDEN.items():
                if name in found:
                    assert (name, pair[column]) == (name, int(found[name]))
                    compared += 1
    if not compared:
        pytest.skip("needs the kernel's headers (linux-libc-dev)")
    assert compared > 50


def test_other_machines_are_refused():
    with pytest.raises(BackendUnavailable, match="riscv64"):
        assemble("riscv64")

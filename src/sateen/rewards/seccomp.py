"""The system calls a sandboxed program may not make, as a classic BPF filter.

bubblewrap reads the assembled filter from a file descriptor and loads it last, so that it binds the program
and not bubblewrap. Assembled here because it is forty lines: the Python bindings of libseccomp are either not
on the package index or no longer kept. Numbers are those of the kernel's tables for x86-64 and for aarch64.
"""

from __future__ import annotations

import errno
import platform
import struct

from sateen.errors import BackendUnavailable

# name: (x86-64, aarch64); -1 where the architecture has no such call.
FORBIDDEN: dict[str, tuple[int, int]] = {
    # Other processes.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    # Network; socketpair, which reaches nobody else, stays.
    "socket": (41, 198),
    # Namespaces, mounts, roots.
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    # Memory that outlives its mapping and is not counted as the process's address space.
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    # Large or old parts of the kernel that no solution needs.
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "syslog": (103, 116),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "acct": (163, 89), "quotactl": (179, 60),
    "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142), "personality": (135, 92),
    "iopl": (172, -1), "ioperm": (173, -1), "modify_ldt": (154, -1), "uselib": (134, -1),
    "vhangup": (153, 58), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "fanotify_init": (300, 262), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "clock_adjtime": (305, 266), "adjtimex": (159, 171), "sethostname": (170, 161),
}  # fmt: skip
# name: AUDIT_ARCH, column of the table above, numbers of clone and clone3.
ARCHITECTURES = {"x86_64": (0xC000003E, 0, 56, 435), "aarch64": (0xC00000B7, 1, 220, 435)}
# The highest call this list was written for (mseal, Linux 6.10); newer ones answer "not implemented".
LAST_KNOWN_CALL = 462
X32_BIT = 0x40000000
CLONE_NEW_ANY = 0x7E020080  # user, pid, net, ipc, uts, cgroup, mount and time namespaces

ALLOW, KILL_PROCESS, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _RETURN, _EQUAL, _ABOVE, _ANY_BIT = (
    0x20,
    0x06,
    0x15,
    0x25,
    0x45,
)  # BPF_LD|W|ABS, RET|K, JMP|{JEQ,JGT,JSET}|K
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; low half of the argument


def assemble(machine: str | None = None) -> bytes:
    """The filter as an array of `struct sock_filter`.

    A call from the list fails with EPERM, as does `clone` with a new namespace; `clone3`, whose flags a
    filter cannot read, and calls newer than the list fail with ENOSYS, and the C library then uses `clone`.
    Calls of another architecture's table kill the process.

    Args:
        machine: as `platform.machine()` says it; this machine's when None.

    Raises:
        BackendUnavailable: an architecture without a table here.
    """
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES)
        raise BackendUnavailable(f"no system-call filter for {machine}; the sandbox knows {known}")
    arch, column, clone, clone3 = ARCHITECTURES[machine]
    # Each test skips one instruction, the return that follows it, when it does not hold.
    program = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":
        program += [(_ANY_BIT, 0, 1, X32_BIT), (_RETURN, 0, 0, KILL_PROCESS)]
    program += [(_ABOVE, 0, 1, LAST_KNOWN_CALL), (_RETURN, 0, 0, ERRNO | errno.ENOSYS)]
    program += [(_EQUAL, 0, 1, clone3), (_RETURN, 0, 0, ERRNO | errno.ENOSYS)]
    for numbers in FORBIDDEN.values():
        if numbers[column] >= 0:
            program += [(_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, ERRNO | errno.EPERM)]
    program += [
        (_EQUAL, 0, 3, clone),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_ANY_BIT, 0, 1, CLONE_NEW_ANY),
        (_RETURN, 0, 0, ERRNO | errno.EPERM),
        (_RETURN, 0, 0, ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)

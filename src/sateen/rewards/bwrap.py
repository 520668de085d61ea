"""bubblewrap's command line for one run, and why it fails where it does.

The sandbox sees libraries, one interpreter, five devices and an empty temporary folder, and runs as nobody.
"""

from __future__ import annotations

import math
import os
import resource
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sateen.rewards.limits import Limits

NOBODY = 65534
# Settings of a machine that forbid namespaces: file -> (the bad value, what to do).
SETTINGS = {
    "/proc/sys/user/max_user_namespaces": ("0", "user namespaces are off; raise it with sysctl"),
    "/proc/sys/kernel/unprivileged_userns_clone": ("0", "only root may make namespaces; set it to 1"),
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": ("1", "give bwrap an AppArmor profile"),
}
DEVICES = ("null", "zero", "full", "random", "urandom")


@dataclass(frozen=True)
class Isolation:
    """What this machine runs programs with.

    Attributes:
        bwrap, interpreter, prlimit: paths of the host; the last two have the same ones inside.
        drops_root: the launcher is root, and bubblewrap is started as nobody.
    """

    bwrap: str
    interpreter: str
    prlimit: str
    drops_root: bool

    def command(
        self,
        *,
        program_fd: int,
        seccomp_fd: int,
        status_fd: int,
        block_fd: int,
        limits: Limits,
        has_groups: bool,
    ) -> list[str]:
        """bubblewrap's command line; the descriptors are those of the process that starts it."""
        words = (
            "--unshare-all --unshare-user --die-with-parent --new-session --clearenv --cap-drop ALL".split()
        )
        words += ["--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "sandbox"]
        prefix = Path(self.interpreter).parents[1]
        for folder in dict.fromkeys(("/usr/lib", "/usr/lib64", f"{prefix}/lib")):
            words += ["--ro-bind-try", folder, folder]
        for link in ("/lib", "/lib64"):
            if os.path.islink(link):
                words += ["--symlink", os.readlink(link), link]
            else:
                words += ["--ro-bind-try", link, link]
        for program in (self.interpreter, self.prlimit):
            words += ["--ro-bind", program, program]
        # One by one: `--dev` would bring a second writable file system, without a size.
        for device in DEVICES:
            words += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
        words += ["--perms", "1777", "--size", str(limits.file_bytes), "--tmpfs", "/tmp"]
        words += ["--perms", "0444", "--ro-bind-data", str(program_fd), "/program.py"]
        words += [
            "--remount-ro",
            "/",
            "--chdir",
            "/tmp",
            "--setenv",
            "HOME",
            "/tmp",
            "--setenv",
            "LANG",
            "C.UTF-8",
        ]
        words += ["--setenv", "LD_LIBRARY_PATH", f"{prefix}/lib", "--setenv", "PYTHONHASHSEED", "0"]
        words += [
            "--seccomp",
            str(seccomp_fd),
            "--json-status-fd",
            str(status_fd),
            "--block-fd",
            str(block_fd),
        ]
        # Resource limits are set inside, where RLIMIT_NPROC counts the processes of this namespace alone.
        words += ["--", self.prlimit, *_rlimits(limits, has_groups=has_groups), "--"]
        return [self.bwrap, *words, self.interpreter, "-s", "-B", "-X", "utf8", "/program.py"]


def _rlimits(limits: Limits, *, has_groups: bool) -> list[str]:
    """Flags of `prlimit`; never above the limits that this process has itself."""
    seconds = math.ceil(limits.wall_s)
    wanted = {
        "CPU": (seconds, seconds + 1),  # SIGXCPU, then SIGKILL for those who ignore it
        "FSIZE": (limits.file_bytes, limits.file_bytes),
        "NPROC": ((limits.processes if has_groups else 1) + 1,) * 2,
        "NOFILE": (128, 128),
        "CORE": (0, 0),
        "MEMLOCK": (0, 0),
    }
    if not has_groups:
        wanted["AS"] = (limits.memory_bytes, limits.memory_bytes)
    flags = []
    for name, (soft, hard) in wanted.items():
        had = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1]
        if had != resource.RLIM_INFINITY:
            soft, hard = min(soft, had), min(hard, had)
        flags.append(f"--{name.lower()}={soft}:{hard}")
    return flags


def why_bwrap_failed(message: str) -> str:
    """bubblewrap's complaint with the setting of this machine that explains it, where one does."""
    for file, (bad, reason) in SETTINGS.items():
        if os.path.exists(file) and Path(file).read_text().strip() == bad:
            return f"{message} ({file} is {bad}: {reason})"
    if "Operation not permitted" in message or "Permission denied" in message:
        return f"{message} (the container or its seccomp profile forbids namespaces; allow them for this one)"
    if "Unknown option" in message:
        version = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, check=False).stdout
        return f"{message} ({version.strip()} is too old; 0.8 or newer is needed)"
    return message

"""Control groups of one sandboxed run: how many processes, how much memory, how much CPU time was used.

A run's groups lie below the group that this process is in, so limits from outside keep holding. Both layouts
of the kernel are served: one hierarchy per controller (v1) and the unified one (v2). Where no group can be
made, `create` returns None and the sandbox sets limits per process instead.
"""

from __future__ import annotations

import os
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CONTROLLERS = ("pids", "memory", "cpuacct")
PREFIX = "sateen-"


@dataclass(frozen=True)
class Groups:
    """The groups of one run.

    Attributes:
        folders: controller -> folder; the same one three times with v2.
        is_unified: v2.
    """

    folders: dict[str, Path]
    is_unified: bool

    def add(self, pid: int) -> None:
        """Moves a process in; the children it makes later follow."""
        for folder in set(self.folders.values()):
            (folder / "cgroup.procs").write_text(str(pid))

    def cpu_s(self) -> float:
        """CPU seconds of all processes that are or were in the groups."""
        if self.is_unified:
            return _field(self.folders["cpuacct"] / "cpu.stat", "usage_usec") / 1e6
        return int((self.folders["cpuacct"] / "cpuacct.usage").read_text()) / 1e9

    def peak_bytes(self) -> int:
        """The most memory the group held at once, files in memory included; 0 where the kernel keeps none."""
        name = "memory.peak" if self.is_unified else "memory.max_usage_in_bytes"
        file = self.folders["memory"] / name
        return int(file.read_text()) if file.exists() else 0

    def num_oom_kills(self) -> int:
        """Processes that the kernel ended because the group reached its memory limit."""
        name = "memory.events" if self.is_unified else "memory.oom_control"
        return _field(self.folders["memory"] / name, "oom_kill")

    def remove(self) -> None:
        """Deletes the groups, waiting for the last killed process to leave them."""
        for folder in set(self.folders.values()):
            for _ in range(200):
                try:
                    folder.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:  # EBUSY until the kernel has buried them
                    time.sleep(0.01)


def create(*, processes: int, memory_bytes: int) -> Groups | None:
    """New empty groups with these limits, or None where this process may not make them."""
    try:
        parents = _parents()
    except OSError:
        return None
    if parents is None:
        return None
    folders, is_unified = parents
    name = f"{PREFIX}{os.getpid()}-{uuid.uuid4().hex}"
    groups = Groups({controller: folder / name for controller, folder in folders.items()}, is_unified)
    try:
        for folder in set(groups.folders.values()):
            folder.mkdir()
        (groups.folders["pids"] / "pids.max").write_text(str(processes))
        memory = groups.folders["memory"]
        (memory / ("memory.max" if is_unified else "memory.limit_in_bytes")).write_text(str(memory_bytes))
        swap = memory / ("memory.swap.max" if is_unified else "memory.memsw.limit_in_bytes")
        if swap.exists():
            swap.write_text("0" if is_unified else str(memory_bytes))
        groups.cpu_s()
        groups.num_oom_kills()
    except (OSError, KeyError):
        groups.remove()
        return None
    return groups


def _parents() -> tuple[dict[str, Path], bool] | None:
    """This process's own folder per controller, and whether they are v2; None where one is missing."""
    own: dict[str, str] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    if all(controller in own for controller in CONTROLLERS):
        folders = {}
        for controller in CONTROLLERS:
            mount = _mount("cgroup", controller)
            if mount is None:
                return None
            folders[controller] = mount / own[controller].lstrip("/")
        return folders, False
    mount = _mount("cgroup2")
    if mount is None or "" not in own:
        return None
    folder = mount / own[""].lstrip("/")
    offered = (folder / "cgroup.subtree_control").read_text().split()
    if not {"pids", "memory"} <= set(offered):
        # Refused by the kernel where this group holds processes itself and is not the root.
        (folder / "cgroup.subtree_control").write_text("+pids +memory")
    return dict.fromkeys(CONTROLLERS, folder), True


def _mount(kind: str, option: str | None = None) -> Path | None:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, found, options, *_ = line.split()
        if found == kind and (option is None or option in options.split(",")):
            return Path(place) if os.access(place, os.X_OK) else None
    return None


def _field(file: Path, name: str) -> int:
    with suppress(FileNotFoundError):
        for line in file.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    raise KeyError(name)

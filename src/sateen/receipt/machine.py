"""What a measurement ran on, read from the system without importing torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any


def hardware() -> dict[str, Any]:
    """The `hardware` part for this machine: CPU, usable cores and bytes of memory, GPUs or None."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _first_line(Path("/sys/fs/cgroup/memory.max"))
    if limit.isdecimal():
        memory = min(memory, int(limit))
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux has it
        cores = os.cpu_count() or 1
    cpu = _named(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine()
    gpus = [_named(file, "Model") for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))]
    return {
        "cpu": cpu,
        "cores": cores,
        "memory_bytes": memory,
        "gpu": ", ".join(name for name in gpus if name) or None,
    }


def versions() -> dict[str, str]:
    """The `versions` part: Python, Sateen and the packages that decide numbers and speed, where installed."""
    found = {"python": platform.python_version()}
    for package in ("sateen", "torch", "numpy", "safetensors", "tokenizers", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _named(file: Path, key: str) -> str:
    """The value of the first `key : value` line of a file, or an empty string."""
    if not file.is_file():
        return ""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _first_line(file: Path) -> str:
    return file.read_text().split("\n")[0].strip() if file.is_file() else ""

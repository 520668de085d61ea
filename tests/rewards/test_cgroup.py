"""Control groups: the files of both layouts are read right; the limits are tested by breaking them."""

import os
from pathlib import Path

import pytest

from sateen.rewards import cgroup
from sateen.rewards.cgroup import Groups


def test_files_of_the_unified_layout(tmp_path):
    (tmp_path / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 2000000\nsystem_usec 500000\n")
    (tmp_path / "memory.events").write_text("low 0\nhigh 0\nmax 7\noom 2\noom_kill 1\n")
    groups = Groups(dict.fromkeys(cgroup.CONTROLLERS, tmp_path), is_unified=True)
    assert (groups.cpu_s(), groups.num_oom_kills(), groups.peak_bytes()) == (2.5, 1, 0)
    (tmp_path / "memory.peak").write_text("4096\n")
    assert groups.peak_bytes() == 4096
    groups.add(123)
    assert (tmp_path / "cgroup.procs").read_text() == "123"


def test_files_of_one_hierarchy_per_controller(tmp_path):
    folders = {name: tmp_path / name for name in cgroup.CONTROLLERS}
    for folder in folders.values():
        folder.mkdir()
    (folders["cpuacct"] / "cpuacct.usage").write_text("1500000000\n")
    (folders["memory"] / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    (folders["memory"] / "memory.max_usage_in_bytes").write_text("8192\n")
    groups = Groups(folders, is_unified=False)
    assert (groups.cpu_s(), groups.num_oom_kills(), groups.peak_bytes()) == (1.5, 3, 8192)
    groups.add(5)
    assert all((folder / "cgroup.procs").read_text() == "5" for folder in folders.values())


def test_no_groups_where_none_can_be_made(monkeypatch, tmp_path):
    nowhere = dict.fromkeys(cgroup.CONTROLLERS, tmp_path / "missing")
    monkeypatch.setattr(cgroup, "_parents", lambda: (nowhere, True))
    assert cgroup.create(processes=4, memory_bytes=2**26) is None
    monkeypatch.setattr(cgroup, "_parents", lambda: None)
    assert cgroup.create(processes=4, memory_bytes=2**26) is None


def test_groups_lie_below_our_own():
    groups = cgroup.create(processes=4, memory_bytes=2**26)
    if groups is None:
        pytest.skip("needs the right to make control groups")
    try:
        own = Path("/proc/self/cgroup").read_text()
        for folder in groups.folders.values():
            assert str(os.getpid()) in (folder.parent / "cgroup.procs").read_text().split()
            assert folder.name not in own
    finally:
        groups.remove()
    assert not any(folder.exists() for folder in groups.folders.values())

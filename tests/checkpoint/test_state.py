"""Training checkpoints: round trip, pruning, damage, a full disk and a killed process."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from sateen.checkpoint.state import latest_checkpoint, save_checkpoint
from sateen.errors import CheckpointError


def write_hf(folder):
    (folder / "config.json").write_text("{}")


def save(run, step, keep=2, value=None):
    tensors = {"a": torch.full((3,), float(step if value is None else value)), "b": torch.arange(4)}
    return save_checkpoint(
        run, step, write_hf=write_hf, tensors=tensors, progress={"tokens": step * 10}, keep=keep
    )


def test_round_trip(tmp_path):
    save(tmp_path, 7)
    found = latest_checkpoint(tmp_path)
    assert (found.step, found.progress) == (7, {"tokens": 70})
    tensors = found.tensors()
    assert torch.equal(tensors["a"], torch.full((3,), 7.0))
    assert torch.equal(tensors["b"], torch.arange(4))
    assert (tmp_path / "model" / "config.json").read_text() == "{}"


def test_no_checkpoint_yet(tmp_path):
    assert latest_checkpoint(tmp_path) is None


def test_only_the_newest_stay_and_model_points_at_the_last(tmp_path):
    for step in (2, 9, 10, 11):
        save(tmp_path, step)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_10", "step_11"]
    assert os.readlink(tmp_path / "model") == "checkpoints/step_11/hf"
    assert latest_checkpoint(tmp_path).step == 11


def test_the_same_step_is_replaced(tmp_path):
    save(tmp_path, 3, value=1)
    save(tmp_path, 3, value=2)
    assert latest_checkpoint(tmp_path).tensors()["a"][0] == 2


def test_leftovers_are_ignored_and_removed_and_a_stale_link_is_mended(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    root = tmp_path / "checkpoints"
    (root / ".step_3.writing" / "hf").mkdir(parents=True)
    (root / ".step_0.old").mkdir()
    (tmp_path / "model").unlink()
    (tmp_path / "model").symlink_to("checkpoints/step_1/hf")
    assert latest_checkpoint(tmp_path).step == 2
    assert sorted(p.name for p in root.iterdir()) == ["step_1", "step_2"]
    assert os.readlink(tmp_path / "model") == "checkpoints/step_2/hf"


def test_an_incomplete_one_is_passed_over_with_a_log_line(tmp_path, caplog):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    tensors = newest.folder / "state" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path).step == 1
    assert str(tensors) in caplog.text


def test_changed_bytes_are_refused_by_name(tmp_path):
    newest = save(tmp_path, 2)
    config = newest.folder / "hf" / "config.json"
    config.write_text("[]")
    with pytest.raises(CheckpointError, match=r"hf/config.json is damaged.*delete .*step_2"):
        latest_checkpoint(tmp_path).tensors()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}'])
def test_no_complete_checkpoint_is_an_error(tmp_path, text):
    newest = save(tmp_path, 2)
    (newest.folder / "meta.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"no checkpoint is complete.*meta.json"):
        latest_checkpoint(tmp_path)


def test_another_schema_is_named(tmp_path):
    newest = save(tmp_path, 2)
    meta = newest.folder / "meta.json"
    meta.write_text(json.dumps(newest.meta | {"schema": 99}))
    with pytest.raises(CheckpointError, match="schema 99"):
        latest_checkpoint(tmp_path)


SCRIPT = """
import pathlib, resource, sys, torch
from sateen.checkpoint.state import save_checkpoint
from sateen.errors import CheckpointError
run = pathlib.Path(sys.argv[1])
def write_hf(folder):
    (folder / "config.json").write_text("{{}}")
    {during}
tensors = {{"a": torch.zeros({size})}}
save_checkpoint(run, 2, write_hf=write_hf, tensors=tensors, progress={{}}, keep=1)
"""


def run_script(tmp_path, during, size=4):
    code = textwrap.dedent(SCRIPT).format(during=during, size=size)
    return subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )


def test_a_disk_that_refuses_more_bytes_leaves_the_old_checkpoint(tmp_path):
    save(tmp_path, 1)
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))"
    done = run_script(tmp_path, limit, size=1_000_000)
    assert done.returncode == 1
    assert "CheckpointError" in done.stderr
    assert "free some space" in done.stderr
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_1"]
    assert latest_checkpoint(tmp_path).tensors()["a"][0] == 1


def test_a_process_killed_while_writing_leaves_the_old_checkpoint(tmp_path):
    save(tmp_path, 1)
    done = run_script(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "checkpoints" / ".step_2.writing").is_dir()
    assert latest_checkpoint(tmp_path).tensors()["a"][0] == 1
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_1"]

"""Training checkpoints: `checkpoints/step_N/{hf,state,meta.json}` in a run folder, and its `model` link.

A checkpoint is written under a hidden name in the same folder, flushed to the disk and renamed, so at every
moment each visible `step_N` is whole: a full disk or a killed process leaves the older ones as they were.
Tensors are safetensors, everything else is JSON; nothing is pickled. `train.loop` and `post` write and read
these.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sateen.errors import CheckpointError

log = logging.getLogger("sateen.checkpoint")

SCHEMA = 1
TENSORS = "state/tensors.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        folder: its `step_N` directory.
        meta: what `meta.json` holds: `step`, `progress` (the caller's own values) and `files`, each with its
            bytes and SHA-256.
    """

    folder: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.meta["step"])

    @property
    def progress(self) -> dict[str, Any]:
        """The JSON values that the caller saved."""
        progress: dict[str, Any] = self.meta["progress"]
        return progress

    @property
    def hf(self) -> Path:
        """The model's Hugging Face directory."""
        return self.folder / "hf"

    def tensors(self) -> dict[str, Tensor]:
        """The saved state tensors, after every file of the checkpoint has been compared with its checksum.

        Raises:
            CheckpointError: a file is not what was written; the message names it.
        """
        for name, entry in self.meta["files"].items():
            if _sha256(self.folder / name) != entry["sha256"]:
                raise self._damaged(name, "its checksum differs")
        try:
            return load_file(self.folder / TENSORS)
        except (SafetensorError, OSError) as error:
            raise self._damaged(TENSORS, str(error)) from None

    def _damaged(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder / name} is damaged ({why}); delete {self.folder} to resume from the one before it"
        )


def save_checkpoint(
    run: Path,
    step: int,
    *,
    write_hf: Callable[[Path], None],
    tensors: Mapping[str, Tensor],
    progress: Mapping[str, Any],
    keep: int,
) -> Checkpoint:
    """Writes `checkpoints/step_<step>`, points `model` at it and removes all but the newest `keep`.

    Args:
        run: the run folder.
        step: global step number; a checkpoint of the same step is replaced.
        write_hf: fills an empty directory with the model's files.
        tensors: optimizer state and random-number states, on any device.
        progress: JSON values: counters, loader state.
        keep: checkpoints that stay, at least 1.

    Raises:
        CheckpointError: the disk is full or a file cannot be written; older checkpoints are untouched.
    """
    root = run / "checkpoints"
    final, fresh = root / f"step_{step}", root / f".step_{step}.writing"
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        (fresh / "state").mkdir(parents=True)
        (fresh / "hf").mkdir()
        write_hf(fresh / "hf")
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, fresh / TENSORS)
        names = sorted(str(f.relative_to(fresh)) for f in fresh.rglob("*") if f.is_file())
        files = {n: {"bytes": (fresh / n).stat().st_size, "sha256": _sha256(fresh / n)} for n in names}
        meta = {"schema": SCHEMA, "step": step, "progress": dict(progress), "files": files}
        (fresh / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        _flush(fresh)
        if final.exists():
            _remove(final)
        fresh.rename(final)
        _flush_one(root)
        point(run / "model", Path("checkpoints") / final.name / "hf")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise CheckpointError(
            f"{final} could not be written ({error}); older ones are untouched: free some space and resume"
        ) from error
    for old in _visible(root)[:-keep]:
        if old != final:
            _remove(old)
    return Checkpoint(final, json.loads(json.dumps(meta)))


def latest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a run, or None before the first one.

    Leftovers of a killed process are removed. A visible checkpoint that lacks a file or has one of another
    size was damaged from outside; it is passed over with a log line that names the file.

    Raises:
        CheckpointError: there are checkpoints and none is complete.
    """
    root = run / "checkpoints"
    if not root.is_dir():
        return None
    for leftover in [*root.glob(".step_*.writing"), *root.glob(".step_*.old")]:
        shutil.rmtree(leftover)
    problems = []
    for folder in reversed(_visible(root)):
        try:
            found = _open(folder)
            break
        except CheckpointError as error:
            log.warning("%s; trying the checkpoint before it", error)
            problems.append(str(error))
    else:
        if problems:
            listed = "; ".join(problems)
            raise CheckpointError(
                f"{root}: no checkpoint is complete: {listed}; start the run in a new folder"
            )
        return None
    # A process killed between the rename and the link leaves the link one checkpoint behind.
    link, target = run / "model", found.hf.relative_to(run)
    if not link.is_symlink() or link.readlink() != target:
        point(link, target)
    return found


def keep_model(run: Path, name: str, checkpoint: Checkpoint) -> None:
    """Keeps a checkpoint's model as `stages/<name>` of its run, whatever happens to the checkpoint.

    The files are hard links where the disk has them, so they take no room of their own.
    """
    final = run / "stages" / name
    fresh = final.with_name(f".{name}.writing")
    if final.is_dir():
        return
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        shutil.copytree(checkpoint.hf, fresh, copy_function=_link_or_copy)
        fresh.rename(final)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise CheckpointError(
            f"{final} could not be written ({error}); free some space and resume the run"
        ) from error


def kept_model(run: Path, name: str) -> Path:
    """The model directory that a finished stage of this name left.

    Raises:
        CheckpointError: it is not there.
    """
    folder = run / "stages" / name
    if not folder.is_dir():
        found = sorted(p.name for p in (run / "stages").glob("[!.]*")) if (run / "stages").is_dir() else []
        raise CheckpointError(
            f"{folder}: no stage left its model here (there are: {', '.join(found) or 'none'}); "
            "run that stage first"
        )
    return folder


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _open(folder: Path) -> Checkpoint:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        files = {name: int(entry["bytes"]) for name, entry in meta["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'meta.json'} cannot be read ({error})") from None
    if meta.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{folder / 'meta.json'} has schema {meta.get('schema')}; this version reads {SCHEMA}"
        )
    for name, size in files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            raise CheckpointError(f"{folder / name} is incomplete: {found} bytes of {size}")
    return Checkpoint(folder, meta)


def _visible(root: Path) -> list[Path]:
    """The `step_N` directories, oldest first."""
    numbered = [p for p in root.glob("step_*") if p.name[5:].isdecimal()]
    return sorted(numbered, key=lambda p: int(p.name[5:]))


def _remove(folder: Path) -> None:
    """Deletes a checkpoint; it is hidden in one step first, so that a kill leaves no half of it visible."""
    hidden = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def point(link: Path, target: Path) -> None:
    """Makes `link` a symbolic link to `target`, in one step."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)


def _flush(folder: Path) -> None:
    """Waits until all files and directories below are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        _flush_one(path)


def _flush_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

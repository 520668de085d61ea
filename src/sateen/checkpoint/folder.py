"""Directories that are complete or not there: written beside their place, then renamed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from sateen.errors import CheckpointError


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a new folder, then puts that in the place of `folder`, so that no half is ever there.

    Raises:
        CheckpointError: see `refuse_foreign`.
    """
    folder = folder.resolve()
    refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        write(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        try:
            fresh.rename(folder)
        except OSError:
            old.rename(folder)
            raise
        shutil.rmtree(old)
    else:
        fresh.rename(folder)


def refuse_foreign(folder: Path) -> None:
    """Nothing where `save` may write.

    Raises:
        CheckpointError: `folder` holds something that is no model, which replacing would delete.
    """
    if (
        folder.exists()
        and not (folder / "config.json").is_file()
        and not (folder.is_dir() and not any(folder.iterdir()))
    ):
        raise CheckpointError(
            f"{folder}: exists and is not a model directory; name another place, or remove it first"
        )

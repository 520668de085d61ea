"""Runs a recipe's stages in order inside a run folder, or resumes them where an earlier process stopped.

The folder holds `run.toml` (the settings, resolved) and `progress.json` (the stages that are done); what a
stage writes beside them is its own matter. A folder that belongs to other settings is refused, and a lock
keeps two processes out of one folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sateen.config import (
    Progress,
    RunConfig,
    StageContext,
    load_recipe,
    resolved_toml,
    stage_function,
)
from sateen.config.toml import as_table
from sateen.errors import CheckpointError, ConfigError, SateenError
from sateen.progress import TerminalProgress
from sateen.receipt import Receipt, hardware, versions, write_atomically

SETTINGS = "run.toml"
PROGRESS = "progress.json"
LOCK = ".lock"


class RunBusy(SateenError):
    """Another process is writing the run folder."""


def main(
    recipe: str,
    overlays: Sequence[str] = (),
    *,
    sets: Sequence[str] = (),
    out: str | None = None,
    dry_run: bool = False,
) -> int:
    """`sateen train`: runs or resumes a recipe; prints the run folder on stdout and returns the exit code.

    Args:
        recipe: path or name of a recipe.
        overlays: recipes merged over it, in order.
        sets: `a.b=VALUE` flags.
        out: the run folder; `runs/<name>` when None.
        dry_run: print the resolved settings and touch nothing.
    """
    config = load_recipe([recipe, *overlays], sets)
    if dry_run:
        sys.stdout.write(resolved_toml(config))
        return 0
    folder = Path(out) if out else run_folder(config)
    run_recipe(config, folder, TerminalProgress())
    print(folder)
    return 0


def run_folder(config: RunConfig) -> Path:
    """Where a run goes when nobody says otherwise."""
    return Path("runs") / config.name


def run_recipe(config: RunConfig, folder: Path, progress: Progress) -> None:
    """Runs every stage that is not done yet; returns when all are.

    Raises:
        ConfigError: the folder belongs to other settings, or is no run folder.
        RunBusy: another process writes it.
    """
    _refuse_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        claim(config, folder)
        done = read_progress(folder, config)
        if len(done) == len(config.stages):
            progress.note(f"{folder} is finished: all {len(done)} stages are done; nothing to do")
            return
        if done:
            progress.note(f"{folder}: resuming after {len(done)} of {len(config.stages)} stages")
        for index in range(len(done), len(config.stages)):
            stage = config.stages[index]
            progress.note(f"stage {index + 1} of {len(config.stages)}: {stage.label}")
            start, cpu = time.monotonic(), time.process_time()
            try:
                stage_function(stage.stage)(StageContext(config, stage, index, folder, progress))
            finally:
                progress.stop()
            # Of this process: a stage that was interrupted counts from where it was resumed.
            wall_s, cpu_s = time.monotonic() - start, time.process_time() - cpu
            row = {"index": index, "stage": stage.stage, "label": stage.label}
            done.append(row | {"wall_s": round(wall_s, 1), "cpu_s": round(cpu_s, 1)})
            write_atomically(folder / PROGRESS, json.dumps({"schema": 1, "done": done}, indent=2) + "\n")
        run_receipt(config, folder).write(folder)


def run_receipt(config: RunConfig, folder: Path) -> Receipt:
    """What training itself measured: held-out bits per byte, stored bytes, tokens per second of each stage.

    `sateen demo` measures more and writes its own.
    """
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    heldout = [line["heldout_bits_per_byte"] for line in lines if "heldout_bits_per_byte" in line]
    speeds: dict[str, list[float]] = {}
    for line in lines:
        speeds.setdefault(f"training, {line['stage']}", []).append(line["tokens_per_s"])
    tensors = (folder / "model").glob("*.safetensors")
    return Receipt(
        source={"kind": "recipe", "path": str(folder / SETTINGS), "sha256": _sha256(folder / SETTINGS)},
        seeds={"run": config.seed},
        hardware=hardware(),
        versions=versions(),
        quality={"bits_per_byte": heldout[-1]} if heldout else {},
        bytes={"weights": sum(tensor.stat().st_size for tensor in tensors)},
        speed=[
            {"what": what, "unit": "tokens/s", "n": len(x), "median": q[1], "p25": q[0], "p75": q[2]}
            for what, x in speeds.items()
            if len(x) > 1 and (q := statistics.quantiles(x, n=4, method="inclusive"))
        ],
        commands=[f"sateen train {folder / SETTINGS} --out {config.name}-again"],
    )


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def is_finished(config: RunConfig, folder: Path) -> bool:
    """Whether this folder belongs to these settings and all of its stages are done.

    Raises:
        ConfigError: the folder belongs to other settings, or is no run folder.
    """
    _refuse_foreign(folder)
    if not (folder / SETTINGS).is_file():
        return False
    _compare(config, folder)
    return len(read_progress(folder, config)) == len(config.stages)


def claim(config: RunConfig, folder: Path) -> None:
    """Writes `run.toml` into a new run folder, or checks that the one there says the same.

    Raises:
        ConfigError: it does not; the message names the first key that differs.
    """
    if (folder / SETTINGS).is_file():
        _compare(config, folder)
    else:
        write_atomically(folder / SETTINGS, resolved_toml(config))


def read_progress(folder: Path, config: RunConfig) -> list[dict[str, Any]]:
    """The stages that are done, oldest first: `{"index", "stage", "label", "wall_s", "cpu_s"}` each.

    Raises:
        CheckpointError: `progress.json` is damaged or speaks of other stages than the run has.
    """
    file = folder / PROGRESS
    if not file.is_file():
        return []
    try:
        done: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["done"]
        names = [stage["stage"] for stage in done]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error!r}); delete it to start over") from None
    if names != [stage.stage for stage in config.stages[: len(names)]]:
        raise CheckpointError(f"{file}: its stages {names} are not the run's; delete it to start over")
    return done


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds a run folder for this process; the system lets go when the process ends, however it ends.

    Raises:
        RunBusy: another process holds it.
    """
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunBusy(
                f"{folder}: another process is writing this run; wait for it or choose another --out"
            ) from None
        yield


def first_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """`(key, old value, new value)` of the first place where two tables differ, None where they do not.

    A value that one side lacks is None.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(key, old.get(key), new.get(key)) for key in {**old, **new}]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return None if old == new else (path, old, new)
    found = (first_difference(a, b, f"{path}.{key}".lstrip(".")) for key, a, b in pairs)
    return next((difference for difference in found if difference), None)


def _compare(config: RunConfig, folder: Path) -> None:
    # Parsed rather than compared as text: a setting added since the run began has its default on both sides.
    theirs = load_recipe([folder / SETTINGS])
    difference = first_difference(as_table(theirs), as_table(config))
    if difference:
        key, old, new = difference
        raise ConfigError(
            f"{folder} belongs to another recipe: {key} is {_shown(old)} there and {_shown(new)} here; "
            "choose another folder with --out, or delete this one"
        )


def _shown(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    return "not set" if value is None else repr(value)


def _refuse_foreign(folder: Path) -> None:
    """A folder with other contents is not ours to write into."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; choose another folder with --out")
    if folder.is_dir() and not (folder / SETTINGS).is_file():
        others = sorted(entry.name for entry in folder.iterdir() if entry.name[0] != ".")
        if others:
            raise ConfigError(
                f"{folder} exists and is no run folder (it has {others[0]} but no {SETTINGS}); "
                "choose another one with --out"
            )

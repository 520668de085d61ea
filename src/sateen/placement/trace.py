"""Recorded expert loads: tokens per step, layer and expert, and the readers and writer of the npz format.

A file holds one or more runs as `<run>__counts`; our trainer writes one named `train`. Shape letters of this
room: T recorded steps, L layers with experts, E experts, G ranks (devices), P physical slots, H horizon.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sateen.errors import ConfigError, ShapeError, unknown_name

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class LoadTrace:
    """Tokens that each expert received, before any capacity drop, summed over processes.

    Attributes:
        counts_TLE: int64, routed assignments; a token counts once for each expert it reaches.
        steps_T: int64, increasing step numbers; they need not be consecutive.
        layers: the model's index of each recorded layer.
        run: name of the run inside its file.
        meta: what the file says about itself.
    """

    counts_TLE: Ints
    steps_T: Ints
    layers: tuple[int, ...]
    run: str = "train"
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts, steps = self.counts_TLE, self.steps_T
        if counts.ndim != 3 or 0 in counts.shape:
            raise ShapeError(f"run {self.run}: counts are {counts.shape}, expected [steps, layers, experts]")
        if steps.shape != counts.shape[:1] or len(self.layers) != counts.shape[1]:
            raise ShapeError(
                f"run {self.run}: {counts.shape} counts with {steps.shape} steps, {len(self.layers)} layers"
            )
        if (counts < 0).any():
            step = steps[np.argwhere(counts < 0)[0, 0]]
            raise ConfigError(f"run {self.run}: step {step} has a negative count; counts start at 0")
        if (counts.sum(-1) == 0).any():
            t, l = np.argwhere(counts.sum(-1) == 0)[0]
            raise ConfigError(f"run {self.run}: step {steps[t]} has no tokens in layer {self.layers[l]}")
        if (np.diff(steps) <= 0).any():
            raise ConfigError(f"run {self.run}: the step numbers do not increase")

    @property
    def shares_TLE(self) -> Floats:
        """Each expert's share of its layer's assignments; every layer sums to 1."""
        counts = self.counts_TLE.astype(np.float64)
        shares: Floats = counts / counts.sum(-1, keepdims=True)
        return shares

    @property
    def assignments_TL(self) -> Floats:
        """Routed assignments of each step and layer: tokens times experts per token when nothing drops."""
        total: Floats = self.counts_TLE.sum(-1).astype(np.float64)
        return total


def load_trace(file: str | Path, run: str | None = None) -> LoadTrace:
    """The trace in an npz file; `run` chooses among several.

    Raises:
        ConfigError: no such file, not an npz file, no counts in it, an unknown run, or a run left open.
    """
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; a run writes traces/expert_load.npz")
    try:
        with np.load(path, allow_pickle=False) as saved:
            runs = sorted(key.removesuffix("__counts") for key in saved.files if key.endswith("__counts"))
            if not runs:
                raise ConfigError(f"{path}: no array named RUN__counts [steps, layers, experts] in it")
            if run is None and len(runs) > 1:
                raise ConfigError(f"{path} holds several runs ({', '.join(runs)}); choose one with --run")
            name = run or runs[0]
            if name not in runs:
                raise ConfigError(f"{path}: {unknown_name('run', name, runs)}")
            found = {key: saved[f"{name}__{key}"] for key in ("counts", "steps", "meta")
                     if f"{name}__{key}" in saved.files}  # fmt: skip
        meta = json.loads(str(found["meta"])) if "meta" in found else {}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not a readable npz trace ({error})") from None
    counts = found["counts"]
    if counts.ndim != 3 or not np.issubdtype(counts.dtype, np.integer):
        raise ConfigError(
            f"{path}: {name}__counts is {counts.dtype} {counts.shape}, expected integers of 3 axes"
        )
    steps = found.get("steps", np.arange(1, len(counts) + 1))
    layers = meta.get("layers") if isinstance(meta, dict) else None
    names = layers if isinstance(layers, list) else range(counts.shape[1])
    return LoadTrace(
        counts.astype(np.int64), np.asarray(steps, np.int64), tuple(int(i) for i in names), name, dict(meta)
    )


def save_trace(file: str | Path, trace: LoadTrace) -> None:
    """Writes a trace in the format that `load_trace` reads; counts take the smallest unsigned dtype."""
    meta = json.dumps({**trace.meta, "layers": list(trace.layers)})
    dtype = np.uint16 if trace.counts_TLE.max() < 2**16 else np.uint32
    arrays: dict[str, Any] = {
        f"{trace.run}__counts": trace.counts_TLE.astype(dtype),
        f"{trace.run}__steps": trace.steps_T,
        f"{trace.run}__meta": np.array(meta),
    }
    np.savez_compressed(file, **arrays)

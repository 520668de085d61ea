"""What a run writes while it trains: `metrics.jsonl`, one object per step, and the expert-load trace.

Reports and trackers read these files; training code contains neither. Lines are written through at once, so a
killed run loses at most the line it was writing, and a resumed run drops the lines after its checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from torch import Tensor

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends one JSON object per step; a context manager.

    Keys carry their unit where the word does not: `tokens`, `tokens_per_s`, `step_s`, `bits_per_byte`; losses
        are nats per token.
    """

    def __init__(self, folder: Path, *, resume_step: int = 0):
        """Opens `folder/metrics.jsonl`, keeping the lines up to `resume_step` and cutting off the rest."""
        self.path = folder / METRICS_FILE
        keep_bytes = 0
        if self.path.is_file():
            for line in self.path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n") or json.loads(line)["step"] > resume_step:
                    break
                keep_bytes += len(line)
            os.truncate(self.path, keep_bytes)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends the line of one step, `step` first."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._file.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics, in order; empty when there are none."""
    path = folder / METRICS_FILE
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


class LoadTrace:
    """Tokens each expert received, step by step, kept in memory and written at checkpoints.

    The file is `traces/expert_load.npz` with `train__counts` uint32 [steps, layers, experts], `train__steps`
    int64 and `train__meta`, a JSON object that names the layers: the trace format `placement` reads.
    """

    def __init__(self, folder: Path, *, resume_step: int = 0):
        """Continues the trace in `folder` up to `resume_step`, or starts an empty one."""
        self.path = folder / "traces" / "expert_load.npz"
        self._steps: list[int] = []
        self._counts: list[np.ndarray[Any, np.dtype[np.uint32]]] = []
        self._layers: list[int] = []
        if self.path.is_file() and resume_step > 0:
            with np.load(self.path, allow_pickle=False) as saved:
                keep = saved["train__steps"] <= resume_step
                self._steps = saved["train__steps"][keep].tolist()
                self._counts = list(saved["train__counts"][keep])
                self._layers = json.loads(str(saved["train__meta"]))["layers"]

    def add(self, step: int, counts: Mapping[int, Tensor]) -> None:
        """Records a step; a model without experts records nothing."""
        if counts:
            self._layers = sorted(counts)
            self._steps.append(step)
            self._counts.append(np.stack([counts[i].cpu().numpy() for i in self._layers]).astype(np.uint32))

    def save(self) -> None:
        """Writes the file atomically; does nothing while there is nothing to write."""
        if not self._steps:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".tmp.npz")
        meta = json.dumps({"layers": self._layers, "unit": "tokens per step"})
        np.savez_compressed(
            fresh,
            train__counts=np.stack(self._counts),
            train__steps=np.array(self._steps),
            train__meta=np.array(meta),
        )
        fresh.replace(self.path)

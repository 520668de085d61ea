"""What a run folder tells a report: its curves, the borders of its stages, its expert loads and its receipt.

Files are read as they are found; what is absent comes back empty and the page says that it is missing. A file
that is there and cannot be read is an error.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sateen.errors import SateenError
from sateen.receipt import Receipt
from sateen.report.page import finite
from sateen.train.metrics import METRICS_FILE, read_metrics

SETTINGS = "run.toml"
RECEIPT = "receipt.json"
# The first of these a step has is its main loss; the last stages of a recipe may have other parts.
MAIN_LOSS = ("loss_main", "loss_ce")

Curve = list[tuple[float, float]]


class ReportError(SateenError, ValueError):
    """There is nothing to report on, or a file of the run cannot be read."""

    exit_code = 2


@dataclass(frozen=True)
class ExpertLoad:
    """A run's expert loads.

    Attributes:
        steps_S: step numbers.
        counts_SLE: tokens each expert received per step, layers as in `layers`.
        layers: indices of the layers with experts.
    """

    steps_S: np.ndarray[Any, Any]
    counts_SLE: np.ndarray[Any, Any]
    layers: list[int]

    def relative(self, counts_LE: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Loads over their layer's mean; 1 is balance."""
        mean = counts_LE.mean(axis=-1, keepdims=True)
        return np.asarray(counts_LE / np.where(mean > 0, mean, 1.0))


class RunFolder:
    """A run folder, read when asked.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """One object per step.

        Raises:
            ReportError: a line is not JSON.
        """
        try:
            return read_metrics(self.path)
        except ValueError as error:
            raise ReportError(f"{self.path / METRICS_FILE}: a line is not valid JSON: {error}") from None

    @cached_property
    def stages(self) -> list[tuple[str, float]]:
        """`(stage, tokens at its end)` in order, from `run.toml`, cut at the tokens trained so far.

        Without settings the borders are where the metrics change their stage, which cannot tell two stages of
        one name apart.
        """
        tokens = [finite(line.get("tokens")) for line in self.metrics]
        last = max((t for t in tokens if t is not None), default=0)
        ends: list[tuple[str, float]] = []
        for stage in self.settings.get("stages", []):
            begin = ends[-1][1] if ends else 0
            if begin >= last:
                break
            batch = stage.get("tokens_per_batch", 1)
            # A stage ends with the batch that reaches its budget.
            end = begin + -(-stage.get("tokens", 0) // batch) * batch
            ends.append((stage.get("name") or stage.get("stage", "?"), min(end, last)))
        if not ends:
            for line, at in zip(self.metrics, tokens, strict=True):
                if at is None:
                    continue
                if ends and ends[-1][0] == str(line.get("stage", "train")):
                    ends.pop()
                ends.append((str(line.get("stage", "train")), at))
        return ends

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The resolved recipe, empty without `run.toml`."""
        file = self.path / SETTINGS
        try:
            return tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except tomllib.TOMLDecodeError as error:
            raise ReportError(f"{file}: not valid TOML: {error}") from None

    @cached_property
    def receipt(self) -> Receipt | None:
        """The folder's receipt, if it has one."""
        return Receipt.read(self.path) if (self.path / RECEIPT).is_file() else None

    def curve(self, *keys: str) -> Curve:
        """`(tokens, value)` of the first of these keys each step has, finite values only."""
        points = []
        for line in self.metrics:
            tokens = finite(line.get("tokens"))
            value = next((finite(line[key]) for key in keys if key in line), None)
            if tokens is not None and value is not None:
                points.append((float(tokens), float(value)))
        return points

    def loss(self) -> Curve:
        """The main loss, or the whole one in a run whose metrics have no parts."""
        return self.curve(*MAIN_LOSS) or self.curve("loss")

    @cached_property
    def expert_load(self) -> ExpertLoad | None:
        """The expert-load trace; None when there is none or it is empty."""
        file = self.path / "traces" / "expert_load.npz"
        if not file.is_file():
            return None
        try:
            with np.load(file, allow_pickle=False) as saved:
                counts, steps = saved["train__counts"], saved["train__steps"]
                meta = json.loads(str(saved["train__meta"])) if "train__meta" in saved else {}
        except (KeyError, ValueError, OSError) as error:
            raise ReportError(f"{file}: not an expert-load trace: {error}") from None
        layers = meta.get("layers", list(range(counts.shape[1])))
        return ExpertLoad(steps, counts.astype(np.float64), layers) if counts.size else None


def read_json(file: Path) -> Mapping[str, Any]:
    """The JSON object in a file.

    Raises:
        ReportError: it holds no JSON object.
    """
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(table, dict):
        raise ReportError(f"{file}: should hold a JSON object, not {type(table).__name__}")
    return table

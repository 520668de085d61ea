"""Builds `report.html` from a run folder or a demo's folder; `sateen report RUN`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sateen.receipt import write_atomically
from sateen.report.demo import demo_sections
from sateen.report.folder import SETTINGS, ReportError, RunFolder, read_json
from sateen.report.page import page
from sateen.report.training import run_sections
from sateen.train.metrics import METRICS_FILE

EVALUATION = "evaluation.json"
REPORT = "report.html"


def main(run: str) -> int:
    """`sateen report RUN`: writes the report, prints its path on stdout and returns the exit code."""
    print(build_report(Path(run)))
    return 0


def build_report(folder: Path) -> Path:
    """The path of `report.html`, written in one piece into the folder.

    Args:
        folder: a run folder, or a demo's folder with `evaluation.json` and the runs `hybrid` and
            `twin`. What is absent is named in the page.

    Raises:
        ReportError: the folder is neither, or one of its files cannot be read.
        ReceiptError: its receipt does not follow the schema.
    """
    parts: Iterable[str]
    if (folder / EVALUATION).is_file():
        title, subtitle = (
            "Sateen demo",
            "A small hybrid-attention model beside its full-attention twin",
        )
        parts = demo_sections(folder, read_json(folder / EVALUATION))
    elif (folder / METRICS_FILE).is_file() or (folder / SETTINGS).is_file():
        run = RunFolder(folder)
        name = str(run.settings.get("name", folder.resolve().name))
        title = f"Run {name}"
        subtitle = ", ".join(stage for stage, _ in run.stages) or "nothing trained yet"
        parts = run_sections(run)
    else:
        raise ReportError(
            f"{folder}: neither a run folder ({METRICS_FILE}, {SETTINGS}) nor a finished demo "
            f"({EVALUATION}); give the folder that `sateen train` or `sateen demo` wrote"
        )
    path = folder / REPORT
    write_atomically(path, page(title, subtitle, parts))
    return path

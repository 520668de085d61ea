"""What the benchmarks here share around a result: the revision, quartiles, where the JSON goes."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sateen.receipt import hardware, write_atomically

ROOT = Path(__file__).resolve().parents[1]


def git(*words: str) -> str:
    """What git says in this checkout; empty where it is none."""
    return subprocess.run(
        ["git", "-C", ROOT, *words], capture_output=True, text=True, check=False
    ).stdout.strip()


def revision() -> str | None:
    """The commit that is checked out, or None."""
    return git("rev-parse", "HEAD") or None


def is_dirty(*paths: str) -> bool:
    """Whether files at these paths of the checkout differ from the commit."""
    return bool(git("status", "--porcelain", *paths))


def tests_pass(script: str, tests: Path) -> bool:
    """Whether the tests of what a script measures pass; if not it says that their speed means nothing."""
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", tests], capture_output=True, cwd=ROOT, check=False
    )
    if ran.returncode:
        name = tests.relative_to(ROOT)
        print(
            f"benchmarks/{script}: {name} fails, so the speed of what it tests means nothing", file=sys.stderr
        )
    return ran.returncode == 0


def quartiles(values: Sequence[float], *, method: str = "exclusive") -> dict[str, float]:
    """Median and quartiles; `method` as in `statistics.quantiles`."""
    low, middle, high = statistics.quantiles(values, n=4, method=method)  # type: ignore[arg-type]
    return {"median": middle, "p25": low, "p75": high}


def result_file(name: str) -> Path:
    """`benchmarks/results/NAME-CPU.json` for this machine's processor."""
    cpu = re.sub(r"[^a-z0-9]+", "-", hardware()["cpu"].lower()).strip("-")
    return ROOT / "benchmarks" / "results" / f"{name}-{cpu}.json"


def publish(document: dict[str, Any], path: Path | None, *, indent: int = 2) -> None:
    """Prints a result as JSON and writes it where `path` says."""
    text = json.dumps(document, indent=indent, ensure_ascii=False) + "\n"
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    print(text, end="")

"""`sateen demo`: the whole recipe on a small scale, from a tokenizer to a report.

Trains the hybrid of `recipes/demo.toml` and its full-attention twin on the same tokens, one core each,
evaluates both, and writes the receipt and `report.html`. An unfinished demo resumes where it stopped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sateen.config import RunConfig, load_recipe
from sateen.config.toml import as_table
from sateen.errors import ConfigError, SateenError
from sateen.receipt import write_atomically
from sateen.run import is_finished

MODELS = {"hybrid": ["demo"], "twin": ["demo", "demo-twin"]}
DEFAULT_MINUTES = 10.0
SETTINGS = "demo.json"


def main(*, out: str = "runs/demo", minutes: float = DEFAULT_MINUTES, fresh: bool = False) -> int:
    """Runs, resumes or shows the demo; returns the exit code.

    Args:
        out: the demo's folder.
        minutes: length of the whole demo on two cores of the kind the recipe was measured on; scales the
            token budgets of every stage. A demo that was begun keeps its own.
        fresh: delete the folder first.
    """
    from sateen.report import build_report

    folder = Path(out)
    settings = begin(folder, minutes, fresh)
    if not (folder / "receipt.json").is_file():
        train(folder, settings)
        from sateen.checkpoint.state import point
        from sateen.eval.demo import evaluate

        evaluate(folder, settings)
        point(folder / "model", Path("hybrid") / "model")
    report = build_report(folder)
    print(summary(folder, report))
    return 0


def begin(folder: Path, minutes: float, fresh: bool) -> dict[str, Any]:
    """The demo's settings: those of the folder if it was begun, else new ones.

    Raises:
        ConfigError: `minutes` is not positive, or the folder holds something else.
    """
    if not minutes > 0:
        raise ConfigError(
            f"--minutes {minutes}: give a number above 0, for example --minutes {DEFAULT_MINUTES:g}"
        )
    if fresh and (folder / SETTINGS).is_file():
        import shutil

        shutil.rmtree(folder)
    if (folder / SETTINGS).is_file():
        settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text())
        return settings
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} exists and is no demo folder; choose another one with --out")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"minutes": minutes, "began": time.time()}
    write_atomically(folder / SETTINGS, json.dumps(settings) + "\n")
    return settings


def overrides(minutes: float) -> list[str]:
    """`--set` flags that scale every stage's token counts to `minutes`, in whole batches."""
    config = load_recipe(["demo"])
    flags = []
    for index, stage in enumerate(as_table(config)["stages"]):
        batch = stage["tokens_per_batch"]

        def scaled(tokens: int, batch: int = batch) -> int:
            return max(1, round(tokens * minutes / DEFAULT_MINUTES / batch)) * batch

        flags.append(f"stages.{index}.tokens={scaled(stage['tokens'])}")
        for key in ("warmup_tokens", "decay_tokens"):
            if stage["schedule"].get(key):
                flags.append(
                    f"stages.{index}.schedule.{key}={int(stage['schedule'][key] * minutes / DEFAULT_MINUTES)}"
                )
    return flags


def configs(settings: dict[str, Any]) -> dict[str, RunConfig]:
    """The two runs."""
    flags = overrides(settings["minutes"])
    return {name: load_recipe(recipe, flags) for name, recipe in MODELS.items()}


# One command per method; the demo itself is the sliding-window hybrid with experts and drafts.
METHODS = {
    "HySparse, sparse layers that share a full one's cache": "train hysparse-tiny",
    "INT8 attention, error tables beside FP8": "bench int8-attention",
    "Fairy±i, a complex model of two-bit weights": "train fairy-tiny",
    "expert loads, forecast for this demo's experts": "experts forecast FOLDER --horizon 100",
    "reasoning RL, sums from mostly wrong to right": "train rl-tiny",
    "MOPD, several teachers distilled into one model": "train mopd-tiny",
    "MiMo-Audio, a speech codec and its language model": "train audio-tiny",
}


def train(folder: Path, settings: dict[str, Any]) -> None:
    """Trains both models, side by side where there are two cores; already finished ones are left alone.

    Raises:
        SateenError: a training process failed; its log is named.
    """
    runs = {
        name: config for name, config in configs(settings).items() if not is_finished(config, folder / name)
    }
    flags = [flag for pair in overrides(settings["minutes"]) for flag in ("--set", pair)]
    waves = [list(runs)] if (os.cpu_count() or 1) > 1 else [[name] for name in runs]
    for wave in waves:
        logs = {name: (folder / f"{name}.log").open("a") for name in wave}
        started = {
            name: subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "sateen.cli",
                    "train",
                    *MODELS[name],
                    *flags,
                    "--out",
                    str(folder / name),
                ],
                stdout=logs[name],
                stderr=logs[name],
                env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            )
            for name in wave
        }
        try:
            _watch(folder, {name: sum(s.tokens for s in runs[name].stages) for name in wave}, started)
        finally:
            failed = [
                name for name, process in started.items() if process.poll()
            ]  # before others are stopped
            for process in started.values():
                if process.poll() is None:
                    process.terminate()  # it finishes its step, saves and ends
            for name, process in started.items():
                process.wait()
                logs[name].close()
        if failed:
            name = failed[0]
            tail = (folder / f"{name}.log").read_text().strip().splitlines()[-1:]
            raise SateenError(f"training {name} failed ({folder / name}.log): {' '.join(tail)}")


def _watch(folder: Path, totals: dict[str, int], started: dict[str, subprocess.Popen[bytes]]) -> None:
    """Shows both runs' progress until the processes end, from the lines they append to metrics.jsonl."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<7}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens  {task.fields[shown]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks = {
            name: bars.add_task(name, total=total, shown="preparing data") for name, total in totals.items()
        }
        while True:
            alive = any(process.poll() is None for process in started.values())
            for name, task in tasks.items():
                done, shown = _progress(folder / name / "metrics.jsonl")
                if done:
                    bars.update(task, completed=done, shown=shown)
            failed = any(process.poll() not in (None, 0) for process in started.values())
            if not alive or failed:
                return
            time.sleep(0.5)


def _progress(file: Path) -> tuple[int, str]:
    """Tokens trained so far, and the newest stage, loss and speed."""
    if not file.is_file():
        return 0, ""
    lines = file.read_bytes().split(b"\n")[:-1]  # the writer may be in the middle of the last line
    if not lines:
        return 0, ""
    last = json.loads(lines[-1])
    return last["tokens"], f"{last['stage']}  loss {last['loss']:.3f}  {last['tokens_per_s']:,.0f} tokens/s"


def summary(folder: Path, report: Path) -> str:
    """What the demo prints at its end: the headline figures and how to go on."""
    evaluation = json.loads((folder / "evaluation.json").read_text())
    hybrid, twin = evaluation["models"]["hybrid"], evaluation["models"]["twin"]
    tasks, twin_tasks = hybrid["quality"]["tasks"], twin["quality"]["tasks"]
    bits, twin_bits = hybrid["quality"]["bits_per_byte"], twin["quality"]["bits_per_byte"]
    kv, twin_kv = hybrid["kv"], twin["kv"]
    baselines = ", ".join(f"{name} {value:.2f}" for name, value in evaluation["baselines"].items())
    draft = hybrid["draft"]["sampled"]
    speeds = {row["what"]: row["median"] for row in hybrid["speed"]}
    lines = [
        f"bits per byte     {bits:.3f} (twin {twin_bits:.3f}; {baselines})",
        f"two-digit sums    {tasks['sums']['accuracy']:.1%} of {tasks['sums']['n']} held-out pairs",
        f"recall            {tasks['recall']['accuracy']:.1%} (twin {twin_tasks['recall']['accuracy']:.1%}, "
        f"chance {tasks['recall']['chance']:.1%})",
        f"KV cache          {kv['bytes']:,} bytes at {kv['context']} tokens, "
        f"{kv['bytes'] / twin_kv['bytes']:.0%} of the twin's",
        f"drafts            acceptance length {draft['acceptance_length']:.2f} at temperature "
        f"{draft['temperature']}; "
        + ", ".join(f"{what} {value:.0f} tokens/s" for what, value in speeds.items()),
        f"report            {report}",
        "",
        f"Talk to it:       sateen chat {folder}      (try: 47+85=, and /reset before the next)",
        f'Continue a text:  sateen generate {folder} -p "The string module"',
        "",
        "The other methods, each in minutes:",
        *(f"  {what:<54} sateen {command}" for what, command in METHODS.items()),
    ]
    trace = folder / "hybrid" / "traces" / "expert_load.npz"
    return "\n".join(lines).replace("FOLDER", str(trace))

"""Runs the small recipes, measures what they claim and keeps the numbers: `make recipes`.

    sateen bench recipes                                  all of them
    sateen bench recipes --only rl-tiny --seeds 0,1,2     one of them
    sateen bench recipes --only fairy-tiny --fresh        again from nothing

A run folder that is finished is measured and not repeated; an unfinished one resumes. `--out` gets one JSON
per recipe: commands, hardware, versions, seconds of every stage and the numbers before and after.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _results import ROOT, revision

from sateen.checkpoint.state import kept_model
from sateen.config import RunConfig, load_recipe
from sateen.receipt import hardware, versions, write_atomically
from sateen.run import is_finished, read_progress


@dataclass(frozen=True)
class Measure:
    """One call of `sateen eval`.

    Attributes:
        label: what the numbers are called.
        tasks: as in `--tasks`.
        stage: the named stage whose model is measured; the run's last model when None.
        num_examples: questions per task.
    """

    label: str
    tasks: str
    stage: str | None = None
    num_examples: int = 500


@dataclass(frozen=True)
class Plan:
    """How a recipe is run and measured.

    Attributes:
        recipes: the recipe and what is merged over it.
        measures: in the order of the table.
        seeds: one run each.
        study: a script of this folder that measures a finished run in its own way, in place of `measures`.
        needs: a path of the checkout that must be there first.
    """

    recipes: tuple[str, ...]
    measures: tuple[Measure, ...] = ()
    seeds: tuple[int, ...] = (0,)
    study: str | None = None
    needs: str | None = None


TEXT = (Measure("after", "perplexity"),)
PLANS: dict[str, Plan] = {
    "hysparse-tiny": Plan(("hysparse-tiny",), TEXT),
    "hysparse-tiny-twin": Plan(("hysparse-tiny", "hysparse-tiny-twin"), TEXT),
    "fairy-tiny": Plan(("fairy-tiny",), TEXT),
    "fairy-tiny-twin": Plan(("fairy-tiny", "fairy-tiny-twin"), TEXT),
    "rl-tiny": Plan(
        ("rl-tiny",), (Measure("before", "sums", stage="start"), Measure("after", "sums")), seeds=(0, 1, 2)
    ),
    "mopd-tiny": Plan(("mopd-tiny",), study="mopd.py"),
    "audio-tiny": Plan(("audio-tiny",), (Measure("after", "audio"),), needs="data/speech"),
}


def main() -> None:
    """Runs what is asked for; the table goes to stdout, everything else to stderr and files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="A,B", help=f"recipes of {', '.join(PLANS)} (default: all)")
    parser.add_argument("--seeds", metavar="N,M", help="seeds of every recipe (default: each recipe's own)")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"), help="run folders (runs/recipes)")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "recipes",
        help="where the JSON files go",
    )
    parser.add_argument("--fresh", action="store_true", help="delete the run folders first")
    flags = parser.parse_args()
    names = flags.only.split(",") if flags.only else list(PLANS)
    if unknown := [name for name in names if name not in PLANS]:
        parser.error(f"--only: {unknown[0]} is not one of {', '.join(PLANS)}")
    try:
        seeds = tuple(int(seed) for seed in flags.seeds.split(",")) if flags.seeds else None
    except ValueError:
        parser.error(f"--seeds: {flags.seeds!r} is not a list of whole numbers such as 0,1,2")
    flags.out.mkdir(parents=True, exist_ok=True)
    rows: list[str] = []
    for name in names:
        plan = PLANS[name]
        if plan.needs is not None and not Path(plan.needs).exists():
            talk(f"{name}: left out, {plan.needs} is not there; its recipe says how to get it")
            continue
        if plan.study is not None:
            rows += studied(name, plan, flags.runs, flags.out, seeds or plan.seeds, flags.fresh)
            continue
        runs = [one_run(name, plan, seed, flags.runs, flags.fresh) for seed in seeds or plan.seeds]
        write_atomically(flags.out / f"{name}.json", json.dumps(document(name, plan, runs), indent=1) + "\n")
        rows += table(name, runs)
    print("\n".join(rows))


def talk(text: str) -> None:
    """A line for the person who waits."""
    print(text, file=sys.stderr, flush=True)


def sateen(*arguments: str) -> str:
    """Runs a verb in its own process, as people do; returns its stdout.

    Raises:
        CalledProcessError: it failed; its message is on stderr already.
    """
    command = [sys.executable, "-m", "sateen.cli", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def train(name: str, plan: Plan, seed: int, runs: Path, is_fresh: bool) -> tuple[RunConfig, Path, list[str]]:
    """The finished run of a seed, its settings, and the words of the command that makes it."""
    folder = runs / f"{name}-seed{seed}"
    sets = [f"seed={seed}"] if seed else []
    words = ["train", *plan.recipes, *(word for s in sets for word in ("--set", s)), "--out", str(folder)]
    config = load_recipe(plan.recipes, sets)
    if is_fresh and folder.exists():
        shutil.rmtree(folder)
    if is_finished(config, folder):
        talk(f"{folder} is finished; --fresh runs it again")
    else:
        talk("sateen " + " ".join(words))
        sateen(*words)
    return config, folder, words


def one_run(name: str, plan: Plan, seed: int, runs: Path, is_fresh: bool) -> dict[str, Any]:
    """Runs or finds the run of one seed and measures it."""
    config, folder, words = train(name, plan, seed, runs, is_fresh)
    numbers, commands = {}, ["sateen " + " ".join(words)]
    for measure in plan.measures:
        model = folder if measure.stage is None else kept_model(folder, measure.stage)
        ask = ["eval", str(model), "--tasks", measure.tasks, "--num-examples", str(measure.num_examples)]
        talk("sateen " + " ".join(ask))
        numbers[measure.label] = json.loads(sateen(*ask, "--json"))
        commands.append("sateen " + " ".join(ask))
    stages = [
        {**stage, "tokens": settings.tokens}
        for stage, settings in zip(read_progress(folder, config), config.stages, strict=True)
    ]
    seconds = {key: round(sum(stage[key] for stage in stages), 1) for key in ("wall_s", "cpu_s")}
    return {
        "seed": config.seed,
        **seconds,
        "threads": config.threads,
        "stages": stages,
        **numbers,
        "commands": commands,
    }


def document(name: str, plan: Plan, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the JSON of a recipe holds."""
    return {
        "what": "quality before and after; seconds of every stage on the clock and of the process",
        "recipe": name,
        "files": [f"recipes/{recipe}.toml" for recipe in plan.recipes],
        "hardware": hardware(),
        "versions": versions(),
        "commit": revision(),
        "command": f"sateen bench recipes --only {name}",
        "runs": runs,
    }


def studied(
    name: str, plan: Plan, runs: Path, out: Path, seeds: tuple[int, ...], is_fresh: bool
) -> Iterator[str]:
    """Runs the recipe, then its own script, which writes the JSON; yields the row."""
    for seed in seeds:
        _, folder, _ = train(name, plan, seed, runs, is_fresh)
        file = out / (f"{name}.json" if seed == plan.seeds[0] else f"{name}-seed{seed}.json")
        script = str(ROOT / "benchmarks" / str(plan.study))
        # Its table goes to stderr; what it prints on stdout is in the file.
        subprocess.run(
            [sys.executable, script, str(folder), "--out", str(file)], stdout=subprocess.DEVNULL, check=True
        )
        yield f"{name:<20} seed {seed}   see {file.name}"


def table(name: str, runs: list[dict[str, Any]]) -> Iterator[str]:
    """A row per run for people."""
    for run in runs:
        parts = [f"{label} {short(run[label])}" for label in ("before", "after") if label in run]
        times = f"{run['wall_s']:>6.0f} s, {run['cpu_s']:.0f} of the processor"
        yield f"{name:<20} seed {run['seed']}   {'   '.join(parts)}   {times}"


def short(quality: dict[str, Any]) -> str:
    """The first numbers of a quality part."""
    found = [f"{task} {value['accuracy']:.1%}" for task, value in quality.get("tasks", {}).items()]
    found += [
        f"{key.replace('_', ' ')} {value:.4g}" for key, value in quality.items() if isinstance(value, float)
    ]
    return ", ".join(found[:2]) or "measured"


if __name__ == "__main__":
    main()

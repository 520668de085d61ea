"""A distillation run in one table: student, teachers, their start and their averaged weights on every domain.

    sateen bench mopd RUN --out benchmarks/results/recipes/mopd-tiny.json

RUN is the finished folder of a recipe with a `mopd` stage. Questions are held-out ones, answered greedily.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _results import publish, revision

from sateen.checkpoint.average import average
from sateen.checkpoint.shards import resolve
from sateen.checkpoint.state import kept_model
from sateen.config import MOPDConfig, RunConfig, TaskSource, load_recipe
from sateen.engine.engine import LLM
from sateen.errors import ConfigError
from sateen.eval.tasks import evaluate_task
from sateen.receipt import hardware, versions
from sateen.run import SETTINGS, is_finished, read_progress
from sateen.train.metrics import read_metrics
from sateen.train.prepare import build_task

CURVE_POINTS = 24
TEACHER_BAR, STUDENT_BAR = 20.0, -5.0  # points: teacher over start, student over teacher, each in its domain


def main() -> None:
    """Prints the table on stderr and the document on stdout; writes the document with `--out`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a finished run folder")
    parser.add_argument("--num-examples", type=int, default=1000, help="questions per domain (1000)")
    parser.add_argument("--seed", type=int, default=1, help="of the questions (1)")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    flags = parser.parse_args()
    document = study(flags.run, flags.num_examples, flags.seed)
    print("\n".join(lines(document)), file=sys.stderr)
    publish(document, flags.out, indent=1)


def study(run: Path, num_examples: int, seed: int) -> dict[str, Any]:
    """Everything the table and the page say of a run.

    Raises:
        ConfigError: the run is not finished, or has no named `mopd` stage that starts from a named one.
    """
    config = load_recipe([run / SETTINGS])
    if not is_finished(config, run):
        raise ConfigError(f"{run} is not finished; `sateen train {run / SETTINGS} --out {run}` resumes it")
    torch.set_num_threads(config.threads or torch.get_num_threads())
    stage = distillation(config)
    domains = list(stage.teachers)
    rows = []
    for label, model in models(config, run, stage):
        print(f"asking {label}", file=sys.stderr, flush=True)
        llm = LLM(model, draft="none", max_num_seqs=64)
        scores = {domain: accuracy(config, llm, domain, num_examples, seed) for domain in domains}
        rows.append({"model": label, "domains": scores})
    seconds = read_progress(run, config)
    return {
        "what": "greedy accuracy on held-out questions",
        "recipe": config.name,
        "seed": config.seed,
        "questions_seed": seed,
        "rows": rows,
        "checks": checks(rows, stage),
        "stages": seconds,
        "cpu_s": round(sum(row["cpu_s"] for row in seconds), 1),
        "wall_s": round(sum(row["wall_s"] for row in seconds), 1),
        "threads": config.threads,
        "reverse_kl": divergences(run, stage),
        "hardware": hardware(),
        "versions": versions(),
        "commit": revision(),
        "commands": [f"sateen train {config.name} --out {run}", f"sateen bench mopd {run}"],
    }


def distillation(config: RunConfig) -> MOPDConfig:
    """The run's last `mopd` stage."""
    found = [stage for stage in config.stages if isinstance(stage, MOPDConfig)]
    if not found or found[-1].name is None or found[-1].start_from is None:
        raise ConfigError(f"{config.name}: the table needs a mopd stage with a name and a start_from")
    return found[-1]


def models(config: RunConfig, run: Path, stage: MOPDConfig) -> Iterator[tuple[str, Path]]:
    """`(label, model directory)` of every row; the averaged weights live as long as the loop stands there."""
    names = [other.name for other in config.stages]
    yield "start", kept_model(run, str(stage.start_from))
    paths = {
        f"teacher {domain}": kept_model(run, str(path)) if str(path) in names else path
        for domain, path in stage.teachers.items()
    }
    yield from paths.items()
    yield "student", kept_model(run, str(stage.name))
    with tempfile.TemporaryDirectory() as folder:
        average(list(paths.values())).save(Path(folder) / "model")
        yield "averaged teachers", resolve(Path(folder) / "model")


def accuracy(config: RunConfig, llm: LLM, domain: str, num_examples: int, seed: int) -> dict[str, Any]:
    """A model's score on the held-out questions of a source."""
    source = config.data[domain]
    assert isinstance(source, TaskSource)
    assert llm.tokenizer is not None
    held_out = source.model_copy(update={"parameters": source.parameters | {"is_heldout": True}})
    result = evaluate_task(llm, build_task(held_out, llm.tokenizer), n=num_examples, seed=seed)
    p, n = result.accuracy, result.n
    return {"accuracy": p, "standard_error": (p * (1 - p) / n) ** 0.5, "n": n, "chance": result.chance}


def checks(rows: list[dict[str, Any]], stage: MOPDConfig) -> list[dict[str, Any]]:
    """What the recipe promises of each domain, in points, and whether it holds."""
    of = {row["model"]: row["domains"] for row in rows}
    found = []
    for domain in stage.teachers:
        start, teacher, student, mean = (
            100 * of[label][domain]["accuracy"]
            for label in ("start", f"teacher {domain}", "student", "averaged teachers")
        )
        found.append(
            {
                "domain": domain,
                "teacher_minus_start": round(teacher - start, 2),
                "student_minus_teacher": round(student - teacher, 2),
                "student_minus_average": round(student - mean, 2),
                "holds": teacher - start >= TEACHER_BAR and student - teacher >= STUDENT_BAR,
            }
        )
    return found


def divergences(run: Path, stage: MOPDConfig) -> dict[str, list[list[float]]]:
    """`[tokens of the stage, nats per token]` along the distillation, means over runs of its updates."""
    steps = [line for line in read_metrics(run) if line["stage"] == stage.label]
    size = max(1, -(-len(steps) // CURVE_POINTS))
    parts = [steps[i : i + size] for i in range(0, len(steps), size)]
    first = steps[0]["tokens"] if steps else 0
    curves = {}
    for domain in stage.teachers:
        key = f"reverse_kl_{domain}"
        values = [(part[-1]["tokens"] - first, [line[key] for line in part if key in line]) for part in parts]
        curves[domain] = [[at, round(sum(x) / len(x), 5)] for at, x in values if x]
    return curves


def lines(document: dict[str, Any]) -> Iterator[str]:
    """The table for people."""
    domains = list(document["rows"][0]["domains"])
    yield f"{'':<20}" + "".join(f"{domain:>18}" for domain in domains)
    for row in document["rows"]:
        cells = [row["domains"][domain] for domain in domains]
        yield f"{row['model']:<20}" + "".join(
            f"{100 * c['accuracy']:>10.1f} ± {100 * c['standard_error']:<4.1f}%" for c in cells
        )
    chances = [document["rows"][0]["domains"][domain]["chance"] for domain in domains]
    yield f"{'chance':<20}" + "".join(f"{100 * chance:>10.2f}       %" for chance in chances)
    yield f"training: {document['cpu_s']} CPU s, {document['wall_s']} s on the clock"
    for check in document["checks"]:
        yield (
            f"{check['domain']}: teacher {check['teacher_minus_start']:+.1f} over start, student "
            f"{check['student_minus_teacher']:+.1f} over teacher, {check['student_minus_average']:+.1f} over "
            f"averaged weights: {'holds' if check['holds'] else 'DOES NOT HOLD'}"
        )


if __name__ == "__main__":
    main()

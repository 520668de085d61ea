"""HySparse beside what it stands between: full attention, a sliding hybrid, HySparse2, and its ablation.

    sateen bench hysparse-study                                   four arms, three seeds
    sateen bench hysparse-study --arms full,sliding --seeds 0     two runs of them
    sateen bench hysparse-study --arms ablation                   the rows of HySparse's Table 4 besides

Every run reads the same tokens in the same order as the other arms of its seed. A finished run is not
repeated and a measured one is not measured again; an unfinished one resumes. `--jobs` runs go side by side,
one thread each. The JSON holds every run's numbers and what they say of each arm; a table stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from _results import publish, result_file, revision

from sateen.config import RunConfig, load_recipe
from sateen.errors import SateenError
from sateen.receipt import hardware, versions, write_atomically
from sateen.run import is_finished, read_progress

MEASURED = "study.json"
SCHEMA = 1  # of study.json; another number measures again
SEED = 7  # of the questions


class Arm(NamedTuple):
    """One of the models that are compared.

    Attributes:
        recipes: the recipe and what is merged over it.
        sets: flags besides.
    """

    recipes: tuple[str, ...]
    sets: tuple[str, ...] = ()


BASE = "hysparse-study"
ARMS = {
    "full": Arm((BASE, f"{BASE}-full")),
    "sliding": Arm((BASE, f"{BASE}-sliding")),
    "hysparse": Arm((BASE,)),
    "hysparse2": Arm((BASE, f"{BASE}-2")),
}
# The further rows of arXiv 2602.03560 Table 4.
ABLATION = {
    "own-kv-no-window": Arm(
        (BASE,), ("model.overrides.share_kv_sa=false", "model.overrides.sparse_local=none")
    ),
    "own-kv": Arm((BASE,), ("model.overrides.share_kv_sa=false",)),
    "shared-in-both": Arm((BASE,), ("model.overrides.share_kv_swa=true",)),
}
EVERY = ARMS | ABLATION
TASKS = ("needle", "multikey", "vt", "cwe")


def main() -> None:
    """Trains, measures and writes what is asked for; the table goes to stdout."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arms", default=",".join(ARMS), metavar="A,B",
        help=f"of {', '.join(EVERY)}; ablation and all stand for several (default: the first four)",
    )  # fmt: skip
    parser.add_argument("--seeds", default="0,1,2", metavar="N,M", help="one run of every arm each (0,1,2)")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each (2)")
    parser.add_argument(
        "--lengths", default="256,512,1024", metavar="N,M", help="of the questions, in tokens"
    )
    parser.add_argument("--documents", type=int, default=100, help="per task and length (100)")
    parser.add_argument("--runs", type=Path, default=Path("runs/hysparse-study"), help="run folders")
    parser.add_argument(
        "--set", dest="sets", action="append", default=[], metavar="A.B=V", help="of every run's recipe"
    )
    parser.add_argument("--out", type=Path, help="the JSON; its table goes beside it (benchmarks/results)")
    parser.add_argument("--measure", type=Path, metavar="RUN", help="measure one finished run and end")
    flags = parser.parse_args()
    try:
        lengths = numbers(flags.lengths)
        if flags.measure is not None:
            measure(flags.measure, lengths, flags.documents)
            return
        arms, seeds = chosen(flags.arms), numbers(flags.seeds)
    except ValueError as error:
        parser.error(str(error))
    cells = [(arm, seed) for seed in seeds for arm in arms]
    with ThreadPoolExecutor(flags.jobs) as pool:
        rows = list(pool.map(lambda c: one_run(*c, flags.runs, flags.sets, lengths, flags.documents), cells))
    document = {
        "what": "held-out loss and retrieval of arms trained on the same tokens in the same order",
        "questions": {"seed": SEED, "documents": flags.documents, "lengths": lengths},
        "runs": rows,
        "arms": summary(rows, lengths),
        "hardware": hardware(),
        "versions": versions(),
        "commit": revision(),
        "command": " ".join(["sateen bench hysparse-study", *sys.argv[1:]]),
    }
    out = flags.out or result_file(BASE)
    sys.stdout, stdout = sys.stderr, sys.stdout
    publish(document, out, indent=1)
    sys.stdout = stdout
    table = "\n".join(lines(document["arms"], lengths)) + "\n"
    write_atomically(out.with_suffix(".md"), table)
    print(table, end="")


def numbers(text: str) -> list[int]:
    """The whole numbers of a flag."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{text!r} is not a list of whole numbers such as 0,1,2") from None


def chosen(text: str) -> list[str]:
    """The arms of a flag."""
    groups = {"ablation": list(ABLATION), "all": list(EVERY)}
    names = [name for part in text.split(",") for name in groups.get(part, [part])]
    if unknown := [name for name in names if name not in EVERY]:
        raise ValueError(f"--arms: {unknown[0]} is not one of {', '.join([*EVERY, *groups])}")
    return list(dict.fromkeys(names))


def one_run(
    arm: str, seed: int, runs: Path, sets: Sequence[str], lengths: list[int], documents: int
) -> dict[str, Any]:
    """Trains and measures one cell of the study, or finds what an earlier call left."""
    folder = runs / f"{arm}-seed{seed}"
    flags = [f"seed={seed}", *EVERY[arm].sets, *sets]
    config = load_recipe(EVERY[arm].recipes, flags)
    words = ["train", *EVERY[arm].recipes, *(w for s in flags for w in ("--set", s)), "--out", str(folder)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    if not is_finished(config, folder):
        talk("sateen " + " ".join(words))
        call([sys.executable, "-m", "sateen.cli", *words], log)
    ask = ["--lengths", ",".join(map(str, lengths)), "--documents", str(documents)]
    if not is_measured(folder, lengths, documents):
        talk(f"measuring {folder}")
        call([sys.executable, __file__, "--measure", str(folder), *ask], log)
    stages = read_progress(folder, config)
    return {
        "arm": arm,
        "seed": seed,
        "tokens": sum(stage.tokens for stage in config.stages),
        "cpu_s": round(sum(row["cpu_s"] for row in stages), 1),
        "wall_s": round(sum(row["wall_s"] for row in stages), 1),
        "command": "sateen " + " ".join(words),
        **json.loads((folder / MEASURED).read_text())["numbers"],
    }


def call(command: list[str], log: Path) -> None:
    """Runs one process on one thread; what it says goes to the log.

    Raises:
        SateenError: it failed.
    """
    with log.open("a") as file:
        done = subprocess.run(
            command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
        )
    if done.returncode:
        tail = log.read_text().strip().splitlines()[-1:]
        raise SateenError(f"{' '.join(command[1:4])} failed, see {log}: {' '.join(tail)}")


def talk(text: str) -> None:
    """A line for the person who waits."""
    print(text, file=sys.stderr, flush=True)


def asked(lengths: list[int], documents: int) -> dict[str, Any]:
    """What was measured, to tell whether a file answers the question."""
    return {"schema": SCHEMA, "seed": SEED, "lengths": lengths, "documents": documents}


def is_measured(folder: Path, lengths: list[int], documents: int) -> bool:
    """Whether the run's numbers are there."""
    file = folder / MEASURED
    return file.is_file() and json.loads(file.read_text())["asked"] == asked(lengths, documents)


def measure(folder: Path, lengths: list[int], documents: int) -> None:
    """Writes the loss on held-out text, retrieval, parameters and cache of a finished run into its folder."""
    import torch

    from sateen.checkpoint.hf import load_model
    from sateen.data.facts import LongTask
    from sateen.data.long_context import long_task
    from sateen.data.tasks import task_class
    from sateen.data.text import python_docs, split_heldout
    from sateen.data.tokenizer import Tokenizer
    from sateen.eval.long_context import retrieval
    from sateen.eval.perplexity import perplexity
    from sateen.models.decoder import count_parameters
    from sateen.models.inspect import kv_bytes
    from sateen.run import SETTINGS

    torch.set_num_threads(1)
    config = load_recipe([folder / SETTINGS])
    model, tokenizer = load_model(folder), Tokenizer.load(folder / "model")
    heldout = split_heldout(python_docs())[1]
    context = max(stage.seq_len for stage in config.stages)
    text = perplexity(model, tokenizer, heldout, context=context)
    found: dict[str, Any] = {}
    for name in TASKS:
        for length in lengths:
            cls = task_class(name)
            assert issubclass(cls, LongTask)
            settings = parameters(config, name, length)
            task = long_task(cls, tokenizer, [d.text for d in heldout], is_heldout=True, **settings)
            result = retrieval(model, tokenizer, task, documents=documents, seed=SEED)
            found.setdefault(name, {})[str(length)] = result.as_dict() | {"settings": settings}
            talk(f"{folder.name}: {name} at {length}: {result.accuracy:.3f}")
    values = {
        "parameters": count_parameters(model)["total"],
        "kv_bytes": {str(n): kv_bytes(model.config, n, "bf16")["bytes"] for n in lengths},
        "bits_per_byte": text.bits_per_byte,
        "perplexity": text.perplexity,
        "tasks": found,
    }
    document = {"asked": asked(lengths, documents), "numbers": values}
    write_atomically(folder / MEASURED, json.dumps(document, indent=1) + "\n")


def parameters(config: RunConfig, task: str, length: int) -> dict[str, Any]:
    """What a task is asked with: the settings it was trained with, its counts in proportion to the length."""
    trained = config.data[task].parameters  # type: ignore[attr-defined]
    share = length / (trained["length"] + 2)
    scaled = {
        key: max(2, round(value * share))
        for key, value in trained.items()
        if key in ("num_keys", "num_queries", "repeats") and share < 1
    }
    return trained | scaled | {"length": length - 2}


def summary(rows: list[dict[str, Any]], lengths: list[int]) -> dict[str, Any]:
    """Per arm and quantity: mean and standard error over seeds, paired difference to full, gap closed."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    of = {(row["arm"], row["seed"]): quantities(row, lengths) for row in rows}
    names = list(next(iter(of.values())))
    found: dict[str, Any] = {}
    for arm in arms:
        seeds = [row["seed"] for row in rows if row["arm"] == arm]
        entry: dict[str, Any] = {"seeds": seeds}
        for name in names:
            values = [of[arm, seed][name] for seed in seeds]
            entry[name] = spread(values)
            for other in ("full", "sliding"):
                shared = [seed for seed in seeds if (other, seed) in of]
                if shared and arm != other:
                    pairs = [of[arm, seed][name] - of[other, seed][name] for seed in shared]
                    entry[name][f"minus_{other}"] = spread(pairs)
        found[arm] = entry
    if {"full", "sliding"} <= set(arms):
        for name in names:
            gap = found["full"][name]["minus_sliding"]
            for arm in arms:
                if arm not in ("full", "sliding"):
                    found[arm][name]["gap_closed"] = closed(found[arm][name]["minus_sliding"], gap)
    return found


def quantities(row: dict[str, Any], lengths: list[int]) -> dict[str, float]:
    """The numbers of a run that arms are compared by; `all@n` is the mean over the tasks."""
    tasks = {f"{task}@{n}": row["tasks"][task][str(n)]["accuracy"] for task in row["tasks"] for n in lengths}
    means = {
        f"all@{n}": statistics.fmean(task[str(n)]["accuracy"] for task in row["tasks"].values())
        for n in lengths
    }
    return {"bits_per_byte": row["bits_per_byte"]} | means | tasks


def spread(values: list[float]) -> dict[str, Any]:
    """Mean and standard error; None for the error of a single value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error, "values": values}


def closed(difference: dict[str, Any], gap: dict[str, Any]) -> float | None:
    """The share of the gap between sliding and full; None where the gap is within two standard errors."""
    error = gap["standard_error"]
    if error is None or abs(gap["mean"]) <= 2 * error or gap["mean"] == 0:
        return None
    return float(difference["mean"] / gap["mean"])


def lines(arms: dict[str, Any], lengths: list[int]) -> Iterator[str]:
    """The Markdown table: one row per quantity, one column per arm."""
    names = [name for name in next(iter(arms.values())) if name != "seeds"]
    yield "| mean ± standard error over seeds | " + " | ".join(arms) + " |"
    yield "|---|" + "---|" * len(arms)
    yield "| seeds | " + " | ".join(", ".join(map(str, arm["seeds"])) for arm in arms.values()) + " |"
    for name in names:
        yield f"| {name} | " + " | ".join(shown(arm[name]) for arm in arms.values()) + " |"
    for other in ("full", "sliding"):
        for name in names:
            cells = [arm[name].get(f"minus_{other}") for arm in arms.values()]
            if any(cells):
                yield f"| {name}, minus {other} | " + " | ".join(shown(c, "+") for c in cells) + " |"
    for name in names:
        if any("gap_closed" in arm[name] for arm in arms.values()):
            cells = [arm[name].get("gap_closed") for arm in arms.values()]
            told = ["" if "gap_closed" not in arm[name] else "no gap" for arm in arms.values()]
            yield (
                f"| {name}, gap closed | "
                + " | ".join(
                    word if cell is None else f"{cell:.0%}" for cell, word in zip(cells, told, strict=True)
                )
                + " |"
            )


def shown(value: dict[str, Any] | None, sign: str = "") -> str:
    """A mean with its error."""
    if value is None:
        return ""
    error = value["standard_error"]
    return f"{value['mean']:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


if __name__ == "__main__":
    main()

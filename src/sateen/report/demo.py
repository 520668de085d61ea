"""The sections of a demo's report: the hybrid beside its full-attention twin, with what got worse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from sateen.report import plots
from sateen.report.evaluation import MODELS, Table, at_chance, dig
from sateen.report.experts import expert_forecast
from sateen.report.folder import RunFolder
from sateen.report.overview import headline, layers, what_ran
from sateen.report.page import figure, finite, missing, section, share, shown, table, text
from sateen.report.serving import acceptance, cache, speed
from sateen.report.training import load_figure, loss_figure, machine
from sateen.report.worse import worse_rows


def demo_sections(folder: Path, evaluation: Table) -> Iterator[str]:
    """The body of a demo's report, in its order."""
    models = {name: (evaluation.get("models") or {}).get(name) or {} for name in MODELS}
    runs = {name: RunFolder(folder / name) for name in MODELS}
    receipt = RunFolder(folder).receipt
    yield headline(models, evaluation.get("baselines") or {})
    shapes = "".join(layers(name, model) for name, model in models.items())
    yield section(
        "What ran",
        shapes,
        what_ran(models, evaluation.get("minutes")),
        machine(receipt),
    )
    losses = {name: run.loss() for name, run in runs.items() if run.loss()}
    yield section("Loss", loss_figure("loss", losses, runs["hybrid"]))
    yield section("Held-out bits per byte", quality(models, evaluation.get("baselines") or {}))
    yield section("Tasks", tasks(models))
    yield section("Key/value cache", cache(models))
    yield section("Drafts", acceptance(models["hybrid"]), speed(models))
    yield section("Expert load", load_figure(runs["hybrid"].expert_load), expert_forecast(folder / "hybrid"))
    yield section("Samples", samples(models))
    yield section("What got worse", worse(evaluation))
    yield section("Measure it again", commands(evaluation))


def quality(models: Mapping[str, Table], baselines: Table) -> str:
    """Bits per byte of both models beside compressors and count tables."""
    bars = []
    for name, model in models.items():
        bits = dig(model, "quality", "bits_per_byte")
        if bits is not None:
            bars.append((name, float(bits), name))
    bars += [(name, float(v), "other") for name, v in baselines.items() if finite(v) is not None]
    if not bars:
        return missing("held-out bits per byte")
    alt = (
        "Bits per byte of held-out text: " + ", ".join(f"{what} {value:.3f}" for what, value, _ in bars) + "."
    )
    svg = plots.bars("quality", alt, bars, label="bits per byte, lower is better")
    words = ", ".join(
        f"{name} {shown(dig(model, 'quality', 'perplexity'))}" for name, model in models.items()
    )
    note = f"{alt} Perplexity per token: {words}. Compressors have seen no training text."
    absent = [name for name in MODELS if dig(models[name], "quality", "bits_per_byte") is None]
    lines = [missing(f"bits per byte of the {name}") for name in absent]
    return figure(svg, note) + "".join(lines + ([] if baselines else [missing("baselines")]))


def tasks(models: Mapping[str, Table]) -> str:
    """Task accuracies with their chance."""
    results = {name: (model.get("quality") or {}).get("tasks") or {} for name, model in models.items()}
    names = list(dict.fromkeys(task for found in results.values() for task in found))
    if not names:
        return missing("task accuracies")
    rows = []
    for task in names:
        found = [results[name].get(task) or {} for name in MODELS]
        known = next(result for result in found if result)
        marks = [share(r.get("accuracy")) + (" (at chance)" if at_chance(r) else "") for r in found]
        rows.append((task, *marks, share(known.get("chance")), shown(known.get("n"))))
    return table(
        "Greedy accuracy on questions a program checks",
        ("task", *MODELS, "chance", "n"),
        rows,
    )


def samples(models: Mapping[str, Table]) -> str:
    """The same prompts continued by both models, side by side."""
    given = {name: model.get("samples") or [] for name, model in models.items()}
    prompts: dict[tuple[str, str], dict[str, str]] = {}
    for name, rows in given.items():
        for row in rows:
            key = (str(row.get("kind", "")), str(row.get("prompt", "")))
            prompts.setdefault(key, {})[name] = str(row.get("completion", ""))
    lines = "".join(missing(f"samples of the {name}") for name in MODELS if not given[name])
    blocks: list[str] = []
    for (kind, prompt), found in prompts.items():
        first = " ".join(prompt.split())
        head = first if len(first) <= 60 else first[:59] + "…"
        texts = "".join(
            f"<div><h3>{text(name)}</h3><pre>{text(found.get(name, '(no sample)'))}</pre></div>"
            for name in MODELS
        )
        blocks.append(
            f"<details{'' if blocks else ' open'}><summary>{text(kind)}: {text(head)}</summary>"
            f'<h3>prompt</h3><pre>{text(prompt)}</pre><div class="two">{texts}</div></details>'
        )
    return "".join(blocks) + lines


def worse(evaluation: Table) -> str:
    """The red rows, or a line that says there are none."""
    rows = worse_rows(evaluation)
    if not evaluation.get("models"):
        return missing("what got worse; without both models' numbers it is not known")
    if not rows:
        return '<p class="plain">Nothing of what was measured got worse.</p>'
    cells = [(row.what, shown(row.before), shown(row.after), row.compared_with) for row in rows]
    caption = "Where the hybrid loses: to its twin, to a baseline, to guessing, or to itself without drafts"
    return f'<div class="bad">{table(caption, ("what", "other", "hybrid", "compared with"), cells)}</div>'


def commands(evaluation: Table) -> str:
    """Shell lines that measure everything again."""
    lines = evaluation.get("commands") or []
    return f"<pre>{text(chr(10).join(map(str, lines)))}</pre>" if lines else missing("commands")

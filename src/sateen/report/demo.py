"""The sections of a demo's report: the hybrid beside its full-attention twin, with what got worse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sateen.receipt.markdown import number, size
from sateen.report import plots
from sateen.report.folder import RunFolder
from sateen.report.page import (
    cards,
    figure,
    finite,
    missing,
    section,
    share,
    shown,
    table,
    text,
)
from sateen.report.serving import (
    MODELS,
    Table,
    acceptance,
    cache,
    dig,
    kind_colour,
    speed,
)
from sateen.report.training import load_figure, loss_figure, machine
from sateen.report.worse import at_chance, train_speed, worse_rows

MANY_LAYERS = 16  # from here on the picture of the layers uses small blocks


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
    yield section(
        "Held-out bits per byte", quality(models, evaluation.get("baselines") or {})
    )
    yield section("Tasks", tasks(models))
    yield section("Key/value cache", cache(models))
    yield section("Drafts", acceptance(models["hybrid"]), speed(models))
    yield section("Expert load", load_figure(runs["hybrid"].expert_load))
    yield section("Samples", samples(models))
    yield section("What got worse", worse(evaluation))
    yield section("Measure it again", commands(evaluation))


def headline(models: Mapping[str, Table], baselines: Table) -> str:
    """The cards, and a line for each that could not be filled."""
    hybrid, twin = models["hybrid"], models["twin"]
    rows, absent = [], []
    bits, other = (
        dig(hybrid, "quality", "bits_per_byte"),
        dig(twin, "quality", "bits_per_byte"),
    )
    if bits is None:
        absent.append("bits per byte")
    else:
        rows.append(
            (
                "bits per byte",
                shown(bits),
                _beside(twin=other, gzip=baselines.get("gzip -9")),
            )
        )
    held, other_held = dig(hybrid, "kv", "bytes"), dig(twin, "kv", "bytes")
    if held is None or not other_held:
        absent.append("KV bytes of both models")
    else:
        note = f"{size(held)} against {size(other_held)} at {shown(dig(hybrid, 'kv', 'context'))} tokens"
        rows.append(("KV bytes of the twin's", share(held / other_held, 0), note))
    sums = dig(hybrid, "quality", "tasks", "sums", "accuracy")
    if sums is None:
        absent.append("sums accuracy")
    else:
        asked = dig(hybrid, "quality", "tasks", "sums", "n")
        theirs = dig(twin, "quality", "tasks", "sums", "accuracy")
        rows.append(
            (
                "sums accuracy",
                share(sums),
                f"of {shown(asked)} held-out sums; twin {share(theirs)}",
            )
        )
    length = dig(hybrid, "draft", "sampled", "acceptance_length")
    if length is None:
        absent.append("acceptance length")
    else:
        note = f"tokens per pass at temperature {shown(dig(hybrid, 'draft', 'sampled', 'temperature'))}"
        greedy = dig(hybrid, "draft", "greedy", "acceptance_length")
        rows.append(
            ("acceptance length", shown(length), f"{note}; greedy {shown(greedy)}")
        )
    return cards(rows) + "".join(missing(what) for what in absent)


def layers(name: str, model: Table) -> str:
    """One block per layer: its kind of attention by colour, a double lower edge for a mixture of experts."""
    specs = model.get("layers")
    heading = f"<h3>{text(name)}</h3>"
    if not specs:
        return heading + missing(f"layers of the {name}")
    many = len(specs) >= MANY_LAYERS
    blocks = []
    for spec in specs:
        kind = kind_colour(spec.get("attention"))
        window = f" {number(spec['window'])}" if spec.get("window") else ""
        words = str(spec.get("attention", "?")).removesuffix("_attention") + window
        mlp = str(spec.get("mlp", "?"))
        label = f'title="{text(words)}, {text(mlp)}"' if many else ""
        inside = (
            "" if many else f"{text(words)}<br>{text('MoE' if mlp == 'moe' else mlp)}"
        )
        blocks.append(
            f'<li class="{"moe" if mlp == "moe" else "dense"}" style="--kind:var(--{kind})" {label}>'
            f"<b>{text(spec.get('index', '?'))}</b>{inside}</li>"
        )
    caption = f"Layers of the {name}, first to last"
    many_class = " many" if many else ""
    return f'{heading}<ol class="layers{many_class}" aria-label="{text(caption)}">{"".join(blocks)}</ol>'


def what_ran(models: Mapping[str, Table], minutes: Any) -> str:
    """Parameters, tokens and time of both models."""
    rows = [
        (what, *(shown(dig(model, "parameters", key)) for model in models.values()))
        for what, key in (
            ("parameters without MTP heads", "total"),
            ("active per token", "active"),
            ("MTP heads", "mtp"),
        )
    ]
    rows.append(
        (
            "tokens trained",
            *(shown(model.get("train_tokens")) for model in models.values()),
        )
    )
    rows.append(
        (
            "training time, min",
            *(_minutes(model.get("train_s")) for model in models.values()),
        )
    )
    rows.append(
        (
            "training tokens/s, all stages",
            *(shown(train_speed(model)) for model in models.values()),
        )
    )
    scale = (
        f"A demo of {shown(minutes)} minutes"
        if finite(minutes) is not None
        else "Both models"
    )
    return table(
        f"{scale}. Blocks above: colour is the kind of attention, a double lower edge a mixture of experts.",
        ("what", *models), rows,
    )  # fmt: skip


def quality(models: Mapping[str, Table], baselines: Table) -> str:
    """Bits per byte of both models beside compressors and count tables."""
    bars = []
    for name, model in models.items():
        bits = dig(model, "quality", "bits_per_byte")
        if bits is not None:
            bars.append((name, float(bits), name))
    bars += [
        (name, float(v), "other")
        for name, v in baselines.items()
        if finite(v) is not None
    ]
    if not bars:
        return missing("held-out bits per byte")
    alt = (
        "Bits per byte of held-out text: "
        + ", ".join(f"{what} {value:.3f}" for what, value, _ in bars)
        + "."
    )
    svg = plots.bars("quality", alt, bars, label="bits per byte, lower is better")
    words = ", ".join(
        f"{name} {shown(dig(model, 'quality', 'perplexity'))}"
        for name, model in models.items()
    )
    note = (
        f"{alt} Perplexity per token: {words}. Compressors have seen no training text."
    )
    absent = [
        name for name in MODELS if dig(models[name], "quality", "bits_per_byte") is None
    ]
    lines = [missing(f"bits per byte of the {name}") for name in absent]
    return figure(svg, note) + "".join(
        lines + ([] if baselines else [missing("baselines")])
    )


def tasks(models: Mapping[str, Table]) -> str:
    """Task accuracies with their chance."""
    results = {
        name: (model.get("quality") or {}).get("tasks") or {}
        for name, model in models.items()
    }
    names = list(dict.fromkeys(task for found in results.values() for task in found))
    if not names:
        return missing("task accuracies")
    rows = []
    for task in names:
        found = [results[name].get(task) or {} for name in MODELS]
        known = next(result for result in found if result)
        marks = [
            share(r.get("accuracy")) + (" (at chance)" if at_chance(r) else "")
            for r in found
        ]
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
    lines = "".join(
        missing(f"samples of the {name}") for name in MODELS if not given[name]
    )
    blocks = []
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
    cells = [
        (row.what, shown(row.before), shown(row.after), row.compared_with)
        for row in rows
    ]
    caption = "Where the hybrid loses: to its twin, to a baseline, to guessing, or to itself without drafts"
    return f'<div class="bad">{table(caption, ("what", "other", "hybrid", "compared with"), cells)}</div>'


def commands(evaluation: Table) -> str:
    """Shell lines that measure everything again."""
    lines = evaluation.get("commands") or []
    return (
        f"<pre>{text(chr(10).join(map(str, lines)))}</pre>"
        if lines
        else missing("commands")
    )


def _beside(**values: Any) -> str:
    return ", ".join(f"{name} {shown(value)}" for name, value in values.items())


def _minutes(seconds: Any) -> str:
    value = finite(seconds)
    return "-" if value is None else f"{value / 60:.1f}"

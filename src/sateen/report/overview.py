"""The beginning of a demo's report: headline numbers, and what ran."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sateen.receipt.markdown import number, size
from sateen.report.evaluation import Table, dig, kind_colour, train_speed
from sateen.report.page import cards, finite, missing, share, shown, table, text

MANY_LAYERS = 16  # from here on the picture of the layers uses small blocks


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
        rows.append(("KV bytes against the twin", share(held / other_held, 0), note))
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
        rows.append(("acceptance length", shown(length), f"{note}; greedy {shown(greedy)}"))
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
        inside = "" if many else f"{text(words)}<br>{text('MoE' if mlp == 'moe' else mlp)}"
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
    scale = f"A demo of {shown(minutes)} minutes" if finite(minutes) is not None else "Both models"
    return table(
        f"{scale}. Blocks above: colour is the kind of attention, a double lower edge a mixture of experts.",
        ("what", *models), rows,
    )  # fmt: skip


def _beside(**values: Any) -> str:
    return ", ".join(f"{name} {shown(value)}" for name, value in values.items())


def _minutes(seconds: Any) -> str:
    value = finite(seconds)
    return "-" if value is None else f"{value / 60:.1f}"

"""The sections of a demo's report on serving: allocated caches, what drafts are worth, decode speed."""

from __future__ import annotations

from collections.abc import Mapping

from sateen.receipt.markdown import size
from sateen.report import plots
from sateen.report.evaluation import MODELS, NO_DRAFT, WITH_DRAFTS, Table, dig, kind_colour, speeds
from sateen.report.page import figure, finite, missing, share, shown, table, text


def cache(models: Mapping[str, Table]) -> str:
    """Allocated key/value bytes layer by layer, and per token."""
    held = {name: model["kv"] for name, model in models.items() if dig(model, "kv", "layers", kind=list)}
    lines = "".join(missing(f"KV bytes of the {name}") for name in MODELS if name not in held)
    if not held:
        return lines
    stacks: dict[str, list[tuple[str, str, float]]] = {}
    rows = []
    for name, kv in held.items():
        kinds: dict[str, list[float]] = {}
        for place, layer in enumerate(kv["layers"]):
            bytes_ = float(finite(layer.get("bytes")) or 0)
            kind = str(layer.get("layer_kind", "?"))
            index = layer.get("index", layer.get("layer", place))
            stacks.setdefault(name, []).append((str(index), kind_colour(kind), bytes_))
            kinds.setdefault(kind, []).append(bytes_)
        context = finite(kv.get("context"))
        rows += [
            (
                name,
                kind.replace("_", " "),
                shown(len(sizes)),
                size(sum(sizes)),
                _per(sum(sizes), context),
            )
            for kind, sizes in kinds.items()
        ]
        per_token = kv.get("bytes_per_token")
        rows.append(
            (
                name,
                "all",
                shown(len(kv["layers"])),
                size(finite(kv.get("bytes"))),
                shown(per_token),
            )
        )
    contexts = {name: shown(kv.get("context")) for name, kv in held.items()}
    alt = "Allocated KV bytes: " + ", ".join(
        f"{name} {size(finite(kv.get('bytes')))} at {contexts[name]} tokens" for name, kv in held.items()
    )
    svg = plots.stacks("cache", alt + ".", stacks, label="allocated bytes, layer by layer", unit=size)
    caption = f"{alt}. One segment per layer, MTP heads last; colours as in the layers above."
    return (
        figure(svg, caption)
        + table(
            "Allocated bytes of one sequence",
            ("model", "layers of kind", "layers", "bytes", "bytes per token of context"), rows,
        )
        + lines
    )  # fmt: skip


def acceptance(model: Table) -> str:
    """Acceptance of the hybrid's MTP drafts by position, sampled and greedy."""
    draft = model.get("draft") or {}
    modes = {name: draft[name] for name in ("sampled", "greedy") if draft.get(name)}
    absent = "".join(
        missing(f"{name} draft acceptance") for name in ("sampled", "greedy") if name not in modes
    )
    if not modes:
        return absent
    shares = {
        f"{name} (temperature {shown(mode.get('temperature'))})": [
            float(finite(v) or 0.0) for v in mode["acceptance_by_position"]
        ]
        for name, mode in modes.items()
        if mode.get("acceptance_by_position")
    }
    rows = [
        (
            name,
            *(shown(mode.get(key)) for key in ("temperature", "acceptance_length")),
            share(mode.get("repetition_4gram")),
        )
        for name, mode in modes.items()
    ]
    drawn = missing("acceptance by position")
    if shares:
        alt = "Share of rounds in which the draft at each position was accepted: " + "; ".join(
            f"{what} " + ", ".join(f"{v:.0%}" for v in values) for what, values in shares.items()
        )
        svg = plots.groups(
            "acceptance",
            alt + ".",
            shares,
            xlabel="draft position",
            label="accepted in a round",
        )
        drawn = figure(svg, alt + ".")
    header = ("decoding", "temperature", "acceptance length", "repeated 4-grams")
    return drawn + table("Drafts of the hybrid; repetitive text is easy to draft", header, rows) + absent


def speed(models: Mapping[str, Table]) -> str:
    """Decode speed with and without drafts, median and quartiles."""
    rows = [
        (
            f"{name}: {row.get('what')}",
            str(row.get("unit", "")),
            *(shown(row.get(key)) for key in ("median", "p25", "p75", "n")),
        )
        for name, model in models.items()
        for row in model.get("speed") or []
    ]
    if not rows:
        return missing("decode speed")
    ratios = []
    for name, model in models.items():
        found = speeds(model)
        fast, plain = found.get(WITH_DRAFTS), found.get(NO_DRAFT)
        if fast is not None and plain:
            ratios.append(f"{name} {fast / plain:.2f}x")
    gain = (
        f'<p class="plain">Decoding with drafts over without: {text(", ".join(ratios))}.</p>'
        if ratios
        else ""
    )
    header = ("what", "unit", "median", "lower quartile", "upper quartile", "n")
    return table("Speed, one sequence at a time", header, rows) + gain


def _per(bytes_: float, context: float | None) -> str:
    return shown(bytes_ / context) if context else "-"

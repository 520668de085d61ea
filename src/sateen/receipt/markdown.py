"""Receipts as Markdown tables: what `RECEIPT.md` holds and `sateen receipt` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Rows = list[list[str]]


def number(value: Any) -> str:
    """A number for people: four significant digits, thousands grouped; a dash for what was not measured."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def size(num_bytes: int | float | None) -> str:
    """A byte count for people, for example `1.50 MiB`."""
    if num_bytes is None:
        return "-"
    amount, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(amount) < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.0f} B" if unit == "B" else f"{amount:.2f} {unit}"


def table(header: Sequence[str], rows: Rows) -> str:
    """A Markdown table; the first column is text, the others are aligned right."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [list(header), *rows]]
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [cells[0], rule, *cells[1:]])


def quality_rows(quality: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """`(what, value)` of everything measured about quality, the tasks and baselines by name."""
    for key, what in (("bits_per_byte", "bits per byte"), ("perplexity", "perplexity")):
        if key in quality:
            yield what, quality[key]
    for name, task in quality.get("tasks", {}).items():
        yield f"{name}: accuracy", task.get("accuracy")
    for name, value in quality.get("baselines", {}).items():
        yield f"baseline {name}: bits per byte", value
    if int8 := quality.get("int8_attention"):
        yield "int8 attention: largest error of a layer", max(int8.get("errors", {}).values(), default=None)
        yield "int8 attention: layers in floating point", len(int8.get("float_layers", []))


def render(receipt: Mapping[str, Any]) -> str:
    """The text of `RECEIPT.md` for a receipt's table."""
    source, seeds = receipt["source"], receipt["seeds"]
    parts = ["# Receipt", f"Made from {source.get('kind') or 'model'} `{source.get('path') or '-'}`."]
    if source.get("sha256"):
        parts.append(f"sha256 `{source['sha256']}`")
    for title, text in (
        ("What got worse", _worse(receipt["worse"])),
        ("Quality", _quality(receipt["quality"])),
        *_int8(receipt["quality"].get("int8_attention")),
        ("Bytes", _bytes(receipt["bytes"])),
        ("Speed", _speed(receipt["speed"])),
        ("Draft", _draft(receipt["draft"])),
        ("Measured on", _machine(receipt["hardware"], receipt["versions"], seeds)),
        ("Measure it again", _commands(receipt["commands"])),
    ):
        parts += [f"## {title}", text or "Not measured."]
    return "\n\n".join(parts) + "\n"


def _worse(items: Sequence[Mapping[str, Any]]) -> str:
    if not items:
        return "Nothing that was measured."
    rows = [[i.get("what") or "-", number(i.get("before")), number(i.get("after"))] for i in items]
    return table(["what", "before", "after"], rows)


def _quality(quality: Mapping[str, Any]) -> str:
    if not quality:
        return ""
    twin = quality.get("twin")
    other = dict(quality_rows(twin)) if twin else {}
    rows = []
    tasks = quality.get("tasks", {})
    for what, value in quality_rows(quality):
        task = tasks.get(what.removesuffix(": accuracy"), {})
        row = [what, number(value), number(task.get("chance")), number(task.get("n"))]
        rows.append([*row, number(other.get(what))] if twin else row)
    return table(["what", "value", "chance", "n", *(["twin"] if twin else [])], rows)


def _int8(found: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """The part about integer attention, of receipts that have one."""
    if not found:
        return
    floats = found.get("float_layers", [])
    rows = [
        [layer, number(error), "floating point" if layer in floats else "integers"]
        for layer, error in found.get("errors", {}).items()
    ]
    text = (
        f"`attention={found.get('attention')}` over cached rows of {found.get('kv_cache_dtype')}. Errors are "
        f"relative L2 errors on {number(found.get('probe_tokens'))} tokens. Above the budget of "
        f"{number(found.get('budget'))}, and so in floating point: {', '.join(floats) or 'none'}."
    )
    yield "INT8 attention", f"{text}\n\n{table(['layer', 'error', 'computes in'], rows)}"


def _bytes(part: Mapping[str, Any]) -> str:
    rows = [["weights", size(part["weights"])]] if "weights" in part else []
    for kv in part.get("kv_bytes_per_token", []):
        layers = f"{number(kv.get('num_layers'))} x {kv.get('layer_kind')}"
        what = f"KV per token, {layers}, context {number(kv.get('context'))}"
        rows.append([what, size(kv.get("bytes"))])
    for kv in part.get("kv_allocated", []):
        rows.append([f"KV allocated, context {number(kv.get('context'))}", size(kv.get("bytes"))])
    return table(["what", "size"], rows) if rows else ""


def _speed(items: Sequence[Mapping[str, Any]]) -> str:
    if not items:
        return ""
    rows = [
        [f"{i.get('what')} ({i.get('unit')})", *(number(i.get(k)) for k in ("median", "p25", "p75", "n"))]
        for i in items
    ]
    return table(["what", "median", "p25", "p75", "n"], rows)


def _draft(draft: Mapping[str, Any]) -> str:
    if not draft:
        return ""
    rows = [["tokens per pass of the main model", number(draft.get("acceptance_length"))]]
    for position, share in enumerate(draft.get("acceptance_by_position", []), start=1):
        rows.append([f"draft token {position} accepted", number(share)])
    return table(["what", "value"], rows)


def _machine(hardware: Mapping[str, Any], versions: Mapping[str, str], seeds: Mapping[str, int]) -> str:
    rows = []
    if hardware:
        rows = [
            ["CPU", f"{hardware.get('cpu') or '-'}, {number(hardware.get('cores'))} cores"],
            ["memory", size(hardware.get("memory_bytes"))],
            ["GPU", hardware.get("gpu") or "none"],
        ]
    rows += [[name, version] for name, version in versions.items()]
    rows += [[f"seed of {name}", str(seed)] for name, seed in seeds.items()]
    return table(["what", "value"], rows) if rows else ""


def _commands(commands: Sequence[str]) -> str:
    return "```sh\n" + "\n".join(commands) + "\n```" if commands else ""

"""The HTML of a report: escaping, tables, cards, figures and the page around them.

Everything a page needs is in the page: no script, no outside asset. Plots arrive as SVG whose colours are the
variables of `STYLE`, so that one page serves light and dark screens.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sateen.receipt.markdown import number

COLOURS = {
    # name: (light, dark)
    "ink": ("#1c2230", "#e6e8ee"),
    "muted": ("#5d6474", "#a2a9b8"),
    "grid": ("#d5d8e0", "#3a4050"),
    "hybrid": ("#1f6f8b", "#5cc0de"),
    "twin": ("#b4632a", "#f0a268"),
    "full": ("#8a5a9e", "#c79ad9"),
    "sliding": ("#3b8f6b", "#6cc79f"),
    "sparse": ("#5277c3", "#8fb0f2"),
    "other": ("#7b8190", "#8d94a4"),
    "bad": ("#b3261e", "#ff8a80"),
    "paper": ("#fbfbfd", "#14171f"),
}
"""The page's palette; plots draw in the light values, which become `var(--name)`."""


def _variables(column: int) -> str:
    return "".join(f"--{name}:{pair[column]};" for name, pair in COLOURS.items())


STYLE = f":root{{{_variables(0)}}}@media(prefers-color-scheme:dark){{:root{{{_variables(1)}}}}}" + Path(
    __file__
).with_name("style.css").read_text(encoding="utf-8")


def finite(value: Any) -> float | int | None:
    """The value when it is a finite number, else None: what was not measured is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def shown(value: Any) -> str:
    """A number for people, a dash when there is none."""
    return number(finite(value))


def share(value: Any, digits: int = 1) -> str:
    """A fraction as a percentage, a dash when there is none."""
    fraction = finite(value)
    return "-" if fraction is None else f"{fraction:.{digits}%}"


def text(value: Any) -> str:
    """Any value as escaped HTML text, safe in attributes too."""
    return html.escape(str(value), quote=True)


def missing(what: str) -> str:
    """The line that stands where a section has nothing to show."""
    return f'<p class="missing">Missing: {text(what)}.</p>'


def section(title: str, *parts: str) -> str:
    """A section with its heading."""
    name = "".join(c if c.isalnum() else "-" for c in title.lower())
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{text(title)}</h2>{"".join(parts)}</section>'


def table(
    caption: str,
    header: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    is_text: bool = False,
) -> str:
    """A table whose first column heads its rows; cells are text and get escaped."""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{text(row[0])}</th>{"".join(f"<td>{text(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    kind = ' class="text"' if is_text else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}"><table{kind}>'
        f"<caption>{text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def cards(rows: Iterable[tuple[str, str, str]]) -> str:
    """A row of headline numbers: what, value, note."""
    items = "".join(
        f'<li><span class="what">{text(what)}</span> <span class="value">{text(value)}</span> '
        f'<span class="note">{text(note)}</span></li>'
        for what, value, note in rows
    )
    return f'<ul class="cards">{items}</ul>' if items else ""


def figure(svg: str, caption: str) -> str:
    """A plot with its caption."""
    return f"<figure>{svg}<figcaption>{text(caption)}</figcaption></figure>"


def page(title: str, subtitle: str, parts: Iterable[str]) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><header><h1>{text(title)}</h1><p>{text(subtitle)}</p></header>\n"
        f"<main>{chr(10).join(parts)}</main></body></html>\n"
    )

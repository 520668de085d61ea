"""The HTML of a report: escaping, tables, cards, figures and the page around them.

Everything a page needs is in the page: no script, no outside asset. Plots arrive as SVG whose colours are the
variables of `STYLE`, so that one page serves light and dark screens.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
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


STYLE = f"""
:root{{color-scheme:light dark;{_variables(0)}--card:#ffffff;--tint:#f1f2f6;--badtint:#fdecea}}
@media (prefers-color-scheme:dark){{:root{{{_variables(1)}--card:#1c212c;--tint:#232936;--badtint:#3a1f1f}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}}
main,header{{max-width:60rem;margin:0 auto;padding:0 1rem}}
header{{padding-top:1.5rem}} h1{{margin:0;font-size:1.7rem;line-height:1.2}} header p{{margin:.3rem 0 0;color:var(--muted)}}
h2{{margin:2.4rem 0 .6rem;font-size:1.25rem}} h3{{margin:1.2rem 0 .4rem;font-size:1rem}}
.cards{{display:grid;grid-template-columns:repeat(auto-fit,minmax(10.5rem,1fr));gap:.75rem;margin:1.2rem 0 0;padding:0;list-style:none}}
.cards li{{background:var(--card);border:1px solid var(--grid);border-radius:.6rem;padding:.7rem .9rem}}
.cards .what,.cards .note{{display:block;font-size:.83rem;color:var(--muted)}}
.cards .value{{display:block;font-size:1.7rem;font-weight:650;line-height:1.3;font-variant-numeric:tabular-nums}}
figure{{margin:.6rem 0 1.2rem;background:var(--card);border:1px solid var(--grid);border-radius:.6rem;padding:.7rem}}
figure svg{{display:block;width:100%;height:auto;max-width:46rem;margin:0 auto}} svg text{{font-family:inherit}}
svg image{{image-rendering:pixelated}}
figcaption,caption,.plain{{font-size:.88rem;color:var(--muted)}} figcaption{{margin-top:.5rem}}
.scroll{{overflow-x:auto;margin:.6rem 0 1.2rem}} .scroll:focus{{outline:2px solid var(--hybrid)}}
table{{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}}
caption{{text-align:left;padding:.2rem 0}} th,td{{padding:.35rem .6rem;border-bottom:1px solid var(--grid);text-align:right;vertical-align:top}}
th:first-child,td:first-child{{text-align:left}} thead th{{color:var(--muted);font-weight:600}} tbody th{{font-weight:500}}
table.text th,table.text td{{text-align:left;overflow-wrap:anywhere}}
.two{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:.75rem}} .two>*{{min-width:0}}
.layers{{display:flex;flex-wrap:wrap;gap:.3rem;margin:.3rem 0 .6rem;padding:0;list-style:none}}
.layers li{{flex:1 1 3.6rem;max-width:9rem;border-radius:.35rem;padding:.25rem .4rem;font-size:.78rem;line-height:1.3;border:1px solid var(--kind);border-top:.45rem solid var(--kind);background:var(--card)}}
.layers b{{display:block;font-weight:600}} .layers .moe{{border-bottom:.45rem double var(--ink)}}
.layers.many{{gap:.15rem}} .layers.many li{{flex:0 1 2.6rem;font-size:.7rem;padding:.1rem .2rem}}
.bad{{border-left:.35rem solid var(--bad);background:var(--badtint);border-radius:.4rem;padding:.2rem .8rem}}
.bad td,.bad th{{color:var(--bad)}} .bad thead th,.bad caption{{color:var(--ink)}}
.missing{{color:var(--muted);border:1px dashed var(--grid);border-radius:.4rem;padding:.4rem .7rem;font-size:.9rem}}
details{{border:1px solid var(--grid);border-radius:.5rem;background:var(--card);margin:.5rem 0;padding:.1rem .8rem}}
summary{{cursor:pointer;padding:.4rem 0;font-weight:550;overflow-wrap:anywhere}}
pre{{background:var(--tint);border-radius:.4rem;padding:.6rem;overflow-x:auto;white-space:pre-wrap;overflow-wrap:anywhere;font:.83rem/1.45 ui-monospace,Menlo,Consolas,monospace;margin:.3rem 0 .8rem}}
@media print{{details{{break-inside:avoid}} figure,.cards li{{break-inside:avoid}}}}
"""


def finite(value: Any) -> float | int | None:
    """The value when it is a finite number, else None: what could not be measured is not shown as a number."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
    ):
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

"""The canvas of a report's plots: matplotlib drawing into SVG text that stands inside an HTML page.

Colours come from the page's palette and are rewritten to its variables; identifiers get the plot's name in
front, because all plots share one document.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sateen.report.page import COLOURS, text

WIDTH = 5.4  # inches; 389 units wide, so that 9 pt text stays readable on a phone
INK = {name: light for name, (light, _) in COLOURS.items()}
_RC = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK["grid"],
    "grid.linewidth": 0.6,
    "text.color": INK["ink"],
    "axes.edgecolor": INK["muted"],
    "axes.labelcolor": INK["ink"],
    "xtick.color": INK["muted"],
    "ytick.color": INK["muted"],
    "legend.frameon": False,
    "legend.fontsize": 8,
    "hatch.linewidth": 0.6,
}


@contextmanager
def drawing(name: str, alt: str, height: float, rows: int = 1) -> Iterator[tuple[list[Axes], list[str]]]:
    """Axes to draw on, and a list that holds the SVG text afterwards."""
    out: list[str] = []
    settings: Any = {**_RC, "svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots(rows, 1, sharex=rows > 1, squeeze=False)[:, 0].tolist()
        yield axes, out
        buffer = io.StringIO()
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None},
        )
    out.append(_inline(buffer.getvalue(), name, alt))


def _inline(svg: str, name: str, alt: str) -> str:
    """An SVG file as an element of an HTML page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->",
        "",
        svg,
        flags=re.DOTALL,
    )
    view = re.search(r'viewBox="([^"]*)"', svg)
    assert view is not None
    opening = f'<svg viewBox="{view[1]}" role="img" aria-label="{text(alt)}">'
    svg = re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"\s*font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r"\n\s*", " ", svg)
    for colour, value in INK.items():
        svg = svg.replace(value, f"var(--{colour})")
    return svg


def short(value: float, _position: int | None = None) -> str:
    """A tick's number: 0.05, 12, 300k, 1.2M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"

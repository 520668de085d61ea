"""Plots of a report as SVG text: curves, bars, stacks, groups and heat maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, MultipleLocator, NullFormatter

from sateen.report.drawing import INK, drawing, short

MAX_POINTS = 400  # per curve: a screen shows no more, and the page stays small
SMOOTH_SHARE = 30  # an average reaches over 1/30 of its stage on either side
MAX_MARKED = 30  # curves of more points have no markers
LINE_STYLES = ("-", "--", ":", "-.")

Points = Sequence[tuple[float, float]]


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """The mean of each value and up to `reach` neighbours on either side, equally many."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    at = np.arange(len(values))
    near = np.minimum(reach, np.minimum(at, len(values) - 1 - at))
    means: list[float] = ((sums[at + near + 1] - sums[at - near]) / (2 * near + 1)).tolist()
    return means


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most `MAX_POINTS` points: the means of neighbours."""
    size = -(-len(points) // MAX_POINTS)
    if size < 2:
        return list(points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def curves(
    name: str,
    alt: str,
    series: Mapping[str, Points],
    *,
    label: str,
    borders: Sequence[float] = (),
    colours: Sequence[str] = ("hybrid", "twin", "full", "sliding"),
    is_smooth: bool = True,
    is_log: bool = False,
) -> str:
    """Curves over trained tokens: the raw one faint, its average strong, stages numbered.

    Args:
        series: label -> (tokens, value) in order; only finite values.
        label: what the vertical axis shows, with its unit.
        borders: tokens at which each stage ends, the last one included.
        colours: names of the palette, one per series in turn.
        is_smooth: draw the raw curve and its average; otherwise the points as they are.
        is_log: logarithmic vertical axis.
    """
    with drawing(name, alt, 2.7) as ([axes], out):
        for index, (what, points) in enumerate(series.items()):
            style: dict[str, Any] = {
                "color": INK[colours[index % len(colours)]],
                "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
            }
            if not is_smooth:
                axes.plot(
                    *zip(*thinned(points), strict=True),
                    marker="o",
                    markersize=3,
                    label=what,
                    **style,
                )
                continue
            axes.plot(
                *zip(*thinned(points), strict=True),
                color=style["color"],
                alpha=0.3,
                linewidth=0.8,
            )
            for part_index, part in enumerate(_parts(points, borders)):
                average = smoothed([y for _, y in part], max(1, len(part) // SMOOTH_SHARE))
                strong = thinned(list(zip((x for x, _ in part), average, strict=True)))
                shown_as = what if part_index == 0 else None
                axes.plot(*zip(*strong, strict=True), linewidth=1.8, label=shown_as, **style)
        for end in borders[:-1]:
            axes.axvline(end, color=INK["muted"], linewidth=0.8, linestyle=":")
        if len(borders) > 1:
            for number, (start, end) in enumerate(zip([0, *borders[:-1]], borders, strict=True), start=1):
                axes.text(
                    (start + end) / 2, 1.01, str(number), transform=axes.get_xaxis_transform(),
                    ha="center", va="bottom", fontsize=8, color=INK["muted"],
                )  # fmt: skip
        if is_log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.set_xlim(0, borders[-1] if borders else None)
        axes.set_xlabel("tokens trained")
        axes.set_ylabel(label)
        axes.xaxis.set_major_formatter(FuncFormatter(short))
        axes.yaxis.set_major_formatter(FuncFormatter(short))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="x", visible=False)
        if len(series) > 1:
            axes.legend(loc="best")
    return out[0]


def _parts(points: Points, borders: Sequence[float]) -> list[Points]:
    """The points stage by stage, so that an average does not carry one stage's level into the next."""
    edges = [0.0, *borders[:-1], float("inf")]
    parts = [[p for p in points if low < p[0] <= high] for low, high in pairwise(edges)]
    return [part for part in parts if part]


def bars(name: str, alt: str, rows: Sequence[tuple[str, float, str]], *, label: str) -> str:
    """Horizontal bars, one per (what, value, colour), with their values written out."""
    with drawing(name, alt, 0.7 + 0.3 * len(rows)) as ([axes], out):
        places = range(len(rows), 0, -1)
        axes.barh(
            places,
            [v for _, v, _ in rows],
            color=[INK[c] for _, _, c in rows],
            height=0.68,
        )
        for place, (_, value, _) in zip(places, rows, strict=True):
            axes.annotate(f"{value:.3g}", (value, place), (3, 0), textcoords="offset points", va="center")
        axes.set_yticks(list(places), [what for what, _, _ in rows], color=INK["ink"])
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 1.12 * max(v for _, v, _ in rows) or 1)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(label)
    return out[0]


def stacks(
    name: str, alt: str, rows: Mapping[str, Sequence[tuple[str, str, float]]], *, label: str,
    unit: Callable[[float], str],
) -> str:  # fmt: skip
    """Horizontal stacked bars: per row, the segments as (text inside, colour, value).

    Args:
        unit: writes a row's total for people.
    """
    with drawing(name, alt, 0.75 + 0.5 * len(rows)) as ([axes], out):
        totals = [sum(value for _, _, value in parts) for parts in rows.values()]
        longest = max(totals) or 1
        for place, (parts, total) in enumerate(zip(rows.values(), totals, strict=True)):
            left = 0.0
            for inside, colour, value in parts:
                axes.barh(
                    -place,
                    value,
                    left=left,
                    color=INK[colour],
                    edgecolor=INK["grid"],
                    height=0.62,
                )
                if value > 0.05 * longest:
                    axes.text(left + value / 2, -place, inside, ha="center", va="center", fontsize=8,
                              color=INK["paper"])  # fmt: skip
                left += value
            axes.annotate(unit(total), (total, -place), (3, 0), textcoords="offset points", va="center")
        axes.set_yticks([-i for i in range(len(rows))], list(rows), color=INK["ink"])
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 1.22 * longest)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(label)
        # Powers of two: quarters of a MiB read better than tenths.
        axes.xaxis.set_major_locator(MultipleLocator(2 ** math.ceil(math.log2(longest / 4))))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: unit(value)))
    return out[0]


def groups(
    name: str,
    alt: str,
    series: Mapping[str, Sequence[float]],
    *,
    xlabel: str,
    label: str,
) -> str:
    """Upright bars in groups: one group per position from 1, one bar per series."""
    with drawing(name, alt, 2.2) as ([axes], out):
        width = 0.8 / len(series)
        for index, (what, values) in enumerate(series.items()):
            places = np.arange(1, len(values) + 1) + width * (index - (len(series) - 1) / 2)
            axes.bar(
                places,
                values,
                width * 0.92,
                label=what,
                color=INK[("hybrid", "other")[index % 2]],
            )
            for x, value in zip(places, values, strict=True):
                axes.text(x, value, f"{value:.0%}", ha="center", va="bottom", fontsize=8)
        axes.set_xticks(range(1, 1 + max(len(v) for v in series.values())))
        axes.set_ylim(0, 1.12)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.grid(axis="x", visible=False)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(label)
        if len(series) > 1:
            axes.legend(loc="upper right")
    return out[0]


def heat(
    name: str, alt: str, panels: Mapping[str, np.ndarray[Any, Any]], *, xlabel: str, ylabel: str,
    extent: tuple[float, float],
) -> str:  # fmt: skip
    """Heat maps under each other with one colour scale: rows of the arrays upwards, columns over `extent`.

    Values are an expert's load over the mean load of its layer, so that 1 is balance.
    """
    top = max(2.0, *(float(np.quantile(panel, 0.995)) for panel in panels.values()))
    with drawing(name, alt, 0.8 + 1.15 * len(panels), rows=len(panels)) as (
        all_axes,
        out,
    ):
        for axes, (title, panel) in zip(all_axes, panels.items(), strict=True):
            box = (*extent, -0.5, panel.shape[0] - 0.5)
            drawn = axes.imshow(
                panel, aspect="auto", origin="lower", interpolation="none", extent=box,
                cmap="viridis", vmin=0.0, vmax=top,
            )  # fmt: skip
            axes.grid(visible=False)
            axes.set_title(title, fontsize=9, loc="left", pad=3)
            axes.set_ylabel(ylabel)
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        all_axes[-1].set_xlabel(xlabel)
        all_axes[-1].xaxis.set_major_formatter(FuncFormatter(short))
        bar = all_axes[0].figure.colorbar(drawn, ax=all_axes, shrink=0.9, pad=0.02)
        bar.set_label("load / mean")
        bar.outline.set_visible(False)
    return out[0]

"""Line charts as SVG text to put inside a page; colours and fonts are the page's."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Drawn in colours that nothing else uses, then replaced: only the page knows whether it is light or dark.
PAGE_COLOURS = {
    "#010203": "currentColor",
    "#010204": "var(--line, #8b949e)",
    "#010205": "var(--series-1, #0b5cad)",
    "#010206": "var(--series-2, #b3400b)",
}
TEXT, LINE, *SERIES = PAGE_COLOURS
DASHES = ("-", (0, (4, 2)))  # series differ without colour too: in print, and for the colour-blind
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vit_cls",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.6,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.borderpad": 0,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), TEXT),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), LINE),
}
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Args:
        label: What it is, for the legend and for those who cannot see it.
        points: ``(x, y)`` from left to right; a ``y`` that is not finite leaves a gap.
    """

    label: str
    points: Sequence[tuple[float, float]]


def line_chart(
    name: str, title: str, series: Sequence[Series], *, percent: bool = False, mark: float | None = None
) -> str:
    """Draw one or two lines over the epochs.

    Args:
        name: Unique in the page, letters and digits alone: every id in the SVG begins with it.
        title: What the chart shows; read aloud together with the first and last value of each line.
        series: At most two, each with a point at least.
        percent: Whether values are shares, written as percentages.
        mark: An epoch to mark by a dotted upright line.

    Returns:
        An ``<svg>`` element as wide as its container, the same text for the same arguments. Labels are
        escaped; colours are CSS variables with a fallback, text is the colour and font around it.

    Example:
        >>> svg = line_chart("loss", "Loss", [Series("training", [(0, 2.0), (1, 1.5)])])
        >>> svg[: svg.index(">")]  # doctest: +ELLIPSIS
        '<svg class="chart" viewBox="..." role="img" aria-label="Loss: training from 2 to 1.5"'
    """
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(4.8, 3.0), layout="constrained")
        axes = figure.subplots()
        for line, colour, dashes in zip(series, SERIES, DASHES, strict=False):
            x, y = zip(*line.points, strict=True)
            marker = "o" if len(x) == 1 else None
            axes.plot(x, y, color=colour, linestyle=dashes, marker=marker, label=line.label)
        if mark is not None:
            axes.axvline(mark, color=TEXT, linestyle=":", linewidth=1)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _number(v, percent, digits=6)))
        if len(series) > 1:
            axes.legend()
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata=NO_METADATA)
    spoken = "; ".join(
        f"{line.label} from {_number(line.points[0][1], percent)} to {_number(line.points[-1][1], percent)}"
        for line in series
    )
    return _inline(text.getvalue(), name, f"{title}: {spoken}")


def _inline(svg: str, name: str, label: str) -> str:
    """What matplotlib writes for a file of its own, made fit for a page that holds several."""
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    body = svg[svg.index("</defs>") + len("</defs>") :]  # the first defs is a style sheet for all elements
    body = re.sub(r'( id="|url\(#|xlink:href="#)', rf"\g<1>{name}-", body)
    body = re.sub(r" font-family: [^;]*;", "", body)
    for drawn, shown in PAGE_COLOURS.items():
        body = body.replace(drawn, shown)
    label = html.escape(label)
    return f'<svg class="chart" {view_box[0]} role="img" aria-label="{label}">{body.strip()}'


def _number(value: float, percent: bool, digits: int = 4) -> str:
    if not math.isfinite(value):
        return "no value"
    return f"{100 * value:.{digits}g} %" if percent else f"{value:.{digits}g}"

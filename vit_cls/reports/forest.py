"""A forest plot as SVG text to put inside a page: differences with their intervals, and the margin."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vit_cls.reports.figures import LINE, NO_METADATA, SERIES, STYLE, TEXT, inline_svg


@dataclass(frozen=True)
class Row:
    """One difference.

    Args:
        label: What of what.
        value: The difference, as a share.
        bounds: Its interval.
    """

    label: str
    value: float
    bounds: tuple[float, float]


def forest_chart(name: str, title: str, rows: Sequence[Row], margin: float) -> str:
    """Draw differences below each other, the first on top, in percentage points.

    Args:
        name: Unique in the page, letters and digits alone: every id in the SVG begins with it.
        title: What the chart shows; read aloud together with each row.
        rows: One at least.
        margin: Half the width of the band around zero, as a share.

    Returns:
        An ``<svg>`` element as wide as its container, in colours of the page.

    Example:
        >>> svg = forest_chart("f", "Difference", [Row("B minus A", 0.04, (0.01, 0.07))], 0.01)
        >>> svg[svg.index("aria-label") : svg.index(">")]
        'aria-label="Difference: B minus A +4.00 points, 95 % interval +1.00 to +7.00"'
    """
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(5.6, 1.0 + 0.38 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.axvspan(-100 * margin, 100 * margin, color=LINE, alpha=0.45, linewidth=0)
        axes.axvline(0, color=TEXT, linestyle=":", linewidth=1)
        for place, row in enumerate(rows):
            axes.plot([100 * bound for bound in row.bounds], [place] * 2, color=SERIES[0], marker="|")
            axes.plot([100 * row.value], [place], color=SERIES[0], marker="o")
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("percentage points")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata=NO_METADATA)
    spoken = "; ".join(
        f"{row.label} {100 * row.value:+.2f} points, 95 % interval {100 * row.bounds[0]:+.2f} to "
        f"{100 * row.bounds[1]:+.2f}"
        for row in rows
    )
    return inline_svg(text.getvalue(), name, f"{title}: {spoken}")

"""The charts of probes and studies as SVG text to put inside a page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from vit_cls.lab.results import MOST_LINES, ForestChart, HeatMap, Line, LineChart, ScatterChart
from vit_cls.reports.figures import (
    MORE_COLOURS,
    SERIES,
    TEXT,
    drawing,
    forest_chart,
    inline_svg,
    set_ticks,
    wrap,
    written,
)
from vit_cls.reports.lab_words import clean, shorten

COLOURS = (*SERIES, *MORE_COLOURS)
DASHES = (
    "-",
    (0, (4, 2)),
    (0, (1, 1.2)),
    (0, (6, 1.5, 1, 1.5)),
    (0, (9, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (2, 2.5)),
    (0, (10, 1.5, 3, 1.5)),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MOST_MARKERS = 12
"""On one line; on a longer one some points have none."""
SMALL = 10
"""Size of labels inside a chart, in points."""
LEGEND = 54
"""Characters of a label in a legend."""
MAP_COLOURS = mpl.colormaps["viridis"]
MOST_WRITTEN = 20
"""Columns up to which the values are written into the cells of a heat map."""
MOST_LABELS = 40
MOST_SPOKEN = 12
DARK, BRIGHT = "#111111", "#ffffff"

Chart = LineChart | ForestChart | ScatterChart | HeatMap


def draw(name: str, chart: Chart) -> str | None:
    """Draw a chart of a result.

    Args:
        name: Unique in the page, letters and digits alone: every id in the SVG begins with it.

    Returns:
        An ``<svg>`` element as wide as its container, the same text for the same chart, which says its title
        and its key values aloud; None where there is no finite value to draw.

    Raises:
        ValueError: If a chart has more than eight lines, or rows and labels of a heat map do not fit.

    Example:
        >>> chart = LineChart("Accuracy", "layer", "top-1", [Line("cls", [(1, 0.5), (2, 0.75)])])
        >>> svg = draw("a", chart)
        >>> svg[svg.index("aria-label") : svg.index(">")]
        'aria-label="Accuracy: cls from 50 % at 1 to 75 % at 2"'
    """
    if isinstance(chart, LineChart):
        return _lines(name, chart)
    if isinstance(chart, ScatterChart):
        return _scatter(name, chart)
    if isinstance(chart, HeatMap):
        return _heat_map(name, chart)
    return forest_chart(name, chart) if len(left_out(chart)) < len(chart.rows) else None


def left_out(chart: Chart) -> list[str]:
    """Labels of the lines, rows and points of a chart that have no finite value, and so are not drawn.

    Args:
        chart: Of any kind; a heat map leaves nothing out, for its empty cells are seen.

    Example:
        >>> left_out(ScatterChart("t", "x", "y", [("a", 1, math.nan, None), ("b", 1, 0.5, None)]))
        ['a']
    """
    if isinstance(chart, LineChart):
        return [
            clean(line.label) for line in chart.lines if not any(math.isfinite(y) for _, y in line.points)
        ]
    if isinstance(chart, ForestChart):
        return [clean(label) for label, value, _ in chart.rows if not math.isfinite(value)]
    if isinstance(chart, ScatterChart):
        return [clean(label) for label, x, y, _ in chart.points if not math.isfinite(x + y)]
    return []


def _lines(name: str, chart: LineChart) -> str | None:
    if len(chart.lines) > MOST_LINES:
        raise ValueError(
            f"the chart {chart.title!r} must have at most {MOST_LINES} lines, told apart without "
            f"colour; got {len(chart.lines)}. Make two charts of it, or a table."
        )
    lines = [line for line in chart.lines if any(math.isfinite(y) for _, y in line.points)]
    if not lines:
        return None
    labels = [line.label for line in lines] + list(chart.marks)
    with drawing(5.2, 3.1 + _legend_height(labels)) as (figure, text):
        axes = figure.subplots()
        handles = [_draw_line(axes, place, line) for place, line in enumerate(lines)]
        for value, dashes in zip(chart.marks.values(), itertools.cycle((":", "-.")), strict=False):
            handles.append(axes.axhline(value, color=TEXT, linestyle=dashes, linewidth=1))
        _label_axes(axes, chart, [x for line in lines for x, _ in line.points])
        _legend(figure, handles, labels)
    spoken = [_spoken_line(line, chart.percent) for line in lines]
    spoken += [f"{clean(label)} at {written(value, chart.percent)}" for label, value in chart.marks.items()]
    return inline_svg(text.getvalue(), name, f"{clean(chart.title)}: {'; '.join(spoken)}")


def _draw_line(axes: Axes, place: int, line: Line) -> Line2D:
    x, y = zip(*line.points, strict=True)
    every = math.ceil(len(x) / MOST_MARKERS)
    style: dict[str, Any] = {"color": COLOURS[place], "linestyle": DASHES[place], "marker": MARKERS[place]}
    # On long lines that coincide all markers are seen.
    (handle,) = axes.plot(
        x, y, markevery=(place % every, every), markersize=5, markeredgewidth=0, linewidth=1.6, **style
    )
    if line.bands is not None:
        low, high = zip(*line.bands, strict=True)
        axes.fill_between(x, low, high, color=COLOURS[place], alpha=0.14, linewidth=0)
    return handle


def _spoken_line(line: Line, percent: bool) -> str:
    (x0, y0), (x1, y1) = line.points[0], line.points[-1]
    start = f"{written(y0, percent)} at {written(x0, False)}"
    if len(line.points) == 1:
        return f"{clean(line.label)} {start}"
    return f"{clean(line.label)} from {start} to {written(y1, percent)} at {written(x1, False)}"


def _label_axes(axes: Axes, chart: LineChart | ScatterChart, x: Sequence[float]) -> None:
    axes.set(xlabel=wrap(chart.x_label, 44), ylabel=wrap(chart.y_label, 26))
    set_ticks(axes.yaxis, percent=chart.percent)
    set_ticks(axes.xaxis, percent=False)
    if chart.log_x and min(x) > 0:
        axes.set_xscale("log")
        _set_log_ticks(axes.xaxis, sorted(set(x)))
    elif all(float(one).is_integer() for one in x):
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))


def _set_log_ticks(axis: Axis, values: Sequence[float]) -> None:
    """At the values themselves where they are few and lie apart."""
    formatter = FuncFormatter(lambda v, _: written(float(f"{v:.9g}"), False))
    steps = np.diff(np.log(values))
    axis.set_minor_locator(NullLocator())
    if len(values) <= 8 and (steps > 0.08 * steps.sum()).all():
        axis.set_major_locator(FixedLocator(values))
    elif max(values) < 20 * min(values):  # hardly a power of ten is on the axis
        axis.set_major_locator(MaxNLocator(5))
    else:
        axis.set_major_locator(LogLocator(10, numticks=7))
    axis.set_major_formatter(formatter)


def _legend_columns(labels: Sequence[str]) -> int:
    return 2 if max(len(clean(label)) for label in labels) <= LEGEND // 2 - 3 else 1


def _legend_height(labels: Sequence[str]) -> float:
    """In inches; one label needs no legend."""
    return 0.21 * math.ceil(len(labels) / _legend_columns(labels)) if len(labels) > 1 else 0.0


def _legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    if len(labels) > 1:
        texts = [shorten(clean(label), LEGEND) for label in labels]
        figure.legend(
            handles,
            [f" {text}" if text.startswith("_") else text for text in texts],  # matplotlib hides these
            loc="outside lower left",
            ncols=_legend_columns(labels),
            fontsize=SMALL,
            handlelength=3.6,
        )


def _scatter(name: str, chart: ScatterChart) -> str | None:
    points = [point for point in chart.points if math.isfinite(point[1]) and math.isfinite(point[2])]
    if not points:
        return None
    front = pareto_front([(x, y) for _, x, y, _ in points])
    labels = [label for label, *_ in points]
    with drawing(5.2, 3.1 + _legend_height([*labels, "Pareto front"])) as (figure, text):
        axes = figure.subplots()
        steps = sorted((points[i][1], points[i][2]) for i in front)
        steps.append((max(x for _, x, _, _ in points), steps[-1][1]))
        x, y = zip(*steps, strict=True)
        (stairs,) = axes.plot(
            x, y, color=TEXT, linestyle=":", drawstyle="steps-post", linewidth=1.2, zorder=1
        )
        handles = []
        for i, (_, cost, gain, bounds) in enumerate(points):
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(MARKERS)) % len(MARKERS)]
            if bounds is not None:
                axes.plot(
                    [cost, cost], bounds, color=colour, linewidth=1, alpha=0.7, marker="_", markersize=5
                )
            fill = colour if i in front else "none"
            style: dict[str, Any] = {
                "marker": marker,
                "markersize": 7,
                "markerfacecolor": fill,
                "linestyle": "none",
            }
            handles += axes.plot([cost], [gain], color=colour, **style)
        axes.margins(0.1, 0.12)
        _label_axes(axes, chart, [cost for _, cost, _, _ in points])
        _legend(figure, [*handles, stairs], [*labels, "Pareto front"])
    spoken = [
        f"{clean(label)} {written(gain, chart.percent)} at {written(cost, False)}"
        + (", on the front" if i in front else "")
        for i, (label, cost, gain, _) in enumerate(points)
    ]
    return inline_svg(text.getvalue(), name, f"{clean(chart.title)}: {'; '.join(spoken)}")


def pareto_front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Which points no other one beats: none costs as little or less and gives as much or more.

    Returns:
        Indices; of equal points the first.

    Example:
        >>> sorted(pareto_front([(1, 0.5), (2, 0.4), (3, 0.9), (3, 0.8)]))
        [0, 2]
    """
    front, best = set(), -math.inf
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if points[i][1] > best:
            front.add(i)
            best = points[i][1]
    return front


def _heat_map(name: str, chart: HeatMap) -> str | None:
    """Colours with a bar that tells what they mean, and the numbers where there is room for them."""
    _check_sizes(chart)
    values = np.array([list(row) for row in chart.values], dtype=float)
    values[~np.isfinite(values)] = np.nan
    if np.isnan(values).all():
        return None
    rows, cols = values.shape
    low, high = chart.limits or (float(np.nanmin(values)), float(np.nanmax(values)))
    scale = Normalize(low, high if high > low else low + 1e-9)
    row_names = [wrap(label, 22) for label in chart.row_labels or ()]
    column_names = [shorten(clean(label), 24) for label in chart.column_labels or ()]
    cell = 5.4 / cols if cols > MOST_WRITTEN else max(0.34, min(0.8, 3.6 / cols))  # inches
    longest = max(map(len, column_names), default=0)
    turned = 0.085 * longest > cell  # they would run into each other
    widest = max((len(line) for label in row_names for line in label.split("\n")), default=0)
    width = 1.3 + cols * cell + 0.095 * widest
    height = 0.35 + (0.075 * longest if turned else 0.2)
    height += rows * min(max(cell * 0.72, 0.3 if rows <= 30 else 0.0), 0.5)
    with drawing(width, max(1.6, height)) as (figure, text):
        axes = figure.subplots()
        shown = axes.imshow(values, cmap=MAP_COLOURS, norm=scale, interpolation="none", aspect="auto")
        if cols <= MOST_WRITTEN:
            _write_values(axes, values, scale, chart.percent, 72 * cell)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.xaxis.tick_top()
        every_row, every_col = math.ceil(rows / MOST_LABELS), math.ceil(cols / MOST_LABELS)
        axes.set_yticks(range(0, len(row_names), every_row), row_names[::every_row], fontsize=SMALL)
        turn: dict[str, Any] = {"rotation": 90 if turned else 0, "fontsize": SMALL}
        axes.set_xticks(range(0, len(column_names), every_col), column_names[::every_col], **turn)
        bar = figure.colorbar(shown, ax=axes, pad=0.02, aspect=16, fraction=0.08)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=SMALL)
        bar.locator = MaxNLocator(4) if high > low else FixedLocator([low])
        bar.formatter = FuncFormatter(lambda v, _: written(float(f"{v:.6g}"), chart.percent))
        bar.update_ticks()
    return inline_svg(text.getvalue(), name, f"{clean(chart.title)}: {_spoken_map(chart, values)}")


def _check_sizes(chart: HeatMap) -> None:
    lengths = {len(row) for row in chart.values}
    if len(lengths) > 1:
        raise ValueError(
            f"the rows of the heat map {chart.title!r} must have one length; got {sorted(lengths)}. "
            "Fill cells without a value with NaN."
        )
    for name, size in zip(("row_labels", "column_labels"), (len(chart.values), *lengths), strict=False):
        labels = getattr(chart, name)
        if labels is not None and len(labels) != size:
            raise ValueError(f"{name} of the heat map {chart.title!r} must be {size}; got {len(labels)}.")


def _write_values(axes: Axes, values: np.ndarray, scale: Normalize, percent: bool, width: float) -> None:
    """Write each value into its cell, dark on the bright half of the colours, bright on the dark one."""
    shown = 100 * values if percent else values
    largest = float(np.nanmax(np.abs(values)))
    decimals = 1 if percent else max(0, 2 - int(math.log10(max(largest, 1))))
    texts = {
        ij: f"{v + 0.0:.{decimals}f}" for ij, v in np.ndenumerate(shown.round(decimals)) if math.isfinite(v)
    }
    size = round(min(SMALL, width / (0.62 * max(map(len, texts.values())))), 1)
    for (i, j), text in texts.items():
        ink = DARK if scale(values[i, j]) > 0.5 else BRIGHT
        axes.text(j, i, text, ha="center", va="center", color=ink, fontsize=size)


def _spoken_map(chart: HeatMap, values: np.ndarray) -> str:
    """Every value where there are few, else the smallest and the largest."""

    def said(i: int, j: int) -> tuple[str, str]:
        row = clean(chart.row_labels[i]) if chart.row_labels else f"row {i + 1}"
        column = clean(chart.column_labels[j]) if chart.column_labels else f"column {j + 1}"
        return f"{row}, {column}", written(float(values[i, j]), chart.percent)

    if values.size <= MOST_SPOKEN:
        return "; ".join("{}: {}".format(*said(*ij)) for ij in np.ndindex(*values.shape))
    lowest, highest = (
        "{1} at {0}".format(*said(*divmod(int(flat), values.shape[1])))
        for flat in (np.nanargmin(values), np.nanargmax(values))
    )
    missing = int(np.isnan(values).sum())
    rest = f"; {missing} without a value" if missing else ""
    size = f"{values.shape[0]} rows, {values.shape[1]} columns"
    return f"{size}; smallest {lowest}; largest {highest}{rest}"

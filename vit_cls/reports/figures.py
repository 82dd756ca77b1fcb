"""Charts as SVG text to put inside a page; colours and fonts are the page's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from vit_cls import formatting as fmt
from vit_cls.lab.results import (
    MOST_LINES,
    ForestChart,
    HeatMap,
    LineChart,
    ScatterChart,
)
from vit_cls.reports.svg import LINE, SERIES, TEXT, drawing, inline_svg, wrap, written
from vit_cls.reports.text import clean, shorten
from vit_cls.stats.intervals import wilson_interval

if TYPE_CHECKING:
    from vit_cls.stats.metrics import Bin

# Series differ without colour too: in print, and for the colour-blind.
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
MOST_POINTS = 200
MOST_WRITTEN = 20
"""Columns up to which the values are written into the cells of a heat map."""
MOST_LABELS = 40
MOST_SPOKEN = 12
DARK, BRIGHT = "#111111", "#ffffff"
Chart = LineChart | ForestChart | ScatterChart | HeatMap


def draw(name: str, chart: Chart) -> str | None:
    """A chart as an ``<svg>`` element as wide as its container, the same text for the same chart.

    Its title and its key values are said aloud. There is none where there is no finite value to draw.

    Args:
        name: Unique in the page, letters and digits alone: every id in the SVG begins with it.

    Raises:
        ValueError: If a chart has more than eight lines, or rows and labels of a heat map do not fit.
    """
    return DRAWN[type(chart)](name, chart)


def left_out(chart: Chart) -> list[str]:
    """Labels of the lines, rows and points of a chart that have no finite value, and so are not drawn."""
    labels: list[str] = []  # a heat map leaves nothing out, for its empty cells are seen
    if isinstance(chart, LineChart):
        labels = [line.label for line in chart.lines if not any(math.isfinite(y) for _, y in line.points)]
    elif isinstance(chart, ForestChart):
        labels = [label for label, value, _ in chart.rows if not math.isfinite(value)]
    elif isinstance(chart, ScatterChart):
        labels = [label for label, x, y, _ in chart.points if not math.isfinite(x + y)]
    return [clean(label) for label in labels]


def line_chart(name: str, chart: LineChart, *, mark: float | None = None) -> str | None:
    """Lines over a common axis, told apart without colour.

    Args:
        mark: Where a vertical line stands.
    """
    if len(chart.lines) > MOST_LINES:
        raise ValueError(
            f"the chart {chart.title!r} must have at most {MOST_LINES} lines, told apart without "
            f"colour; got {len(chart.lines)}. Make two charts of it, or a table."
        )
    lines = [line for line in chart.lines if any(math.isfinite(y) for _, y in line.points)]
    if not lines:
        return None
    with drawing() as (figure, text):
        axes, handles = figure.subplots(), []
        for place, line in enumerate(lines):
            x, y = zip(*line.points, strict=True)
            colour, every = SERIES[place], math.ceil(len(x) / MOST_MARKERS)
            style: dict[str, Any] = {"linestyle": DASHES[place], "marker": MARKERS[place], "markersize": 5}
            style["markevery"] = (place % every, every)  # of long lines that coincide all markers are seen
            handles += axes.plot(x, y, color=colour, markeredgewidth=0, **style)
            if line.bands is not None:
                low, high = zip(*line.bands, strict=True)
                axes.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)
        for i, value in enumerate(chart.marks.values()):
            handles.append(axes.axhline(value, color=TEXT, linestyle=(":", "-.")[i % 2], linewidth=1))
        if mark is not None:
            axes.axvline(mark, color=TEXT, linestyle=":", linewidth=1)
        _label_axes(axes, chart, [x for line in lines for x, _ in line.points])
        _legend(figure, handles, [line.label for line in lines] + list(chart.marks))
    spoken = []
    for line in lines:
        ends = [f"{written(y, chart.percent)} at {written(x, False)}" for x, y in line.points]
        spoken.append(f"{line.label} {ends[0] if len(ends) == 1 else f'from {ends[0]} to {ends[-1]}'}")
    spoken += [f"{label} at {written(value, chart.percent)}" for label, value in chart.marks.items()]
    return inline_svg(text.getvalue(), name, chart.title, spoken)


def reliability_diagram(name: str, bins: Sequence[Bin]) -> str:
    """How often predictions of like confidence are right, with Wilson's 95 % intervals."""
    full = [b for b in bins if b.images]
    images = sum(b.images for b in full)
    shares = np.array([b.correct / b.images for b in full])
    bounds = np.array([wilson_interval(b.correct, b.images) for b in full])
    reach = np.maximum(0, [shares - bounds[:, 0], bounds[:, 1] - shares])
    with drawing() as (figure, text):
        axes = figure.subplots()
        left, heights = [b.lower for b in full], [b.images / images for b in full]
        bars: dict[str, Any] = {
            "align": "edge",
            "color": LINE,
            "alpha": 0.6,
            "linewidth": 0,
            "label": "share of images",
        }
        axes.bar(left, heights, [b.upper - b.lower for b in full], **bars)
        axes.plot([0, 1], [0, 1], color=TEXT, linestyle=":", linewidth=1, label="as it should be")
        x = [b.confidence for b in full]
        style: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.2}
        axes.errorbar(x, shares, reach, color=SERIES[0], label="right", **style)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
        _set_ticks(axes.xaxis, percent=True)
        _set_ticks(axes.yaxis, percent=True)
        _legend(figure, *axes.get_legend_handles_labels())
    spoken = [
        f"at {written(b.confidence, True, 3)} confidence {written(share, True, 3)} of {b.images} are right"
        for b, share in zip(full, shares.tolist(), strict=True)
    ]
    return inline_svg(text.getvalue(), name, "Reliability", spoken)


def coverage_chart(name: str, curve: Sequence[float]) -> str:
    """The accuracy of the most confident images over the share of images that is answered."""
    n = len(curve)
    kept = sorted({math.ceil(n * i / MOST_POINTS) for i in range(1, MOST_POINTS + 1)})
    with drawing() as (figure, text):
        axes = figure.subplots()
        marker = "o" if n == 1 else None
        axes.plot([k / n for k in kept], [curve[k - 1] for k in kept], color=SERIES[0], marker=marker)
        axes.set(xlim=(0, 1), xlabel="share of images answered", ylabel="accuracy")
        _set_ticks(axes.xaxis, percent=True)
        _set_ticks(axes.yaxis, percent=True)
    half, whole = (written(curve[k - 1], True) for k in (math.ceil(n / 2), n))
    spoken = f"{half} of the most confident half, {whole} of all"
    return inline_svg(text.getvalue(), name, "Accuracy at coverage", [spoken])


def forest_chart(name: str, chart: ForestChart) -> str | None:
    """Differences below each other, with their intervals and the margin within which none matters."""
    rows = [row for row in chart.rows if math.isfinite(row[1])]
    if not rows:
        return None
    with drawing(5.6, 1.0 + 0.38 * len(rows)) as (figure, text):
        axes = figure.subplots()
        axes.axvspan(-100 * chart.margin, 100 * chart.margin, color=LINE, alpha=0.45, linewidth=0)
        axes.axvline(0, color=TEXT, linestyle=":", linewidth=1)
        values = 100 * np.array([value for _, value, _ in rows])
        bounds = 100 * np.array([interval for _, _, interval in rows])
        axes.hlines(range(len(rows)), *bounds.T, color=SERIES[0])
        axes.plot(bounds.T, [range(len(rows))] * 2, color=SERIES[0], marker="|", linestyle="none")
        axes.plot(values, range(len(rows)), color=SERIES[0], marker="o", linestyle="none")
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [wrap(label, 26) for label, _, _ in rows])
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("percentage points")
        axes.xaxis.set_major_locator(MaxNLocator(6))

    def points(value: float) -> str:
        return fmt.percent(value, 2, unit="", signed=True)

    spoken = [f"{label} {points(value)} points, {fmt.interval(ends, points)}" for label, value, ends in rows]
    return inline_svg(text.getvalue(), name, chart.title, spoken)


def scatter_chart(name: str, chart: ScatterChart) -> str | None:
    """Named points; those on the Pareto front are filled, and a stair goes along it."""
    points = [point for point in chart.points if math.isfinite(point[1]) and math.isfinite(point[2])]
    if not points:
        return None
    front = pareto_front([(x, y) for _, x, y, _ in points])
    steps = sorted((points[i][1], points[i][2]) for i in front)
    steps.append((max(x for _, x, _, _ in points), steps[-1][1]))
    style: dict[str, Any]
    with drawing() as (figure, text):
        axes, handles = figure.subplots(), []
        for i, (_, cost, gain, bounds) in enumerate(points):
            colour, marker = SERIES[i % len(SERIES)], MARKERS[(i + i // len(MARKERS)) % len(MARKERS)]
            if bounds is not None:
                style = {"linewidth": 1, "alpha": 0.7, "marker": "_", "markersize": 5}
                axes.plot([cost, cost], bounds, color=colour, **style)
            style = {"marker": marker, "markersize": 7, "linestyle": "none"}
            fill = colour if i in front else "none"
            handles += axes.plot([cost], [gain], color=colour, markerfacecolor=fill, **style)
        style = {"linestyle": ":", "drawstyle": "steps-post", "linewidth": 1.2, "zorder": 1}
        handles += axes.plot(*zip(*steps, strict=True), color=TEXT, **style)
        axes.margins(0.1, 0.12)
        _label_axes(axes, chart, [cost for _, cost, _, _ in points])
        _legend(figure, handles, [*(label for label, *_ in points), "Pareto front"])
    spoken = [
        f"{label} {written(gain, chart.percent)} at {written(cost, False)}"
        + (", on the front" if i in front else "")
        for i, (label, cost, gain, _) in enumerate(points)
    ]
    return inline_svg(text.getvalue(), name, chart.title, spoken)


def pareto_front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Indices of the points that no other one beats: none costs no more and gives no less."""
    front, best = set(), -math.inf
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if points[i][1] > best:
            front.add(i)
            best = points[i][1]
    return front


def heat_map(name: str, chart: HeatMap) -> str | None:
    """Colours with a bar that tells what they mean, and the numbers where there is room for them."""
    _check_sizes(chart)
    values = np.array([list(row) for row in chart.values], dtype=float)
    values[~np.isfinite(values)] = np.nan
    if np.isnan(values).all():
        return None
    rows, cols = values.shape
    low, high = chart.limits or (float(np.nanmin(values)), float(np.nanmax(values)))
    cell = 5.4 / cols if cols > MOST_WRITTEN else max(0.34, min(0.8, 3.6 / cols))  # inches
    width, height = cols * cell, max(1.0, rows * min(max(0.72 * cell, 0.3 if rows <= 30 else 0.0), 0.5))
    with drawing(width, height, layout="none") as (figure, text):
        axes = figure.add_axes((0, 0, 1, 1))  # labels and bar hang out of it
        scale = Normalize(low, high if high > low else low + 1e-9)
        shown = axes.imshow(values, cmap="viridis", norm=scale, interpolation="none", aspect="auto")
        if cols <= MOST_WRITTEN:
            _write_values(axes, values, scale, chart.percent, 72 * cell)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.xaxis.tick_top()
        row_names = [wrap(label, 22) for label in chart.row_labels or ()]
        axes.set_yticks(*_thinned(row_names), fontsize=SMALL)
        column_names = [shorten(clean(label), 24) for label in chart.column_labels or ()]
        turned = 0.085 * max(map(len, column_names), default=0) > cell  # they would run into each other
        axes.set_xticks(*_thinned(column_names), fontsize=SMALL, rotation=90 if turned else 0)
        bar = figure.colorbar(shown, cax=figure.add_axes((1 + 0.15 / width, 0, 0.12 / width, 1)))
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=SMALL)
        bar.locator = MaxNLocator(4) if high > low else FixedLocator([low])
        bar.formatter = FuncFormatter(lambda v, _: written(float(f"{v:.6g}"), chart.percent))
        bar.update_ticks()
    return inline_svg(text.getvalue(), name, chart.title, _spoken_map(chart, values))


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


def _thinned(names: Sequence[str]) -> tuple[range, Sequence[str]]:
    every = math.ceil(len(names) / MOST_LABELS) or 1
    return range(0, len(names), every), names[::every]


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


def _spoken_map(chart: HeatMap, values: np.ndarray) -> list[str]:
    """Every value where there are few, else the smallest and the largest."""
    rows, columns = (
        labels or [f"{what} {i + 1}" for i in range(size)]
        for what, labels, size in zip(
            ("row", "column"), (chart.row_labels, chart.column_labels), values.shape, strict=True
        )
    )
    places = {(i, j): f"{row}, {column}" for i, row in enumerate(rows) for j, column in enumerate(columns)}
    if values.size <= MOST_SPOKEN:
        return [f"{place}: {written(float(values[ij]), chart.percent)}" for ij, place in places.items()]
    spoken = [f"{values.shape[0]} rows, {values.shape[1]} columns"]
    for what, flat in (("smallest", np.nanargmin(values)), ("largest", np.nanargmax(values))):
        i, j = divmod(int(flat), values.shape[1])
        spoken.append(f"{what} {written(float(values[i, j]), chart.percent)} at {places[i, j]}")
    missing = int(np.isnan(values).sum())
    return [*spoken, *([f"{missing} without a value"] if missing else [])]


DRAWN: dict[type, Callable[[str, Any], str | None]] = {
    LineChart: line_chart,
    ForestChart: forest_chart,
    ScatterChart: scatter_chart,
    HeatMap: heat_map,
}
"""How each kind of chart is drawn."""


def _label_axes(axes: Axes, chart: LineChart | ScatterChart, x: Sequence[float]) -> None:
    axes.set(xlabel=wrap(chart.x_label, 44), ylabel=wrap(chart.y_label, 26))
    _set_ticks(axes.yaxis, percent=chart.percent)
    _set_ticks(axes.xaxis, percent=False)
    if chart.log_x and min(x) > 0:
        axes.set_xscale("log")
        _set_log_ticks(axes.xaxis, sorted(set(x)))
    elif all(float(value).is_integer() for value in x):
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))


def _set_ticks(axis: Axis, *, percent: bool) -> None:
    """Six ticks at most, written like all numbers of a chart."""
    axis.set_major_locator(MaxNLocator(6))
    axis.set_major_formatter(FuncFormatter(lambda v, _: written(float(f"{v:.9g}"), percent, digits=6)))


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


def _legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """Below the axes; one label alone needs none."""
    if len(labels) < 2:
        return
    texts = [shorten(clean(label), LEGEND) for label in labels]
    figure.legend(
        handles,
        [f" {text}" if text.startswith("_") else text for text in texts],  # matplotlib hides these
        loc="upper left",
        bbox_to_anchor=(0, 0),
        ncols=2 if max(map(len, texts)) <= LEGEND // 2 - 3 else 1,
        fontsize=SMALL,
        handlelength=3.6,
    )

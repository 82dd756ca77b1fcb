"""The charts of probes and studies as SVG text to put inside a page."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from vit_cls.lab.results import ForestChart, HeatMap, Line, LineChart, ScatterChart
from vit_cls.reports.chart_parts import SMALL, drawing, set_scale, spread, wrap, written
from vit_cls.reports.figures import MORE_COLOURS, SERIES, TEXT, inline_svg
from vit_cls.reports.forest import Row, forest_chart
from vit_cls.reports.heat_map import heat_map
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
MOST_LINES = len(COLOURS)
MOST_MARKERS = 12
"""On one line; on a longer one some points have none."""
DIRECT = 20
"""Characters up to which labels stand at the ends of their lines; longer ones are a legend below."""
LEGEND = 54
FAR = 14
"""Points above or below from which a label has a line to what it names."""
LABEL_GAP = 0.08
"""Least distance of labels at the ends of lines, as a share of the height of the axes."""

Chart = LineChart | ForestChart | ScatterChart | HeatMap


def draw(name: str, chart: Chart) -> str | None:
    """Draw a chart of a result.

    Args:
        name: Unique in the page, letters and digits alone: every id in the SVG begins with it.
        chart: Its labels may hold anything.

    Returns:
        An ``<svg>`` element as wide as its container, the same text for the same chart, which says its title
        and its key values aloud; None where there is no finite value to draw.

    Raises:
        ValueError: If a chart has more than eight lines, or the rows of a heat map differ in length.

    Example:
        >>> chart = LineChart("Accuracy", "layer", "top-1", [Line("cls", [(1, 0.5), (2, 0.75)])])
        >>> svg = draw("a", chart)
        >>> svg[svg.index("aria-label") : svg.index(">")]
        'aria-label="Accuracy: cls from 50 % at 1 to 75 % at 2"'
    """
    with warnings.catch_warnings():
        # The font that matplotlib measures with lacks some scripts; the page's own fonts have them.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        warnings.filterwarnings("ignore", "Matplotlib currently does not support", UserWarning)
        # Labels of the widest letters alone can leave the axes no room; the words around them still tell.
        warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)
        if isinstance(chart, LineChart):
            return _lines(name, chart)
        if isinstance(chart, ScatterChart):
            return _scatter(name, chart)
        if isinstance(chart, HeatMap):
            return heat_map(name, chart)
        rows = [
            Row("\n".join(wrap(label, 26)), value, bounds)
            for label, value, bounds in chart.rows
            if math.isfinite(value)
        ]
        return forest_chart(name, clean(chart.title), rows, chart.margin) if rows else None


def left_out(chart: Chart) -> list[str]:
    """Labels of the lines, rows and points of a chart that have no finite value, and so are not drawn.

    Args:
        chart: Of any kind; a heat map leaves nothing out, for its empty cells are seen.

    Example:
        >>> left_out(ScatterChart("t", "x", "y", [("a", 1, math.nan, None), ("b", 1, 0.5, None)]))
        ['a']
    """
    if isinstance(chart, LineChart):
        values = [(line.label, [y for _, y in line.points if math.isfinite(y)]) for line in chart.lines]
        return [clean(label) for label, finite in values if not finite]
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
    labels = [clean(line.label) for line in lines] + [clean(label) for label in chart.marks]
    direct = len(labels) > 1 and max(map(len, labels)) <= DIRECT and len(labels) <= 10
    rows = 0 if direct or len(labels) == 1 else math.ceil(len(labels) / _legend_columns(labels))
    with drawing(5.2, 3.1 + 0.21 * rows) as (canvas, axes, text):
        handles = [_draw_line(axes, place, line) for place, line in enumerate(lines)]
        for value in chart.marks.values():
            handles.append(axes.axhline(value, color=TEXT, linestyle=":", linewidth=1))
        axes.set(xlabel="\n".join(wrap(chart.x_label, 44)), ylabel="\n".join(wrap(chart.y_label, 26)))
        set_scale(axes, "x", [x for line in lines for x, _ in line.points], log=chart.log_x)
        set_scale(axes, "y", [], percent=chart.percent)
        if direct:
            ends = [[point for point in line.points if math.isfinite(point[1])][-1] for line in lines]
            _label_ends(axes, ends, list(chart.marks.values()), labels)
        elif rows:
            _legend_below(canvas, handles, labels)
    spoken = [_spoken_line(line, chart.percent) for line in lines]
    spoken += [f"{clean(label)} at {written(value, chart.percent)}" for label, value in chart.marks.items()]
    return inline_svg(text.getvalue(), name, f"{clean(chart.title)}: {'; '.join(spoken)}")


def _draw_line(axes: Axes, place: int, line: Line) -> Line2D:
    x, y = zip(*line.points, strict=True)
    every = math.ceil(len(x) / MOST_MARKERS)
    (handle,) = axes.plot(
        x,
        y,
        color=COLOURS[place],
        linestyle=DASHES[place],
        marker=MARKERS[place],
        markevery=(place % every, every),  # on long lines that coincide all markers are seen
        markersize=5,
        markeredgewidth=0,
        linewidth=1.6,
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


def _legend_columns(labels: Sequence[str]) -> int:
    return 2 if max(map(len, labels)) <= LEGEND // 2 - 3 else 1


def _legend_below(canvas: Canvas, handles: Sequence[Line2D], labels: Sequence[str]) -> None:
    texts = [shorten(label, LEGEND) for label in labels]
    canvas.legend(
        handles,
        [f" {text}" if text.startswith("_") else text for text in texts],  # matplotlib hides these
        loc="outside lower left",
        ncols=_legend_columns(labels),
        fontsize=SMALL,
        handlelength=3.6,
    )


def _label_ends(
    axes: Axes, ends: Sequence[tuple[float, float]], marks: Sequence[float], labels: Sequence[str]
) -> None:
    """Write each label right of the axes, as near to the end of its line as its neighbours let it."""
    bottom, top = axes.get_ylim()
    axes.set(xlim=axes.get_xlim(), ylim=(bottom, top))  # what is written must not move them
    heights = [*(y for _, y in ends), *marks]
    places = spread([(y - bottom) / (top - bottom) for y in heights], LABEL_GAP)
    starts = [(end, axes.transData) for end in ends]
    starts += [((1.0, value), axes.get_yaxis_transform()) for value in marks]
    colours = [*COLOURS[: len(ends)], *[TEXT] * len(marks)]
    for (start, system), label, place, colour in zip(starts, labels, places, colours, strict=True):
        axes.annotate(
            label,
            xy=start,
            xycoords=system,
            xytext=(1.05, place),
            textcoords="axes fraction",
            color=colour,
            fontsize=SMALL,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.8,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 4,
            },
        )


def _scatter(name: str, chart: ScatterChart) -> str | None:
    points = [point for point in chart.points if math.isfinite(point[1]) and math.isfinite(point[2])]
    if not points:
        return None
    front = pareto_front([(x, y) for _, x, y, _ in points])
    with drawing(5.2, 3.7) as (canvas, axes, text):
        steps = sorted((points[i][1], points[i][2]) for i in front)
        steps.append((max(x for _, x, _, _ in points), steps[-1][1]))
        axes.plot(*zip(*steps, strict=True), color=SERIES[1], linestyle=DASHES[1], drawstyle="steps-post",
                  linewidth=1.2, zorder=1)  # fmt: skip
        for i, (_, x, y, bounds) in enumerate(points):
            if bounds is not None:
                axes.plot([x, x], bounds, color=SERIES[0], linewidth=1, alpha=0.7, marker="_", markersize=5)
            fill = SERIES[0] if i in front else "none"
            axes.plot([x], [y], color=SERIES[0], marker="o", markersize=6, markerfacecolor=fill)
        axes.set(xlabel="\n".join(wrap(chart.x_label, 44)), ylabel="\n".join(wrap(chart.y_label, 26)))
        axes.margins(0.24, 0.12)  # room for labels
        set_scale(axes, "x", [x for _, x, _, _ in points], log=chart.log_x)
        set_scale(axes, "y", [], percent=chart.percent)
        _label_points(canvas, axes, points)
    spoken = [
        f"{clean(label)} {written(y, chart.percent)} at {written(x, False)}"
        + (", on the front" if i in front else "")
        for i, (label, x, y, _) in enumerate(points)
    ]
    return inline_svg(text.getvalue(), name, f"{clean(chart.title)}: {'; '.join(spoken)}")


def pareto_front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Which points no other one beats: none costs as little or less and gives as much or more.

    Args:
        points: Cost and gain.

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


def _label_points(
    canvas: Canvas, axes: Axes, points: Sequence[tuple[str, float, float, tuple[float, float] | None]]
) -> None:
    """Write each label where it meets the fewest points, bars and labels, and stays inside the axes."""
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    canvas.draw_without_rendering()  # lays out the axes
    centres = [axes.transData.transform((x, y)) for _, x, y, _ in points]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in centres]
    for (_, x, _, bounds), (cx, _) in zip(points, centres, strict=True):
        if bounds is not None:
            low, high = (axes.transData.transform((x, bound))[1] for bound in bounds)
            taken.append(Bbox.from_extents(cx - 2, low, cx + 2, high))
    frame = axes.get_window_extent()
    for (label, *_), (cx, cy) in zip(points, centres, strict=True):
        text = shorten(clean(label), 24)
        best, dy = _best_place((cx, cy), (0.6 * SMALL * len(text), 1.15 * SMALL), taken, frame)
        taken.append(best)
        left = best.x1 < cx
        leader = {"arrowstyle": "-", "color": TEXT, "linewidth": 0.6, "relpos": (0.5, 0.5), "shrinkB": 3}
        axes.annotate(
            text,
            xy=(cx, cy),
            xycoords="figure points",
            xytext=(best.x1 if left else best.x0, (best.y0 + best.y1) / 2),
            textcoords="figure points",
            ha="right" if left else "left",
            fontsize=SMALL,
            va="center",
            annotation_clip=False,
            arrowprops=leader if abs(dy) > FAR else None,
        ).set_in_layout(False)


def _best_place(
    centre: tuple[float, float], size: tuple[float, float], taken: Sequence[Bbox], frame: Bbox
) -> tuple[Bbox, float]:
    """The box for a label near a point, and how far above the point it is."""
    (cx, cy), (width, height) = centre, size
    places = [
        (Bbox.from_bounds(cx + dx - width * back, cy + dy - height / 2, width, height), dy)
        for dx, back in ((7, 0), (-7, 1), (0, 0.5))
        for dy in (0, 8, -8, 14, -14, 24, -24, 36, -36)
        if dx or abs(dy) > 8
    ]

    def cost(place: tuple[Bbox, float]) -> float:
        box, dy = place
        outside = width * height - _shared(box, frame)
        return sum(_shared(box, other) for other in taken) + 3 * outside + abs(dy)

    return min(places, key=cost)  # the first of equals


def _shared(one: Bbox, other: Bbox) -> float:
    both = Bbox.intersection(one, other)
    return both.width * both.height if both is not None else 0.0

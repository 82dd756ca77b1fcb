"""Charts as SVG text to put inside a page; colours and fonts are the page's."""

from __future__ import annotations

import contextlib
import html
import io
import math
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.style
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from vit_cls import formatting as fmt
from vit_cls.files import write_text
from vit_cls.lab.results import ForestChart
from vit_cls.reports.lab_words import clean
from vit_cls.stats.intervals import wilson_interval

if TYPE_CHECKING:
    from vit_cls.stats.metrics import Bin

# Drawn in colours that nothing else uses, then replaced: only the page knows whether it is light or dark.
PAGE_COLOURS = {
    "#010203": "currentColor",
    "#010204": "var(--line, #8b949e)",
    "#010205": "var(--series-1, #0b5cad)",
    "#010206": "var(--series-2, #b3400b)",
}
# Only charts of the lab have more than two lines.
MORE_COLOURS = {
    "#010207": "var(--series-3, #1a7f37)",
    "#010208": "var(--series-4, #7a3fd1)",
    "#010209": "var(--series-5, #a3246b)",
    "#01020a": "var(--series-6, #0a7580)",
    "#01020b": "var(--series-7, #765800)",
    "#01020c": "var(--series-8, #57606a)",
}
TEXT, LINE, *SERIES = PAGE_COLOURS
DASHES = ("-", (0, (4, 2)))  # series differ without colour too: in print, and for the colour-blind
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vit_cls",
    "text.parse_math": False,  # a name with two dollar signs stays a name
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
MOST_POINTS = 200
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

    Returns:
        An ``<svg>`` element as wide as its container, the same text for the same arguments. Labels are
        escaped; colours are CSS variables with a fallback, text is the colour and font around it.

    Example:
        >>> svg = line_chart("loss", "Loss", [Series("training", [(0, 2.0), (1, 1.5)])])
        >>> svg[: svg.index(">")]  # doctest: +ELLIPSIS
        '<svg class="chart" viewBox="..." role="img" aria-label="Loss: training from 2 to 1.5"'
    """
    with drawing() as (figure, text):
        axes = figure.subplots()
        for line, colour, dashes in zip(series, SERIES, DASHES, strict=False):
            x, y = zip(*line.points, strict=True)
            marker = "o" if len(x) == 1 else None
            axes.plot(x, y, color=colour, linestyle=dashes, marker=marker, label=line.label)
        if mark is not None:
            axes.axvline(mark, color=TEXT, linestyle=":", linewidth=1)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        set_ticks(axes.yaxis, percent=percent)
        if len(series) > 1:
            axes.legend()
    spoken = "; ".join(
        f"{line.label} from {written(line.points[0][1], percent)} to {written(line.points[-1][1], percent)}"
        for line in series
    )
    return inline_svg(text.getvalue(), name, f"{title}: {spoken}")


def reliability_diagram(name: str, bins: Sequence[Bin]) -> str:
    """Draw how often predictions of like confidence are right.

    Args:
        bins: Bins of confidence; at least one has images.

    Returns:
        An ``<svg>`` element like that of `line_chart`: a point with Wilson's 95 % interval for each bin with
        images, bars for the share of the images in it, and the line where a calibrated model's points lie.

    Example:
        >>> from vit_cls.stats.metrics import Bin
        >>> svg = reliability_diagram("r", [Bin(0.5, 1.0, 10, 0.8, 6)])
        >>> svg[svg.index("aria-label") : svg.index(">")]
        'aria-label="Reliability: at 80 % confidence 60 % of 10 are right"'
    """
    full = [b for b in bins if b.images]
    images = sum(b.images for b in full)
    shares = [b.correct / b.images for b in full]
    bounds = [wilson_interval(b.correct, b.images) for b in full]
    reach = [
        [max(0.0, s - low) for s, (low, _) in zip(shares, bounds, strict=True)],
        [max(0.0, high - s) for s, (_, high) in zip(shares, bounds, strict=True)],
    ]
    with drawing() as (figure, text):
        axes = figure.subplots()
        left, heights = [b.lower for b in full], [b.images / images for b in full]
        widths = [b.upper - b.lower for b in full]
        label = "share of images"
        axes.bar(left, heights, widths, align="edge", color=LINE, alpha=0.6, linewidth=0, label=label)
        axes.plot([0, 1], [0, 1], color=TEXT, linestyle=":", linewidth=1, label="as it should be")
        x = [b.confidence for b in full]
        style: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.2}
        axes.errorbar(x, shares, reach, color=SERIES[0], label="right", **style)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
        set_ticks(axes.xaxis, percent=True)
        set_ticks(axes.yaxis, percent=True)
        axes.legend(fontsize=9)
    spoken = "; ".join(
        f"at {written(b.confidence, True, 3)} confidence {written(share, True, 3)} of {b.images} are right"
        for b, share in zip(full, shares, strict=True)
    )
    return inline_svg(text.getvalue(), name, f"Reliability: {spoken}")


def coverage_chart(name: str, curve: Sequence[float]) -> str:
    """Draw the accuracy of the most confident images over the share of images that is answered.

    Returns:
        An ``<svg>`` element like that of `line_chart`.

    Example:
        >>> svg = coverage_chart("c", [1.0, 1.0, 0.75, 0.75])
        >>> svg[svg.index("aria-label") : svg.index(">")]
        'aria-label="Accuracy at coverage: 100 % of the most confident half, 75 % of all"'
    """
    n = len(curve)
    kept = sorted({math.ceil(n * i / MOST_POINTS) for i in range(1, MOST_POINTS + 1)})
    with drawing() as (figure, text):
        axes = figure.subplots()
        marker = "o" if n == 1 else None
        axes.plot([k / n for k in kept], [curve[k - 1] for k in kept], color=SERIES[0], marker=marker)
        axes.set(xlim=(0, 1), xlabel="share of images answered", ylabel="accuracy")
        set_ticks(axes.xaxis, percent=True)
        set_ticks(axes.yaxis, percent=True)
    half, whole = (written(curve[k - 1], True) for k in (math.ceil(n / 2), n))
    label = f"Accuracy at coverage: {half} of the most confident half, {whole} of all"
    return inline_svg(text.getvalue(), name, label)


def forest_chart(name: str, chart: ForestChart) -> str:
    """Draw differences below each other, with their intervals and the margin within which none matters.

    Args:
        chart: At least one row with a finite difference.

    Returns:
        An ``<svg>`` element like that of `line_chart`.

    Example:
        >>> svg = forest_chart("f", ForestChart("Difference", [("B minus A", 0.04, (0.01, 0.07))], 0.01))
        >>> svg[svg.index("aria-label") : svg.index(">")]
        'aria-label="Difference: B minus A +4.00 points, 95 % interval +1.00 to +7.00"'
    """
    rows = [row for row in chart.rows if math.isfinite(row[1])]
    with drawing(5.6, 1.0 + 0.38 * len(rows)) as (figure, text):
        axes = figure.subplots()
        axes.axvspan(-100 * chart.margin, 100 * chart.margin, color=LINE, alpha=0.45, linewidth=0)
        axes.axvline(0, color=TEXT, linestyle=":", linewidth=1)
        for place, (_, value, bounds) in enumerate(rows):
            axes.plot([100 * bound for bound in bounds], [place] * 2, color=SERIES[0], marker="|")
            axes.plot([100 * value], [place], color=SERIES[0], marker="o")
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [wrap(label, 26) for label, _, _ in rows])
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("percentage points")
        axes.xaxis.set_major_locator(MaxNLocator(6))

    def points(value: float) -> str:
        return fmt.percent(value, 2, unit="", signed=True)

    spoken = "; ".join(
        f"{clean(label)} {points(value)} points, {fmt.interval(bounds, points)}"
        for label, value, bounds in rows
    )
    return inline_svg(text.getvalue(), name, f"{clean(chart.title)}: {spoken}")


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Matplotlib as all charts have it, whatever the user's own settings are."""
    with warnings.catch_warnings(), matplotlib.style.context(["default", STYLE]):
        # The font that matplotlib measures with lacks some scripts; the page's own fonts have them.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        warnings.filterwarnings("ignore", "Matplotlib currently does not support", UserWarning)
        # Labels of the widest letters alone can leave the axes no room; the words around them still tell.
        warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)
        yield


@contextlib.contextmanager
def drawing(width: float = 4.8, height: float = 3.0) -> Iterator[tuple[Figure, io.StringIO]]:
    """A figure to draw on, its sides in inches, and the text that holds the SVG afterwards."""
    text = io.StringIO()
    with styled():
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, text
        figure.savefig(text, format="svg", transparent=True, metadata=NO_METADATA)


def set_ticks(axis: Axis, *, percent: bool) -> None:
    """Six ticks at most, written like all numbers of a chart."""
    axis.set_major_locator(MaxNLocator(6))
    axis.set_major_formatter(FuncFormatter(lambda v, _: written(float(f"{v:.9g}"), percent, digits=6)))


def written(value: float, percent: bool, digits: int = 4) -> str:
    """A number as charts write and say it; what is not finite has no value.

    Example:
        >>> written(0.5, True), written(1250000, False), written(float("nan"), True)
        ('50 %', '1.25M', 'no value')
    """
    if not math.isfinite(value):
        return "no value"
    return f"{fmt.compact(100 * value, digits)} %" if percent else fmt.compact(value, digits)


def wrap(label: str, width: int) -> str:
    """A label on two lines of so many characters at most.

    Example:
        >>> wrap("the mean of all patch tokens of the last block", 20)
        'the mean of all\\npatch tokens of the…'
    """
    return textwrap.fill(clean(label), width, max_lines=2, placeholder="…")


def inline_svg(svg: str, name: str, label: str) -> str:
    """What matplotlib writes for a file of its own, made fit for a page that holds several."""
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    body = svg[svg.index("</defs>") + len("</defs>") :]  # the first defs is a style sheet for all elements
    body = re.sub(r'( id="|url\(#|xlink:href="#)', rf"\g<1>{name}-", body)
    body = re.sub(r" font-family: [^;]*;", "", body)
    for drawn, shown in (PAGE_COLOURS | MORE_COLOURS).items():
        body = body.replace(drawn, shown)
    label = html.escape(label)
    return f'<svg class="chart" {view_box[0]} role="img" aria-label="{label}">{body.strip()}'


def write_figures(folder: Path, charts: Iterable[tuple[str, str]]) -> list[Path]:
    """Write charts as SVG files of their own, in dark colours on white.

    Args:
        folder: Is made if it does not exist; files of the same name are replaced.
        charts: Title, of which the file's name is made, and the ``<svg>`` element of a page.

    Returns:
        The files.

    Raises:
        OSError: If the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for title, svg in charts:
        for shown in (PAGE_COLOURS | MORE_COLOURS).values():
            alone = re.search(r"#[0-9a-f]{6}", shown)
            svg = svg.replace(shown, alone[0] if alone else "#1f2328")
        head = 'svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        style = "background: #fff; font-family: sans-serif"
        name = re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")
        files.append(folder / f"{name}.svg")
        write_text(files[-1], f'<?xml version="1.0"?>\n{svg.replace("svg", f"{head} style={style!r}", 1)}\n')
    return files

"""Charts as SVG text to put inside a page; colours and fonts are the page's."""

from __future__ import annotations

import contextlib
import html
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from vit_cls.files import write_text
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
        mark: An epoch to mark by a dotted upright line.

    Returns:
        An ``<svg>`` element as wide as its container, the same text for the same arguments. Labels are
        escaped; colours are CSS variables with a fallback, text is the colour and font around it.

    Example:
        >>> svg = line_chart("loss", "Loss", [Series("training", [(0, 2.0), (1, 1.5)])])
        >>> svg[: svg.index(">")]  # doctest: +ELLIPSIS
        '<svg class="chart" viewBox="..." role="img" aria-label="Loss: training from 2 to 1.5"'
    """
    with _drawing() as (axes, text):
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
    spoken = "; ".join(
        f"{line.label} from {_number(line.points[0][1], percent)} to {_number(line.points[-1][1], percent)}"
        for line in series
    )
    return inline_svg(text.getvalue(), name, f"{title}: {spoken}")


def reliability_diagram(name: str, bins: Sequence[Bin]) -> str:
    """Draw how often predictions of like confidence are right.

    Args:
        name: Unique in the page, letters and digits alone.
        bins: Bins of confidence; at least one has images.

    Returns:
        An ``<svg>`` element like that of `line_chart`: a point with Wilson's 95 % interval for each bin with
        images, bars for the share of the images in it, and the line where a believable model's points lie.

    Example:
        >>> from vit_cls.stats.metrics import Bin
        >>> svg = reliability_diagram("r", [Bin(0.5, 1.0, 10, 0.8, 6)])
        >>> svg[svg.index("aria-label") : svg.index(">")]
        'aria-label="Reliability: at 80 % confidence 60 % of 10 are right"'
    """
    full = [b for b in bins if b.images]
    images = sum(b.images for b in full)
    with _drawing() as (axes, text):
        axes.bar(
            [b.lower for b in full],
            [b.images / images for b in full],
            [b.upper - b.lower for b in full],
            align="edge",
            color=LINE,
            alpha=0.6,
            linewidth=0,
            label="share of images",
        )
        axes.plot([0, 1], [0, 1], color=TEXT, linestyle=":", linewidth=1, label="as it should be")
        shares = [b.correct / b.images for b in full]
        bounds = [wilson_interval(b.correct, b.images) for b in full]
        reach = [
            [max(0.0, s - low) for s, (low, _) in zip(shares, bounds, strict=True)],
            [max(0.0, high - s) for s, (_, high) in zip(shares, bounds, strict=True)],
        ]
        x = [b.confidence for b in full]
        axes.errorbar(
            x, shares, reach, color=SERIES[0], marker="o", markersize=4, linewidth=1.2, label="right"
        )
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
        _percent_axes(axes)
        axes.legend(fontsize=9)
    spoken = "; ".join(
        f"at {_number(b.confidence, True, 3)} confidence {_number(b.correct / b.images, True, 3)} "
        f"of {b.images} are right"
        for b in full
    )
    return inline_svg(text.getvalue(), name, f"Reliability: {spoken}")


def coverage_chart(name: str, curve: Sequence[float]) -> str:
    """Draw the accuracy of the most confident images over the share of images that is answered.

    Args:
        name: Unique in the page, letters and digits alone.
        curve: Accuracy of the k most confident images, k = 1 ... n.

    Returns:
        An ``<svg>`` element like that of `line_chart`.

    Example:
        >>> svg = coverage_chart("c", [1.0, 1.0, 0.75, 0.75])
        >>> svg[svg.index("aria-label") : svg.index(">")]
        'aria-label="Accuracy at coverage: 100 % of the surest half, 75 % of all"'
    """
    n = len(curve)
    kept = sorted({math.ceil(n * i / MOST_POINTS) for i in range(1, MOST_POINTS + 1)})
    with _drawing() as (axes, text):
        marker = "o" if n == 1 else None
        axes.plot([k / n for k in kept], [curve[k - 1] for k in kept], color=SERIES[0], marker=marker)
        axes.set(xlim=(0, 1), xlabel="share of images answered", ylabel="accuracy")
        _percent_axes(axes)
    half, whole = (_number(curve[k - 1], True) for k in (math.ceil(n / 2), n))
    return inline_svg(
        text.getvalue(), name, f"Accuracy at coverage: {half} of the surest half, {whole} of all"
    )


@contextlib.contextmanager
def _drawing() -> Iterator[tuple[Axes, io.StringIO]]:
    """Axes to draw on, and the text that holds the SVG afterwards."""
    text = io.StringIO()
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(4.8, 3.0), layout="constrained")
        yield figure.subplots(), text
        figure.savefig(text, format="svg", transparent=True, metadata=NO_METADATA)


def _percent_axes(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6))
        axis.set_major_formatter(FuncFormatter(lambda v, _: _number(v, True, digits=6)))


def inline_svg(svg: str, name: str, label: str) -> str:
    """What matplotlib writes for a file of its own, made fit for a page that holds several.

    Args:
        svg: From matplotlib, drawn in `PAGE_COLOURS` and `MORE_COLOURS`.
        name: Unique in the page.
        label: The chart in words.
    """
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


def _number(value: float, percent: bool, digits: int = 4) -> str:
    if not math.isfinite(value):
        return "no value"
    return f"{100 * value:.{digits}g} %" if percent else f"{value:.{digits}g}"

"""What the charts of probes and studies are made of: axes, scales, labels that keep their distance."""

from __future__ import annotations

import contextlib
import io
import math
import textwrap
from collections.abc import Iterator, Sequence

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from vit_cls.reports.figures import NO_METADATA, STYLE
from vit_cls.reports.lab_words import clean, shorten

SMALL = 10
"""Size of labels inside a chart, in points."""


@contextlib.contextmanager
def drawing(width: float, height: float) -> Iterator[tuple[Canvas, Axes, io.StringIO]]:
    """A figure, axes to draw on, and the text that holds the SVG afterwards.

    Args:
        width: In inches.
        height: In inches.
    """
    text = io.StringIO()
    with matplotlib.style.context(["default", STYLE]):
        canvas = Canvas(figsize=(width, height), dpi=72, layout="constrained")  # an SVG's pixels are points
        yield canvas, canvas.subplots(), text
        canvas.savefig(text, format="svg", transparent=True, metadata=NO_METADATA)


def written(value: float, percent: bool) -> str:
    """A number as charts say it.

    Args:
        value: What is not finite has no value.
        percent: Whether it is a share.

    Example:
        >>> written(0.5, True), written(1250000, False), written(float("nan"), True)
        ('50 %', '1.25M', 'no value')
    """
    if not math.isfinite(value):
        return "no value"
    if percent:
        return f"{100 * value:.4g} %"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (size > 1e3 and abs(value) >= size):
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def wrap(label: str, width: int) -> list[str]:
    """A label on two lines at most.

    Args:
        label: Any text.
        width: Characters of a line.

    Example:
        >>> wrap("the mean of all patch tokens of the last block", 20)
        ['the mean of all', 'patch tokens of the…']
    """
    lines = textwrap.wrap(clean(label), width) or [""]
    return lines if len(lines) <= 2 else [lines[0], shorten(f"{lines[1]}…", width).rstrip("…") + "…"]


def set_scale(
    axes: Axes, which: str, values: Sequence[float], *, percent: bool = False, log: bool = False
) -> None:
    """Choose ticks and how they are written.

    Args:
        axes: Of a chart that has been drawn.
        which: ``x`` or ``y``.
        values: Where the points are; a few of them become the ticks of a logarithmic axis.
        percent: Whether values are shares.
        log: Whether the axis is logarithmic, which it can be where all values are positive.
    """
    axis: Axis = axes.xaxis if which == "x" else axes.yaxis
    log = log and bool(values) and min(values) > 0
    few = sorted(set(values))
    if log:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        axis.set_minor_locator(NullLocator())
        if len(few) <= 8 and all(_apart(few, i) > 0.08 for i in range(1, len(few))):
            axis.set_major_locator(FixedLocator(few))
        elif max(few) < 20 * min(few):  # hardly a power of ten is on the axis
            axis.set_major_locator(MaxNLocator(5))
        else:
            axis.set_major_locator(LogLocator(10, numticks=7))
    elif values and all(float(x).is_integer() for x in values):
        axis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    else:
        axis.set_major_locator(MaxNLocator(6))
    axis.set_major_formatter(FuncFormatter(lambda v, _: written(float(f"{v:.9g}"), percent)))


def _apart(few: Sequence[float], i: int) -> float:
    """Distance of a value to the one before, as a share of a logarithmic axis."""
    return math.log(few[i] / few[i - 1]) / math.log(few[-1] / few[0])


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move places apart until neighbours keep a distance, in the order they have, inside [0, 1].

    Args:
        places: Where they would be best, in [0, 1].
        gap: The least distance; smaller where so many would not fit.

    Returns:
        As near to their best as that lets them be in the mean square (isotonic regression).

    Example:
        >>> spread([0.5, 0.5, 0.9], 0.25)
        [0.375, 0.625, 0.9]
    """
    n = len(places)
    gap = min(gap, 1 / max(n - 1, 1))
    order = sorted(range(n), key=lambda i: (places[i], i))
    # Without the gaps the places only need to be in order: neighbours that are not share their mean.
    blocks: list[tuple[float, int]] = []
    for rank, i in enumerate(order):
        blocks.append((places[i] - rank * gap, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, size_a), (b, size_b) = blocks[-2:]
            blocks[-2:] = [((a * size_a + b * size_b) / (size_a + size_b), size_a + size_b)]
    flat = [mean for mean, size in blocks for _ in range(size)]
    room = 1 - (n - 1) * gap
    moved = [0.0] * n
    for rank, i in enumerate(order):
        moved[i] = round(min(max(flat[rank], 0.0), room) + rank * gap, 9)
    return moved

"""A grid of values as SVG text to put inside a page; its cells look the same on light and on dark."""

from __future__ import annotations

import math
from collections.abc import Callable

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.image import AxesImage
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from vit_cls.lab.results import HeatMap
from vit_cls.reports.chart_parts import SMALL, drawing, wrap, written
from vit_cls.reports.figures import inline_svg
from vit_cls.reports.lab_words import clean, shorten

# Perceptually uniform and as good for the colour-blind. Below 50 colours matplotlib draws the bar of colours
# as rectangles, not as pixels.
COLOURS = mpl.colormaps["viridis"].resampled(48)
MOST_WRITTEN = 20
"""Columns up to which the values are written into the cells."""
MOST_CELLS = 2500
"""Up to here cells are rectangles; beyond they are pixels of one image, or the page would be megabytes."""
MOST_LABELS = 40
MOST_SPOKEN = 12
DARK, BRIGHT = "#111111", "#ffffff"


def heat_map(name: str, chart: HeatMap) -> str | None:
    """Draw a grid of values in colours, with a bar that tells what they mean.

    Args:
        name: Unique in the page, letters and digits alone.
        chart: Rows of equal length.

    Returns:
        An ``<svg>`` element that says the smallest and largest value aloud, and every one where there are at
        most 12; None where no value is finite.

    Raises:
        ValueError: If the rows differ in length, or labels are not one a row or one a column.

    Example:
        >>> svg = heat_map("h", HeatMap("Entropy", [[0.5, 0.75]], ["layer 1"], ["head 1", "head 2"]))
        >>> svg[svg.index("aria-label") : svg.index(">")]
        'aria-label="Entropy: layer 1, head 1: 50 %; layer 1, head 2: 75 %"'
    """
    _check(chart)
    values = np.array([list(row) for row in chart.values], dtype=float)
    values[~np.isfinite(values)] = np.nan
    if np.isnan(values).all():
        return None
    rows, cols = values.shape
    low, high = chart.limits or (float(np.nanmin(values)), float(np.nanmax(values)))
    masked = np.ma.masked_invalid(values)
    scale = Normalize(low, high if high > low else low + 1e-9)
    longest = max((len(label) for label in chart.column_labels or ()), default=0)
    row_width = max((len(line) for label in chart.row_labels or () for line in wrap(label, 22)), default=0)
    cell = 5.4 / cols if cols > MOST_WRITTEN else max(0.34, min(0.8, 3.6 / cols))
    width = 1.3 + cols * cell + 0.095 * row_width
    turned = 0.085 * longest > cell  # they would run into each other
    top = 0.075 * min(longest, 24) if turned else 0.2
    cell_height = min(max(cell * 0.72, 0.3 if rows <= 30 else 0.0), 0.5)
    with drawing(width, max(1.6, 0.35 + top + rows * cell_height)) as (canvas, axes, text):
        if values.size <= MOST_CELLS:
            shown: QuadMesh | AxesImage = axes.pcolormesh(
                masked, cmap=COLOURS, norm=scale, edgecolors="face", linewidth=0.4
            )
            axes.invert_yaxis()
        else:
            extent = (0, cols, rows, 0)
            shown = axes.imshow(
                masked, cmap=COLOURS, norm=scale, interpolation="none", aspect="auto", extent=extent
            )
        if cols <= MOST_WRITTEN and values.size <= MOST_CELLS:
            _write_values(axes, values, scale, chart.percent, 72 * cell)
        _label(axes, chart, rows, cols, turned)
        bar = canvas.colorbar(shown, ax=axes, pad=0.02, aspect=16, fraction=0.08)
        bar.outline.set_visible(False)
        assert bar.solids is not None
        bar.solids.set_edgecolor("face")  # or thin lines of the ground shine through
        bar.ax.tick_params(labelsize=SMALL)
        bar.locator = MaxNLocator(4) if high > low else FixedLocator([low])
        bar.formatter = FuncFormatter(lambda v, _: written(float(f"{v:.6g}"), chart.percent))
        bar.update_ticks()
    return inline_svg(text.getvalue(), name, f"{clean(chart.title)}: {_spoken(chart, values)}")


def _check(chart: HeatMap) -> None:
    lengths = {len(row) for row in chart.values}
    if len(lengths) > 1:
        raise ValueError(
            f"the rows of the heat map {chart.title!r} must have one length; got {sorted(lengths)}. "
            "Fill cells without a value with NaN."
        )
    wanted = (len(chart.values), *lengths)
    for what, labels, size in zip(
        ("row_labels", "column_labels"), (chart.row_labels, chart.column_labels), wanted, strict=False
    ):
        if labels is not None and len(labels) != size:
            raise ValueError(f"{what} of the heat map {chart.title!r} must be {size}; got {len(labels)}.")


def _write_values(axes: Axes, values: np.ndarray, scale: Normalize, percent: bool, width: float) -> None:
    """Write each value into its cell, dark or bright, whichever stands out."""
    form = _form(values, percent)
    texts = {(i, j): form(float(v)) for (i, j), v in np.ndenumerate(values) if math.isfinite(v)}
    size = min(SMALL, width / (0.62 * max(map(len, texts.values()))))
    for (i, j), text in texts.items():
        colour = _ink(COLOURS(scale(float(values[i, j]))))
        axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=colour, fontsize=round(size, 1))


def _form(values: np.ndarray, percent: bool) -> Callable[[float], str]:
    """One number of decimals for the whole map; zero has no sign."""
    largest = float(np.nanmax(np.abs(values)))
    decimals = 1 if percent else max(0, 2 - int(math.log10(max(largest, 1))))
    return lambda v: f"{round(100 * v if percent else v, decimals) + 0.0:.{decimals}f}"


def _ink(rgba: tuple[float, float, float, float]) -> str:
    """Dark or bright, whichever has more contrast by WCAG 2.2's relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgba[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return BRIGHT if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.0557 else DARK


def _label(axes: Axes, chart: HeatMap, rows: int, cols: int, turned: bool) -> None:
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    every_row, every_col = math.ceil(rows / MOST_LABELS), math.ceil(cols / MOST_LABELS)
    labels = chart.row_labels or ()
    axes.set_yticks(
        [i + 0.5 for i in range(0, len(labels), every_row)],
        ["\n".join(wrap(label, 22)) for label in labels[::every_row]],
        fontsize=SMALL,
    )
    labels = chart.column_labels or ()
    axes.xaxis.tick_top()
    axes.set_xticks(
        [j + 0.5 for j in range(0, len(labels), every_col)],
        [shorten(clean(label), 24) for label in labels[::every_col]],
        fontsize=SMALL,
        rotation=90 if turned else 0,
    )


def _spoken(chart: HeatMap, values: np.ndarray) -> str:
    def place(i: int, j: int) -> str:
        row = clean(chart.row_labels[i]) if chart.row_labels else f"row {i + 1}"
        column = clean(chart.column_labels[j]) if chart.column_labels else f"column {j + 1}"
        return f"{row}, {column}"

    if values.size <= MOST_SPOKEN:
        found = [(ij, written(float(v), chart.percent)) for ij, v in np.ndenumerate(values)]
        return "; ".join(f"{place(*ij)}: {text}" for ij, text in found)
    ends = []
    for what, flat in (("smallest", int(np.nanargmin(values))), ("largest", int(np.nanargmax(values)))):
        i, j = divmod(flat, values.shape[1])
        ends.append(f"{what} {written(float(values[i, j]), chart.percent)} at {place(i, j)}")
    missing = int(np.isnan(values).sum())
    rest = f"; {missing} without a value" if missing else ""
    return f"{values.shape[0]} rows, {values.shape[1]} columns; {'; '.join(ends)}{rest}"

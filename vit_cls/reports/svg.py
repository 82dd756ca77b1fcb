"""A drawing of matplotlib's as SVG text to put inside a page; colours and fonts are the page's."""

from __future__ import annotations

import contextlib
import html
import io
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

from vit_cls import formatting as fmt
from vit_cls.reports.text import clean

# Drawn in colours that nothing else uses, then replaced: only the page knows whether it is light or dark.
COLOURS = {
    "#010203": "currentColor",
    "#010204": "var(--line, #8b949e)",
    "#010205": "var(--series-1, #0b5cad)",
    "#010206": "var(--series-2, #b3400b)",
    "#010207": "var(--series-3, #1a7f37)",
    "#010208": "var(--series-4, #7a3fd1)",
    "#010209": "var(--series-5, #a3246b)",
    "#01020a": "var(--series-6, #0a7580)",
    "#01020b": "var(--series-7, #765800)",
    "#01020c": "var(--series-8, #57606a)",
}
TEXT, LINE, *SERIES = COLOURS
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
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.borderpad": 0,
    "savefig.bbox": "tight",  # what hangs out of the figure makes it larger
    "savefig.pad_inches": 0.05,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), TEXT),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), LINE),
}
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


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
def drawing(
    width: float = 4.8, height: float = 3.0, layout: Any = "constrained"
) -> Iterator[tuple[Figure, io.StringIO]]:
    """A figure to draw on, its sides in inches, and the text that holds the SVG afterwards."""
    text = io.StringIO()
    with styled():
        figure = Figure(figsize=(width, height), layout=layout)
        yield figure, text
        figure.savefig(text, format="svg", transparent=True, metadata=NO_METADATA)


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


def inline_svg(svg: str, name: str, title: str, spoken: Sequence[str]) -> str:
    """What matplotlib writes for a file of its own, made fit for a page that holds several.

    Args:
        spoken: What is said aloud after the title.
    """
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    body = svg[svg.index("</defs>") + len("</defs>") :]  # the first defs is a style sheet for all elements
    body = re.sub(r'( id="|url\(#|xlink:href="#)', rf"\g<1>{name}-", body)
    body = re.sub(r" font-family: [^;]*;", "", body)
    for drawn, shown in COLOURS.items():
        body = body.replace(drawn, shown)
    label = html.escape(clean(f"{title}: {'; '.join(spoken)}"))
    return f'<svg class="chart" {view_box[0]} role="img" aria-label="{label}">{body.strip()}'


def svg_file(svg: str) -> str:
    """A chart of a page as a file of its own, in dark colours on white."""
    for shown in COLOURS.values():
        alone = re.search(r"#[0-9a-f]{6}", shown)
        svg = svg.replace(shown, alone[0] if alone else "#1f2328")
    head = 'svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    style = "background: #fff; font-family: sans-serif"
    return f'<?xml version="1.0"?>\n{svg.replace("svg", f"{head} style={style!r}", 1)}\n'

"""What a probe or a study found, as files: JSON for programs, a page, and figures of their own."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure as Canvas
from PIL import Image

from vit_cls.lab.results import Figure, HeatMap, LabResult, Pictures
from vit_cls.reports.figures import draw, left_out
from vit_cls.reports.html import Files, file_stem, render
from vit_cls.reports.svg import styled, svg_file, wrap
from vit_cls.reports.text import clean, shorten
from vit_cls.reports.words import facts, finding_facts, table_cells

SIDE = 96
"""Pixels; smaller images are magnified by a whole number to about this."""
PIXELATED = 64
"""Images up to this side keep their pixels' edges when they are magnified."""
WIDE_COLUMNS = 10
"""A heat map with more takes the whole width of the page, and can be moved sideways on a phone."""


@dataclass(frozen=True)
class _Drawn:
    """A figure of a result, ready for the page: an SVG, or cells of images, or neither if it is empty."""

    title: str
    note: str
    svg: Markup | None = None
    wide: bool = False
    pictures: Mapping[str, Any] | None = None


def lab_files(result: LabResult, *, versions: Mapping[str, str]) -> Files:
    """``results.json`` with the per-image predictions, the page, and its charts and pictures."""
    yield "results.json", _json({**result.to_dict(predictions=True), "versions": dict(versions)})
    drawn = [_draw(f"figure{i}", figure) for i, figure in enumerate(result.figures, start=1)]
    tables = []
    for table in result.tables:
        cells, texts = table_cells(table)
        tables.append((table, cells, [_kind(texts[i], [row[i] for row in cells]) for i in range(len(texts))]))
    context = {
        "result": result,
        "findings": [(finding, finding_facts(finding)) for finding in result.findings],
        "figures": drawn,
        "tables": tables,
        "sections": [("Settings", facts(result.settings)), ("Data", facts(result.data))],
    }
    yield "report.html", render("lab.html", context, versions)
    for i, (shown, figure) in enumerate(zip(drawn, result.figures, strict=True), start=1):
        name = f"figures/{i}_{file_stem(shown.title)}".rstrip("_")
        if shown.svg is not None:
            yield f"{name}.svg", svg_file(shown.svg)
        elif shown.pictures is not None:
            assert isinstance(figure, Pictures)
            yield f"{name}.png", picture_sheet(figure)


def _kind(text: bool, cells: Sequence[str]) -> str:
    """The class of a column in the page; prose does not shrink to a word a line."""
    if not text:
        return ""
    return "text prose" if max(map(len, cells), default=0) > 14 else "text"


def _json(found: Mapping[str, Any]) -> str:
    """One object, a line for each key; ASCII, for a name that is not valid UTF-8 must not break it."""
    lines = [
        f"{json.dumps(key)}: {json.dumps(value, allow_nan=False, default=str)}"
        for key, value in found.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _draw(name: str, figure: Figure) -> _Drawn:
    title, note = clean(figure.title), clean(figure.note)
    if isinstance(figure, Pictures):
        return _Drawn(title, note, pictures=_cells(figure) if check_pictures(figure) else None)
    svg = draw(name, figure)
    if svg is None:
        return _Drawn(title, note)
    if missing := left_out(figure):
        note = f"{note} Not drawn, for lack of a value: {', '.join(missing)}.".strip()
    wide = isinstance(figure, HeatMap) and len(figure.values[0]) > WIDE_COLUMNS
    return _Drawn(title, note, svg=Markup(svg), wide=wide)


def _cells(pictures: Pictures) -> dict[str, Any]:
    """What the page needs of each image: its address, size on the screen, and words in its place."""
    scale = magnification(pictures)
    columns = [clean(column) for column in pictures.columns]
    labels = [clean(label) for label in pictures.row_labels] if pictures.row_labels else None
    rows = []
    for i, row in enumerate(pictures.rows):
        where = labels[i] if labels else f"row {i + 1}"
        cells = [
            None
            if image is None
            else {
                "uri": picture_uri(image),
                "alt": f"{where}, {column}",
                "width": scale * image.shape[1],
                "height": scale * image.shape[0],
                "small": max(image.shape) <= PIXELATED,
            }
            for image, column in zip(row, columns, strict=True)
        ]
        rows.append((where if labels else None, cells))
    return {"columns": columns, "rows": rows}


def magnification(pictures: Pictures) -> int:
    """By how much all images of a grid are magnified, a whole number so that pixels stay squares."""
    largest = max(side for row in pictures.rows for one in row if one is not None for side in one.shape[:2])
    return max(1, SIDE // largest)


def check_pictures(pictures: Pictures) -> bool:
    """Whether there is an image at all, each of which can be drawn.

    Raises:
        ValueError: If an image is not uint8 of shape ``(height, width, 3)``, or rows, columns and labels do
            not fit together.
    """
    sizes = {len(pictures.columns), *map(len, pictures.rows)}
    num_labels = len(pictures.rows) if pictures.row_labels is None else len(pictures.row_labels)
    if len(sizes) > 1 or num_labels != len(pictures.rows):
        raise ValueError(
            f"the pictures {pictures.title!r} must have one image or None a column in each row, and one "
            f"label a row; got {len(pictures.columns)} columns, rows of "
            f"{sorted(set(map(len, pictures.rows)))} images, {len(pictures.rows)} rows, "
            f"{num_labels} labels."
        )
    images = [one for row in pictures.rows for one in row if one is not None]
    for one in images:
        if one.dtype != np.uint8 or one.ndim != 3 or one.shape[2] != 3 or 0 in one.shape:
            raise ValueError(
                f"an image of the pictures {pictures.title!r} must be uint8 of shape (height, width, 3); got "
                f"{one.dtype} of shape {one.shape}. Scale it to 0 ... 255 and put its channels last."
            )
    return bool(images)


def picture_uri(image: np.ndarray) -> str:
    """An image, uint8 of shape ``(height, width, 3)``, as a ``data:`` address that a page can show."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture_sheet(pictures: Pictures) -> bytes:
    """All images of a grid on one sheet, a PNG, with the title and the labels of columns and rows."""
    rows, cols = len(pictures.rows), len(pictures.columns)
    buffer = io.BytesIO()
    with styled():
        figure = Canvas(figsize=(1.6 + 1.3 * cols, 0.8 + 1.3 * rows), dpi=100, layout="constrained")
        grid = figure.subplots(rows, cols, squeeze=False)
        figure.suptitle(shorten(clean(pictures.title), 16 + 12 * cols), fontsize=11)
        for i, row in enumerate(pictures.rows):
            for axes, image in zip(grid[i], row, strict=True):
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                if image is not None:
                    axes.imshow(image, interpolation="nearest")
            if pictures.row_labels:
                label = wrap(pictures.row_labels[i], 14)
                grid[i, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        for axes, column in zip(grid[0], pictures.columns, strict=True):
            axes.set_title(wrap(column, 16), fontsize=9)
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()

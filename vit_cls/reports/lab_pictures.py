"""Grids of small images: as data for a page, and as one PNG sheet with its labels drawn."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vit_cls.lab.results import Pictures
from vit_cls.reports.lab_words import clean

SIDE = 96
"""Pixels; smaller images are magnified by a whole number to about this."""
GAP, FONT_SIZE, LINE = 8, 13, 17
INK, PAPER, EMPTY = "#1f2328", "#ffffff", "#f0f2f4"
PIXELATED = 64
"""Images up to this side keep their pixels' edges when they are magnified."""


def magnification(pictures: Pictures) -> int:
    """By how much all images of a grid are magnified, a whole number so that pixels stay squares.

    Args:
        pictures: One image at least.

    Example:
        >>> magnification(Pictures("p", ["a"], [[np.zeros((28, 20, 3), np.uint8)]]))
        3
    """
    largest = max(side for row in pictures.rows for one in row if one is not None for side in one.shape[:2])
    return max(1, SIDE // largest)


def check_pictures(pictures: Pictures) -> bool:
    """Whether there is an image at all, each of which can be drawn.

    Args:
        pictures: A grid.

    Raises:
        ValueError: If an image is not uint8 of shape ``(height, width, 3)``, or rows, columns and labels do
            not fit together.

    Example:
        >>> check_pictures(Pictures("p", ["a"], [[None]]))
        False
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
    """An image as a ``data:`` address that a page can show.

    Args:
        image: uint8, shape ``(height, width, 3)``.

    Example:
        >>> picture_uri(np.zeros((2, 2, 3), np.uint8))[:27]
        'data:image/png;base64,iVBOR'
    """
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture_sheet(pictures: Pictures) -> Image.Image:
    """All images of a grid on one sheet, with the title and the labels of columns and rows.

    Args:
        pictures: One image at least; small ones are magnified.

    Returns:
        An RGB image: a line for the title, two for the headers of the columns, then the rows, each as high as
        its highest image. Labels too long for their place are cut.

    Example:
        >>> picture_sheet(Pictures("p", ["a", "b"], [[np.zeros((96, 96, 3), np.uint8), None]])).size
        (216, 171)
    """
    font = _font()
    scale = magnification(pictures)
    cells = [[None if one is None else _magnified(one, scale) for one in row] for row in pictures.rows]
    width = max(SIDE, *(one.width for row in cells for one in row if one is not None))
    heights = [max([2 * LINE, *(one.height for one in row if one is not None)]) for row in cells]
    labels = [clean(label) for label in pictures.row_labels or ()]
    left = GAP + (int(min(200, max(map(font.getlength, labels)))) + GAP if labels else 0)
    top = GAP + 3 * LINE + GAP
    size = (left + len(pictures.columns) * (width + GAP), top + sum(heights) + GAP * len(heights))
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)

    def put(x: int, y: int, lines: list[str]) -> None:
        for i, line in enumerate(lines):
            pen.text((x, y + i * LINE), line, fill=INK, font=font)

    put(GAP, GAP // 2, _lines(clean(pictures.title), size[0] - 2 * GAP, font)[:1])
    for j, column in enumerate(pictures.columns):
        lines = _lines(clean(column), width, font)
        put(left + j * (width + GAP), top - GAP // 2 - LINE * len(lines), lines)
    y = top
    for i, (row, height) in enumerate(zip(cells, heights, strict=True)):
        if labels:
            lines = _lines(labels[i], left - 2 * GAP, font)
            put(GAP, y + (height - LINE * len(lines)) // 2, lines)
        for j, one in enumerate(row):
            x = left + j * (width + GAP)
            if one is None:
                pen.rectangle((x, y, x + width - 1, y + height - 1), fill=EMPTY)
            else:
                sheet.paste(one, (x, y))
        y += height + GAP
    return sheet


def _magnified(image: np.ndarray, scale: int) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(image))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def _font() -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib: the same letters on every machine."""
    path = Path(mpl.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    return ImageFont.truetype(str(path), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)


def _lines(text: str, room: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """As much of a text as fits on two lines, broken between words where there are some."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > 2:
        lines[1:] = [" ".join(lines[1:])]
    return [_fitting(line, room, font) for line in lines]


def _fitting(text: str, room: int, font: ImageFont.FreeTypeFont) -> str:
    """As much of a text as fits on a line."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(f"{text}…") > room:
        text = text[:-1]
    return f"{text.rstrip()}…"

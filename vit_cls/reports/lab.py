"""What a probe or a study found, as files: JSON for scripts, a page, Markdown, and figures of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vit_cls.files import replacing, write_text
from vit_cls.lab.results import Figure, HeatMap, LabResult, Pictures
from vit_cls.reports.figures import write_figures
from vit_cls.reports.html import render
from vit_cls.reports.lab_figures import draw, left_out
from vit_cls.reports.lab_pictures import (
    PIXELATED,
    check_pictures,
    magnification,
    picture_sheet,
    picture_uri,
)
from vit_cls.reports.lab_words import clean, facts, finding_facts, lab_markdown, lab_text, table_cells

__all__ = ["lab_text", "write_lab_report"]

WIDE_COLUMNS = 10
"""A heat map with more takes the whole width of the page, and can be moved sideways on a phone."""


@dataclass(frozen=True)
class _Drawn:
    """A figure of a result, ready for the page: an SVG, or cells of images, or neither if it is empty."""

    title: str
    note: str
    path: str
    svg: Markup | None = None
    wide: bool = False
    pictures: Mapping[str, Any] | None = None


def write_lab_report(folder: Path, result: LabResult, *, versions: Mapping[str, str]) -> list[Path]:
    """Write everything about a probe or a study.

    Args:
        folder: Is made if it does not exist; files of the same name are replaced.
        result: Its findings, tables and figures may hold any text.
        versions: Version by package.

    Returns:
        ``results.json`` with the per-image predictions, written first so that a figure that cannot be drawn
        loses no number; ``report.html``; ``report.md``; then ``figures/*.svg``, and ``figures/*.png`` for
        pictures.

    Raises:
        ValueError: If a table or a figure contradicts itself, such as rows of different lengths.
        OSError: If a file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = LabResult("probe linear", "What does CLS know?", "CLS knows more than GAP.")
        ...     files = write_lab_report(Path(folder), result, versions={})
        ...     [file.name for file in files], files[2].read_text().splitlines()[0]
        (['results.json', 'report.html', 'report.md'], 'CLS knows more than GAP.')
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("results.json", "report.html", "report.md")]
    write_text(files[0], _json({**result.to_dict(predictions=True), "versions": dict(versions)}))
    drawn = [_draw(i, figure) for i, figure in enumerate(result.figures, start=1)]
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
        "versions": versions,
    }
    write_text(files[1], render("lab.html", context))
    words = lab_markdown(result, [(one.title, one.note, one.path) for one in drawn], versions)
    write_text(files[2], words)
    charts = [(Path(one.path).stem, str(one.svg)) for one in drawn if one.svg is not None]
    if charts:
        files += write_figures(folder / "figures", charts)
    for one, figure in zip(drawn, result.figures, strict=True):
        if isinstance(figure, Pictures) and one.path:
            files.append(folder / one.path)
            files[-1].parent.mkdir(exist_ok=True)
            with replacing(files[-1]) as temporary:
                picture_sheet(figure).save(temporary, "PNG")
    return files


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


def _draw(place: int, figure: Figure) -> _Drawn:
    title, note = clean(figure.title), clean(figure.note)
    name = re.sub(r"[^a-z0-9]+", "_", title.lower())[:60].strip("_")
    path = f"figures/{place}_{name}".rstrip("_")
    if isinstance(figure, Pictures):
        if not check_pictures(figure):
            return _Drawn(title, note, "")
        return _Drawn(title, note, f"{path}.png", pictures=_cells(figure))
    svg = draw(f"figure{place}", figure)
    if svg is None:
        return _Drawn(title, note, "")
    if missing := left_out(figure):
        note = f"{note} Not drawn, for lack of a value: {', '.join(missing)}.".strip()
    wide = isinstance(figure, HeatMap) and len(figure.values[0]) > WIDE_COLUMNS
    return _Drawn(title, note, f"{path}.svg", svg=Markup(svg), wide=wide)


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

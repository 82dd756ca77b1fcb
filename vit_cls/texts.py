"""Texts that others chose: printed so that they command no terminal, written so that they are no formula."""

from __future__ import annotations

from collections.abc import Iterable

FORMULA = "=+-@\t\r'"
"""What a text may not begin with in a CSV file: a spreadsheet would compute it, or take the quote away."""


def printable(text: str) -> str:
    r"""A text in which nothing commands a terminal or turns its lines around.

    Example:
        >>> printable("a\u202eb\x1b[31m")
        'a\\u202eb\\x1b[31m'
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def csv_row(cells: Iterable[object]) -> str:
    r"""One line of CSV. A text that begins like a formula, or with a single quote, gets one in front.

    Args:
        cells: Texts; numbers are written as they print, None as nothing.

    Example:
        >>> csv_row(["=1+1", -1, None, "a,b"])
        '\'=1+1,-1,,"a,b"\n'
    """
    texts = ["" if cell is None else _guarded(cell) if isinstance(cell, str) else str(cell) for cell in cells]
    # Not csv.writer: up to Python 3.12 it leaves a carriage return bare, and the line cannot be read back.
    quoted = [f'"{t.replace(chr(34), chr(34) * 2)}"' if set(t) & set(',"\r\n') else t for t in texts]
    return ",".join(quoted) + "\n"


def _guarded(text: str) -> str:
    return f"'{text}" if text[:1] in tuple(FORMULA) else text


def csv_text(cell: str) -> str:
    """The text that `csv_row` wrote, from the cell of a reader.

    Example:
        >>> csv_text("'=1+1")
        '=1+1'
    """
    return cell[1:] if cell[:1] == "'" and cell[1:2] in tuple(FORMULA) else cell

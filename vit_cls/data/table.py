"""Text and Parquet tables to columns of text, with errors that name rows as the user counts them."""

from __future__ import annotations

import csv
import importlib
import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_cls.errors import DataError

DELIMITERS = (",", ";", "\t")
PARQUET = (".parquet", ".pq")
ENDINGS = (".csv", ".tsv", ".tab", ".txt", *PARQUET)


@dataclass(frozen=True)
class Table:
    """Some columns of a file.

    Args:
        where: What the user called the file, and its path.
        columns: The text of each cell, by the name of its column.
        rows: Number of each row as a spreadsheet shows it: the header of a text file is row 1.
    """

    where: str
    columns: dict[str, list[str]]
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def refuse(self, what: str, positions: Sequence[int], *, column: str = "", hint: str = "") -> None:
        """Raise if there are rows with a fault.

        Args:
            what: The fault, as the end of "3 of 10 rows have ...".
            positions: Which rows have it, counted from 0.
            column: The column whose cells are shown.
            hint: What to do about it.

        Raises:
            DataError: If there are any; names the first ones.
        """
        if positions:
            examples = [
                f"row {self.rows[i]}" + (f" ({self.columns[column][i]!r})" if column else "")
                for i in positions[:5]
            ]
            raise DataError(
                f"{self.where}: {len(positions)} of {len(self)} rows have {what}: {listed(examples)}"
                f"{' and more' if len(positions) > 5 else ''}.{hint and ' ' + hint}"
            )


def read_table(path: Path, *, name: str, required: Sequence[str], optional: Sequence[str]) -> Table:
    """Read some columns of a table.

    Args:
        path: Parquet by its ending, otherwise text with commas, semicolons or tabs, in UTF-8.
        name: What the user called it, for error messages.
        required: Columns that must be there, in any case and order.
        optional: Columns that are read if they are there; all others are passed over.

    Raises:
        DataError: If the file cannot be read, has no rows, lacks a column, or has uneven rows.
    """
    where = f"{name} {path}"
    if not path.is_file():
        raise DataError(f"{where} {'is not a file' if path.exists() else 'does not exist'}.")
    read = _read_parquet if path.suffix.lower() in PARQUET else _read_text
    try:
        table = read(path, where, required, optional)
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror or _in_one_line(error)}") from error
    if not len(table):
        raise DataError(f"{where} has no rows.")
    return table


def listed(examples: Sequence[str]) -> str:
    """Words with commas between them.

    Args:
        examples: The words.
    """
    return ", ".join(examples)


def _read_text(path: Path, where: str, required: Sequence[str], optional: Sequence[str]) -> Table:
    rows: list[int] = []
    ragged: list[tuple[int, int]] = []
    row = 1
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            lines = csv.reader(
                itertools.chain([first], file), delimiter=_delimiter(first, required), strict=True
            )
            header = next(lines, [])
            positions = _positions(header, where, required, optional)
            columns: dict[str, list[str]] = {column: [] for column in positions}
            cells = [(position, columns[column].append) for column, position in positions.items()]
            for row, line in enumerate(lines, start=2):
                if len(line) == len(header):
                    rows.append(row)
                    for position, append in cells:
                        append(line[position])
                elif line:  # not an empty line
                    ragged.append((row, len(line)))
    except UnicodeDecodeError:
        raise DataError(f"{where} is not UTF-8, from about row {row} on. Save it as CSV UTF-8.") from None
    except csv.Error as error:
        raise DataError(f"{where} cannot be read after row {row}: {error}.") from None
    if ragged:
        examples = listed([f"row {row} has {cells}" for row, cells in ragged[:5]])
        raise DataError(
            f"{where} has {len(header)} columns, but {len(ragged)} row(s) have not: {examples}. "
            "A cell with a delimiter in it must be in quotes."
        )
    return Table(where, columns, rows)


def _delimiter(header: str, required: Collection[str]) -> str:
    """The delimiter with which the header has the required columns, or the most frequent one."""
    for delimiter in DELIMITERS:
        if set(required) <= {cell.strip(' "\r\n').lower() for cell in header.split(delimiter)}:
            return delimiter
    return max(DELIMITERS, key=header.count)


def _read_parquet(path: Path, where: str, required: Sequence[str], optional: Sequence[str]) -> Table:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(
            f"{where} cannot be read without pyarrow. Install it (pip install pyarrow), "
            "or save the table as CSV."
        ) from None
    try:
        header = list(parquet.read_schema(path).names)
    except ValueError as error:  # ArrowInvalid
        raise DataError(f"{where} is not a Parquet file: {_in_one_line(error)}") from None
    positions = _positions(header, where, required, optional)
    try:
        content = parquet.read_table(path, columns=[header[position] for position in positions.values()])
        columns = {
            column: [_text(value) for value in content.column(header[position]).to_pylist()]
            for column, position in positions.items()
        }
    except ValueError as error:  # damaged, or text that is not UTF-8
        raise DataError(f"{where} cannot be read: {_in_one_line(error)}") from None
    return Table(where, columns, range(1, len(columns[required[0]]) + 1))


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _text(value: Any) -> str:
    """A cell as a text file would have it."""
    if value is None or value != value:  # NaN is how pandas writes an empty cell
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _positions(
    header: Iterable[Any], where: str, required: Sequence[str], optional: Sequence[str]
) -> dict[str, int]:
    """Where the known columns are."""
    names = [str(cell).strip().lower() for cell in header]
    known = (*required, *optional)
    its = f"Its columns: {listed(names) or 'none'}."
    may = f"{' and '.join(required)}, and may have {listed(optional)}"
    missing = [column for column in required if column not in names]
    if missing:
        raise DataError(f"{where} has no column {' and no column '.join(missing)}. {its} It must have {may}.")
    twice = [column for column, count in Counter(names).items() if count > 1 and column in known]
    if twice:
        raise DataError(f"{where} has the column {listed(twice)} more than once. {its}")
    for column in optional:
        if column not in names and f"{column}s" in names:
            raise DataError(
                f"{where} has a column {column}s, which has no effect. Call it {column}, or leave it out."
            )
    return {column: names.index(column) for column in known if column in names}

"""A table of images instead of folders: CSV or Parquet with a path and a label in every row."""

from __future__ import annotations

import csv
import importlib
import itertools
import math
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_cls.data.index import ImageIndex, PathTable
from vit_cls.data.parts import ALL, PART_OF, PARTS
from vit_cls.data.splits import refuse_shared_groups
from vit_cls.errors import DataError

COLUMNS = ("path", "label")
MORE_COLUMNS = ("split", "group", "weight")
DELIMITERS = (",", ";", "\t")
PARQUET = (".parquet", ".pq")
ENDINGS = (".csv", ".tsv", ".tab", ".txt", *PARQUET)


@dataclass(frozen=True)
class Fault:
    """What is wrong with some rows, as the end of "3 of 10 rows have ..."; positions count from 0."""

    text: str
    positions: list[int]
    column: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Table:
    """Some columns of a file as text, and its rows as a spreadsheet counts them: a header is row 1."""

    where: str
    columns: dict[str, list[str]]
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def refuse(self, fault: Fault, example: Callable[[int], str] | None = None) -> None:
        """Raise DataError, with the first rows in words, if there are rows with the fault."""

        def row_and_cell(i: int) -> str:
            return f"row {self.rows[i]}" + (f" ({self.columns[fault.column][i]!r})" if fault.column else "")

        if fault.positions:
            examples = ", ".join(map(example or row_and_cell, fault.positions[:5]))
            more = " and more" if len(fault.positions) > 5 else ""
            raise DataError(
                f"{self.where}: {len(fault.positions)} of {len(self)} rows have {fault.text}: "
                f"{examples}{more}.{fault.hint and ' ' + fault.hint}"
            )


@dataclass(frozen=True)
class Manifest:
    """The rows of a table, by what they are for.

    Args:
        folder: Where relative paths start.
        paths: Of each row, spelled in one way: below ``folder`` relative to it, elsewhere absolute or
            beginning with ``../``; empty where the row has none.
        part_of: Part of each row: of `PARTS`, ``all`` where there is no split column, empty where unknown.
    """

    table: Table
    folder: Path
    paths: list[str]
    part_of: list[str]
    weights: np.ndarray | None

    @property
    def parts(self) -> list[str]:
        """The parts that have rows, in the order of `PARTS`; ``["all"]`` where there is no split column."""
        there = set(self.part_of)
        return [part for part in (*PARTS, ALL) if part in there]

    def index(
        self, part: str, class_names: Sequence[str] | None = None, *, training: bool = False
    ) -> ImageIndex:
        """The images of one part, sorted by class and path; labels point into the classes given, or its own.

        Raises:
            DataError: If a row points nowhere, a label is not in ``class_names``, or it cannot be trained on.
        """
        rows = [i for i, name in enumerate(self.part_of) if name == part]
        self.table.refuse(self.absent_files(rows))
        names = self.table.columns["label"]
        if class_names is None:
            class_names = sorted({names[i] for i in rows})
        if training and len(class_names) < 2:
            raise DataError(
                f"{self.table.where} has only one label to train on ({class_names[0]}); "
                "a classifier needs at least two."
            )
        if training and self.weights is not None and not self.weights[rows].any():
            raise DataError(
                f"{self.table.where}: all rows to train on have weight 0, so nothing would be drawn."
            )
        number = {name: i for i, name in enumerate(class_names)}
        unknown = [i for i in rows if names[i] not in number]
        self.table.refuse(Fault("a label that no training row has", unknown, column="label"))
        rows.sort(key=lambda i: (number[names[i]], self.paths[i]))
        groups = self.table.columns.get("group")
        return ImageIndex(
            self.folder,
            PathTable(self.paths[i] for i in rows),
            np.array([number[names[i]] for i in rows], dtype=np.int64),
            list(class_names),
            None if groups is None else PathTable(groups[i] for i in rows),
            None if self.weights is None else self.weights[rows],
        )

    def absent_files(self, rows: Iterable[int]) -> Fault:
        """Those of some rows whose path leads to no file."""
        start = os.path.join(self.folder, "")
        absent = [i for i in rows if not os.path.isfile(os.path.join(start, self.paths[i]))]
        hint = f"Relative paths start from {self.folder}."
        if absent and "\\" in self.paths[absent[0]] and os.sep == "/":
            hint += " Folders are separated by / here."
        return Fault("a path where there is no file", absent, column="path", hint=hint)


def is_manifest(path: str | Path) -> bool:
    """Whether a path has the ending of a table and is no folder."""
    return Path(path).suffix.lower() in ENDINGS and not os.path.isdir(path)


def read_manifest(path: str | Path, *, name: str = "--data") -> Manifest:
    """Read a table with the columns ``path`` and ``label``, and maybe ``split``, ``group`` and ``weight``.

    Column names may be in any case and order; other columns are passed over. ``split`` has the names of part
    folders (train, val, validation, test, ...), ``group`` says which images belong together, and ``weight``
    how often an image is drawn in training, relative to the others. Files are looked for when a part is
    indexed, see `Manifest.index`.

    Args:
        path: Parquet (``.parquet``, needs pyarrow), or text with commas, semicolons or tabs, in UTF-8. Paths
            in it are relative to its folder, or absolute; they are only ever opened.

    Raises:
        DataError: Says what is wrong, in how many rows, and in which.
    """
    manifest, faults = inspect_manifest(path, name=name)
    for fault in faults:
        manifest.table.refuse(fault)
    _refuse_twice(manifest)
    groups, where = manifest.table.columns.get("group"), manifest.table.where
    if groups is not None:
        members = {
            part: [
                group for group, its_part in zip(groups, manifest.part_of, strict=True) if its_part == part
            ]
            for part in PARTS
        }
        for part in ("val", "test"):
            refuse_shared_groups(members["train"], members[part], where=where, parts=("train", part))
    return manifest


def inspect_manifest(path: str | Path, *, name: str = "--data") -> tuple[Manifest, list[Fault]]:
    """`read_manifest` whatever the rows hold: they, and what is wrong with their cells."""
    path = Path(path)
    table = _read_table(path, f"{name} {path}")
    faults = []
    for column, cells in table.columns.items():
        if column != "path":
            cells[:] = [cell.strip() for cell in cells]
        faults.append(Fault(f"an empty {column}", [i for i, cell in enumerate(cells) if not cell]))
    weights = None
    if "weight" in table.columns:
        weights = np.array([_number(cell) for cell in table.columns["weight"]])
        wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0))).tolist()
        faults.append(Fault("a weight that is not a number from 0 on", wrong, column="weight"))
    part_of = [ALL] * len(table)
    if "split" in table.columns:
        part_of = [PART_OF.get(cell.lower(), "") for cell in table.columns["split"]]
        unknown = [i for i, part in enumerate(part_of) if not part]
        hint = f"Known: {', '.join(PART_OF)}."
        faults.append(Fault("a split that is not known", unknown, column="split", hint=hint))
    paths = list(_one_spelling(table.columns["path"], path.parent))
    return Manifest(table, path.parent, paths, part_of, weights), faults


def _one_spelling(paths: Iterable[str], folder: Path) -> Iterator[str]:
    """Relative to the folder where a path leads below it, and otherwise as short as it can be."""
    above = [f"{absolute(folder).rstrip(os.sep)}{os.sep}" for absolute in (os.path.abspath, os.path.realpath)]
    for path in paths:
        if os.path.isabs(path):
            path = os.path.normpath(path)
            path = next((path[len(start) :] for start in above if path.startswith(start)), path)
        if os.sep != "/":
            path = path.replace(os.sep, "/")
        if path and (path[0] == "." or "//" in path or "/." in path):
            path = posixpath.normpath(path)
        if path.startswith("../"):  # it may lead back
            absolute_path = posixpath.normpath(posixpath.join(os.path.abspath(folder), path))
            path = next((absolute_path[len(s) :] for s in above if absolute_path.startswith(s)), path)
        yield path


def _refuse_twice(manifest: Manifest) -> None:
    paths, rows = manifest.paths, manifest.table.rows
    if len(set(paths)) == len(paths):
        return
    first: dict[str, int] = {}
    again = [i for i, path in enumerate(paths) if first.setdefault(path, i) != i]
    fault = Fault("a path that is there already", again, hint="Each image may have one row.")
    manifest.table.refuse(fault, lambda i: f"{paths[i]} (rows {rows[first[paths[i]]]} and {rows[i]})")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _read_table(path: Path, where: str) -> Table:
    """The known columns of a table; DataError where it cannot be read, is empty, or lacks one."""
    if not path.is_file():
        raise DataError(f"{where} {'is not a file' if path.exists() else 'does not exist'}.")
    read = _read_parquet if path.suffix.lower() in PARQUET else _read_text
    try:
        table = read(path, where)
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror or _in_one_line(error)}") from error
    if not len(table):
        raise DataError(f"{where} has no rows.")
    return table


def _read_text(path: Path, where: str) -> Table:
    rows: list[int] = []
    ragged: list[tuple[int, int]] = []
    row = 1
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            lines = csv.reader(itertools.chain([first], file), delimiter=_delimiter(first), strict=True)
            header = next(lines, [])
            positions = _positions(header, where)
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
        examples = ", ".join(f"row {row} has {cells}" for row, cells in ragged[:5])
        raise DataError(
            f"{where} has {len(header)} columns, but {len(ragged)} row(s) have not: {examples}. "
            "A cell with a delimiter in it must be in quotes."
        )
    return Table(where, columns, rows)


def _delimiter(header: str) -> str:
    """The delimiter with which the header has the required columns, or the most frequent one."""
    for delimiter in DELIMITERS:
        if set(COLUMNS) <= {cell.strip(' "\r\n').lower() for cell in header.split(delimiter)}:
            return delimiter
    return max(DELIMITERS, key=header.count)


def _read_parquet(path: Path, where: str) -> Table:
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
    positions = _positions(header, where)
    try:
        content = parquet.read_table(path, columns=[header[position] for position in positions.values()])
        columns = {
            column: [_text(value) for value in content.column(header[position]).to_pylist()]
            for column, position in positions.items()
        }
    except ValueError as error:  # damaged, or text that is not UTF-8
        raise DataError(f"{where} cannot be read: {_in_one_line(error)}") from None
    return Table(where, columns, range(1, len(columns["path"]) + 1))


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _text(value: Any) -> str:
    """A cell as a text file would have it."""
    if value is None or value != value:  # NaN is how pandas writes an empty cell
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _positions(header: Iterable[Any], where: str) -> dict[str, int]:
    """Where the known columns are."""
    names = [str(cell).strip().lower() for cell in header]
    known = (*COLUMNS, *MORE_COLUMNS)
    its = f"Its columns: {', '.join(names) or 'none'}."
    may = f"{' and '.join(COLUMNS)}, and may have {', '.join(MORE_COLUMNS)}"
    missing = [column for column in COLUMNS if column not in names]
    if missing:
        raise DataError(f"{where} has no column {' and no column '.join(missing)}. {its} It must have {may}.")
    twice = [column for column, count in Counter(names).items() if count > 1 and column in known]
    if twice:
        raise DataError(f"{where} has the column {', '.join(twice)} more than once. {its}")
    for column in MORE_COLUMNS:
        if column not in names and f"{column}s" in names:
            raise DataError(
                f"{where} has a column {column}s, which has no effect. Call it {column}, or leave it out."
            )
    return {column: names.index(column) for column in known if column in names}

"""Tables that grow row by row: CSV, JSONL and Parquet, kept when a run is interrupted, and continued."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vit_cls.errors import ConfigError, DataError, RunError
from vit_cls.evaluation.predictions import Row
from vit_cls.evaluation.results import PREDICTION_COLUMNS
from vit_cls.files import replacing, write_text

Value = str | float | None
PARQUET_ROWS = 50_000
"""Rows of a row group, which is held in memory."""


def columns_of(top_k: int) -> tuple[str, ...]:
    """Columns of the table of predictions: those of ``evaluate``, and the further classes.

    Args:
        top_k: Classes a row.

    Example:
        >>> columns_of(2)[-3:]
        ('error', 'prediction_2', 'probability_2')
    """
    more = (f"{name}_{k}" for k in range(2, top_k + 1) for name in ("prediction", "probability"))
    return (*PREDICTION_COLUMNS, *more)


def as_record(row: Row, top_k: int) -> dict[str, Value]:
    """A row by column, None where there is nothing to say (``label`` and ``correct`` always).

    Args:
        row: The row.
        top_k: Classes a row.
    """
    record: dict[str, Value] = dict.fromkeys(columns_of(top_k))
    record |= {"path": row.path, "error": row.error}
    for k, (name, probability) in enumerate(row.best, start=1):
        ending = "" if k == 1 else f"_{k}"
        record |= {f"prediction{ending}": name, f"probability{ending}": round(probability, 6)}
    return record


def csv_line(values: Iterable[Value]) -> str:
    r"""One line of CSV.

    Args:
        values: Of its columns.

    Example:
        >>> csv_line(["a,b.jpg", None, 0.5])
        '"a,b.jpg",,0.500000\n'
    """
    texts = ["" if v is None else f"{v:.6f}" if isinstance(v, float) else v for v in values]
    # Not csv.writer: up to Python 3.12 it leaves a carriage return bare, and the line cannot be read back.
    quoted = [f'"{t.replace(chr(34), chr(34) * 2)}"' if set(t) & set(',"\r\n') else t for t in texts]
    return ",".join(quoted) + "\n"


def _read_csv(record: bytes, columns: Sequence[str]) -> dict[str, Any]:
    text = record.decode("utf-8", "surrogateescape")
    values = next(csv.reader(io.StringIO(text, newline="")))
    return dict(zip(columns, values, strict=True))


def _read_json(record: bytes, columns: Sequence[str]) -> dict[str, Any]:
    values = json.loads(record)
    return {name: values[name] for name in columns}


@dataclass(frozen=True)
class RowFormat:
    """How rows become lines, and lines rows again.

    Args:
        ending: Of the file's name.
        head: The first line, from the columns.
        line: A row's line.
        read: A line's row, given the columns.
        quoted: Whether a quoted field may hold line ends.
    """

    ending: str
    head: Callable[[Sequence[str]], str]
    line: Callable[[Mapping[str, Value]], str]
    read: Callable[[bytes, Sequence[str]], dict[str, Any]]
    quoted: bool


def _json_line(record: Mapping[str, Value]) -> str:
    return json.dumps(record) + "\n"


def _no_head(columns: Sequence[str]) -> str:
    return ""


FORMATS: dict[str, RowFormat] = {
    "csv": RowFormat("csv", csv_line, lambda record: csv_line(record.values()), _read_csv, quoted=True),
    "jsonl": RowFormat("jsonl", _no_head, _json_line, _read_json, quoted=False),
    # Lines until the end, so that it can be continued; then Parquet.
    "parquet": RowFormat("parquet", _no_head, _json_line, _read_json, quoted=False),
}


def check_parquet() -> None:
    """Make sure that Parquet can be written.

    Raises:
        ConfigError: If pyarrow is not installed.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(
            "--format parquet needs pyarrow: pip install pyarrow. Or use --format csv or jsonl."
        )


class RowFile:
    """A table that is ``NAME.part`` until it is complete; then it replaces ``NAME``.

    Beside the part stands ``NAME.part.json``: what the rows depend on besides the paths.

    Args:
        folder: Where it goes; made by `start` and `resume`.
        stem: Name without ending.
        row_format: A row of `FORMATS`.
        columns: Names of the columns, ``path`` first.
    """

    def __init__(self, folder: Path, stem: str, row_format: str, columns: Sequence[str]) -> None:
        self.format = FORMATS[row_format]
        self.columns = columns
        self.path = folder / f"{stem}.{self.format.ending}"
        self.part = self.path.with_name(f"{self.path.name}.part")
        self.facts = self.path.with_name(f"{self.path.name}.part.json")
        self.rows = 0
        self.failed = 0
        self._file: BinaryIO | None = None
        self._made: list[Path] = []

    def check_part(self, resume: bool) -> bool:
        """Whether there are rows to continue from.

        Args:
            resume: Whether the user wants that.

        Raises:
            ConfigError: If there are, and the user has not said what to do with them.
        """
        if self.part.exists() and not resume:
            raise ConfigError(
                f"{self.part} holds the rows of an interrupted run. Continue it with --resume, or delete it."
            )
        return self.part.exists()

    def start(self, facts: Mapping[str, Any]) -> None:
        """Begin with no row.

        Args:
            facts: What the rows depend on, for `resume`.
        """
        folder = self.path.parent
        self._made = [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        write_text(self.facts, json.dumps(facts))
        self._file = self.part.open("wb")
        self._write(self.format.head(self.columns))

    def resume(self, facts: Mapping[str, Any], paths: Iterator[str], batch_size: int) -> Iterator[str]:
        """Continue after the rows of a part.

        Args:
            facts: What the rows depend on; must be those of the part.
            paths: The same paths as before, from the first one.
            batch_size: Whole batches are kept, so that the others have the images that they would have had.

        Returns:
            The paths that are still to do; `rows` is the number of those done.

        Raises:
            DataError: If the part is of other paths, another model or other options; it stays as it is.
        """
        before = self._read_facts()
        if differ := [name for name in facts if before.get(name) != facts[name]]:
            raise DataError(
                f"--resume: {self.part} was made with another {' and another '.join(differ)}. Repeat the "
                "command that was interrupted, or delete the file to start anew."
            )
        head = self.format.head(self.columns).encode()
        ahead: list[str] = []
        with self.part.open("rb") as file:
            end = len(head)
            if file.read(end) != head:
                raise DataError(
                    f"--resume: {self.part} does not begin as it should. Delete it to start anew."
                )
            failed = 0
            for number, (record, place) in enumerate(_whole_records(file, end, self.format.quoted), 1):
                path = next(paths, None)
                failed += self._compare(number, record, path)
                assert path is not None
                ahead.append(path)
                if number % batch_size == 0:
                    self.rows, self.failed, end = number, failed, place
                    ahead.clear()
        self._file = self.part.open("r+b")
        self._file.truncate(end)
        self._file.seek(end)
        return itertools.chain(ahead, paths)

    def _read_facts(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.facts.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"--resume: {self.facts}, which says what {self.part} was made with, cannot be read. Delete "
                "both to start anew."
            ) from error

    def _compare(self, number: int, record: bytes, path: str | None) -> bool:
        """Whether the row is one of a failure; it must be that of the path."""
        try:
            row = self.format.read(record, self.columns)
        except (ValueError, TypeError, KeyError, csv.Error) as error:
            raise DataError(f"--resume: row {number} of {self.part} is damaged. Delete it.") from error
        before = row["path"]
        if path != before:
            now = "there is no such path now" if path is None else f"now path {number} is {path}"
            raise DataError(
                f"--resume: row {number} of {self.part} is {before}, but {now}. Give the same paths in the "
                "same order, or delete the file to start anew."
            )
        return bool(row["error"])

    def append(self, records: Sequence[Mapping[str, Value]]) -> None:
        """Add rows, and hand them to the operating system.

        Args:
            records: Values by column.
        """
        self._write("".join(map(self.format.line, records)))
        self.rows += len(records)
        self.failed += sum(record["error"] is not None for record in records)

    def finish(self) -> None:
        """Put the complete table in its place."""
        assert self._file is not None
        os.fsync(self._file.fileno())
        self._file.close()
        if self.format.ending == "parquet":
            with replacing(self.path) as temporary:
                _to_parquet(self.part, temporary, self.columns)
            self.part.unlink()
        else:
            os.replace(self.part, self.path)
        self.facts.unlink(missing_ok=True)

    def close(self, keep: bool) -> None:
        """Leave the part for `resume`, or nothing.

        Args:
            keep: Whether the rows are worth keeping.
        """
        if self._file is not None:
            self._file.close()
        if not keep:
            with contextlib.suppress(OSError):
                self.part.unlink(missing_ok=True)
                self.facts.unlink(missing_ok=True)
                for folder in self._made:
                    folder.rmdir()

    def _write(self, text: str) -> None:
        assert self._file is not None
        self._file.write(text.encode("utf-8", "surrogateescape"))
        self._file.flush()


def _whole_records(file: BinaryIO, end: int, quoted: bool) -> Iterator[tuple[bytes, int]]:
    """Records that are complete, each with the offset of its end; what follows the last is torn."""
    lines: list[bytes] = []
    open_quote = False
    for line in file:
        lines.append(line)
        open_quote ^= quoted and line.count(b'"') % 2 == 1
        if line.endswith(b"\n") and not open_quote:
            record = b"".join(lines)
            end += len(record)
            yield record, end
            lines.clear()


def _to_parquet(lines: Path, target: Path, columns: Sequence[str]) -> None:
    try:
        import pyarrow  # type: ignore[import-not-found,unused-ignore]
        from pyarrow import parquet  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:  # it was there when the run began
        raise RunError(f"--format parquet needs pyarrow, which cannot be imported: {error}.") from error

    numbers = [name for name in columns if name.startswith("probability")]
    kinds = {name: pyarrow.float64() if name in numbers else pyarrow.string() for name in columns}
    schema = pyarrow.schema(list(kinds.items()))
    with lines.open(encoding="utf-8") as file, parquet.ParquetWriter(target, schema) as writer:
        while part := [_storable(json.loads(line)) for line in itertools.islice(file, PARQUET_ROWS)]:
            writer.write_table(pyarrow.Table.from_pylist(part, schema=schema))


def _storable(record: dict[str, Value]) -> dict[str, Value]:
    """Parquet holds UTF-8 alone; a path of other bytes is written with escapes."""
    path = str(record["path"]).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return {**record, "path": path}

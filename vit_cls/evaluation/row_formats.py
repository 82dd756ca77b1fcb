"""Rows of predictions as lines of CSV and JSON, and as Parquet; and read from CSV again."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vit_cls.errors import ConfigError, DataError, RunError
from vit_cls.evaluation.predictions import Row
from vit_cls.texts import csv_row, csv_text

Value = str | float | None
PREDICTION_COLUMNS = ("path", "label", "prediction", "probability", "correct", "error")
PARQUET_ROWS = 50_000
"""Rows of a row group, which is held in memory."""


def columns_of(top_k: int) -> tuple[str, ...]:
    """Columns of the table of predictions: those of ``evaluate``, and the further classes."""
    more = (f"{name}_{k}" for k in range(2, top_k + 1) for name in ("prediction", "probability"))
    return (*PREDICTION_COLUMNS, *more)


def as_record(row: Row, top_k: int) -> dict[str, Value]:
    """A row by column, None where there is nothing to say."""
    record: dict[str, Value] = dict.fromkeys(columns_of(top_k))
    record |= {"path": row.path, "label": row.label, "error": row.error}
    if row.label is not None and row.best:
        record["correct"] = int(row.best[0][0] == row.label)
    for k, (name, probability) in enumerate(row.best, start=1):
        ending = "" if k == 1 else f"_{k}"
        record |= {f"prediction{ending}": name, f"probability{ending}": round(probability, 6)}
    return record


def csv_line(values: Iterable[Value]) -> str:
    """One line of CSV, as `vit_cls.texts.csv_row`; a float has six decimals."""
    return csv_row(_Number(v) if isinstance(v, float) else v for v in values)


class _Number(float):
    """Printed with six decimals."""

    def __str__(self) -> str:
        return f"{float(self):.6f}"


def read_predictions(path: str) -> list[Row]:
    """Read a ``predictions.csv`` that ``evaluate --output`` wrote, or the one in a folder.

    Raises:
        DataError: If it cannot be read, is no such file, or names an image twice.
    """
    file = Path(path)
    file = file / "predictions.csv" if file.is_dir() else file
    wrong = f"--predictions {path} is no predictions.csv of `vit-cls evaluate --output`"
    columns = PREDICTION_COLUMNS[:4]  # without them there is nothing to compare
    rows: dict[str, Row] = {}
    try:
        with file.open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
            reader = csv.DictReader(lines)
            if missing := [column for column in columns if column not in (reader.fieldnames or [])]:
                raise DataError(f"{wrong}: it has no column {', '.join(missing)}.")
            for record in reader:
                cells = (record[column] for column in columns)
                image, label, prediction, written = (cell and csv_text(cell) for cell in cells)
                where = f"{wrong}: line {reader.line_num}"
                if not image or not label or prediction is None or written is None:
                    raise DataError(f"{where} is not complete.")
                if image in rows:
                    raise DataError(f"{where} names {image} a second time.")
                try:
                    best = ((prediction, float(written)),) if prediction else ()
                except ValueError:
                    raise DataError(f"{where} has the probability {written!r}, not a number.") from None
                rows[image] = Row(image, best, csv_text(record.get("error") or "") or None, label)
    except OSError as error:
        raise DataError(f"--predictions {path} cannot be read: {error.strerror or error}.") from error
    except csv.Error as error:
        raise DataError(f"{wrong}: {error}.") from error
    if not rows:
        raise DataError(f"{wrong}: it has no rows.")
    return list(rows.values())


@dataclass(frozen=True)
class RowFormat:
    """How rows become lines: the ending of the file's name, its first line from the columns, a row's line."""

    ending: str
    head: Callable[[Sequence[str]], str]
    line: Callable[[Mapping[str, Value]], str]


def _json_line(record: Mapping[str, Value]) -> str:
    return json.dumps(record) + "\n"


def _no_head(columns: Sequence[str]) -> str:
    return ""


FORMATS: dict[str, RowFormat] = {
    "csv": RowFormat("csv", csv_line, lambda record: csv_line(record.values())),
    "jsonl": RowFormat("jsonl", _no_head, _json_line),
    "parquet": RowFormat("parquet", _no_head, _json_line),  # lines in the chunks, Parquet at the end
}


def check_parquet() -> None:
    """Raise ConfigError if pyarrow, which writes Parquet, is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(
            "--format parquet needs pyarrow: pip install pyarrow. Or use --format csv or jsonl."
        )


def write_parquet(texts: Iterable[bytes], target: Path, columns: Sequence[str]) -> None:
    """Write lines of JSON, any number in each of ``texts``, to a Parquet file; RunError without pyarrow."""
    try:
        import pyarrow  # type: ignore[import-not-found,unused-ignore]
        from pyarrow import parquet  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:  # it was there when the run began
        raise RunError(f"--format parquet needs pyarrow, which cannot be imported: {error}.") from error

    numbers = [name for name in columns if name.startswith("probability")]
    kinds = {name: pyarrow.float64() if name in numbers else pyarrow.string() for name in columns}
    schema = pyarrow.schema(list(kinds.items()))
    lines = (line for text in texts for line in text.splitlines())
    with parquet.ParquetWriter(target, schema) as writer:
        while part := [_storable(json.loads(line)) for line in itertools.islice(lines, PARQUET_ROWS)]:
            writer.write_table(pyarrow.Table.from_pylist(part, schema=schema))


def _storable(record: dict[str, Value]) -> dict[str, Value]:
    """Parquet holds UTF-8 alone; a path of other bytes is written with escapes."""
    path = str(record["path"]).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return {**record, "path": path}

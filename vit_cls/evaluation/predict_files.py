"""Tables of any number of rows, with features beside them: complete chunks, joined when all are there."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vit_cls.errors import ConfigError, DataError, VitClsError
from vit_cls.evaluation.row_formats import FORMATS, Value, write_parquet
from vit_cls.files import replacing, write_text
from vit_cls.signals import StopSignals

log = logging.getLogger("vit_cls")

RowBatch = tuple[Sequence[Mapping[str, Value]], np.ndarray | None]
"""Rows of one batch by column, and their features, float32, where those are wanted."""

CHUNK_ROWS = 16_384
CHUNK_BYTES = 64 * 2**20
CHUNK_SECONDS = 10.0
"""A chunk is written when it has that many rows or bytes, or is that old: what a crash costs."""
HEADER_BYTES = 4096
"""Of a file of features, whatever the names in it."""


@dataclass(frozen=True)
class FeatureFile:
    """A file of one tensor, ``features``, float32, a row a path; its metadata are texts."""

    path: Path
    shape: tuple[int, ...]
    metadata: Mapping[str, str]

    def header(self, rows: int) -> bytes:
        """What a safetensors file of so many rows begins with; ConfigError if the metadata is too long."""
        end = rows * 4 * int(np.prod(self.shape))
        tensor = {"dtype": "F32", "shape": [rows, *self.shape], "data_offsets": [0, end]}
        header = json.dumps({"__metadata__": dict(self.metadata), "features": tensor}).encode()
        if len(header) > HEADER_BYTES - 8:
            raise ConfigError("the names of model and files are too long for the header of the features.")
        return (HEADER_BYTES - 8).to_bytes(8, "little") + header.ljust(HEADER_BYTES - 8)


class _Chunk:
    """Rows on their way to a file, as the bytes that it will hold."""

    def __init__(self) -> None:
        self.rows = 0
        self.failed = 0
        self.text = bytearray()
        self.features = bytearray()
        self.since = time.monotonic()
        self._paths = hashlib.blake2b(digest_size=16)

    def add_paths(self, paths: Iterable[str]) -> None:
        """Take paths into the digest, each closed by a NUL."""
        self._paths.update("".join(f"{path}\0" for path in paths).encode("utf-8", "surrogateescape"))

    def header(self) -> dict[str, Any]:
        """What its first line says, less the digest."""
        counts = {"rows": self.rows, "failed": self.failed, "text": len(self.text)}
        return {**counts, "paths": self._paths.hexdigest()}

    def save(self, path: Path) -> None:
        """Write the chunk, with a digest of all that it holds."""
        header = self.header()
        digest = _digest_of(header)
        digest.update(self.text)
        digest.update(self.features)
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(json.dumps({**header, "sha256": digest.hexdigest()}).encode() + b"\n")
            file.write(self.text)
            file.write(self.features)


def _digest_of(header: Mapping[str, Any]) -> Any:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode())


def _whole_header(chunk: BinaryIO) -> dict[str, Any] | None:
    """The first line of a chunk; None where the chunk is not what was written."""
    try:
        header = dict(json.loads(chunk.readline()))
    except (ValueError, TypeError, RecursionError):
        return None
    told = header.pop("sha256", None)
    digest = _digest_of(header)
    while block := chunk.read(2**20):
        digest.update(block)
    return header if told == digest.hexdigest() else None


class RowFile:
    """A table whose rows are kept as complete chunks in a hidden folder beside it, until all are there.

    A chunk is one file: a line of JSON (how many rows, how many of failures, a digest of their paths, how
    many bytes of text, a digest of all), the lines of the table, the features. A run that is resumed counts
    them and goes on; where one is damaged, from there.

    Args:
        folder: Where the table goes; is made when the first chunk is.
        stem: Name without ending.
        row_format: A row of `FORMATS`.
        columns: Names of the columns, ``path`` first.
    """

    def __init__(self, folder: Path, stem: str, row_format: str, columns: Sequence[str]) -> None:
        self.format = FORMATS[row_format]
        self.columns = columns
        self.path = folder / f"{stem}.{self.format.ending}"
        self.part = folder / f".{self.path.name}.part"
        self.facts = self.part / "facts.json"
        self.rows = 0
        self.failed = 0
        self._chunks = 0
        self._pending = _Chunk()
        self._made: list[Path] = []

    def check_part(self, resume: bool) -> bool:
        """Whether there are chunks to continue from; ConfigError if so, without ``resume`` being set."""
        before = self.path.with_name(f"{self.path.name}.part")
        if before.is_file():
            raise ConfigError(
                f"{before} holds the rows of a run that an earlier version of vit-cls began, which this one "
                f"cannot continue. Delete it and {before.name}.json, or finish it with that version."
            )
        begun = self._chunk(0).exists()
        if begun and not resume:
            raise ConfigError(
                f"{self.part} holds the rows of an interrupted run. Continue it with --resume, or delete it."
            )
        return begun

    def start(self, facts: Mapping[str, Any]) -> None:
        """Begin with no row; ``facts`` is what rows depend on besides their paths."""
        self._made = [p for p in (self.part, *self.part.parents) if not p.exists()]
        self.part.mkdir(parents=True, exist_ok=True)
        write_text(self.facts, json.dumps(facts))

    def resume(self, facts: Mapping[str, Any], paths: Iterator[str]) -> None:
        """Count the chunks, and skip their paths; DataError if those, model or options are not the same."""
        try:
            before = dict(json.loads(self.facts.read_text()))
            headers = list(map(_whole_header, self._read_chunks()))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"--resume: {self.part} is damaged ({error}). Delete it to start anew."
            ) from error
        if differ := [name for name in facts if before.get(name) != facts[name]]:
            raise DataError(
                f"--resume: {self.part} was made with another {' and another '.join(differ)}. Repeat the "
                "command that was interrupted, or delete the folder to start anew."
            )
        for header in headers:
            if header is None:
                self._drop_from(self._chunks, len(headers))
                return
            given = _Chunk()
            given.add_paths(itertools.islice(paths, header["rows"]))
            if given.header()["paths"] != header["paths"]:
                raise DataError(
                    f"--resume: rows {self.rows + 1} to {self.rows + header['rows']} of {self.part} are of "
                    "other paths than those given now. Give the same paths in the same order, or delete the "
                    "folder to start anew."
                )
            self._count(header)

    def _drop_from(self, first: int, chunks: int) -> None:
        """Take chunks away, to be made again."""
        log.warning(f"--resume: {self._chunk(first)} is damaged: rows from {self.rows + 1} on are made again")
        for number in range(first, chunks):
            self._chunk(number).unlink()

    def append(self, records: Sequence[Mapping[str, Value]], features: np.ndarray | None) -> None:
        """Add rows; they are on the disk when the chunk is full, the very first ones at once."""
        chunk = self._pending
        chunk.rows += len(records)
        chunk.failed += sum(record["error"] is not None for record in records)
        chunk.add_paths(str(record["path"]) for record in records)
        chunk.text += "".join(map(self.format.line, records)).encode("utf-8", "surrogateescape")
        if features is not None:
            chunk.features += np.ascontiguousarray(features, dtype="<f4").tobytes()
        if (
            not self._chunks  # what cannot be written should be said early
            or chunk.rows >= CHUNK_ROWS
            or len(chunk.features) >= CHUNK_BYTES
            or time.monotonic() - chunk.since >= CHUNK_SECONDS
        ):
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait as a chunk."""
        chunk = self._pending
        if not chunk.rows:
            return
        chunk.save(self._chunk(self._chunks))
        self._pending = _Chunk()
        self._count(chunk.header())

    def finish(self, features: FeatureFile | None) -> None:
        """Join the chunks to the files, and put those in their place."""
        self.flush()
        if features is not None:
            with replacing(features.path) as temporary, temporary.open("wb") as file:
                file.write(features.header(self.rows))
                for chunk in self._read_chunks():
                    chunk.seek(json.loads(chunk.readline())["text"], 1)
                    shutil.copyfileobj(chunk, file)
        with replacing(self.path) as temporary:
            if self.format.ending == "parquet":
                write_parquet(self._texts(), temporary, self.columns)
            else:
                with temporary.open("wb") as file:
                    file.write(self.format.head(self.columns).encode())
                    file.writelines(self._texts())
        shutil.rmtree(self.part, ignore_errors=True)

    def close(self) -> None:
        """Leave the chunks for `resume`; where this run made none, leave nothing."""
        if self._made and not self._chunks:
            shutil.rmtree(self.part, ignore_errors=True)
            with contextlib.suppress(OSError):
                for folder in self._made[1:]:
                    folder.rmdir()

    def _count(self, header: Mapping[str, Any]) -> None:
        self._chunks += 1
        self.rows += header["rows"]
        self.failed += header["failed"]

    def _chunk(self, number: int) -> Path:
        return self.part / f"{number:06d}"

    def _read_chunks(self) -> Iterator[BinaryIO]:
        """Each chunk, open at its first line."""
        for number in itertools.count():
            try:
                with self._chunk(number).open("rb") as file:
                    yield file
            except FileNotFoundError:
                return

    def _texts(self) -> Iterator[bytes]:
        """The lines of each chunk."""
        for chunk in self._read_chunks():
            yield chunk.read(json.loads(chunk.readline())["text"])


@dataclass(frozen=True)
class Saved:
    """What became of the paths: rows, those without an image, rows of an earlier run, wall time."""

    images: int
    failed: int
    resumed: int
    seconds: float


def save_rows(
    table: RowFile,
    paths: Iterator[str],
    work: Callable[[Iterator[str]], Iterator[RowBatch]],
    *,
    facts: Mapping[str, Any],
    resume: bool = False,
    features: FeatureFile | None = None,
) -> Saved:
    """Write the rows that ``work`` makes of ``paths``, and put the files in their place when all are there.

    Args:
        paths: All paths, also those that an interrupted run has done.
        facts: What the rows depend on besides the paths.

    Raises:
        Stopped: If SIGINT or SIGTERM came; the rows are kept.
        ConfigError: If a file cannot be written, or there are chunks and ``resume`` is not set.
        DataError: If the chunks do not fit.
    """
    started = time.perf_counter()
    try:
        with StopSignals(lambda: _hint(table)) as stop:
            if table.check_part(resume):
                table.resume(facts, paths)
            else:
                table.start(facts)
            before = table.rows
            try:
                for records, values in work(paths):
                    with stop.held():
                        table.append(records, values)
            finally:
                stop.waits = True
                table.flush()
            stop.check()
            table.finish(features)
    except OSError as error:
        if isinstance(error, VitClsError) or error.errno is None:
            raise
        raise ConfigError(
            f"--output {table.path.parent} cannot be written: {error.strerror or error}; {_hint(table)}."
        ) from error
    finally:
        table.close()
    return Saved(table.rows, table.failed, before, time.perf_counter() - started)


def _hint(table: RowFile) -> str:
    if not table.rows:
        return "no row was complete"
    return (
        f"{table.rows} rows are kept in {table.part}. Repeat the command with --resume to continue "
        f"({table.path} appears at the end)"
    )

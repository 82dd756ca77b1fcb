"""Rows to files as they come; what a signal, a full disk or a crash leaves can be continued."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_cls.errors import ConfigError, VitClsError
from vit_cls.evaluation.features import FeatureFile
from vit_cls.evaluation.row_files import RowFile, Value
from vit_cls.signals import StopSignals

Chunk = tuple[Sequence[Mapping[str, Value]], np.ndarray | None]
"""Rows of one batch by column, and their features where those are wanted."""


@dataclass(frozen=True)
class Saved:
    """What became of the paths.

    Args:
        images: Rows of the files.
        failed: Those without an image.
        resumed: Rows that an earlier run had made.
        seconds: Wall time of this run.
    """

    images: int
    failed: int
    resumed: int
    seconds: float


def save_rows(
    table: RowFile,
    paths: Iterator[str],
    work: Callable[[Iterator[str]], Iterator[Chunk]],
    *,
    facts: Mapping[str, Any],
    batch_size: int,
    resume: bool = False,
    features: FeatureFile | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Saved:
    """Write rows as they come, and put the files in their place when all are there.

    Args:
        table: Where the rows go.
        paths: All paths, also those that an interrupted run has done.
        work: From paths to their rows, a batch at a time.
        facts: What the rows depend on besides the paths.
        batch_size: Paths of a batch.
        resume: Whether to continue where a part is left; without a part all is done.
        features: Where features go.
        metadata: For the header of the features.

    Returns:
        Counts and time.

    Raises:
        Stopped: If SIGINT or SIGTERM came; the rows are kept.
        ConfigError: If a file cannot be written, or there is a part and ``resume`` is not set.
        DataError: If the part does not fit.
    """
    started = time.perf_counter()
    resumed = table.check_part(resume)
    try:
        with StopSignals(lambda: _hint(table)) as stop:
            if resumed:
                paths = table.resume(facts, paths, batch_size)
                if features is not None:
                    features.resume(table.rows)
            else:
                table.start(facts)
                if features is not None:
                    features.start()
            before = table.rows
            for records, values in work(paths):
                with stop.held():
                    if features is not None and values is not None:
                        features.append(values)  # first: rows of the table have features then
                    table.append(records)
            stop.waits = True
            stop.check()
            if features is not None:
                features.finish(metadata or {})
            table.finish()
    except OSError as error:
        if isinstance(error, VitClsError) or error.errno is None:
            raise
        raise ConfigError(
            f"--output {table.path.parent} cannot be written: {error.strerror or error}; {_hint(table)}."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            if features is not None:
                features.close(keep=resumed or table.rows > 0)
            table.close(keep=resumed or table.rows > 0)
    return Saved(table.rows, table.failed, before, time.perf_counter() - started)


def _hint(table: RowFile) -> str:
    if not table.rows:
        return "no row was complete"
    return (
        f"{table.rows} rows are kept in {table.part}. Repeat the command with --resume to continue "
        f"({os.fspath(table.path)} appears at the end)"
    )

"""Rows to files as they come; what a signal, a full disk or a crash leaves can be continued."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import numpy as np

from vit_cls.errors import ConfigError, RunError, VitClsError
from vit_cls.evaluation.features import FeatureFile
from vit_cls.evaluation.row_files import RowFile, Value

Chunk = tuple[Sequence[Mapping[str, Value]], np.ndarray | None]
"""Rows of one batch by column, and their features where those are wanted."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(RunError):
    """The work was stopped by a signal.

    Args:
        signum: The signal's number.
        hint: How to go on.
    """

    def __init__(self, signum: int, hint: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}{hint}")
        self.signum = signum


class StopSignals:
    """SIGINT and SIGTERM end the block with `Stopped`, but not in the middle of a write."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._held = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # others cannot have handlers
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.signum is not None:
            raise Stopped(self.signum) from error

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        if not self._held:
            # Not an Exception: decoding, which takes those for a damaged image, would make a row of it.
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let a write come to its end first; do not begin one after a signal."""
        self._held = True
        try:
            if self.signum is not None:
                raise KeyboardInterrupt
            yield
        finally:
            self._held = False
        if self.signum is not None:
            raise KeyboardInterrupt


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
        with StopSignals() as stop:
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
            with stop.held():
                if features is not None:
                    features.finish(metadata or {})
                table.finish()
    except Stopped as error:
        raise Stopped(error.signum, _hint(table)) from None
    except OSError as error:
        if isinstance(error, VitClsError) or error.errno is None:
            raise
        raise ConfigError(
            f"--output {table.path.parent} cannot be written: {error.strerror or error}{_hint(table)}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            if features is not None:
                features.close(keep=resumed or table.rows > 0)
            table.close(keep=resumed or table.rows > 0)
    return Saved(table.rows, table.failed, before, time.perf_counter() - started)


def _hint(table: RowFile) -> str:
    if not table.rows:
        return "."
    return (
        f"; {table.rows} rows are kept in {table.part}. Repeat the command with --resume to continue "
        f"({os.fspath(table.path)} appears at the end)."
    )

"""SIGINT and SIGTERM end work between two writes; what is done is kept, and the exit code is 130 or 143."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from vit_cls.errors import RunError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(RunError):
    """A signal ended the work; the command line exits with 128 and the signal's number.

    Args:
        hint: What is kept, and how to go on.
    """

    def __init__(self, signum: int, hint: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}{f'; {hint}' if hint else ''}.")
        self.signum = signum
        self.hint = hint


class _SignalCame(BaseException):
    """Not an Exception, which decoding would take for a damaged image; not what Lightning exits upon."""


class StopSignals:
    """SIGINT and SIGTERM end a ``with`` block with `Stopped`, but not in the middle of a write.

    Where blocks are nested the outermost that has a hint gives it. Handlers are Python's, so only the main
    thread can have them; in another thread the block changes nothing.

    Args:
        hint: Called after the block was stopped: what is kept, and how to go on.
    """

    def __init__(self, hint: Callable[[], str] = str) -> None:
        self.signum: int | None = None
        self.waits = False
        """Whether a first signal waits for the next `check`; a second one never does."""
        self._hint = hint
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self.listen()
        return self

    def listen(self) -> None:
        """Take the signals, also back from a library that has taken them since."""
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, self._note) for number in SIGNALS}
            self._before = self._before or before

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, Stopped):
            raise Stopped(error.signum, self._hint() or error.hint) from error
        if self.signum is not None and error is not None:  # without an error the work came to its end
            raise Stopped(self.signum, self._hint()) from error

    def _note(self, signum: int, frame: FrameType | None) -> None:
        again, self.signum = self.signum is not None, signum
        if again or not self.waits:
            raise _SignalCame

    def check(self) -> None:
        """End the block if a signal came."""
        if self.signum is not None:
            raise _SignalCame

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a write come to its end first; do not begin one after a signal."""
        self.waits = True
        try:
            self.check()
            yield
        finally:
            self.waits = False
        self.check()


def leave_signals_to_parent(worker_id: int = 0) -> None:
    """In a process that loads images: a scheduler signals every process of a job, and the parent decides."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

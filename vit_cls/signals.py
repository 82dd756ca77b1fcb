"""Signals end work between two steps or two files; what is done is kept, and the exit code is 128 + n."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from vit_cls.errors import RunError

NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
"""By which a terminal, a scheduler or a person ends work; a platform may lack some."""
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
ECHO_SECONDS = 0.2
"""The same signal within so short a time is one: torchrun and Slurm send on what the group got already."""


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

    def __init__(self, signum: int, hint: str = "") -> None:
        super().__init__(signum)
        self.signum = signum
        self.hint = hint


class _State:
    """What is true of the whole process."""

    def __init__(self) -> None:
        self.blocks: list[StopSignals] = []
        self.holds = 0
        self.came: tuple[int, float] | None = None
        """The first signal within the outermost block, and when."""
        self.heard: tuple[signal.Signals, ...] = SIGNALS
        self.patient = False
        """Whether the parent alone decides when this process has had time enough."""
        self.watched = False
        """Whether a thread ends the process after a second signal."""


_STATE = _State()


class StopSignals:
    """The signals of `SIGNALS` end a ``with`` block with `Stopped`, but not within a write (see `held`).

    Where blocks are nested the outermost that has a hint gives it. A signal that came when the work was all
    but done ends the block around it. SIGHUP that is ignored, as under nohup, stays so. Handlers are
    Python's, so only the main thread can have them; in another thread the block changes nothing.

    Args:
        hint: Called after the block was stopped: what is kept, and how to go on.
        is_program: Whether the process is there for this block alone: a second signal then ends it at once,
            and so does one after the block.
    """

    def __init__(self, hint: Callable[[], str] = str, *, is_program: bool = False) -> None:
        self.signum: int | None = None
        self.waits = False
        """Whether a first signal waits for the next `check`; a second one never does."""
        self._hint = hint
        self._is_program = is_program
        self._owner = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if _in_main_thread():
            if not _STATE.blocks:
                _STATE.came = None
            _STATE.blocks.append(self)
        self.listen()
        return self

    def listen(self) -> None:
        """Take the signals, also back from a library that has taken them since."""
        if not _in_main_thread():
            return
        ignored = [number for number in _STATE.heard if number == getattr(signal, "SIGHUP", None)]
        ignored = [number for number in ignored if signal.getsignal(number) is signal.SIG_IGN]
        wanted = [number for number in _STATE.heard if number not in ignored]
        before = {number: signal.signal(number, self._note) for number in wanted}
        self._before = self._before or before

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.waits = True
        program = self._is_program
        for number, handler in self._before.items():
            signal.signal(number, _leave if program else signal.SIG_DFL if handler is None else handler)
        if self in _STATE.blocks:
            _STATE.blocks.remove(self)
        if isinstance(error, Stopped | _SignalCame):
            raise Stopped(error.signum, self._hint() or error.hint) from error
        if self.signum is None:
            return
        if error is not None:
            raise Stopped(self.signum, self._hint()) from error
        if not _STATE.blocks:
            raise Stopped(self.signum, "all was done by then")
        _STATE.blocks[-1].signum = self.signum

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # in a copy of the process, whose parent decides
            return
        first, now = _STATE.came, time.monotonic()
        is_again = first is not None
        if first is None:
            _STATE.came = signum, now
        elif _STATE.patient or (signum == first[0] and now - first[1] < ECHO_SECONDS):
            return
        self.signum = signum
        if is_again and self._ends_at_once():
            _leave(signum, frame)
        if is_again or not (self.waits or _STATE.holds):
            raise _SignalCame(signum)

    def _ends_at_once(self) -> bool:
        return not _STATE.watched and any(block._is_program for block in (self, *_STATE.blocks))

    def check(self) -> None:
        """End the block if a signal came."""
        if self.signum is not None:
            raise _SignalCame(self.signum)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a write come to its end first; do not begin one after a signal."""
        self.check()
        with held():
            yield


@contextmanager
def held(hint: str = "") -> Iterator[None]:
    """Let what is in the block come to its end before a signal ends the `StopSignals` block around it.

    Args:
        hint: What is true after the block, for one who is told of the signal.
    """
    if not _in_main_thread():
        yield
        return
    _STATE.holds += 1
    try:
        yield
    finally:
        _STATE.holds -= 1
    block = _STATE.blocks[-1] if _STATE.blocks else None
    if block is not None and block.signum is not None and not (_STATE.holds or block.waits):
        raise _SignalCame(block.signum, hint)


@contextmanager
def starting_processes(*, heard: tuple[int, ...] = ()) -> Iterator[None]:
    """Processes that begin in the block never see a signal of `SIGNALS` but ``heard``.

    A scheduler signals every process of a job, and the parent decides. The block itself comes to its end:
    half a start leaves a process that complains of it.
    """
    with held():
        if not hasattr(signal, "pthread_sigmask"):
            yield
            return
        before = signal.pthread_sigmask(signal.SIG_BLOCK, set(SIGNALS) - set(heard))
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(*, heard: tuple[signal.Signals, ...] = ()) -> None:
    """In a process that works for another: ignore signals but ``heard``, and any second one."""
    _STATE.heard, _STATE.patient = heard, True
    for number in SIGNALS:
        if number not in heard:
            signal.signal(number, signal.SIG_IGN)


def watched(is_watched: bool) -> None:
    """Say whether a thread of the run ends this process after a second signal, with those it waits for."""
    _STATE.watched = is_watched


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _leave(signum: int, frame: FrameType | None) -> None:
    """End the process at once."""
    for child in multiprocessing.active_children():
        child.kill()
    with contextlib.suppress(OSError):
        if _STATE.came is not None:
            name = signal.Signals(signum).name
            os.write(2, f"vit-cls: stopped by {name}, the second signal, at once.\n".encode())
    os._exit(128 + signum)

"""A loader whose processes end in one paragraph where they die, are stopped, or wait for a file for ever."""

from __future__ import annotations

import atexit
import errno
import multiprocessing.process
import os
import signal
import threading
import time
import weakref
from multiprocessing import connection
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data._utils import MP_STATUS_CHECK_INTERVAL, signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from vit_cls.environment import shared_memory
from vit_cls.errors import RunError
from vit_cls.signals import starting_processes

NAMED = 8
"""Files of a batch that are named."""
NOT_HANDED_OVER = 77
"""Exit code of a loading process whose batch could not be handed over."""
LEAVE_SECONDS = 5.0
"""How long a killed process may take to be gone; one in a call to a dead disk is not waited for."""
STATES = {"T": "is stopped", "D": "waits for a disk or a network drive"}
"""What the states of a process in ``/proc`` mean, where they explain a silence."""


class WatchedLoader(DataLoader[Any]):
    """torch's loader; its ``timeout`` are the seconds without a batch after which it raises; 0 is for ever.

    torch's own waits in vain for a process that is stopped while it hands over a batch, and tells of a dead
    one wherever the program happens to be. A suspended program does not count its sleep.
    """

    prefix = "data."
    """Before ``num_workers`` and ``timeout_seconds``, as the user writes them."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module's state says where it is, and Lightning asks who can be resumed."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""

    def _get_iterator(self) -> Any:
        if not self.num_workers:
            return super()._get_iterator()
        try:
            with starting_processes():
                return _Batches(self)
        except OSError as error:
            raise RunError(
                f"the loading processes cannot be started ({error.strerror or error}){_room()}. Use fewer "
                f"{self.prefix}num_workers, or 0."
            ) from error


class _Batches(_MultiProcessingDataLoaderIter):
    """torch's iterator, with what is said when it has nothing to give."""

    def __init__(self, loader: WatchedLoader) -> None:
        self._workers: list[Any] = []
        self._keys: dict[int, Any] = {}
        self._prefix = loader.prefix
        self._owner = os.getpid()
        self._waits, self._is_waiting = 0, False
        self._silence: str | None = None
        self._seconds: float | None = None
        super().__init__(loader)
        self._seconds, self._timeout = self._timeout, 0
        # Else torch's handler of SIGCHLD would raise wherever the program is: `_try_get_data` sees it too.
        signal_handling._remove_worker_pids(id(self))
        self._worker_pids_set = False
        _OPEN.add(self)
        if self._seconds > 0:
            given = (weakref.ref(self), self._seconds)
            threading.Thread(target=_watch, args=given, daemon=True, name="loader-watch").start()

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        self._keys = {}
        super()._reset(loader, first_iter)

    def _next_index(self) -> Any:
        keys = super()._next_index()
        self._keys[self._send_idx] = keys
        self._keys.pop(self._rcvd_idx - 1, None)
        return keys

    def _get_data(self) -> Any:
        self._waits, self._is_waiting = self._waits + 1, True
        try:
            return super()._get_data()
        except (RuntimeError, OSError, EOFError) as error:
            raise RunError(self._failure(error)) from error
        finally:
            self._is_waiting = False

    def _try_get_data(self, timeout: float = MP_STATUS_CHECK_INTERVAL) -> Any:
        if self._silence is not None:
            raise RuntimeError("no batch came")
        if self._pin_memory:  # a thread of this process waits for the others
            return super()._try_get_data(timeout)
        sentinels = [worker.sentinel for worker in self._workers]
        reader = self._worker_result_queue._reader  # type: ignore[attr-defined]
        connection.wait([reader, *sentinels], timeout)
        return super()._try_get_data(0)

    def _process_data(self, data: Any, worker_idx: int) -> Any:
        try:
            return super()._process_data(data, worker_idx)
        except MemoryError as error:
            self.end_workers()
            raise RunError(
                f"a loading process had not enough memory. Use fewer {self._prefix}num_workers, or smaller "
                "batches."
            ) from error

    def _failure(self, error: BaseException) -> str:
        """Why no batch came, in a paragraph; ends all processes."""
        if self._silence is not None:
            text = self._silence
        elif getattr(error, "errno", None) == errno.EMFILE or "open files" in str(error):
            text = (
                "the loading processes hand over images by open files, and this program may open no more. "
                f"Raise its limit (ulimit -n 65536), or use fewer {self._prefix}num_workers."
            )
        else:
            dead = {i: worker.exitcode for i, worker in enumerate(self._workers) if not worker.is_alive()}
            how = " and ".join(sorted({_ending(code) for code in dead.values()})) or str(error)
            files = "" if NOT_HANDED_OVER in dead.values() else self._files(set(dead), "It was to load")
            text = (
                f"a loading process died ({how}), of a fault in a decoder or for want of memory{_room()}."
                f"{files} Use fewer {self._prefix}num_workers, or 0."
            )
        self.end_workers()
        return text

    def note_silence(self) -> None:
        """Put down why there is no batch, and wake up who waits for one: its sender is killed."""
        info = self._task_info.get(self._rcvd_idx)
        late = set(range(len(self._workers))) if info is None else {info[0]}
        states = {STATES.get(_state_of(self._workers[i].pid), "") for i in late}
        why = "".join(f"; one {state}" for state in sorted(states) if state)
        self._silence = (
            f"no loading process gave a batch for {self._seconds:g} seconds{why}."
            f"{self._files(late, 'Waited for')} A drive that does not answer, or a stopped process, does "
            f"that; where loading takes so long, raise {self._prefix}timeout_seconds (0 waits for ever)."
        )
        for worker in self._workers:
            worker.kill()

    def _files(self, workers: set[int], words: str) -> str:
        """The files of the first batch that some processes owe, by their names."""
        owed = [i for i, info in sorted(self._task_info.items()) if len(info) == 1 and info[0] in workers]
        keys = self._keys.get(owed[0], []) if owed else []
        name_of = getattr(self._dataset, "name_of", None)
        if not keys or name_of is None:
            return ""
        names = ", ".join(name_of(key) for key in keys[:NAMED])
        return f" {words} {names}{f' and {len(keys) - NAMED} more' if len(keys) > NAMED else ''}."

    def _shutdown_workers(self) -> None:
        if self._seconds is not None:  # else it could not be made
            super()._shutdown_workers()
        self.end_workers()

    def end_workers(self) -> None:
        """Kill who is still there: they ignore SIGTERM, and Python would wait for them when it ends."""
        if os.getpid() != self._owner:
            return
        for worker in self._workers:
            worker.kill()
        deadline = time.monotonic() + LEAVE_SECONDS
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.is_alive():
                multiprocessing.process._children.discard(worker)  # type: ignore[attr-defined]


_OPEN: weakref.WeakSet[_Batches] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    for batches in list(_OPEN):
        batches.end_workers()


def _watch(reference: weakref.ref[_Batches], seconds: float) -> None:
    """Count the seconds of one wait by ticks, of which a suspended program makes none."""
    tick = min(1.0, seconds / 4)
    before, waited = 0, 0.0
    while (batches := reference()) is not None and not batches._shutdown:
        same = batches._is_waiting and batches._waits == before
        before, waited = batches._waits, waited + tick if same else 0.0
        if waited >= seconds:
            batches.note_silence()
            return
        del batches
        time.sleep(tick)


def _ending(code: int | None) -> str:
    """How a process ended, by its exit code."""
    if code == NOT_HANDED_OVER:
        return "its batch could not be handed over"
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def _state_of(pid: int) -> str:
    """The letter that Linux gives for what a process does; empty where it is not known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _room() -> str:
    room = shared_memory()
    return f" ({room}; a container gets more by --shm-size 1g)" if room else ""

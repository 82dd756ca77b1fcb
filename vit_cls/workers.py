"""Processes that work side by side, leave signals to their parent, and never outlive it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, TypeVar

from vit_cls.checks import check_range
from vit_cls.environment import cpu_count
from vit_cls.errors import RunError
from vit_cls.own_code import import_modules, imported
from vit_cls.signals import Stopped, leave_signals_to_parent, starting_processes

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK = 16
"""Items that a process gets at once; after a crash those in flight are tried again one by one."""
PATIENCE_SECONDS = 30.0
"""How long a process may take to stop, such as for the last step of a training."""


class WorkerPool(ProcessPoolExecutor):
    """A pool of fresh processes, for a ``with`` block.

    If the block raises, as on Ctrl-C, what waits is cancelled and what runs is told to stop by SIGTERM, on
    which a training ends after its step. Ctrl-C itself reaches the parent alone, so that there is one that
    decides; processes whose parent was killed leave on their own. Each may use its share of the cores.

    Args:
        num_workers: How many processes, at least 1.
        start: Called once in each of them, once the modules of ``--import`` are there; sent between
            processes, like all that is submitted.
    """

    def __init__(self, num_workers: int, start: Callable[[], object] | None = None) -> None:
        # spawn: a forked copy of a process that has run torch's threads may hang
        context = multiprocessing.get_context("spawn")
        share = max(1, cpu_count() // num_workers)
        given = (share, start, list(imported()))
        super().__init__(num_workers, context, initializer=_start, initargs=given)
        self._others = set(multiprocessing.active_children())

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Have a function of a module called in a process; one that raises `Stopped` ends its process."""
        with starting_processes():
            resource_tracker.ensure_running()  # which lets SIGINT and SIGTERM through again
        with starting_processes(heard=(signal.SIGTERM,)):
            return super().submit(_leave_when_stopped, function, *args, **kwargs)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.shutdown(wait=False, cancel_futures=True)
            _end(set(multiprocessing.active_children()) - self._others)
        self.shutdown(wait=True)


def each_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], *, crashed: Result, num_workers: int
) -> Iterator[tuple[int, Result]]:
    """Call a function on every item, in processes of its own; an item that kills its process is a result too.

    Args:
        function: A function of a module, which does not raise. It, the items and the results are sent between
            processes.
        crashed: The result of an item whose process died, of a fault in a decoder or for want of memory.
        num_workers: Processes; 0 calls the function here, where such an item would end the program.

    Yields:
        Position and result of every item, once each, as they come.

    Raises:
        ConfigError: If ``num_workers`` is negative.
        RunError: If processes cannot be started.
    """
    check_range("num_workers", num_workers, at_least=0)
    if num_workers == 0:
        yield from enumerate(map(function, items))
        return
    waiting = deque(range(i, min(i + CHUNK, len(items))) for i in range(0, len(items), CHUNK))
    while waiting:
        suspects = yield from _until_a_crash(function, items, waiting, num_workers)
        yield from _one_by_one(function, items, suspects, crashed)


def _until_a_crash(
    function: Callable[[Item], Result], items: Sequence[Item], waiting: deque[range], num_workers: int
) -> Generator[tuple[int, Result], None, list[int]]:
    """Take chunks off ``waiting``; returns what was in flight when a process died, or nothing."""
    running: dict[Future[list[Result]], range] = {}
    try:
        with WorkerPool(min(num_workers, len(waiting))) as pool:
            while waiting or running:
                while waiting and len(running) < 2 * num_workers:
                    part = waiting[0]
                    running[pool.submit(_apply, function, items[part.start : part.stop])] = part
                    waiting.popleft()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield from zip(running[future], future.result(), strict=True)
                    del running[future]
    except BrokenProcessPool:
        return [position for part in running.values() for position in part]
    return []


def _one_by_one(
    function: Callable[[Item], Result], items: Sequence[Item], positions: Iterable[int], crashed: Result
) -> Iterator[tuple[int, Result]]:
    """Try each item alone; it is the culprit if its process dies."""
    left = deque(positions)
    while left:
        try:
            with WorkerPool(1) as pool:
                _check_start(pool)
                while left:
                    yield left[0], pool.submit(function, items[left[0]]).result()
                    left.popleft()
        except BrokenProcessPool:
            yield left.popleft(), crashed


def _check_start(pool: WorkerPool) -> None:
    """Where a process dies of nothing, it is at fault, and not a file."""
    try:
        pool.submit(int).result()
    except BrokenProcessPool as error:
        raise RunError(
            "worker processes cannot be started here (a script needs `if __name__ == '__main__':` around "
            "what it runs). Use num_workers 0."
        ) from error


def _apply(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [function(item) for item in items]


def _leave_when_stopped(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """It must not ask for more work: the lock on the queue may be held by one that has just been killed."""
    try:
        return function(*args, **kwargs)
    except Stopped as error:
        os._exit(128 + error.signum)


def _end(processes: set[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + PATIENCE_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()


def _start(cores: int, start: Callable[[], object] | None, modules: list[str]) -> None:
    os.environ["LOKY_MAX_CPU_COUNT"] = str(cores)  # what `cpu_count` heeds
    leave_signals_to_parent(heard=(signal.SIGTERM,))
    sys.stdout = sys.stderr  # the parent's stdout is for its result
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    import_modules(modules)
    if start is not None:
        start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)

"""Work on many files in several processes; a file that kills its process is an answer too."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from vit_cls.errors import ConfigError, RunError

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK = 16
"""Items that a process gets at once. After a crash those in flight are tried again one by one."""


def each_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], *, crashed: Result, num_workers: int
) -> Iterator[tuple[int, Result]]:
    """Call a function on every item, in processes of its own.

    Args:
        function: A function of a module, which does not raise. It, the items and the results are sent
            between processes.
        items: Its arguments.
        crashed: The result of an item whose process died, of a fault in a decoder or for want of memory.
        num_workers: Processes; 0 calls the function here, where such an item would end the program.

    Yields:
        Position and result of every item, once each, as they come.

    Raises:
        ConfigError: If ``num_workers`` is negative.
        RunError: If processes cannot be started.
    """
    if num_workers < 0:
        raise ConfigError(f"num_workers must not be negative; got {num_workers}.")
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
    pool = _pool(min(num_workers, len(waiting)))
    running: dict[Future[list[Result]], range] = {}
    try:
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
    finally:
        pool.shutdown(cancel_futures=True)
    return []


def _one_by_one(
    function: Callable[[Item], Result], items: Sequence[Item], positions: Iterable[int], crashed: Result
) -> Iterator[tuple[int, Result]]:
    """Try each item alone; it is the culprit if its process dies."""
    pool: ProcessPoolExecutor | None = None
    try:
        for position in positions:
            pool = pool or _tried_pool()
            try:
                yield position, pool.submit(function, items[position]).result()
            except BrokenProcessPool:
                pool.shutdown()
                pool = None
                yield position, crashed
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _tried_pool() -> ProcessPoolExecutor:
    """A process that has answered: otherwise it, and not a file, would be at fault."""
    pool = _pool(1)
    try:
        pool.submit(int).result()
    except BrokenProcessPool as error:
        raise RunError(
            "worker processes cannot be started here (a script needs `if __name__ == '__main__':` around "
            "what it runs). Use num_workers 0."
        ) from error
    return pool


def _pool(num_workers: int) -> ProcessPoolExecutor:
    # spawn: a forked copy of a process that has run torch's threads may hang
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_workers, mp_context=context, initializer=_leave_interrupts_to_the_parent)


def _apply(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [function(item) for item in items]


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

"""Processes that train side by side, stop when their parent is stopped, and never outlive it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

PATIENCE_SECONDS = 30.0
"""How long a process may take for its last step."""


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of fresh processes, each with its share of the cores.

    If the block raises, as on Ctrl-C, what waits is cancelled and what runs is told to stop by SIGTERM, on
    which a training ends after its step. Ctrl-C itself reaches the parent alone, so that there is one that
    decides; processes whose parent was killed leave on their own.

    Args:
        count: How many processes.

    Yields:
        The pool. Submit inside of `interrupts_held`, and what may be stopped by `leave_when_stopped`.
    """
    others = set(multiprocessing.active_children())
    threads = max(1, num_cores() // count)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, initializer=_start, initargs=(threads,))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        _end(set(multiprocessing.active_children()) - others)
        raise
    finally:
        pool.shutdown(wait=True)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let SIGINT wait until the end of the block; processes that begin in it never see any."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_when_stopped(work: Callable[..., Any], *args: Any) -> Any:
    """Do some work in a process of `workers`; where a signal stops it, the process ends.

    It must not ask for more work: the lock on the queue may be held by one that has just been killed.

    Args:
        work: Raises an error with ``signum`` where a signal stopped it.
        args: Its arguments.

    Returns:
        What ``work`` returns.
    """
    try:
        return work(*args)
    except Exception as error:
        if hasattr(error, "signum"):
            os._exit(128 + error.signum)
        raise


def _end(processes: set[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + PATIENCE_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr  # the parent's stdout is for its result
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)

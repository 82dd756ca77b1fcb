"""Work in several processes: every answer once, and a file that kills its process is one of them."""

from __future__ import annotations

import os
import signal
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from operator import call

import pytest

from vit_cls import workers
from vit_cls.environment import cpu_count
from vit_cls.errors import ConfigError, RunError
from vit_cls.signals import Stopped, StopSignals
from vit_cls.workers import CHUNK, WorkerPool, each_in_processes


def test_without_processes_the_answers_come_in_order():
    items = [partial(int, i) for i in range(5)]
    assert list(each_in_processes(call, items, crashed=-1, num_workers=0)) == list(enumerate(range(5)))
    assert list(each_in_processes(call, [], crashed=-1, num_workers=2)) == []


def test_negative_number_of_processes_is_refused():
    with pytest.raises(ConfigError, match="num_workers must be at least 0; got -1"):
        list(each_in_processes(call, [], crashed=-1, num_workers=-1))


def test_item_that_kills_its_process_is_an_answer_and_the_others_are_worked_on():
    items = [partial(int, i) for i in range(3 * CHUNK)]
    items[5] = items[CHUNK + 7] = partial(os._exit, 1)
    results = dict(each_in_processes(call, items, crashed=-1, num_workers=1))
    expected = dict(enumerate(range(3 * CHUNK))) | {5: -1, CHUNK + 7: -1}
    assert results == expected


def test_processes_that_cannot_start_are_not_blamed_on_files(monkeypatch):
    monkeypatch.setattr(workers, "_start", partial(os._exit, 1))
    with pytest.raises(RunError, match=r"cannot be started.*num_workers 0"):
        list(each_in_processes(call, [partial(int, 1)], crashed=-1, num_workers=1))


def test_a_signal_waits_until_a_process_has_begun(monkeypatch):
    begun = []

    def submit(self, function, *args, **kwargs):
        signal.raise_signal(signal.SIGTERM)  # between a process and what it is to be told
        begun.append(function)
        return Future()

    monkeypatch.setattr(ProcessPoolExecutor, "submit", submit)
    with pytest.raises(Stopped, match="SIGTERM"), StopSignals(), WorkerPool(1) as pool:
        pool.submit(int)
    assert len(begun) == 1


def test_processes_side_by_side_share_the_usable_cores(monkeypatch):
    monkeypatch.setattr(workers, "cpu_count", lambda: 3)
    with WorkerPool(2) as pool:
        assert pool.submit(cpu_count).result() == 1

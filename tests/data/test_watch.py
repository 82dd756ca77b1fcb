"""A loading process that dies, is stopped or never answers ends in one paragraph, and nobody outlives it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vit_cls.data import loader as loader_module
from vit_cls.data import watch
from vit_cls.data.dataset import FolderSource, ImageDataset
from vit_cls.data.index import index_folder
from vit_cls.data.loader import load_once, make_loader
from vit_cls.data.sampler import EpochSampler
from vit_cls.data.transforms import eval_reader
from vit_cls.errors import RunError

READER = eval_reader(12)
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture
def folder(tmp_path, write_folder) -> Path:
    return write_folder(tmp_path, {"a": 12, "b": 12})


def _loader(folder: Path, num_workers: int = 2, **settings):
    dataset = ImageDataset(FolderSource(index_folder(folder)), READER)
    sampler = EpochSampler(len(dataset), seed=0, shuffle=False)
    return make_loader(dataset, sampler, batch_size=4, num_workers=num_workers, **settings)


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:4]
    except OSError:
        return False


def _pids(batches) -> list[int]:
    return [worker.pid for worker in batches._workers]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_process_is_named_with_what_it_was_to_load_where_batches_are_asked_for_alone(folder, how):
    batches = iter(_loader(folder))
    next(batches)
    pids = _pids(batches)
    os.kill(pids[0], how)
    time.sleep(0.2)  # torch's own handler would raise here, in whatever the program does
    pattern = (
        rf"a loading process died \(killed by {how.name}\).*/dev/shm has .*Use fewer data\.num_workers, or 0"
    )
    with pytest.raises(RunError, match=pattern) as caught:
        list(batches)
    assert re.search(r"It was to load \S+/\w/\d+\.\w+, ", str(caught.value))
    assert not any(map(_alive, pids))


def test_a_stopped_process_ends_the_wait_and_names_the_files_of_its_batch(folder):
    batches = iter(_loader(folder, timeout_seconds=1.0))
    pids = _pids(batches)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    with pytest.raises(
        RunError, match=r"gave a batch for 1 seconds; one is stopped\. Waited for \S+/a/"
    ) as caught:
        list(batches)
    assert "raise data.timeout_seconds (0 waits for ever)" in str(caught.value)
    assert not any(map(_alive, pids))


def test_a_process_that_is_stopped_while_it_hands_over_a_batch_is_not_waited_for(folder):
    """The batch is announced; to fetch it asks the process, which torch's timeout does not cover."""
    batches = iter(_loader(folder, num_workers=1, timeout_seconds=1.0))
    time.sleep(1.0)
    assert batches._worker_result_queue._reader.poll(30)
    os.kill(_pids(batches)[0], signal.SIGSTOP)
    with pytest.raises(RunError, match="gave a batch for 1 seconds"):
        list(batches)


class _Waits:
    """A reader for whom one file never answers."""

    in_chans, size = 3, (12, 12)

    def __init__(self, fifo: Path) -> None:
        self.fifo = fifo

    def __call__(self, data, key=None):
        with self.fifo.open():
            return READER(data)


@pytest.mark.parametrize("which", ["paths", "index"])
def test_a_file_that_never_answers_ends_an_evaluation_by_the_users_words(folder, tmp_path_factory, which):
    fifo = tmp_path_factory.mktemp("fifo") / "never"
    os.mkfifo(fifo)
    paths = sorted(folder.rglob("*.*"))
    images = paths if which == "paths" else FolderSource(index_folder(folder))
    loaded = load_once(images, _Waits(fifo), batch_size=9, num_workers=1, timeout_seconds=0.5)
    names = ", ".join(map(str, paths[: watch.NAMED]))
    pattern = rf"for 0\.5 seconds\. Waited for {names} and 1 more\..*raise --timeout_seconds "
    with pytest.raises(RunError, match=pattern):
        list(loaded)


def test_a_slow_process_and_a_suspended_program_are_no_false_alarm(folder, monkeypatch):
    def slow(samples, collate=loader_module.collate):
        time.sleep(0.3)
        return collate(samples)

    monkeypatch.setattr(loader_module, "collate", slow)
    assert len(list(_loader(folder, num_workers=1, timeout_seconds=1.0))) == 6  # 1.8 seconds in all
    now = [0.0]
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + 3600))

    class Batches:
        _is_waiting, _waits, _shutdown = True, 1, False

        def note_silence(self):
            raise AssertionError

    waiting = Batches()
    ticks = iter(range(4))

    def reference():
        waiting._shutdown = next(ticks) == 3
        return waiting

    watch._watch(reference, 300.0)  # three ticks of an hour each: three seconds of waiting
    assert now[0] == 3 * 3600


def test_want_of_memory_in_a_process_is_a_paragraph(folder, monkeypatch):
    def no_memory(samples):
        raise MemoryError

    monkeypatch.setattr(loader_module, "collate", no_memory)
    with pytest.raises(RunError, match=r"had not enough memory\. Use fewer data\.num_workers"):
        list(_loader(folder, num_workers=1))


def test_processes_that_cannot_be_started_are_a_paragraph(folder, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("multiprocessing.synchronize._multiprocessing.SemLock", refuse)
    with pytest.raises(RunError, match=r"cannot be started \(No space left on device\)"):
        iter(_loader(folder))


@pytest.fixture
def memory(monkeypatch, caplog):
    """A function that says how much shared memory is free; notes are in ``caplog``."""
    loader_module._say_once.cache_clear()
    caplog.set_level("INFO", "vit_cls")
    return lambda free: monkeypatch.setattr(loader_module, "free_shared_memory", lambda: free)


BATCH = 4 * 3 * 12 * 12 + 4 * 4096
"""Bytes of a batch of `_loader`, with what its process takes beside."""


@pytest.mark.parametrize(
    ("free", "sharing", "workers", "prefetch"),
    [
        ((8 * 2 + 2) * BATCH, 1, 8, 2),
        ((8 * 2 + 2) * BATCH - 1, 1, 8, 1),
        ((8 + 2) * BATCH - 1, 1, 7, 1),
        (3 * BATCH, 1, 1, 1),
        (3 * BATCH - 1, 1, 0, None),
        (2 * (8 * 2 + 2) * BATCH, 2, 8, 2),
        (2 * (8 * 2 + 2) * BATCH - 1, 2, 8, 1),
        (None, 1, 8, 2),
    ],
)
def test_no_more_is_loaded_ahead_than_fits(folder, memory, caplog, free, sharing, workers, prefetch):
    memory(free)
    loaders = [_loader(folder, num_workers=8, loaders=sharing) for _ in range(2)]
    assert {(loader.num_workers, loader.prefetch_factor) for loader in loaders} == {(workers, prefetch)}
    notes = [record.getMessage() for record in caplog.records]
    assert len(notes) == (prefetch != 2)
    if notes:
        then = f"{workers} load 1 batch ahead each" if workers else "the main process loads"
        assert notes[0].startswith("data.num_workers 8 takes ")
        assert f": {then}; a container gets more by --shm-size 1g" in notes[0]


def test_a_default_recipe_in_dockers_64_mb_loads_what_fits(memory):
    memory(64 * 2**20)
    pixels = 64 * 3 * 224 * 224
    assert loader_module._that_fit(8, pixels, 1, "--num_workers") == (4, 1)
    assert loader_module._that_fit(4, pixels, 2, "data.num_workers") == (1, 1)


PROGRAM = """
import os, sys
from tests.data.test_watch import *
from tests.data.test_watch import _loader, _pids
batches = iter(_loader(Path(sys.argv[1]), num_workers=2))
next(batches)
os.kill(_pids(batches)[0], signal.SIGSTOP)
print(*_pids(batches), flush=True)
kept = batches  # as a traceback keeps it
raise SystemExit(3)
"""


def test_a_program_ends_though_its_processes_are_stopped_or_ignore_signals(folder):
    words = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    assert not any(_alive(int(pid)) for pid in done.stdout.split())

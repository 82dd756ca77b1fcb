"""One process at a time writes into a folder, and a lock of one that is gone is no lock."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vit_cls import locks
from vit_cls.errors import ConfigError
from vit_cls.locks import LOCK, Holder, alone_in

HERE = Holder.this_process()


def _left_by(folder: Path, **changes: object) -> Path:
    """A lock that another process has left."""
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(dataclasses.asdict(HERE) | {"token": "other"} | changes))
    return folder


def test_a_second_writer_is_refused_and_the_first_keeps_everything(tmp_path):
    with alone_in(tmp_path / "new/run", "run_dir"):
        (tmp_path / "new/run/mine").touch()
        refused = rf"run_dir .*new/run: process {os.getpid()} has been writing"
        with pytest.raises(ConfigError, match=refused), alone_in(tmp_path / "new/run", "run_dir"):
            pytest.fail("not reached")
        assert sorted(os.listdir(tmp_path / "new/run")) == [LOCK, "mine"]
        with alone_in(tmp_path / "new/run", name=f"{LOCK}-part"):
            pass  # a part of its own
    assert os.listdir(tmp_path / "new/run") == ["mine"]
    with alone_in(tmp_path / "new/run"):
        pass


def test_what_was_made_for_a_failure_goes_again(tmp_path):
    with pytest.raises(KeyError), alone_in(tmp_path / "new/run"):
        raise KeyError
    assert not os.listdir(tmp_path)
    with alone_in(None):
        pass


@pytest.mark.parametrize(
    "changes",
    [
        {"started": "another"},
        {"pid": 2**22 + 1},
        {"boot": "before"},
        {"host": "other", "job": "7 0"},
    ],
    ids=["its number was given again", "it has ended", "the machine was started again", "Slurm requeued it"],
)
def test_a_lock_of_a_process_that_is_gone_is_taken_over(tmp_path, monkeypatch, changes):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    folder = _left_by(tmp_path / "run", **changes)
    with alone_in(folder):
        assert json.loads((folder / LOCK).read_text())["token"] != "other"
        assert os.listdir(folder) == [LOCK]
    assert os.listdir(folder) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_lock_is_taken_over(tmp_path, text):
    (tmp_path / LOCK).write_text(text)
    with alone_in(tmp_path):
        assert len((tmp_path / LOCK).read_text()) > 50


def test_a_lock_of_another_machine_is_refused_with_the_file_to_remove(tmp_path):
    folder = _left_by(tmp_path / "run", host="elsewhere", pid=12)
    refused = rf"process 12 on elsewhere .* remove {folder}/{LOCK}"
    with pytest.raises(ConfigError, match=refused), alone_in(folder):
        pytest.fail("not reached")
    assert json.loads((folder / LOCK).read_text())["token"] == "other"


def test_of_many_that_find_a_stale_lock_one_at_a_time_has_the_folder(tmp_path):
    inside, most, entered = 0, 0, 0
    counting = threading.Lock()

    def enter() -> None:
        nonlocal inside, most, entered
        for _ in range(30):
            try:
                with alone_in(tmp_path):
                    with counting:
                        inside, entered = inside + 1, entered + 1
                        most = max(most, inside)
                    with counting:
                        inside -= 1
                    _left_by(tmp_path, pid=2**22 + 1, token=os.urandom(4).hex())  # as if it was killed
            except ConfigError:
                pass

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert entered >= 30
    assert most == 1


def test_a_file_system_without_links_has_locks_too(tmp_path, monkeypatch):
    def refuse(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(locks.os, "link", refuse)
    with alone_in(tmp_path), pytest.raises(ConfigError, match="has been writing"), alone_in(tmp_path):
        pytest.fail("not reached")
    assert not os.listdir(tmp_path)


def test_a_process_that_was_forked_does_not_give_the_lock_away(tmp_path):
    with alone_in(tmp_path):
        holder = Holder(**json.loads((tmp_path / LOCK).read_text()))
        child = multiprocessing.get_context("fork").Process(
            target=locks._release, args=(tmp_path / LOCK, holder)
        )
        child.start()
        child.join()
        assert (tmp_path / LOCK).is_file()


def test_a_process_that_runs_keeps_the_folder_until_it_is_killed(tmp_path):
    code = "import sys, time; from pathlib import Path; from vit_cls.locks import alone_in\n"
    code += "with alone_in(Path(sys.argv[1])): print('in', flush=True); time.sleep(600)"
    words = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        refused = f"process {process.pid} has been writing"
        with pytest.raises(ConfigError, match=refused), alone_in(tmp_path):
            pytest.fail("not reached")
        process.send_signal(signal.SIGKILL)
        process.wait()
    with alone_in(tmp_path):
        pass

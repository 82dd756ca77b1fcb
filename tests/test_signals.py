"""Signals: one table, one handler; every phase of every verb ends between two steps or two files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vit_cls import signals
from vit_cls.files import replacing
from vit_cls.signals import SIGNALS, Stopped, StopSignals, held, leave_signals_to_parent

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/fault_cases.py"
IN_FEW_PHASES = (
    *("fit, 2 loading: step", "fit, 2 loading: checkpoint", "fit: report", "evaluate, 2 loading: image"),
    *("predict: file", "export: imports"),
)


@pytest.mark.parametrize("signum", SIGNALS, ids=lambda signum: signum.name)
def test_every_signal_of_the_table_ends_a_block_and_is_given_back(signum):
    before = signal.getsignal(signum)
    with (
        pytest.raises(Stopped, match=f"stopped by {signum.name}; kept") as stopped,
        StopSignals(lambda: "kept"),
    ):
        signal.raise_signal(signum)
    assert stopped.value.signum == signum
    assert signal.getsignal(signum) is before


def test_a_platform_may_lack_some():
    assert {"SIGINT", "SIGTERM"} <= {number.name for number in SIGNALS} <= set(signals.NAMES)


def test_a_hangup_that_is_ignored_stays_so(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_file_that_is_being_written_comes_to_its_end(tmp_path):
    file = tmp_path / "file"
    with pytest.raises(Stopped), StopSignals():
        with replacing(file) as temporary:
            signal.raise_signal(signal.SIGTERM)
            temporary.write_text("all")
        file.write_text("not reached")
    assert file.read_text() == "all"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_second_signal_does_not_wait_but_an_echo_is_none(monkeypatch):
    done = []
    with pytest.raises(Stopped, match="SIGTERM"), StopSignals(), held():
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        done.append("after the echo")
        monkeypatch.setattr(signals, "ECHO_SECONDS", 0.0)
        signal.raise_signal(signal.SIGTERM)
        done.append("not reached")
    assert done == ["after the echo"]


def test_a_signal_when_all_is_done_ends_the_block_around_it():
    done = []
    with pytest.raises(Stopped, match="SIGUSR1; what is around"), StopSignals(lambda: "what is around"):
        with StopSignals(lambda: "inner") as inner:
            inner.waits = True
            signal.raise_signal(signal.SIGUSR1)
        done.append("inner")
        with held():
            done.append("held")
        done.append("not reached")
    assert done == ["inner", "held"]
    with pytest.raises(Stopped, match="all was done by then"), StopSignals() as block:
        block.waits = True
        signal.raise_signal(signal.SIGUSR1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="copies of a process")
def test_a_copy_of_the_process_leaves_signals_to_it():
    with StopSignals():
        pid = os.fork()
        if not pid:
            for signum in SIGNALS:
                signal.raise_signal(signum)
            leave_signals_to_parent()
            for signum in SIGNALS:
                signal.raise_signal(signum)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


PROGRAM = """
import sys, time
import vit_cls.cli, types
def run(words):
    print("begun", flush=True, file=sys.stderr)
    while True:
        with vit_cls.cli.held():
            time.sleep(100)
sys.modules["verb"] = types.SimpleNamespace(run=run)
vit_cls.cli.COMMANDS["verb"] = ("", "verb")
sys.argv = ["vit-cls", "verb"]
sys.exit(vit_cls.cli.main())
"""


def test_a_second_signal_ends_the_program_at_once_with_its_code():
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (129, "vit-cls: stopped by SIGHUP, the second signal, at once.\n")


@pytest.mark.skipif(not Path("/proc").exists(), reason="the script needs Linux")
def test_a_signal_in_any_phase_keeps_what_is_done_and_says_so_in_one_line(python):
    """All phases of all verbs, with all signals: `scripts/fault_cases.py`, by hand."""
    words = ["--kind", "signals", "--signals", "USR1", "--only", ";".join(IN_FEW_PHASES)]
    ran = python.start(SCRIPT, *words)
    out, err = ran.communicate(timeout=250)
    assert ran.returncode == 0, out + err
    assert f"{len(IN_FEW_PHASES)} of {len(IN_FEW_PHASES)} ended as documented" in out

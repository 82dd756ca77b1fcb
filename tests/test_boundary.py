"""What is not ours ends in one paragraph, and what is ours is told as such."""

from __future__ import annotations

import errno
import io
import os
import sys
import types
from pathlib import Path

import pytest

from vit_cls import cli
from vit_cls.boundary import LONG, ReaderGone, Sturdy, paragraph, printing
from vit_cls.errors import RunError
from vit_cls.files import write_text

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/fault_cases.py"
FEW = ("fit: files of at most 4", "fit: a folder as last", "evaluate: stdout full", "export: a name of 300")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "", "/x/.run.json.abcd1234.tmp"), r"^/x/run.json: No space left .* Make room"),
        (OSError("Error while serializing: I/O (os error 28)"), "^No space left on device. Make room"),
        (ValueError("Error while serializing: I/O (os error 122)"), "quota"),
        (OSError(errno.EROFS, "", "out"), "^out: Read-only file system. Choose a folder"),
        (OSError(errno.EACCES, "", "out"), "^out: Permission denied. Ask for the right"),
        (OSError(errno.ENAMETOOLONG, "", "n" * 5000), r"^n+\.\.\.n+ \(5000 characters\): File name too long"),
        (
            OSError("it cannot be written: [enforce fail at inline_container.cc:1] . x"),
            "^it cannot be written. Look",
        ),
        (FileNotFoundError(errno.ENOENT, "", "run"), "^run: No such file .* moved or deleted"),
        (MemoryError(), "^the memory is not enough. Take smaller"),
        (RecursionError(), "nested too deeply"),
        (RuntimeError("Could not determine home directory."), "set HOME"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_the_paragraph_names_the_place_and_what_to_do(error, told):
    assert len(paragraph(error)) < LONG + 200
    with pytest.raises(AssertionError, match=told):
        raise AssertionError(paragraph(error))
    assert paragraph(error, "the place").startswith(("the place: ", *paragraph(error)[:5].split("\n")))


def test_the_cause_is_told_and_a_fault_of_ours_is_none():
    wrapped = ValueError("wrapped")
    wrapped.__cause__ = OSError(errno.ENOSPC, "")
    assert "No space left" in paragraph(wrapped)
    assert paragraph(ValueError("ours")) is None


def test_a_write_that_fails_names_its_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as raised:
        write_text(tmp_path / "run.json", "{}")
    assert paragraph(raised.value).startswith(f"{tmp_path / 'run.json'}: No space left")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def verb(monkeypatch):
    """A verb that raises an error."""

    def make(error):
        def run(words):
            raise error

        monkeypatch.setitem(sys.modules, "a_verb", types.SimpleNamespace(run=run))
        monkeypatch.setitem(cli.COMMANDS, "verb", ("", "a_verb"))

    return make


def test_a_fault_of_ours_is_told_as_such_and_debug_shows_it(verb, capsys):
    verb(KeyError("x"))
    assert cli.main(["verb"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("vit-cls: a fault of vit-cls itself (KeyError: 'x', ")
    assert len(told.splitlines()) == 1
    with pytest.raises(KeyError):
        cli.main(["verb", "--debug"])


def test_what_is_not_ours_has_its_code(verb, capsys):
    verb(PermissionError(errno.EACCES, "", "out"))
    assert cli.main(["verb"]) == 2
    assert capsys.readouterr().err == (
        "vit-cls: out: Permission denied. Ask for the right to it, or choose another place.\n"
    )


def test_torchs_advice_reaches_nobody(verb, capsys):
    verb(RuntimeError("Weights only load failed. ... set `weights_only=False` ... can result in code"))
    assert cli.main(["verb"]) == 2
    told = capsys.readouterr().err
    assert "weights_only" not in told
    assert "is not opened" in told


class _Refuses(io.StringIO):
    def __init__(self, number):
        super().__init__()
        self.number = number

    def flush(self):
        raise OSError(self.number, os.strerror(self.number))

    write = flush
    write.__name__ = "write"

    def fileno(self):
        raise OSError("none")


def test_words_by_the_way_stop_no_work():
    class Full(_Refuses):
        def write(self, text):
            self.flush()

    stream = Sturdy(Full(errno.ENOSPC))
    print("some words", file=stream, flush=True)
    assert not stream.isatty()


def test_a_reader_of_stdout_may_leave_and_a_full_one_is_told():
    with pytest.raises(ReaderGone) as gone, printing(_Refuses(errno.EPIPE)):
        pass
    assert gone.value.exit_code == 0
    with (
        pytest.raises(RunError, match="stdout cannot be written: No space left"),
        printing(_Refuses(errno.ENOSPC)),
    ):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="the script needs Linux")
def test_what_the_machine_refuses_is_one_paragraph_and_a_training_goes_on_after_it(python):
    """Every verb through every fault: `scripts/fault_cases.py`, by hand."""
    words = ["--kind", "faults", "--only", ";".join(FEW)]
    ran = python.start(SCRIPT, *words)
    out, err = ran.communicate(timeout=250)
    assert ran.returncode == 0, out + err
    assert out.count('"wrong": []') >= len(FEW)

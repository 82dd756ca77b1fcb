"""The command line in this process, its refusals, and signals to it in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from vit_cls.cli import main

ON_CPU = ("--device", "cpu", "--num_workers", "0")

PRESENT_KEYS = {
    *("images", "failed", "scored", "correct", "top1", "top1_ci95", "top5", "balanced_accuracy", "nll"),
    *("seconds", "images_per_second", "classes", "classes_present", "output"),
    *("ece", "ece_ci95", "ece_equal_mass", "brier", "brier_ci95", "accuracy_at_coverage", "most_confused"),
    *("calibrated", "temperature", "restricted", "tta", "exact", "seed"),
    *("device", "device_name", "precision"),
}
"""Of the JSON object of ``evaluate``, which scripts read."""


class Ran(NamedTuple):
    """What a verb left."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys) -> Callable[..., Ran]:
    """Runs a verb."""

    def run(*words) -> Ran:
        code = main([str(word) for word in words])
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture
def json_of(cli) -> Callable[..., Any]:
    """Runs a verb with ``--json``: its answer, exactly one object."""

    def run(*words, code: int = 0) -> Any:
        ran = cli(*words, "--json")
        assert ran.code == code, ran.err
        return json.loads(ran.out)

    return run


@pytest.fixture
def help_of(capsys) -> Callable[..., str]:
    """Help texts, which end the command with 0."""

    def run(*words) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([*words, "--help"])
        assert not stopped.value.code
        return capsys.readouterr().out

    return run


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Not in the checkout, whose every file `refused` would read."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(cli) -> Callable[..., None]:
    """A request that ends with 2, one paragraph on stderr, nothing on stdout, and every file as it was."""

    def check(words, message: str) -> None:
        before = files_here()
        code, out, err = cli(*words)
        assert (code, out) == (2, "")
        (paragraph,) = (line for line in err.splitlines() if line.startswith("vit-cls: "))
        assert re.search(message, paragraph), err
        assert "Traceback" not in err
        assert files_here() == before

    return check


def files_here() -> dict[str, bytes | None]:
    """Every file and folder below the working folder."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def command(*words) -> list[str]:
    """For a process of its own."""
    return [sys.executable, "-m", "vit_cls", *map(str, words)]


def loaded_by(*words) -> set[str]:
    """Modules that a verb loads in a fresh process."""
    code = (
        "import sys; from vit_cls.cli import main; assert main(sys.argv[1:]) == 0; "
        "print(); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def until(holds: Callable[[], Any], process: subprocess.Popen | None = None, seconds: float = 250) -> None:
    """Wait for what a process brings about; it must not end before."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)

"""The GPU check runs from its first step to its record, tiny and on a CPU; a failure hides nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from types import ModuleType

import pytest
import torch

QUICK = ["--device", "cpu", "--quick"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def check(load_script) -> ModuleType:
    return load_script("gpu_check")


def _run(check, tmp_path, *words):
    code = check.main([*QUICK, "--json", str(tmp_path / "record.json"), *words])
    report = json.loads((tmp_path / "record.json").read_text())
    return code, {row["step"]: row for row in report["rows"]}, report


def test_runs_by_python_where_the_command_line_lacks_its_parser(check, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    code, rows, report = _run(check, tmp_path, "--steps", "fit", "no_wait", "everything", "evaluate", "speed")
    assert code == 0, capsys.readouterr().out
    assert list(rows) == ["photos", "fit", "no_wait", "everything", "evaluate", "speed"]
    assert {row["outcome"] for row in rows.values()} == {"ok"}
    assert (report["by"], report["ok"]) == ("Python", True)
    assert rows["fit"]["losses"][-1] < rows["fit"]["losses"][0]
    assert rows["no_wait"]["steps"] == 10  # of 12: not the first of each epoch
    assert rows["everything"]["kept"] in ("raw", "ema")
    assert (rows["evaluate"]["images"], rows["evaluate"]["changed"]) == (12, 0)
    assert rows["speed"]["report"]["rows"][0]["timm"]["images_per_second"] > 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-2].endswith(" s: everything holds")
    assert all(f"\n{name} " in shown for name in rows)


def test_runs_by_the_command_line_too_and_a_step_that_fails_is_told(check, tmp_path, monkeypatch, capsys):
    def nothing(*_, **__):
        return subprocess.CompletedProcess([], 4, "no tests ran", "")

    monkeypatch.setattr(check.subprocess, "run", nothing)
    monkeypatch.setattr(check, "COMPILED_AGREES", -1.0)
    code, rows, report = _run(check, tmp_path, "--steps", "tests", "everything", "compile")
    assert code == 1
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "photos": "ok",
        "tests": "FAILED",
        "everything": "ok",
        "compile": "FAILED",
    }
    assert "pytest ended with 4: no tests ran" in rows["tests"]["said"]
    assert "the last training loss is" in rows["compile"]["said"]
    assert report["by"] == "command line"
    assert "not ok: tests, compile" in capsys.readouterr().out


def test_a_step_for_which_no_time_is_left_is_skipped_or_stopped(check, tmp_path, monkeypatch):
    code, rows, _ = _run(check, tmp_path, "--steps", "fit", "--minutes", "0")
    assert code == 1
    assert {row["outcome"] for row in rows.values()} == {"skipped"}
    monkeypatch.setitem(check.STEPS, "evaluate", lambda settings: time.sleep(60))
    code, rows, _ = _run(check, tmp_path, "--steps", "evaluate", "--minutes", "0.02")
    assert code == 1
    assert rows["evaluate"]["said"] == "Failed: it was stopped: no time was left"
    assert 0 < rows["evaluate"]["seconds"] < 30


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--photos", "nowhere", *QUICK], "--photos nowhere is no folder."),
        (["--json", "/", *QUICK], "--json / cannot be written: / is a folder."),
        pytest.param(
            [],
            "there is no GPU here that torch can use. To see that the script runs: --device cpu --quick.",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(words, message, check, capsys):
    assert check.main(words) == 2
    assert capsys.readouterr().err == f"gpu_check: {message}\n"


def test_no_record_without_a_gpu_unless_it_is_asked_for(check):
    assert check.parse(QUICK).json is None

"""The measurement of checkpointing counts less where less is kept, and writes its report."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark_checkpointing.py"


def test_a_report_says_what_is_kept_and_what_a_step_costs(tmp_path, monkeypatch, capsys, one_thread):
    monkeypatch.setattr(sys, "path", list(sys.path))
    report = tmp_path / "report.json"
    words = ["--models", "vit_pico_patch7_28", "--batch_size", "2", "--pairs", "2", "--json", str(report)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    with pytest.raises(SystemExit) as exit_status:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert exit_status.value.code == 0
    (row,) = json.loads(report.read_text())["rows"]
    assert 0 < row["kept_bytes_checkpointed"] < row["kept_bytes"] / 2
    assert row["time_ratio"]["pairs"] == 2
    assert "MiB kept, checkpointed" in capsys.readouterr().out

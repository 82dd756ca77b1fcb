"""The command as a user runs it: processes, exit codes, JSON on stdout and nothing else there."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import vit_cls
from vit_cls.cli import main

MODEL = {
    "name": "vit_pico_patch7_28",
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
}
TINY = [word for key, value in MODEL.items() for word in (f"--model.{key}", str(value))]
TINY += [
    "--data.batch_size",
    "6",
    "--data.num_workers",
    "1",
    "--optim.lr",
    "3e-3",
    "--trainer.accelerator",
    "cpu",
]


def _vit_cls(*words, cwd, timeout=240):
    command = [sys.executable, "-m", "vit_cls", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)


def test_fit_then_evaluate_from_the_command_line(image_root, tmp_path):
    fit = _vit_cls(
        "fit",
        *TINY,
        "--data.root",
        image_root,
        "--run_dir",
        "run",
        "--trainer.max_epochs",
        5,
        "--json",
        cwd=tmp_path,
    )
    assert fit.returncode == 0, fit.stderr
    fitted = json.loads(fit.stdout)
    assert fitted["run_dir"] == "run"
    assert fitted["epochs"] == 5
    assert "24 images to train on, 8 to validate on" in fit.stderr
    assert fit.stderr.count("val/acc1") == 5
    assert fitted["images"] == 8
    assert fitted["top1"] == fitted["correct"] / 8
    assert fitted["top1_ci95"][0] <= fitted["top1"] <= fitted["top1_ci95"][1]

    # The model file alone is enough, whatever is in the run folder.
    (tmp_path / "run/model.safetensors").rename(tmp_path / "model.safetensors")
    words = ["--data", image_root / "val", "--output", "out", "--device", "cpu", "--json"]
    evaluate = _vit_cls("evaluate", "--model", "model.safetensors", *words, cwd=tmp_path)
    assert evaluate.returncode == 0, evaluate.stderr
    result = json.loads(evaluate.stdout)
    assert {
        "images",
        "failed",
        "correct",
        "top1",
        "top1_ci95",
        "top5",
        "balanced_accuracy",
        "nll",
        "ece",
    } <= set(result)
    assert {"seconds", "images_per_second", "classes", "output"} <= set(result)
    # what fit logged for its best epoch is what evaluate finds
    assert (result["correct"], result["images"], result["failed"]) == (fitted["correct"], 8, 0)
    found = sorted(os.listdir(tmp_path / "out"))
    assert found == ["figures", "per_class.csv", "predictions.csv", "report.html"]
    rows = list(csv.DictReader((tmp_path / "out/predictions.csv").read_text().splitlines()))
    assert sum(int(row["correct"]) for row in rows) == result["correct"]
    assert (tmp_path / "run/report.html").is_file()

    # The stored configuration runs again, and the same.
    again = _vit_cls("fit", "--config", "run/config.yaml", "--run_dir", "again", "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["correct"] == fitted["correct"]
    columns = ["train/loss", "val/loss", "val/acc1"]
    histories = [
        [
            [row[c] for c in columns]
            for row in csv.DictReader((tmp_path / run / "metrics.csv").read_text().splitlines())
        ]
        for run in ("run", "again")
    ]
    assert histories[0] == histories[1]


def test_fit_and_evaluate_need_the_data_alone(image_root, tmp_path, monkeypatch, capsys):
    """The default model at its own size; no option but the number of epochs is set."""
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--data.root", str(image_root), "--trainer.max_epochs", "1", "--json"]) == 0
    fitted = json.loads(capsys.readouterr().out)
    assert fitted["run_dir"] == "runs/vit_tiny_patch16_224_cls_0"
    assert main(["evaluate", "--model", fitted["run_dir"], "--data", str(image_root / "val"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["correct"], found["images"]) == (fitted["correct"], 8)


def test_two_processes_train_together_and_count_every_validation_image_once(image_root, tmp_path):
    shutil.copytree(image_root, tmp_path / "data")
    (tmp_path / "data/val/red/3.png").unlink()  # 7 images: two processes cannot share them evenly
    words = [*TINY, "--data.root", "data", "--trainer.max_epochs", 1, "--trainer.devices", 2, "--json"]
    fit = _vit_cls("fit", *words, "--run_dir", "run", cwd=tmp_path)
    assert fit.returncode == 0, fit.stderr
    assert json.loads(fit.stdout)["images"] == 7
    assert json.loads((tmp_path / "run/run.json").read_text())["processes"] == 2
    without = _vit_cls("fit", *words, cwd=tmp_path)
    assert without.returncode == 2
    assert "run_dir is missing: 2 processes must agree" in without.stderr


def test_ctrl_c_ends_a_run_with_130_and_it_resumes(image_root, tmp_path):
    words = [*TINY, "--data.root", image_root, "--run_dir", "run", "--trainer.max_epochs", "100000"]
    command = [sys.executable, "-m", "vit_cls", "fit", *map(str, words)]
    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 200
        while not (tmp_path / "run/model.safetensors").exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the loading processes get it, too
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopped by SIGINT" in errors
    assert "Traceback" not in errors
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "interrupted"
    epochs = len(list(csv.DictReader((tmp_path / "run/metrics.csv").read_text().splitlines())))
    resumed = _vit_cls("fit", "--resume", "run", "--trainer.max_epochs", epochs + 1, "--json", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["epochs"] == epochs + 1
    assert "resume" not in (tmp_path / "run/config.yaml").read_text()


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_are_quick_and_import_no_torch(flag, tmp_path):
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        result = _vit_cls(flag, cwd=tmp_path)
        seconds.append(time.perf_counter() - started)
        assert result.returncode == 0
    assert min(seconds) < 0.5
    assert (vit_cls.__version__ if flag == "--version" else "evaluate") in result.stdout
    code = f"import sys; from vit_cls.cli import main; main(['{flag}']); print('torch' in sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert modules.stdout.splitlines()[-1] == "False"

"""The command as a user runs it: processes, exit codes, JSON on stdout and nothing else there."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess

import pytest

import vit_cls
from tests.commands.conftest import PRESENT_KEYS, command, loaded_by, until

TINY = (
    *("--model.name", "vit_pico_patch7_28", "--model.img_size", "16", "--model.patch_size", "4"),
    *("--model.embed_dim", "24", "--model.depth", "2", "--model.num_heads", "2"),
    *("--data.batch_size", "6", "--data.num_workers", "1", "--optim.lr", "3e-3"),
    *("--trainer.accelerator", "cpu"),
)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _process(*words):
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=240)


def _forked(python, *words):
    """The same sooner."""
    process = python.start("-m", "vit_cls", *words)
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def _rows(path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_fit_then_evaluate_from_the_command_line(image_root, place, json_of, python):
    words = ("--data.root", image_root, "--run_dir", "run", "--trainer.max_epochs", 5)
    fit = _process("fit", *TINY, *words, "--json")
    assert fit.returncode == 0, fit.stderr
    fitted = json.loads(fit.stdout)
    assert fitted["run_dir"] == "run"
    assert fitted["epochs"] == 5
    assert "24 images to train on, 8 to validate on" in fit.stderr
    assert fit.stderr.count("val/acc1") == 5
    assert fitted["images"] == 8
    assert fitted["top1"] == fitted["correct"] / 8
    assert fitted["top1_ci95"][0] <= fitted["top1"] <= fitted["top1_ci95"][1]
    assert (place / "run/report.html").is_file()

    # The model file alone is enough, whatever is in the run folder.
    (place / "run/model.safetensors").rename(place / "model.safetensors")
    words = ("--data", image_root / "val", "--output", "out", "--device", "cpu", "--json")
    evaluate = _forked(python, "evaluate", "--model", "model.safetensors", *words)
    assert evaluate.returncode == 0, evaluate.stderr
    result = json.loads(evaluate.stdout)
    assert set(result) >= PRESENT_KEYS
    # what fit logged for its best epoch is what evaluate finds
    assert (result["correct"], result["images"], result["failed"]) == (fitted["correct"], 8, 0)
    found = sorted(os.listdir("out"))
    assert found == ["figures", "per_class.csv", "predictions.csv", "report.html"]
    assert sum(int(row["correct"]) for row in _rows(place / "out/predictions.csv")) == result["correct"]

    # The stored configuration runs again, and the same.
    again = json_of("fit", "--config", "run/config.yaml", "--run_dir", "again")
    assert again["correct"] == fitted["correct"]
    first, second = (
        [
            [row[key] for key in ("train/loss", "val/loss", "val/acc1")]
            for row in _rows(place / run / "metrics.csv")
        ]
        for run in ("run", "again")
    )
    assert first == second


def test_fit_and_evaluate_need_the_data_alone(image_root, json_of):
    """The default model at its own size; no option but the number of epochs is set."""
    fitted = json_of("fit", "--data.root", image_root, "--trainer.max_epochs", "1")
    assert fitted["run_dir"] == "runs/vit_tiny_patch16_224_cls_0"
    found = json_of("evaluate", "--model", fitted["run_dir"], "--data", image_root / "val")
    assert (found["correct"], found["images"]) == (fitted["correct"], 8)


def test_two_processes_train_together_and_count_every_validation_image_once(
    image_root, place, refused, python
):
    shutil.copytree(image_root, place / "data")
    (place / "data/val/red/3.png").unlink()  # 7 images: two processes cannot share them evenly
    words = [*TINY, "--data.root", "data", "--trainer.max_epochs", 1, "--trainer.devices", 2, "--json"]
    fit = _forked(python, "fit", *words, "--run_dir", "run")
    assert fit.returncode == 0, fit.stderr
    assert json.loads(fit.stdout)["images"] == 7
    assert json.loads((place / "run/run.json").read_text())["processes"] == 2
    refused(["fit", *words], "run_dir is missing: 2 processes must agree")


def test_ctrl_c_ends_a_run_with_130_and_it_resumes(image_root, place, json_of, python):
    words = (*TINY, "--data.root", image_root, "--run_dir", "run", "--trainer.max_epochs", "100000")
    with python.start("-m", "vit_cls", "fit", *words) as process:
        until((place / "run/model.safetensors").exists, process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the loading processes get it, too
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopped by SIGINT" in errors
    assert "Traceback" not in errors
    assert json.loads((place / "run/run.json").read_text())["status"] == "interrupted"
    epochs = len(_rows(place / "run/metrics.csv"))
    on_purpose = ("--resume_changes", "trainer.max_epochs")
    resumed = json_of("fit", "--resume", "run", "--trainer.max_epochs", epochs + 1, *on_purpose)
    assert resumed["epochs"] == epochs + 1
    assert "resume" not in (place / "run/config.yaml").read_text()


@pytest.mark.parametrize(("flag", "told"), [("--help", "evaluate"), ("--version", vit_cls.__version__)])
def test_help_and_version_load_no_torch(flag, told, cli):
    assert told in cli(flag).out
    assert "torch" not in loaded_by(flag)

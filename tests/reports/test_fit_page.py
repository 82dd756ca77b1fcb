"""The page of ``vit-cls fit``: the record's numbers, the epochs, and what became of the weights."""

from __future__ import annotations

import pytest

from tests.reports.conftest import fit_case
from vit_cls.errors import RunError
from vit_cls.reports.html import DASH


def test_the_page_has_the_numbers_of_the_record(outline_of):
    words = outline_of(fit_case()).words
    for part in (
        "94.17 % top-1 accuracy 113 of 120 validation images right; 95 % interval 88.45 % to 97.15 %.",
        "The model is that of epoch 3, counted from 0, the best of 4.",
        "vit-cls evaluate --model 'runs/my run' --data FOLDER",
        "Parameters 464,458",
        "Input 28 × 42 pixels",  # noqa: RUF001
        "Split 0.1 of each class of my photos held out for validation, seed 42",
        "Weights licence the licence is yours to choose",
        "vit-cls fit --data.root 'my photos'",
        "Seed 42",
        "Device NVIDIA H200",
        "Started 2026-11-20 11:46 UTC",
        "Time 1 h 8 min",
        "Commit 3505d532f5a09fa4ace7e9b060d4b8bf18418305+",
        "Versions vit_cls 0.1.0, python 3.11.7, torch 2.15.0",
    ):
        assert part in words
    assert DASH not in words


def test_each_epoch_and_class_has_a_row(outline_of):
    page = outline_of(fit_case())
    numbers = "17 0.002 2.5000 2.2500 25.00 % 90.00 % 30 120 1 min 5 s 1,764"
    assert " ".join(page.row("0")) == f"0 {numbers}"
    assert [attrs.get("class") for attrs in page.all("tr")].count("best") == 1
    assert page.row("owl")[1] == "28"
    assert page.row("epoch")[6] == "top-3"  # there are three classes


def test_what_the_history_has_is_drawn(folder_of, outline_of, record):
    page = outline_of(fit_case())
    assert [svg["aria-label"] for svg in page.all("svg")] == [
        "Loss: validation from 2.25 at 0 to 0.5625 at 3; training from 2.5 at 0 to 0.625 at 3",
        "Validation accuracy: top-1 from 25 % at 0 to 100 % at 3; top-3 from 90 % at 0 to 90 % at 3",
        "Learning rate at the end of the epoch: learning rate from 0.002 at 0 to 0.0005 at 3",
    ]
    figures = [path.name for path in (folder_of(fit_case()) / "figures").iterdir()]
    curves = ["learning_rate_at_the_end_of_the_epoch.svg", "loss.svg", "validation_accuracy.svg"]
    assert sorted(figures) == curves
    assert len(outline_of(fit_case(record, [{"epoch": 0.0, "lr": 0.1}])).all("svg")) == 1
    assert "No epoch is on record" in outline_of(fit_case(record, [])).words


def test_averaged_weights_and_validations_within_an_epoch_are_shown(outline_of, record, history):
    record["result"]["weights"] = "ema"
    half = {
        "epoch": 1.0,
        "step": 25.0,
        "lr": 0.001,
        "val/acc1": 0.4,
        "val/ema_acc1": 0.4,
        "val/raw_acc1": 0.3,
    }
    history.insert(1, half)
    history[2] |= {"val/ema_acc1": 0.5, "val/raw_acc1": 0.45}
    record["result"] |= {"best_epoch": 1, "best_step": 25}
    page = outline_of(fit_case(record, history))
    assert page.words.count("with the running average of its weights") == 1
    assert page.row("epoch")[3] == "training loss"  # as ever, though the first validation has none
    assert [row["class"] for row in page.all("tr") if row.get("class")] == ["best"]
    accuracy = page.all("svg")[1]["aria-label"]
    assert "top-1, averaged weights from 40 % at 0.4706 to 50 % at 1" in accuracy
    assert "weights as they are from 30 % at 0.4706 to 45 % at 1" in accuracy


def test_missing_and_diverged_values_are_dashes(outline_of, record, history):
    history[1] = {"epoch": 1.0, "train/loss": float("nan"), "grad/norm": 12.345}
    page = outline_of(fit_case(record, history))
    assert page.row("1") == ["1", DASH, DASH, DASH, *[DASH] * 7, "12.35"]
    assert page.row("epoch")[-1] == "grad/norm"
    words = outline_of(fit_case({"result": record["result"]})).words
    for label in ("Parameters", "Split", "Versions", "Started", "Seed", "Weights licence", "Input"):
        assert f"{label} {DASH}" in words


def test_a_run_without_result_is_refused(outline_of, record):
    record["status"] = "interrupted"
    del record["result"]
    with pytest.raises(RunError, match=r"finished run.*'interrupted'.*--resume"):
        outline_of(fit_case(record))


def test_the_page_of_a_fine_tuned_run_tells_what_became_of_the_weights(outline_of, record):
    assert "Weights it began with" not in outline_of(fit_case()).words
    rows = [{"fate": "moved", "keys": "fc_norm.weight", "count": 1, "note": "from norm.weight"}]
    counts = {"loaded": 148, "resized": 0, "moved": 2, "dropped": 0, "fresh": 2}
    told = {"source": "vit_small.tag", "counts": counts, "rows": rows, "notes": ["the norm is kept"]}
    record["model"]["load_report"] = told
    words = outline_of(fit_case(record)).words
    assert "From vit_small.tag. Tensors: 148 loaded, 2 moved, 2 fresh." in words
    assert "moved fc_norm.weight 1 from norm.weight" in words
    assert "the norm is kept" in words

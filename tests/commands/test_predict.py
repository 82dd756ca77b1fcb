"""What ``predict`` prints and writes, what it refuses, and what a signal leaves."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.commands.conftest import ON_CPU, command, loaded_by, until
from vit_cls.cli import main
from vit_cls.locks import LOCK, alone_in
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.config import ViTConfig
from vit_cls.model.vit import VisionTransformer
from vit_cls.weights.bundle import save_classifier

MODEL = ["predict", "--model", "model.safetensors", *ON_CPU]


@pytest.fixture
def place(image_root, tiny, tmp_path, monkeypatch):
    """A working folder with images, models with and without head, and what is wrong."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(image_root, "images")
    os.makedirs("hollow/deeper")
    Path("hollow/notes.txt").touch()
    Path("file").touch()
    torch.manual_seed(0)
    for name, classes, settings in (
        ("model", ["blue", "green", "red"], {}),
        ("headless", [], {}),
        ("gap", ["blue", "red"], {"class_token": False, "pool": "gap"}),
    ):
        model = VisionTransformer(ViTConfig.from_dict({**tiny, "num_classes": len(classes), **settings}))
        save_classifier(ImageClassifier(model, Preprocess((16, 16)), classes), f"{name}.safetensors")
    return tmp_path


def _stdin(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_rows_go_to_stdout_as_csv_and_a_missing_file_is_a_row(place, capsys):
    assert main([*MODEL, "images/val", "gone.jpg"]) == 0
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["path", "label", "prediction", "probability", "correct", "error"]
    assert [row["path"] for row in rows[:2]] == ["images/val/blue/0.png", "images/val/blue/1.png"]
    assert len(rows) == 9
    assert rows[8] == {**dict.fromkeys(rows[0], ""), "path": "gone.jpg", "error": "No such file or directory"}
    assert all(row["prediction"] in ("blue", "green", "red") for row in rows[:8])
    assert all(1 / 3 <= float(row["probability"]) <= 1 for row in rows[:8])
    assert {(row["label"], row["correct"]) for row in rows} == {("", "")}
    assert "9 images, 1 of them could not be read; probabilities are not calibrated" in err


def test_metrics_and_their_libraries_are_not_loaded_to_predict(place):
    loaded = loaded_by(*MODEL, "images/val", "--output", "out")
    assert not {"scipy", "sklearn", "timm", "torchmetrics"} & loaded


def test_the_same_file_as_evaluate_writes_but_for_the_truth(place, capsys):
    words = ["--model", "model.safetensors", *ON_CPU]
    assert main(["evaluate", *words, "--data", "images/val", "--output", "evaluated"]) == 0
    assert main(["predict", *words, "images/val", "--output", "predicted"]) == 0
    out, _ = capsys.readouterr()
    assert "8 images, 0 of them could not be read" in out
    assert "files in predicted" in out
    assert os.listdir("predicted") == ["predictions.csv"]
    one, other = (
        list(csv.DictReader(Path(folder, "predictions.csv").read_text().splitlines()))
        for folder in ("evaluated", "predicted")
    )
    assert [(f"images/val/{r['path']}", r["prediction"], r["probability"]) for r in one] == [
        (r["path"], r["prediction"], r["probability"]) for r in other
    ]


def test_json_is_one_object_with_the_rows_where_there_is_no_output(place, capsys):
    assert main([*MODEL, "images/val/*/0.png", "gone.jpg", "--top_k", "2", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["images"], data["failed"], data["output"]) == (3, 1, None)
    assert (data["calibrated"], data["temperature"]) == (False, 1.0)
    assert data["seconds"] > 0
    assert data["images_per_second"] > 0
    assert [row["path"] for row in data["predictions"]] == [
        "images/val/blue/0.png",
        "images/val/red/0.png",
        "gone.jpg",
    ]
    assert data["predictions"][0]["probability"] >= data["predictions"][0]["probability_2"]
    assert data["predictions"][2]["prediction"] is None
    assert main([*MODEL, "images/val", "--output", "out", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["output"] == "out"
    assert "predictions" not in data


def test_jsonl_and_table_on_stdout(place, capsys):
    assert main([*MODEL, "images/val/red", "--format", "jsonl", "--top_k", "3"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 4
    names = {rows[0][name] for name in ("prediction", "prediction_2", "prediction_3")}
    assert names == {"blue", "green", "red"}
    total = sum(rows[0][name] for name in ("probability", "probability_2", "probability_3"))
    assert total == pytest.approx(1, abs=3e-6)
    assert main([*MODEL, "images/val/red", "gone.jpg", "--format", "table"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["prediction", "prob", "path"]
    assert re.fullmatch(r"\w+ +0\.\d{4} +images/val/red/0.png", lines[0])
    assert lines[4] == "gone.jpg: No such file or directory"


def test_a_calibrated_model_is_called_so(place, capsys, tiny):
    model = VisionTransformer(ViTConfig.from_dict({**tiny, "num_classes": 2}))
    classifier = ImageClassifier(model, Preprocess((16, 16)), ["a", "b"])
    classifier.temperature = 1.5
    save_classifier(classifier, "calibrated.safetensors")
    words = ["predict", "--model", "calibrated.safetensors", *ON_CPU, "images/val"]
    assert main([*words, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["calibrated"], data["temperature"]) == (True, 1.5)
    assert main(words) == 0
    assert "probabilities are calibrated (temperature 1.5)" in capsys.readouterr().err


@pytest.mark.parametrize("separator", [b"\n", b"\0"])
def test_paths_come_on_stdin(separator, place, capsys, monkeypatch):
    _stdin(monkeypatch, separator.join([b"images/val/red/1.png", b"x y.jpg", b"images/val/red/0.png"]))
    assert main([*MODEL, "-"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["path"] for row in rows] == ["images/val/red/1.png", "x y.jpg", "images/val/red/0.png"]


def test_features_of_a_model_without_a_head(place, capsys):
    words = ["predict", "--model", "headless.safetensors", *ON_CPU, "images/val", "gone.jpg"]
    assert main([*words, "--features", "cls", "--output", "out"]) == 0
    assert "9 images, 1 of them could not be read; features in out" in capsys.readouterr().out
    with safe_open("out/features.safetensors", framework="pt") as file:
        features = file.get_tensor("features")
        assert file.metadata() == {
            "features": "cls",
            "model": "headless.safetensors",
            "paths": "features.csv",
        }
    assert features.shape == (9, 24)
    assert features.isfinite().all(dim=1).tolist() == [True] * 8 + [False]
    rows = list(csv.DictReader(Path("out/features.csv").read_text().splitlines()))
    assert rows[8] == {"path": "gone.jpg", "error": "No such file or directory"}
    assert len(rows) == 9


REFUSED = {
    "no path": ("", r"PATH is missing. Give image files"),
    "empty folder": ("hollow", r"folder hollow holds no image file"),
    "empty glob": ("images/*.gif", r"glob images/\*.gif matches no file"),
    "empty stdin": ("-", r"stdin holds no path"),
    "format": ("images --format xml", r"--format must be one of csv, jsonl, parquet, table; got 'xml'"),
    "features": ("images --features mop --output new", r"--features must be one of cls, gap"),
    "features by weights that nobody trained": (
        "images --features map --output new",
        r"--features map has weights of its own, which this model has not trained",
    ),
    "output is a file": ("images --output file", r"--output file is a file"),
    "output below a file": ("images --output file/new", r"cannot be written"),
    "output in a place without files": ("images --output /proc/new", r"--output /proc/new cannot be"),
    "resume without output": ("images --resume", r"--resume needs --output"),
    "features without output": ("images --features cls", r"--features needs --output"),
    "features as jsonl": (
        "images --features cls --output new --format jsonl",
        r"leave --format and --top_k out",
    ),
    "top_k of features": ("images --features cls --output new --top_k 2", r"leave --format and --top_k out"),
    "parquet without output": ("images --format parquet", r"parquet needs --output"),
    "table with output": ("images --format table --output new", r"table is for the terminal"),
    "headless": ("images --model headless.safetensors --output new", r"no head.*linear_probe"),
    "no class token": (
        "images --model gap.safetensors --features cls --output new",
        r"--features cls reads the class token, but the model has none",
    ),
    "top_k": ("images --top_k 4 --output new", r"--top_k must be from 1 to the model's 3 classes"),
    "top_k zero": ("images --top_k 0", r"--top_k must be from 1"),
    "batch size": ("images --batch_size 0", r"batch_size must be at least 1"),
    "device": ("images --device tpu", r"--device must be one of"),
    "missing model": ("images --model nowhere", r"no file or folder 'nowhere'"),
    "typo": ("images --topk 2", r"mean `top_k`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_predict_refuses(case, place, refused, monkeypatch):
    words, message = REFUSED[case]
    _stdin(monkeypatch, b"")
    refused([*MODEL, *words.split()], message)


def test_parquet_without_pyarrow_says_what_to_install(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*MODEL, "images", "--format", "parquet", "--output", "new"]) == 2
    assert "needs pyarrow: pip install pyarrow" in capsys.readouterr().err
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("signum", "code", "workers"),
    [(signal.SIGINT, 130, "0"), (signal.SIGTERM, 143, "2")],
    ids=["int", "term"],
)
def test_a_signal_keeps_the_rows_and_resume_completes_them(
    signum, code, workers, place, json_of, monkeypatch, python
):
    paths = [str(path) for path in sorted(Path("images").rglob("*.png"))] * 40
    words = ["predict", "--model", "model.safetensors", "--device", "cpu", "-", "--batch_size", "8"]
    words += ["--num_workers", workers]
    os.mkfifo("names")
    with (
        python.start("-m", "vit_cls", *words, "--output", "out", stdin="names") as process,
        Path("names").open("w") as names,  # and left open: the signal comes while it waits for more
    ):
        names.write("\n".join(paths[:200]) + "\n")
        names.flush()
        until((Path("out/.predictions.csv.part") / "000000").exists, process)  # the first rows
        os.killpg(process.pid, signum)  # the loading processes get it too
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    kept = r"vit-cls: stopped by \w+; \d+ rows are kept in out/.predictions.csv.part.*--resume"
    assert re.search(kept, err)
    # multiprocessing's own thread may complain of a worker that the signal ended, too
    assert "vit_cls/" not in err
    assert not Path("out/predictions.csv").exists()

    for folder, more in (("out", ["--resume"]), ("whole", [])):
        _stdin(monkeypatch, "\n".join(paths).encode())
        assert json_of(*words, "--output", folder, *more)["images"] == len(paths)
        assert os.listdir(folder) == ["predictions.csv"]
    assert Path("out/predictions.csv").read_bytes() == Path("whole/predictions.csv").read_bytes()


def test_a_reader_that_has_enough_is_no_error(place):
    words = shlex.join(command(*MODEL, "--batch_size", "1", "images"))
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words} | head -n 2"], capture_output=True, text=True
    )
    assert done.stdout.count("\n") == 2
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_a_second_run_into_one_output_is_refused_but_features_have_a_table_of_their_own(place, cli, refused):
    words = ["predict", "--model", "model.safetensors", "images", "--output", "shared", "--device", "cpu"]
    with alone_in(Path("shared"), name=f"{LOCK}-predictions.csv"):
        refused(words, "--output shared: process .* has been writing there")
        assert cli(*words, "--features", "cls")[0] == 0
    assert cli(*words)[0] == 0
    assert not list(Path("shared").glob(".*"))

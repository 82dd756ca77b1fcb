"""``vit-cls compare``: models or files, text or one JSON object; bad requests leave nothing."""

from __future__ import annotations

import csv
import json
import re
import shutil

import pytest
import torch

from tests.commands.conftest import ON_CPU
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.config import ViTConfig
from vit_cls.model.vit import VisionTransformer
from vit_cls.weights.bundle import save_classifier

HEAD = "path,label,prediction,probability,correct,error\n"
PAIR_KEYS = (
    "a b images failed both_right only_a only_b both_wrong difference difference_ci95 p_mcnemar_mid p_holm "
    "p_equivalence margin smallest_detectable verdict images_needed"
)


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny, image_root):
    """A working folder with ``data``, two models, and the files of two others."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(image_root / "val", tmp_path / "data")
    (tmp_path / "data/red/1.png").write_bytes(b"")
    for seed, names in ((0, ["blue", "red"]), (1, ["red", "blue"])):
        torch.manual_seed(seed)
        model = VisionTransformer(ViTConfig.from_dict({**tiny, "num_classes": 2}))
        torch.nn.init.normal_(model.head.weight)
        classifier = ImageClassifier(model, Preprocess((16, 16)), names)
        save_classifier(classifier, tmp_path / f"{seed}.safetensors")
    rows = [(f"{'xy'[i % 2]}/{i}.jpg", "xy"[i % 2]) for i in range(200)]
    for name, wrong in (("a", range(40)), ("b", range(30, 40)), ("c", range(40))):
        lines = [
            f"{path},{label},{'z' if i in wrong else label},0.9,1,\n" for i, (path, label) in enumerate(rows)
        ]
        (tmp_path / f"{name}.csv").write_text(HEAD + "".join(lines))
    return tmp_path


def _models(*more: str) -> list[str]:
    return ["--model", "0.safetensors", "--model", "1.safetensors", "--data", "data", *ON_CPU, *more]


def _files(*names: str) -> list[str]:
    return [word for name in names for word in ("--predictions", f"{name}.csv")]


def test_models_agree_with_what_evaluate_says_of_each(folder, cli):
    code, out, err = cli("compare", *_models("--json", "--output", "out"))
    assert code == 0
    assert err.count("could not be read: data/red/1.png: ") == 2
    result = json.loads(out)
    assert list(result) == [
        "models",
        "pairs",
        "seed",
        "split",
        "origin",
        *("device", "device_name", "precision"),
        "output",
    ]
    assert " ".join(result["pairs"][0]) == PAIR_KEYS
    assert [list(model) for model in result["models"]] == [
        ["name", "correct", "scored", "top1", "top1_ci95"]
    ] * 2
    for model in result["models"]:
        alone = json.loads(cli("evaluate", "--model", model["name"], "--data", "data", *ON_CPU, "--json").out)
        assert {key: alone[key] for key in ("correct", "scored", "top1")} == {
            key: model[key] for key in ("correct", "scored", "top1")
        }
    pair = result["pairs"][0]
    assert pair["images"] == 7
    assert pair["failed"] == 1
    assert pair["both_right"] + pair["only_a"] + pair["only_b"] + pair["both_wrong"] == 7
    assert pair["both_right"] + pair["only_b"] == result["models"][1]["correct"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "comparison.csv",
        "figures",
        "report.html",
    ]
    with (folder / "out/comparison.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == pair["only_a"] + pair["only_b"]  # of two classes, one is right where they differ
    assert (folder / "out/report.html").read_text().count("<img ") == len(rows)


def test_files_that_evaluate_wrote_give_the_same_as_the_models(folder, cli):
    _, out, _ = cli("compare", *_models("--json"))
    for seed in "01":
        words = ["--model", f"{seed}.safetensors", "--data", "data", *ON_CPU, "--output", seed]
        assert cli("evaluate", *words).code == 0
    _, again, _ = cli("compare", "--predictions", "0", "--predictions", "1/predictions.csv", "--json")
    for ours, theirs in zip(json.loads(out)["pairs"], json.loads(again)["pairs"], strict=True):
        names = {"a", "b"}
        assert {k: v for k, v in ours.items() if k not in names} == {
            k: v for k, v in theirs.items() if k not in names
        }


def test_a_clear_difference_has_a_winner_by_name(folder, cli):
    code, out, err = cli("compare", *_files("a", "b"))
    assert code == 0
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == "b.csv is better than a.csv, by 15.00 points."
    assert lines[4].endswith("(0 left out): both right 160, only A 0, only B 30, both wrong 10")
    assert lines[5].startswith("difference B - A       +0.1500   95 % bootstrap interval +0.1")


def test_three_files_are_three_pairs_and_the_margin_and_the_seed_are_used(folder, cli):
    _, out, _ = cli("compare", *_files("a", "b", "c"), "--json", "--margin", "0.03", "--seed", "3")
    result = json.loads(out)
    assert [pair["verdict"] for pair in result["pairs"]] == [
        "b.csv is better",
        "equivalent within the margin",
        "b.csv is better",
    ]
    assert {pair["margin"] for pair in result["pairs"]} == {0.03}
    assert result["seed"] == 3
    _, out, _ = cli("compare", *_files("a", "c"), "--json")
    assert json.loads(out)["pairs"][0]["images_needed"] == 268


def test_files_of_pictures_that_are_not_there_become_a_table(folder, cli):
    code, out, _ = cli("compare", *_files("a", "b"), "--output", "deep/out")
    assert code == 0
    assert out.endswith("files in deep/out\n")
    assert "Table of images they disagree on" in (folder / "deep/out/report.html").read_text()


@pytest.mark.parametrize(("words", "message"), [
    ([], "compare needs --model two to 26 times; got 0"),
    (["--model", "0.safetensors", "--data", "data"], "compare needs --model two to 26 times; got 1"),
    (_files("a"), "compare needs --predictions two to 26 times; got 1"),
    ([*_models(), *_files("a", "b")], "--model and --predictions exclude each other"),
    (["--model", "0.safetensors", "--model", "1.safetensors"], "--model needs --data"),
    (_models("--margin", "0"), "--margin must be above 0 and below 1; got 0.0. 0.01 is one point."),
    (_models("--margin", "1.5"), "got 1.5"),
    (_models("--margin", "nan"), "margin must be a number; got 'nan'"),
    (_models("--margin", "much"), "margin must be a number"),
    (_models("--seed", "-1"), "--seed must be at least 0; got -1"),
    (_models("--output", "a.csv"), "--output a.csv is a file"),
    (_models("--output", "/proc/none"), "--output /proc/none cannot be written"),
    ([*_files("a", "b"), "--data", "none"], "--data none does not exist"),
    (_models("--colour", "red"), "unknown key --colour"),
    ([*_files("a"), "--predictions", "none.csv"], "--predictions none.csv cannot be read: No such file"),
    ([*_files("a"), "--predictions", "0.safetensors"], "is no predictions.csv of `vit-cls evaluate"),
    ([*_files("a"), "--predictions", "data"], "--predictions data cannot be read"),
    ([*_files("a"), "--predictions", "other.csv"], "same images; 199 only in a.csv (y/1.jpg,"),
    ([*_files("a"), "--predictions", "labels.csv"], "differ on 100, the first: y/1.jpg is 'y' in"),
    (["--model", "0.safetensors", "--model", "1.safetensors", "--data", "birds"], "birds"),
    (["--model", "none.safetensors", *_models()], "none.safetensors"),
])  # fmt: skip
def test_a_bad_request_is_one_paragraph_and_leaves_nothing(folder, refused, words, message):
    (folder / "other.csv").write_text(f"{HEAD}x/0.jpg,x,x,0.9,1,\n")
    (folder / "labels.csv").write_text((folder / "a.csv").read_text().replace(",y,", ",w,", 10**6))
    shutil.copytree(folder / "data/red", folder / "birds/robin")
    shutil.copytree(folder / "data/red", folder / "birds/wren")
    output = [] if "--output" in words else ["--output", "out"]
    refused(["compare", *words, *output], re.escape(message))


def test_a_full_disk_is_one_paragraph_and_the_old_files_stay(folder, cli, monkeypatch):
    cli("compare", *_files("a", "b"), "--output", "out")
    old = {path.name: path.read_bytes() for path in (folder / "out").rglob("*.*")}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vit_cls.files.os.fsync", full)
    code, out, err = cli("compare", *_files("a", "c"), "--output", "out")
    assert code == 2
    assert out == ""
    assert err == "vit-cls: --output out cannot be written: No space left on device.\n"
    assert {path.name: path.read_bytes() for path in (folder / "out").rglob("*.*")} == old

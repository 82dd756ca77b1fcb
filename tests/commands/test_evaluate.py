"""``vit-cls evaluate``: the options, what the file holds afterwards, and clear refusals."""

from __future__ import annotations

import csv
import errno
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.commands.conftest import ON_CPU, PRESENT_KEYS, files_here
from vit_cls.locks import alone_in
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.config import ViTConfig
from vit_cls.model.vit import VisionTransformer
from vit_cls.stats.intervals import wilson_interval
from vit_cls.weights.bundle import load_classifier, read_metadata, save_classifier

NAMES = ("ant", "bee", "cow")
EXTRA = {"metrics": {"val/acc1": 0.75}, "versions": {"vit_cls": "0.0.9"}}


def _pixels(rng) -> np.ndarray:
    """A photo of sorts: a colour, noise, and light from the right."""
    pixels = rng.integers(0, 60, (16, 16, 3)) + rng.integers(0, 196, (1, 1, 3))
    return (pixels * rng.uniform(0.3, 1, (1, 16, 1))).astype(np.uint8)


def _tensor(pixels) -> torch.Tensor:
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]


@torch.no_grad()
def _save(path, tiny, names) -> Path:
    """A model of random weights that answers with every class, and surely."""
    torch.manual_seed(3)
    model = VisionTransformer(ViTConfig.from_dict({**tiny, "num_classes": len(names)}))
    classifier = ImageClassifier(model, Preprocess((16, 16), crop_pct=1.0), list(names))
    if names:
        images = torch.cat([_tensor(_pixels(np.random.default_rng(i))) for i in range(64)])
        logits = classifier.eval()(images)
        model.head.weight *= 2 / logits.std(dim=0)[:, None]
        model.head.bias -= classifier(images).mean(dim=0)
    classifier.weights_licence = "MIT"
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_classifier(classifier, path, extra=EXTRA)


@pytest.fixture
def place(tiny, tmp_path, monkeypatch):
    """Models, a test folder and a validation folder whose labels are the model's answer or by chance."""
    monkeypatch.chdir(tmp_path)
    model = load_classifier(_save(tmp_path / "run/model.safetensors", tiny, [*NAMES, "dog"]))
    rng = np.random.default_rng(0)
    for split, count in (("test", 18), ("val", 30)):
        for i in range(count):
            pixels = _pixels(rng)
            answer = int(model(_tensor(pixels)).argmax())
            name = NAMES[answer if answer < 3 and i % 2 else i // 2 % 3]
            (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    Path("empty").mkdir()
    Path("other/zebra").mkdir(parents=True)
    shutil.copy("test/ant/0.png", "other/zebra/0.png")
    Path("page.html").write_text("<html></html>")
    _save(tmp_path / "headless.safetensors", tiny, [])
    metadata = {"format_version": 1, **model.to_metadata()}
    state = {f"classifier.model.{k}": v for k, v in model.model.state_dict().items()}
    torch.save({"state_dict": state, "vit_cls_metadata": metadata}, "last.ckpt")
    return tmp_path


def _rows(path) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(path).read_text().splitlines()))


@pytest.fixture
def evaluate(json_of):
    """What ``evaluate`` says of ``run`` on ``test``."""
    return lambda *words, data="test": json_of("evaluate", "--model", "run", "--data", data, *ON_CPU, *words)


def test_json_has_the_keys_that_scripts_read(place, evaluate):
    result = evaluate()
    assert result.keys() >= PRESENT_KEYS
    assert (result["images"], result["failed"], result["scored"]) == (18, 0, 18)
    assert (result["classes"], result["classes_present"]) == (4, 3)
    told = [result[k] for k in ("calibrated", "temperature", "restricted", "tta", "exact", "seed")]
    assert told == [False, 1.0, False, "none", False, 0]
    assert [result[k] for k in ("device", "device_name", "precision")] == ["cpu", None, "32"]
    assert [p["coverage"] for p in result["accuracy_at_coverage"]] == [0.5, 0.8, 0.9, 0.95, 1.0]
    assert result["accuracy_at_coverage"][-1]["accuracy"] == pytest.approx(result["top1"])
    pairs = result["most_confused"]
    assert sum(pair["images"] for pair in pairs) == result["scored"] - result["correct"]
    assert result["weights_licence"] == "MIT"
    for name in ("nll", "brier", "ece", "ece_equal_mass"):
        low, high = result[f"{name}_ci95"]
        assert low <= result[name] <= high


def test_batch_size_and_workers_change_no_number(place, evaluate):
    drop = {"seconds", "images_per_second"}
    first, *others = (
        {k: v for k, v in evaluate(*words).items() if k not in drop}
        for words in ([], ["--batch_size", "1"], ["--batch_size", "7", "--num_workers", "2"])
    )
    for other in others:
        assert other.keys() == first.keys()
        assert other["correct"] == first["correct"]
        assert other["most_confused"] == first["most_confused"]
        for name in ("nll", "brier", "ece", "ece_equal_mass", "aurc", "ece_ci95", "nll_ci95", "top5"):
            assert other[name] == pytest.approx(first[name], abs=1e-5)


def test_calibrating_changes_the_temperature_in_the_file_and_nothing_else(place, evaluate):
    before = evaluate()
    tensors, metadata = load_file("run/model.safetensors"), read_metadata("run/model.safetensors")
    fitted = evaluate("--calibrate", "val")
    after = load_file("run/model.safetensors")
    assert tensors.keys() == after.keys()
    assert all(torch.equal(tensors[k], after[k]) for k in tensors)
    changed = read_metadata("run/model.safetensors")
    assert changed.pop("calibration") == fitted["calibration"]
    assert metadata.pop("temperature") == 1.0
    assert changed.pop("temperature") == fitted["temperature"] != 1.0
    assert changed == metadata
    assert changed["metrics"] == EXTRA["metrics"]
    assert os.listdir("run") == ["model.safetensors"]

    calibration = fitted["calibration"]
    assert (calibration["data"], calibration["images"], calibration["failed"]) == ("val", 30, 0)
    assert calibration["nll_after"] < calibration["nll_before"]
    assert fitted["calibrated"] is True
    assert fitted["correct"] == before["correct"]
    assert fitted["most_confused"] == before["most_confused"]
    assert fitted["nll"] < before["nll"]  # this model is far too sure on noise

    again = evaluate()
    assert again["calibrated"] is True
    assert again["calibration"] is None
    for name in ("temperature", "nll", "ece", "correct"):
        assert again[name] == pytest.approx(fitted[name])
    # A second fit begins at 1, not at what the first one stored.
    second = evaluate("--calibrate", "val")
    assert second["calibration"] == pytest.approx(fitted["calibration"])


def test_people_are_told_what_calibration_did(place, cli):
    Path("val/ant/0.png").write_bytes(b"")
    code, out, _ = cli("evaluate", "--model", "run", "--data", "test", "--calibrate", "val", *ON_CPU)
    assert code == 0
    assert re.search(
        r"temperature \d+\.\d+ fitted on 29 images of val \(1 could not be read\), stored in", out
    )
    assert re.search(r"NLL there \d+\.\d+ -> \d\.\d+, ECE 0\.\d+ -> 0\.\d+", out)
    assert "probabilities are calibrated, temperature" in out


def test_restricting_leaves_only_the_folders_classes_and_says_so(place, evaluate):
    free = evaluate("--output", "free")
    bound = evaluate("--output", "bound", "--restrict")
    predicted = [
        {row["prediction"] for row in _rows(f"{name}/predictions.csv")} for name in ("free", "bound")
    ]
    assert "dog" in predicted[0]
    assert "dog" not in predicted[1]
    assert (free["restricted"], bound["restricted"]) == (False, True)
    assert bound["correct"] >= free["correct"]
    assert bound["top5"] == 1.0
    page = " ".join(Path("bound/report.html").read_text().split())
    assert "Predictions are restricted to the 3 classes of the folder" in page
    assert "restricted" not in Path("free/report.html").read_text()


def test_the_class_table_has_wilsons_interval_of_recall(place, evaluate):
    evaluate("--output", "out")
    rows = {row["class"]: row for row in _rows("out/per_class.csv")}
    assert (rows["dog"]["recall"], rows["dog"]["recall_ci95_low"]) == ("", "")
    for name in NAMES:
        low, high = wilson_interval(int(rows[name]["correct"]), int(rows[name]["support"]))
        assert float(rows[name]["recall_ci95_low"]) == pytest.approx(low, abs=1e-6)
        assert float(rows[name]["recall_ci95_high"]) == pytest.approx(high, abs=1e-6)


def test_flipping_is_the_mean_of_both_views_and_is_named(place, evaluate):
    evaluate("--output", "one")
    flipped = evaluate("--tta", "flip", "--output", "both")
    assert flipped["tta"] == "flip"
    classifier = load_classifier("run/model.safetensors")
    rows = _rows("both/predictions.csv")
    assert rows != _rows("one/predictions.csv")
    for row in rows:
        image = _tensor(Image.open(f"test/{row['path']}"))
        with torch.inference_mode():
            probs = (classifier(image).softmax(1) + classifier(image.flip(-1)).softmax(1))[0] / 2
        assert row["prediction"] == classifier.class_names[int(probs.argmax())]
        assert float(row["probability"]) == pytest.approx(float(probs.max()), abs=1e-5)


def test_mirror_images_give_the_same_answer_when_flipped(place, evaluate):
    first = evaluate("--tta", "flip")
    for path in Path("test").rglob("*.png"):
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    second = evaluate("--tta", "flip")
    assert second["correct"] == first["correct"]
    assert second["nll"] == pytest.approx(first["nll"], abs=1e-5)


def test_folders_with_imagenet_names_are_the_models_wordnet_ids(place, tiny, json_of, refused):
    _save(Path("imagenet.safetensors"), tiny, ["n01440764", "n01443537", "n02012849", "n03126707"])
    os.rename("test/ant", "test/Tinca_tinca")
    os.rename("test/bee", "test/n01443537")
    shutil.rmtree("test/cow")
    words = ["evaluate", "--model", "imagenet.safetensors", "--data", "test", *ON_CPU]
    assert json_of(*words, "--output", "out")["classes_present"] == 2
    labels = {row["label"] for row in _rows("out/predictions.csv")}
    assert labels == {"n01440764", "n01443537"}
    os.rename("test/Tinca_tinca", "test/crane")
    refused(words, r"the folder crane may be any of the classes n02012849, n03126707")
    os.rename("test/crane", "test/goldfish")
    refused(words, r"folders goldfish and n01443537 are one class of the model, n01443537")


def test_what_fit_logged_is_what_evaluate_finds(image_root, tmp_path, monkeypatch, json_of, evaluate):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(image_root, "data")
    os.rename("data/val/red/0.png", "data/val/blue/red.png")  # so that not every image is right
    words = ["--model.name", "vit_pico_patch7_28", "--trainer.max_epochs", "2", "--run_dir", "run"]
    words += ["--model.depth", "1", "--trainer.accelerator", "cpu", "--data.num_workers", "0"]
    fitted = json_of("fit", "--data.root", "data", *words)
    rows = _rows("run/metrics.csv")
    result = evaluate(data="data/val")
    assert (result["correct"], result["images"]) == (fitted["correct"], 8)
    assert 0 < result["correct"] < 8
    assert result["top1"] == fitted["top1"]
    best = read_metadata("run/model.safetensors")["metrics"]
    assert result["nll"] == pytest.approx(best["val/loss"], abs=1e-5)
    assert any(float(row["val/acc1"]) == pytest.approx(result["top1"], abs=1e-6) for row in rows)


CASES = {
    "empty folder": ("--model run --data empty", r"--data empty has no class folders"),
    "no common class": ("--model run --data other", r"zebra.*Known classes: ant, bee, cow, dog"),
    "no head": (
        "--model headless.safetensors --data test",
        r"the model has no head.*configs/linear_probe.yaml",
    ),
    "wrong file": ("--model page.html --data test", r"page.html is not a model file"),
    "tta": ("--model run --data test --tta rotate", r"--tta must be one of none, flip"),
    "seed": ("--model run --data test --seed -1", r"--seed must be at least 0; got -1"),
    "output": ("--model run --data test --output page.html", r"--output page.html is a file"),
    "output below a file": ("--model run --data test --output page.html/out", r"cannot be written"),
    "calibrate nowhere": (
        "--model run --data test --calibrate nowhere",
        r"--calibrate nowhere does not exist",
    ),
    "calibrate on the test folder": (
        "--model run --data test --calibrate test/",
        r"--calibrate test/ are the images of --data",
    ),
    "calibrate an unknown class": ("--model run --data test --calibrate other", r"zebra.*Known classes"),
    "calibrate a checkpoint": (
        "--model last.ckpt --data test --calibrate val",
        r"--model last.ckpt has none that can hold it. Give a run folder",
    ),
    "calibrate a name": (
        "--model vit_tiny_patch16_224 --data test --calibrate val",
        r"has none that can hold it",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_evaluate_refuses(case, place, refused):
    words, message = CASES[case]
    refused(["evaluate", *words.split(), *ON_CPU], message)


@pytest.mark.parametrize("full", ["predictions.csv", "per_class.csv", "report.html", "model.safetensors"])
def test_a_full_disk_leaves_the_old_file(full, place, evaluate, cli, monkeypatch):
    evaluate("--output", "out")
    moved, old = os.replace, files_here()

    def replace(source, target):
        if Path(target).name == full:
            raise OSError(errno.ENOSPC, "No space left on device")
        moved(source, target)

    monkeypatch.setattr(os, "replace", replace)
    calibrate = ["--calibrate", "val"] if full == "model.safetensors" else []
    code, out, err = cli(
        "evaluate", "--model", "run", "--data", "test", "--output", "out", *calibrate, *ON_CPU
    )
    assert (code, out) == (2, "")
    assert re.search(r"vit-cls: .*(cannot be|could not be) (written|stored).*No space left", err)
    new = files_here()
    assert new.keys() == old.keys()  # nothing half-written beside it
    target = next(path for path in old if path.endswith(full))
    assert new[target] == old[target]


@pytest.mark.parametrize(
    "words",
    [
        "evaluate --model model.safetensors --data images/val --device cpu",
        "compare --model model.safetensors --model model.safetensors --data images/val --device cpu",
        "probe knn --model model.safetensors --data images --device cpu",
        "study heads --data digits",
        "doctor --data images/val",
    ],
)
def test_a_verb_does_not_write_where_another_process_does(words, place, refused):
    with alone_in(Path("shared")):
        refused([*words.split(), "--output", "shared"], "--output shared: process .* has been writing there")

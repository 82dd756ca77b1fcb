"""Grey models, from training to export: one conversion of the images, and other channels are refused."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import vit_cls
from tests.commands.conftest import ON_CPU
from tests.models import make_vit, perturbed
from tests.training.runs import TINY
from vit_cls.cli import main
from vit_cls.data.transforms import eval_transform
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.weights.bundle import save_classifier

LUMA = torch.tensor([0.299, 0.587, 0.114])
"""ITU-R BT.601, section 2.5.1."""


def _fit(cli, root, run_dir, *words):
    settings = [f"--model.{key}={value}" for key, value in {**TINY, "in_chans": 1}.items()]
    cpu = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--data.num_workers=0", "--optim.lr=3e-3"]
    name = [] if words else ["--model.name=vit_pico_patch7_28"]
    return cli("fit", f"--data.root={root}", f"--run_dir={run_dir}", *name, *settings, *cpu, *words)


def _grey_by_hand(path) -> torch.Tensor:
    rgb = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).astype(np.float32))
    return (rgb @ LUMA).round().to(torch.uint8)[None]


@pytest.fixture(scope="module")
def grey_run(image_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grey")

    def cli(*words):
        assert main(list(words)) == 0

    _fit(
        cli, image_root, folder / "run", "--model.name=vit_pico_patch7_28", f"--data.cache={folder / 'cache'}"
    )
    return folder


def test_a_run_says_that_its_images_are_grey_and_keeps_them_so(grey_run):
    record = json.loads((grey_run / "run/run.json").read_text())
    assert record["model"]["colour"] == "grey (ITU-R 601 luma of the decoded RGB)"
    assert record["model"]["preprocess"]["mean"] == [0.5]
    (cache,) = (grey_run / "cache").iterdir()
    assert cache.stat().st_size == 8 * (4 + 16 * 16)
    assert vit_cls.load(grey_run / "run").model.patch_embed.proj.weight.shape[1] == 1


def test_evaluate_predict_and_python_see_the_same_grey_pixels(grey_run, image_root, json_of, tmp_path):
    words = ("--model", grey_run / "run", "--data", image_root)
    result = json_of("evaluate", *words, "--output", tmp_path / "out", *ON_CPU)
    rows = list(csv.DictReader((tmp_path / "out/predictions.csv").read_text().splitlines()))
    assert result["images"] == len(rows) == 8
    paths = [str(image_root / "val" / row["path"]) for row in rows]
    classifier = vit_cls.load(grey_run / "run")
    labelled = classifier.predict(paths)
    assert labelled.labels == [row["prediction"] for row in rows]
    pre = classifier.preprocess
    transform = eval_transform(pre.img_size, crop_pct=pre.crop_pct)
    pixels = torch.stack([transform(_grey_by_hand(path)) for path in paths])
    with torch.inference_mode():
        probs = classifier.probs(classifier(pixels))
    torch.testing.assert_close(labelled.probs, probs, rtol=0, atol=0.02)  # one grey level of rounding
    named = json_of("predict", "--model", grey_run / "run", *paths, *ON_CPU)["predictions"]
    assert [row["prediction"] for row in named] == labelled.labels


def test_a_grey_model_is_exported_and_opened_again(grey_run, json_of, image_root, tmp_path):
    json_of("export", "--model", grey_run / "run", "--format", "timm", "--output", tmp_path / "timm")
    config = json.loads((tmp_path / "timm/config.json").read_text())["pretrained_cfg"]
    assert (config["input_size"], config["mean"]) == ([1, 16, 16], [0.5])
    paths = sorted(map(str, (image_root / "val").rglob("*.png")))
    ours, again = vit_cls.load(grey_run / "run"), vit_cls.load(tmp_path / "timm")
    torch.testing.assert_close(again.predict(paths).probs, ours.predict(paths).probs, rtol=0, atol=1e-5)


def test_probes_read_a_grey_model_and_reconstruct_its_pixels(grey_run, json_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("red", "blue"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(15):
            pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    words = ("--model", grey_run / "run", "--data", "photos", "--cache", "cache", "--output", "out", *ON_CPU)
    result = json_of("probe", "invert", *words)
    assert -1 <= result["values"]["cls"]["r2"] <= 1
    assert list((tmp_path / "out").glob("*.html"))


def test_weights_of_three_channels_start_a_grey_model(cli, image_root, tmp_path, caplog):
    mean, std = (0.2, 0.4, 0.6), (0.2, 0.3, 0.4)
    model = perturbed(make_vit(TINY, num_classes=2))
    theirs = ImageClassifier(model, Preprocess((16, 16), mean, std), ["blue", "red"])
    save_classifier(theirs, tmp_path / "model.safetensors")
    words = ["--model.name=auto", f"--model.pretrained={tmp_path / 'model.safetensors'}"]
    ran = _fit(cli, image_root, tmp_path / "run", *words, "--optim.freeze=backbone")
    assert ran.code == 0, ran.err
    assert "grey (ITU-R 601 luma of the decoded RGB), mean [0.4" in caplog.text
    tuned = vit_cls.load(tmp_path / "run")
    assert tuned.preprocess.mean == pytest.approx((0.4,))
    assert tuned.preprocess.std == pytest.approx((0.3,))
    expected = model.patch_embed.proj.weight.sum(dim=1, keepdim=True)
    torch.testing.assert_close(tuned.model.patch_embed.proj.weight, expected)


def test_other_channels_are_refused(cli, image_root, tmp_path):
    ran = _fit(cli, image_root, tmp_path / "run", "--model.name=vit_pico_patch7_28", "--model.in_chans=4")
    assert ran.code == 2
    assert "model.in_chans must be 3 (images are RGB) or 1 (they are made grey); got 4" in ran.err
    assert not (tmp_path / "run").exists()
    preprocess = Preprocess((16, 16), (0.5,) * 4, (0.5,) * 4)
    classifier = ImageClassifier(make_vit(TINY, num_classes=2, in_chans=4), preprocess, ["blue", "red"])
    save_classifier(classifier, tmp_path / "model.safetensors")
    ran = cli("evaluate", "--model", tmp_path / "model.safetensors", "--data", image_root, *ON_CPU)
    assert ran.code == 2
    assert "model.in_chans must be 3 (images are RGB) or 1 (they are made grey); got 4" in ran.err

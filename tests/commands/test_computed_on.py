"""What a result says of the device and the precision that it was computed with."""

from __future__ import annotations

import pytest
import torch

from tests.commands.conftest import ON_CPU
from tests.models import make_vit
from vit_cls.inference import InferenceConfig
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.weights.bundle import save_classifier

SAID = "computed on cpu, precision bf16"


@pytest.fixture(autouse=True)
def place(tiny, image_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        model = make_vit(tiny, num_classes=2, seed=seed)
        save_classifier(ImageClassifier(model, Preprocess((16, 16)), ["blue", "red"]), f"{seed}.safetensors")


@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("verb", ["evaluate", "predict", "compare"])
def test_every_answer_says_where_and_with_what_it_was_computed(verb, precision, image_root, json_of):
    images = [image_root / "val/red"] if verb == "predict" else ["--data", image_root]
    models = ["--model", "0.safetensors", *(["--model", "1.safetensors"] if verb == "compare" else [])]
    told = json_of(verb, *models, *images, *ON_CPU, "--precision", precision)
    assert [told[key] for key in ("device", "device_name", "precision")] == ["cpu", None, precision]


@pytest.mark.parametrize("verb", ["evaluate", "compare"])
def test_pages_and_terminal_say_it_too(verb, image_root, cli, tmp_path):
    models = ["--model", "0.safetensors", *(["--model", "1.safetensors"] if verb == "compare" else [])]
    ran = cli(verb, *models, "--data", image_root, *ON_CPU, "--precision", "bf16", "--output", "out")
    assert ran.code == 0, ran.err
    assert SAID in (tmp_path / "out/report.html").read_text()
    assert verb == "compare" or SAID in ran.out


def test_a_probe_records_it(image_root, json_of):
    words = ("--model", "0.safetensors", "--data", image_root, "--cache", "cache", "--precision", "bf16")
    settings = json_of("probe", "knn", *words, *ON_CPU)["settings"]
    assert [settings[key] for key in ("device", "precision")] == ["cpu", "bf16"]


def test_a_gpu_is_called_by_its_name_and_by_what_auto_means_on_it(monkeypatch):
    for name, value in (("is_available", True), ("is_bf16_supported", True), ("get_device_name", "H100")):
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
    record = InferenceConfig("cuda").record
    assert record == {"device": "cuda", "device_name": "H100", "precision": "bf16"}

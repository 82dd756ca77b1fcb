"""``vit-cls export``: what it writes, what it says, and one paragraph where it refuses."""

from __future__ import annotations

import json
import re

import pytest
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tests.export.exporting import native_classifier, opened_by_timm, random_images
from tests.models import relative_difference
from vit_cls import load
from vit_cls.cli import main
from vit_cls.weights.bundle import load_classifier, save_classifier

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def place(tiny, tmp_path, monkeypatch):
    """A working folder with a model of ours and weights of timm's."""
    monkeypatch.chdir(tmp_path)
    save_classifier(native_classifier(tiny), "model.safetensors")
    save_classifier(native_classifier(tiny).half(), "half.safetensors")
    save_classifier(native_classifier(tiny, pool="token:3"), "token.safetensors")
    theirs = timm.create_model("test_vit", num_classes=5)
    save_file(theirs.state_dict(), "test_vit.safetensors")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    return tmp_path


def _export(*words: str) -> int:
    return main(["export", *words])


@torch.inference_mode()
@pytest.mark.parametrize("file", ["model.safetensors", "half.safetensors"])
def test_the_command_writes_a_folder_for_timm_and_says_so_in_one_object(file, place, capsys):
    assert _export("--model", file, "--format", "timm", "--output", "out", "--json") == 0
    out, _ = capsys.readouterr()
    data = json.loads(out)
    assert out.count("\n") == 1
    assert data.pop("max_relative_difference") <= 1e-6
    assert data == {"output": "out", "format": "timm", "architecture": "vit_base_patch16_224"}
    classifier = load_classifier(file).float()
    images = random_images(classifier)
    assert relative_difference(opened_by_timm(place / "out")(images), classifier.model(images)) <= 1e-5


def test_the_command_tells_people_how_to_open_the_folder(place, capsys):
    assert _export("--model", "model.safetensors", "--format", "timm", "--output", "a/b") == 0
    out, _ = capsys.readouterr()
    assert 'timm.create_model("local-dir:a/b", pretrained=True)' in out
    timm.create_model("local-dir:a/b", pretrained=True)


@torch.inference_mode()
def test_the_command_makes_one_model_file_of_weights_of_timm(place, capsys):
    words = ["--model", "test_vit=test_vit.safetensors", "--format", "safetensors", "--output", "out"]
    assert _export(*words, "--json") == 0
    out, _ = capsys.readouterr()
    assert json.loads(out) == {
        "output": "out/model.safetensors",
        "format": "safetensors",
        "max_relative_difference": 0.0,
    }
    theirs = timm.create_model("test_vit", num_classes=5, checkpoint_path="test_vit.safetensors").eval()
    ours = load("out/model.safetensors")
    images = random_images(ours)
    assert relative_difference(ours.model(images), theirs(images)) <= 1e-5
    assert torch.equal(load("test_vit=test_vit.safetensors").model(images), ours.model(images))
    assert ours.class_names == [f"output_{i}" for i in range(5)]
    assert torch.equal(load("out").model(images), ours.model(images))


TAKEN = r"--output taken is not an empty folder"
# name: (model, format, output, message); None leaves an option out
REFUSED = {
    "format": ("model.safetensors", "onnx", "out", r"timm.*got 'onnx'"),
    "format typo": (
        "model.safetensors",
        "safetensor",
        "out",
        r"--format must be one of timm, safetensors; got 'safetensor'. Did you mean `safetensors`",
    ),
    "no output": ("model.safetensors", "timm", None, r"required.*output"),
    "no model": (None, "timm", "out", r"required.*model"),
    "missing model": ("nowhere", "timm", "out", r"no file or folder 'nowhere'"),
    "taken": ("model.safetensors", "timm", "taken", TAKEN),
    "taken by safetensors": ("model.safetensors", "safetensors", "taken", TAKEN),
    "a file": ("model.safetensors", "timm", "half.safetensors", r"--output half.safetensors is a file"),
    "under a file": (
        "model.safetensors",
        "timm",
        "half.safetensors/out",
        r"half.safetensors/out cannot be writ",
    ),
    "pool": ("token.safetensors", "timm", "a/out", r"it knows cls, gap, max"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_command_refuses_in_one_paragraph_and_leaves_nothing(case, place, capsys):
    *values, message = REFUSED[case]
    options = zip(("--model", "--format", "--output"), values, strict=True)
    words = [word for name, value in options if value is not None for word in (name, value)]
    before = sorted(place.rglob("*"))
    assert _export(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    paragraphs = [line for line in err.splitlines() if line.startswith("vit-cls: ")]
    assert len(paragraphs) == 1
    assert re.search(message, paragraphs[0]), err
    assert "Traceback" not in err
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("format", ["timm", "safetensors"])
def test_the_command_says_that_a_disk_is_full_and_leaves_nothing(format, place, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("vit_cls.export.timm.save_for_hf", full)
    monkeypatch.setattr("vit_cls.weights.bundle.save_file", full)
    before = sorted(place.rglob("*"))
    assert _export("--model", "model.safetensors", "--format", format, "--output", "a/out") == 2
    _, err = capsys.readouterr()
    assert "vit-cls: --output a/out cannot be written: No space left on device." in err
    assert sorted(place.rglob("*")) == before

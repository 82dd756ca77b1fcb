"""Bad input: one clear paragraph on stderr, exit 2, nothing on stdout, nothing left behind."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.commands.conftest import ON_CPU
from vit_cls.cli import main
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.config import ViTConfig
from vit_cls.model.vit import VisionTransformer
from vit_cls.weights.bundle import save_classifier

PICO = "--model.name vit_pico_patch7_28 --trainer.max_epochs 1 --run_dir run "
TINY = f"{PICO} --trainer.accelerator cpu --data.num_workers 0 "
GOOD = f"{TINY} --data.root good "


@pytest.fixture
def place(image_root, tiny, tmp_path, monkeypatch):
    """A working folder with one of everything that can be wrong."""
    monkeypatch.chdir(tmp_path)
    photo = (image_root / "val/red/0.png").read_bytes()
    for path in ("no_classes", "one_class/cat", "empty_class/cat", "empty_class/dog"):
        os.makedirs(path)
    for path in ("one_class/cat/1.png", "empty_class/cat/1.png"):
        Path(path).write_bytes(photo)
    shutil.copytree(image_root, "good")
    shutil.copytree(image_root, "unknown_in_val")
    os.rename("unknown_in_val/val/red", "unknown_in_val/val/crimson")
    shutil.copytree(image_root, "broken")
    Path("broken/train/blue/3.png").write_bytes(photo[:50])
    Path("typo.yaml").write_text("model:\n  pol: gap\n")
    Path("section.yaml").write_text("modle:\n  pool: gap\n")
    Path("no_yaml.yaml").write_text("model: [\n")
    Path("not_a_model.safetensors").write_text("<html></html>")
    torch.manual_seed(0)
    for name, classes in (("model", ["blue", "green", "red"]), ("other", ["blue", "green"])):
        model = VisionTransformer(ViTConfig.from_dict({**tiny, "num_classes": len(classes)}))
        save_classifier(ImageClassifier(model, Preprocess((16, 16)), classes), f"{name}.safetensors")
    return tmp_path


FIT_CASES = {
    "missing folder": (f"{TINY} --data.root nowhere", r"data.root nowhere does not exist"),
    "a file as folder": (f"{TINY} --data.root typo.yaml", r"data.root typo.yaml is a file, but no manifest"),
    "no words": ("", r"data.root is missing"),
    "no root": (TINY, r"data.root is missing.*--data.name digits"),
    "no classes": (f"{TINY} --data.root no_classes", r"no_classes has no class folders"),
    "one class": (f"{TINY} --data.root one_class", r"only one class folder \(cat\)"),
    "empty class": (f"{TINY} --data.root empty_class", r"class folder without images: dog"),
    "unknown in val": (f"{TINY} --data.root unknown_in_val", r"crimson.*Known classes: blue, red"),
    "unreadable image": (f"{TINY} --data.root broken", r"broken/train/blue/3.png cannot be read"),
    "flag typo": (f"{GOOD} --model.pol gap", r"--model.pol.*Did you mean `model.pool`"),
    "yaml typo": (f"--config typo.yaml {TINY}", r"unknown key model.pol. Did you mean `model.pool`"),
    "yaml section": (f"--config section.yaml {TINY}", r"unknown key modle.pool. Did you mean `model.pool`"),
    "no yaml": (f"--config no_yaml.yaml {TINY}", r"[Pp]roblems parsing config"),
    "no config file": (f"--config nowhere.yaml {TINY}", r"config.*nowhere.yaml"),
    "wrong type": (f"{GOOD} --model.depth two", r"model.depth must be a whole number"),
    "stray word": (f"{GOOD} stray", r"unexpected word\(s\): stray"),
    "img_size": (f"{GOOD} --model.img_size 30", r"got 30 and 7. Use .* 28 or 35"),
    "num_heads": (f"{GOOD} --model.num_heads 5", r"5 heads and width 96"),
    "pool": (f"{GOOD} --model.pool mean", r"model.pool must be one of cls, gap"),
    "name": (f"{PICO} --data.root good --model.name vit_tny_patch16_224", r"mean `vit_tiny_patch16_224`"),
    "batch size": (f"{GOOD} --data.batch_size 0", r"data.batch_size must be at least 1"),
    "device": (f"{GOOD} --trainer.devices 0", r"Lightning's trainer refuses"),
    "callback that cannot be imported": (
        f"{GOOD} --trainer.callbacks+=nowhere.Mine",
        r"trainer.callbacks: nowhere.Mine cannot be imported: No module named 'nowhere'",
    ),
    "callback typo": (
        f"{GOOD} --trainer.callbacks+=EarlyStoping",
        r"trainer.callbacks: there is no class 'EarlyStoping'",
    ),
    "no callback": (f"{GOOD} --trainer.callbacks+=torch.nn.Linear", r"torch.nn.Linear is no Callback"),
    "option of a callback": (
        f"{GOOD} --trainer.callbacks+=EarlyStopping --trainer.callbacks.patience=x",
        r"EarlyStopping: patience must be a whole number; got 'x'",
    ),
    "callback without its argument": (
        f"{GOOD} --trainer.callbacks+=EarlyStopping",
        r"EarlyStopping: the following arguments are required: monitor",
    ),
    "callback that refuses": (
        f"{GOOD} --trainer.callbacks+=StochasticWeightAveraging --trainer.callbacks.swa_lrs=-1",
        r"StochasticWeightAveraging cannot be made: The `swa_lrs` should",
    ),
    "logger without its package": (
        f"{GOOD} --trainer.logger WandbLogger",
        r"WandbLogger cannot be made: Requirement 'wandb",
    ),
    "logger by one word": (f"{GOOD} --trainer.logger csv", r"trainer.logger: .*By one word: --logger csv"),
    "sharded strategy": (
        f"{GOOD} --trainer.strategy.class_path DeepSpeedStrategy",
        r"trainer.strategy must be one device or DDP .*; got DeepSpeedStrategy",
    ),
    "resume": ("--data.root good --resume nowhere", r"resume nowhere: there is no nowhere/checkpoints"),
}
MODEL = "--model model.safetensors "
EVALUATE_CASES = {
    "no model": ("--data good/val", r"required.*model"),
    "missing model": ("--model nowhere --data good/val", r"no file or folder 'nowhere'"),
    "not a model": ("--model not_a_model.safetensors --data good/val", r"not a model file"),
    "folder without model": ("--model good --data good/val", r"good is a folder without a model.safetensors"),
    "missing folder": (f"{MODEL} --data nowhere", r"--data nowhere does not exist"),
    "part that is not there": (
        f"{MODEL} --data good --split test",
        r"--split test: --data good has only train, val\.",
    ),
    "part of undivided data": (
        f"{MODEL} --data good/val --split val",
        r"--split val: --data good/val has no parts, so leave --split out\.",
    ),
    "unknown class": ("--model other.safetensors --data good/val", r"red.*Known classes: blue, green"),
    "batch size": (f"{MODEL} --data good/val --batch_size 0", r"batch_size must be"),
    "flag typo": (f"{MODEL} --data good/val --devise cpu", r"mean `device`"),
    "output": (f"{MODEL} --data good/val --output typo.yaml", r"is a file"),
}
OTHER_CASES = {
    "verb": ("evalute", "Did you mean `evaluate`"),
    "architecture": (
        "models vit_tinny_patch16_224",
        "no architecture matches .*Did you mean `vit_tiny_patch16_224`",
    ),
    "stray word": ("models a b", r"unexpected word\(s\): b"),
}
CASES = {
    **{f"fit: {case}": (f"fit {words}", message) for case, (words, message) in FIT_CASES.items()},
    **{f"evaluate: {case}": (f"evaluate {words}", told) for case, (words, told) in EVALUATE_CASES.items()},
    **OTHER_CASES,
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_request_is_refused(case, place, refused):
    words, message = CASES[case]
    refused(words.split(), message)


def test_debug_shows_the_traceback(place):
    with pytest.raises(Exception, match="does not exist"):
        main(["evaluate", "--model", "model.safetensors", "--data", "nowhere", "--debug"])


def test_a_folder_that_lacks_classes_of_the_model_is_scored_and_says_so(place, cli):
    code, out, _ = cli("evaluate", "--model", "model.safetensors", "--data", "good/val", *ON_CPU)
    assert code == 0
    assert "2 of the model's 3 classes" in out
    assert "no images of: green" in out


def test_an_unreadable_image_is_scored_around_and_named(place, cli):
    shutil.copytree("good/val", "test")
    Path("test/red/2.png").write_bytes(b"")
    code, out, err = cli("evaluate", "--model", "model.safetensors", "--data", "test", *ON_CPU)
    assert code == 0
    assert "of 7 images right (1 could not be read" in out
    assert "could not be read: test/red/2.png: the file is empty" in err


def test_models_lists_and_filters(cli):
    code, out, _ = cli("models", "*tiny*")
    assert code == 0
    assert re.search(r"vit_tiny_patch16_224 +native +5\.7 M +224 +16 +197 +cls +0\.5 +2 +apache", out)
    assert re.search(
        r"deit_tiny_distilled_patch16_224 +adapter +5\.9 M +224 +16 +198 +distilled +imagenet", out
    )
    assert "vit_small" not in out


def test_models_tells_all_about_one(cli):
    code, out, _ = cli("models", "vit_base_patch32_clip_224")
    assert code == 0
    assert "parameters, 224 pixels in patches of 32" in out
    assert "50 tokens (class token), width 768, 12 blocks of 12 heads, pool cls" in out
    assert re.search(
        r"metaclip_400m +224 +512 projection +clip +\S+ +center .*cc-by-nc-4.0 \(non-commercial\)", out
    )
    assert re.search(r"loaded with QuickGELU.*openai", out)


@pytest.mark.parametrize("verb", ["fit", "evaluate", "export", "models"])
def test_help_of_a_verb_is_on_stdout(verb, help_of):
    out = help_of(verb)
    assert out.startswith(f"usage: vit-cls {verb}")
    assert "--json" in out

"""A pooling from outside the package is known wherever poolings are named: fit, probes, studies, features."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

import vit_cls
from vit_cls.cli import main
from vit_cls.data.digits import write_digits
from vit_cls.model.pooling import POOLINGS, Pooling, register_pooling

TINY = ["--recipe.epochs", "1", "--recipe.embed_dim", "8", "--recipe.depth", "1", "--recipe.num_heads", "2"]
MODEL = ["--model.name", "vit_pico_patch7_28", "--model.embed_dim", "8", "--model.num_heads", "2"]


class Corners(Pooling):
    """The mean of the first and the last patch."""

    def forward(self, tokens, mask=None):
        return 0.5 * (tokens[:, 0] + tokens[:, -1])


@pytest.fixture
def corners(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    register_pooling("corners", Corners)
    yield
    del POOLINGS["corners"]


def _json(capsys, *words):
    assert main([*words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("corners")
def test_one_registration_makes_it_known_everywhere(capsys):
    words = ["--data.name", "digits", *MODEL, "--model.depth", "1", "--trainer.max_epochs", "1"]
    _json(capsys, "fit", *words, "--model.pool", "corners+cls", "--run_dir", "run")
    classifier = vit_cls.load("run")
    assert isinstance(classifier.model.pool.poolings[0], Corners)
    assert classifier.model.head.in_features == 16

    found = _json(capsys, "probe", "linear", "--model", "run", "--data", "digits", "--cache", "cache",
                  "--pools", "corners,cls,corners+cls,gem:3")  # fmt: skip
    assert list(found["values"]["top1"]) == ["corners", "cls", "corners+cls", "gem:3"]
    found = _json(capsys, "probe", "attentive", "--model", "run", "--data", "digits", "--cache", "cache",
                  "--heads", "corners", "--recipe.epochs", "1", "--recipe.learning_rates", ".01")  # fmt: skip
    assert found["settings"]["heads"] == ["cls", "corners"]

    write_digits("digits_test")
    _json(capsys, "predict", "--model", "run", "digits_test", "--features", "corners", "--output", "out")
    assert load_file("out/features.safetensors")["features"].shape == (599, 8)

    heads = ["--heads", "cls,corners", "--lr_grid", "1", "--seeds", "1", "--jobs", "1"]
    found = _json(capsys, "study", "heads", "--data", "digits", *heads, *TINY)
    assert list(found["values"]["top1"]) == ["cls", "corners"]


def test_without_its_registration_the_name_is_unknown_everywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in (
        ["fit", "--data.name", "digits", *MODEL, "--model.pool", "corners", "--run_dir", "run"],
        ["study", "heads", "--data", "digits", "--heads", "cls,corners"],
        ["predict", "--model", "none", "x.png", "--features", "corners", "--output", "out"],
    ):
        assert main(words) == 2
        assert "must be one of cls, gap, max" in capsys.readouterr().err

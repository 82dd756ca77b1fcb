"""Own code by `--import`: its names are known wherever names are taken, and missed where it is absent."""

from __future__ import annotations

import csv
import json
import sys

import pytest
import yaml
from safetensors.torch import load_file

import vit_cls
from vit_cls.cli import main
from vit_cls.data.digits import write_digits
from vit_cls.data.transforms import AUGMENTS
from vit_cls.errors import ModelFileError
from vit_cls.lab.probes.table import PROBES
from vit_cls.model.pooling import POOLINGS
from vit_cls.training.losses import LOSSES
from vit_cls.training.validation import VAL_METRICS
from vit_cls.weights.factory import create_model

OWN = '''
"""A pooling, an augmentation, a loss and a metric."""

import torch.nn.functional as F
from torchmetrics.classification import MulticlassCohenKappa
from torchvision.transforms import v2

from vit_cls.data.augmentations import register_augmentation
from vit_cls.model.pooling import register_pooling
from vit_cls.model.pooling_base import Pooling
from vit_cls.training.losses import register_loss
from vit_cls.training.validation import register_metric


class Corners(Pooling):
    """The mean of the first and the last patch."""

    def forward(self, tokens, mask=None):
        return 0.5 * (tokens[:, 0] + tokens[:, -1])


register_pooling("corners", Corners)
register_augmentation("shaken", v2.RandomAffine(10))
register_loss("twice", lambda logits, targets: 2 * F.cross_entropy(logits, targets))
register_metric("kappa", MulticlassCohenKappa)
'''
TINY = ["--recipe.epochs", "1", "--recipe.embed_dim", "8", "--recipe.depth", "1", "--recipe.num_heads", "2"]
MODEL = ["--model.name", "vit_pico_patch7_28", "--model.embed_dim", "8", "--model.num_heads", "2"]
DIGITS = ["--data.name", "digits", *MODEL, "--model.depth", "1"]
FIT = [
    "fit",
    *DIGITS,
    "--model.pool",
    "corners+cls",
    "--data.augment",
    "shaken",
    "--optim.loss",
    "twice",
    "--metrics",
    "[kappa]",
]
IMPORT = ["--import", "own/corners.py"]
TABLES = {"corners": POOLINGS, "shaken": AUGMENTS, "twice": LOSSES, "kappa": VAL_METRICS}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the file, and a run of one epoch that used it."""
    place = tmp_path_factory.mktemp("place")
    (place / "own").mkdir()
    (place / "own/corners.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main([*FIT, "--run_dir", "run", "--trainer.max_epochs", "1", *IMPORT]) == 0
        _forget()
    return place


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    """Each test begins as a new process would: nothing is imported yet."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    _forget()


def _forget():
    for name, table in TABLES.items():
        table.pop(name, None)
    sys.modules.pop("corners", None)


def _json(capsys, *words):
    assert main([*words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def _complaint(capsys, *words):
    assert main(list(words)) == 2
    return capsys.readouterr().err


def test_a_run_says_which_code_it_was_given(place):
    assert json.loads((place / "run/run.json").read_text())["imports"] == {"own/corners.py": "corners"}
    config = (place / "run/config.yaml").read_text()
    assert config.startswith("# own code: --import own/corners.py\n")
    assert yaml.safe_load(config)["data"]["augment"] == "shaken"


def test_an_own_loss_trains_and_an_own_metric_reaches_the_table(place):
    (row,) = csv.DictReader((place / "run/metrics.csv").read_text().splitlines())
    assert -1 <= float(row["val/kappa"]) <= 1
    assert float(row["train/loss"]) > 1.9 * float(row["val/loss"])  # which stays the cross entropy


def test_one_registration_makes_it_known_everywhere(capsys):
    found = _json(capsys, "evaluate", "--model", "run", "--data", "digits", *IMPORT)
    assert found["images"] == 599
    classifier = vit_cls.load("run")
    assert type(classifier.model.pool.poolings[0]).__name__ == "Corners"
    assert classifier.model.head.in_features == 16
    found = _json(capsys, "probe", "linear", "--model", "run", "--data", "digits", "--cache", "cache",
                  "--pools", "corners,cls,corners+cls,gem:3", *IMPORT)  # fmt: skip
    assert list(found["values"]["top1"]) == ["corners", "cls", "corners+cls", "gem:3"]
    found = _json(capsys, "probe", "attentive", "--model", "run", "--data", "digits", "--cache", "cache",
                  "--heads", "corners", "--recipe.epochs", "1", "--recipe.learning_rates", ".01",
                  *IMPORT)  # fmt: skip
    assert found["settings"]["heads"] == ["cls", "corners"]
    write_digits("digits_test")
    _json(
        capsys,
        "predict",
        "--model",
        "run",
        "digits_test",
        "--features",
        "corners",
        "--output",
        "out",
        *IMPORT,
    )
    assert load_file("out/features.safetensors")["features"].shape == (599, 8)


def test_a_row_of_another_table_is_known_as_well(place, capsys, monkeypatch):
    monkeypatch.setitem(PROBES, "near", None)
    del PROBES["near"]  # and again afterwards
    (place / "own_probe.py").write_text(
        "from vit_cls.lab.probes.knn import KnnProbe\n"
        "from vit_cls.lab.probes.table import PROBES\n"
        "PROBES['near'] = type('Near', (KnnProbe,), {'name': 'near', 'question': 'Who is near?'})\n"
    )
    with pytest.raises(SystemExit, match="0"):
        main(["probe", "near", "--help", "--import", "own_probe.py"])
    assert "Who is near?" in capsys.readouterr().out
    del sys.modules["own_probe"]


def test_a_run_keeps_what_it_was_given_though_python_goes_on_with_it(place, capsys, monkeypatch):
    _json(capsys, "fit", *DIGITS, "--run_dir", "plain", "--trainer.max_epochs", "1", *IMPORT)
    _json(capsys, "fit", "--resume", "plain", "--trainer.max_epochs", "2")  # the module is there already
    assert json.loads((place / "plain/run.json").read_text())["imports"] == {"own/corners.py": "corners"}


def test_a_study_knows_it_too(capsys):
    heads = ["--heads", "cls,corners", "--lr_grid", "1", "--seeds", "1", "--jobs", "1"]
    found = _json(capsys, "study", "heads", "--data", "digits", *heads, *TINY, *IMPORT)
    assert list(found["values"]["top1"]) == ["cls", "corners"]


def test_a_run_goes_on_with_its_code_and_not_without(capsys):
    complaint = _complaint(capsys, "fit", "--resume", "run", "--trainer.max_epochs", "2")
    assert complaint == (
        "vit-cls: the run in run was given own code: own/corners.py. Give it again: --resume run --import "
        "own/corners.py. Nothing is imported by itself.\n"
    )
    assert "corners" not in sys.modules
    found = _json(capsys, "fit", "--resume", "run", "--trainer.max_epochs", "2", *IMPORT)
    assert found["epochs"] == 2


def test_a_model_file_says_which_module_its_pooling_lacks(capsys, monkeypatch):
    message = (
        "its pooling corners is not known here; it was registered by module own/corners.py: give --import "
        "own/corners.py (or import it before vit_cls.load). Nothing is imported by itself."
    )
    for model in ("run", "run/model.safetensors", "run/checkpoints/last.ckpt"):
        assert message in _complaint(capsys, "evaluate", "--model", model, "--data", "digits")
    with pytest.raises(ModelFileError, match="own/corners"):
        vit_cls.load("run")
    with pytest.raises(ModelFileError, match="own/corners"):
        create_model("auto", pretrained="run")
    assert "corners" not in sys.modules
    monkeypatch.syspath_prepend("own")
    import corners  # noqa: F401

    assert vit_cls.load("run").class_names[0] == "0"


def test_timm_has_no_counterpart_of_an_own_pooling_and_our_file_does(capsys):
    words = ["export", "--model", "run", *IMPORT, "--output", "exported", "--format"]
    assert "model.pool corners+cls" in _complaint(capsys, *words, "timm")
    _json(capsys, *words, "safetensors")
    _forget()
    assert "give --import own/corners.py" in _complaint(
        capsys, "evaluate", "--model", "exported/model.safetensors", "--data", "digits"
    )


def test_without_its_registration_the_name_is_unknown_everywhere(capsys):
    digits = ["--data.name", "digits", "--run_dir", "other"]
    for words, message in (
        (["fit", *digits, "--model.pool", "corners"], "must be one of cls, gap, max"),
        (["study", "heads", "--data", "digits", "--heads", "cls,corners"], "must be one of cls, gap, max"),
        (["predict", "--model", "none", "x", "--features", "corners"], "must be one of cls, gap, max"),
        (["fit", *digits, "--data.augment", "shaken"], "data.augment must be one of crop_flip, affine"),
        (["fit", *digits, "--optim.loss", "twice"], "optim.loss must be one of cross_entropy, bce"),
        (["fit", *digits, "--metrics", "[kappa]"], "metrics must be one of f1, auroc"),
        (["fit", "--config", "run/config.yaml", "--run_dir", "other"], "must be one of"),
    ):
        complaint = _complaint(capsys, *words)
        assert message in complaint
        assert complaint.endswith("One of your own is known after --import MODULE.\n")

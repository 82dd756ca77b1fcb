"""Today's code repeats what the recorded code trained, wrote and said; `record.py` recorded it."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vit_cls
from tests.golden.record import (
    COMMANDS,
    GOLDEN,
    LOSSES,
    STEPS,
    TRAINED,
    TRAINING,
    VOLATILE,
    answer,
    losses,
    machine,
    tensors,
    train,
)
from tests.golden.record import vit_cls as vit_cls_json
from vit_cls.data.digits import load_digits
from vit_cls.weights.bundle import CHECKPOINT_KEY, FORMAT_VERSION, read_metadata

TOLERANCE = 1e-4
"""Of every number, on another processor or another torch; on the recorded ones none."""


MODELS = sorted(file for kind in ("safetensors", "ckpt") for file in GOLDEN.rglob(f"*.{kind}"))


def _tolerance() -> float:
    recorded = json.loads((GOLDEN / "machine.json").read_text())
    return 0.0 if machine() == recorded else TOLERANCE


def _differences(golden: Any, now: Any, tolerance: float, where: str = "") -> list[str]:
    """Where two answers differ; a key that is new is no difference, for old readers pass it over."""
    if isinstance(golden, dict) and isinstance(now, dict):
        gone = [f"{where}.{key} is gone" for key in golden if key not in now]
        return gone + [
            line
            for key in golden
            if key in now and key not in VOLATILE
            for line in _differences(golden[key], now[key], tolerance, f"{where}.{key}")
        ]
    if isinstance(golden, list) and isinstance(now, list) and len(golden) == len(now):
        return [
            line
            for i, (one, other) in enumerate(zip(golden, now, strict=True))
            for line in _differences(one, other, tolerance, f"{where}[{i}]")
        ]
    number = isinstance(golden, float) and isinstance(now, int | float)
    if golden == now or (number and math.isclose(golden, now, rel_tol=tolerance, abs_tol=tolerance)):
        return []
    return [f"{where}: {golden!r} -> {now!r}"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_of_old_models_what_it_said(name, tmp_path):
    golden = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    assert _differences(golden, answer(name, tmp_path), _tolerance()) == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The golden run, trained anew."""
    return train(tmp_path_factory.mktemp("golden"))


def test_training_ends_in_the_same_weights(trained):
    golden, now = (tensors(run / "model.safetensors") for run in (GOLDEN / TRAINED, trained))
    assert list(now) == list(golden)
    assert len(golden) >= 20
    for key, values in golden.items():
        if _tolerance():
            torch.testing.assert_close(now[key], values, rtol=TOLERANCE, atol=TOLERANCE, msg=key)
        else:
            assert torch.equal(now[key], values), key


def test_a_run_folder_has_the_same_files_and_metrics(trained):
    golden, now = (_metrics(run) for run in (GOLDEN / TRAINED, trained))
    assert len(now) == len(golden) == 3
    for old, new in zip(golden, now, strict=True):
        assert list(old) == list(new)
        for key, value in old.items():
            if not any(word in key for word in ("second", "data_wait")):
                assert float(new[key]) == pytest.approx(float(value), rel=TOLERANCE, abs=_tolerance()), key
    golden_files, files = (_files(run) for run in (GOLDEN / "run", trained))
    assert golden_files <= files
    assert len(golden_files) >= 9


def _metrics(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))


def _files(run: Path) -> set[str]:
    return {
        path.relative_to(run).as_posix().partition("events.out")[0]
        for path in run.rglob("*")
        if path.is_file()
    }


def test_fifty_steps_have_the_same_losses(tmp_path):
    golden = json.loads((GOLDEN / f"{LOSSES}.json").read_text())
    now = losses(tmp_path)
    assert len(now) == len(golden["losses"]) == STEPS
    if machine() == golden["machine"]:
        assert now == golden["losses"]
    else:
        assert now == pytest.approx(golden["losses"], rel=TOLERANCE)


@pytest.mark.parametrize("file", MODELS, ids=lambda file: file.relative_to(GOLDEN).as_posix())
def test_every_model_file_and_checkpoint_says_its_schema_and_loads(file):
    if file.suffix == ".ckpt":
        version = torch.load(file, weights_only=True)[CHECKPOINT_KEY]["format_version"]
    else:
        version = read_metadata(file)["format_version"]
    assert 1 <= version <= FORMAT_VERSION
    assert len(vit_cls.load(file).class_names) == 10


@pytest.mark.parametrize("file", ["run", "run/model.safetensors", "run/checkpoints/last.ckpt"])
def test_an_old_file_loads_and_says_what_the_run_says(file):
    images = torch.nn.functional.interpolate(load_digits("test").images[:16], size=(16, 16))
    logits = vit_cls.load(GOLDEN / file).eval()(images)
    expected = vit_cls.load(GOLDEN / "run" / "model.safetensors").eval()(images)
    assert logits.shape == (16, 10)
    # the last epoch of this run was its best, so its weights are those of the model file
    np.testing.assert_array_equal(logits.detach().numpy(), expected.detach().numpy())


def test_an_old_run_can_be_resumed(tmp_path):
    shutil.copytree(GOLDEN / "run", tmp_path / "run")
    longer = [word if word != "3" else "4" for word in TRAINING]
    told = vit_cls_json(
        "fit", *longer, "--model.pool", "cls", "--run_dir", "run", "--resume", "run", cwd=tmp_path
    )
    assert told["epochs"] == 4
    assert os.path.getsize(tmp_path / "run" / "model.safetensors") > 0

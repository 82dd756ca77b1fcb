"""The options that people script against, and the configurations that ship."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from vit_cls.commands.fit import FitCLI
from vit_cls.commands.parsing import known_keys
from vit_cls.model.config import ViTConfig
from vit_cls.training.options import ModelOptions

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
GOLDEN = Path(__file__).with_name("fit_options.txt")


def _options() -> list[str]:
    keys = known_keys(FitCLI(["--data.name", "digits"]).parser)
    return [key for key in keys if not key.startswith("trainer.")]


def test_adding_or_removing_an_option_of_fit_is_a_decision():
    """After such a decision, edit fit_options.txt by hand."""
    assert _options() == GOLDEN.read_text().split()


def test_stable_keys_are_there():
    stable = {"seed", "run_dir", "resume"}
    stable |= {f"data.{key}" for key in ("root", "name", "val_fraction", "batch_size", "num_workers")}
    stable |= {f"model.{key}" for key in ("name", "pretrained", "pool", "img_size", "drop_path_rate")}
    assert stable <= set(_options())


def test_model_options_are_fields_of_the_architecture_or_of_the_crop():
    fields = {field.name for field in dataclasses.fields(ViTConfig)} | {"name", "crop_pct", "crop_mode"}
    fields |= {"pretrained", "keep_head", "head_init", "max_fresh"}  # what becomes of weights
    fields |= {"grad_checkpointing"}  # how it is trained
    assert {field.name for field in dataclasses.fields(ModelOptions)} <= fields


def test_there_are_configurations():
    assert len(CONFIGS) >= 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_a_configuration_parses_builds_and_opens_with_what_it_is(path):
    head = path.read_text().splitlines()[:3]
    assert head[0].startswith("# ")
    assert head[1].startswith("# Run:")
    assert head[2].startswith("# Expect:")
    given = yaml.safe_load(path.read_text())
    words = ["--config", str(path)]
    if given.get("data", {}).get("name") != "digits":
        words += ["--data.root", "some/folder"]
    cli = FitCLI(words)
    assert cli.options.model.build(["a", "b"], load_weights=False).class_names == ["a", "b"]
    for section, values in given.items():
        for key, value in (values if isinstance(values, dict) else {}).items():
            assert cli.config[f"{section}.{key}"] == value

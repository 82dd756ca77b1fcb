"""A number that is not finite is refused wherever a user can set one."""

from __future__ import annotations

import dataclasses

import pytest

from vit_cls.checks import check_finite, check_range
from vit_cls.cli import main
from vit_cls.commands.fit_parser import FitCLI
from vit_cls.data.mixing import MixOptions
from vit_cls.errors import ConfigError
from vit_cls.lab.studies.recipe import Recipe
from vit_cls.model.classifier import Preprocess
from vit_cls.model.config import ViTConfig
from vit_cls.training.options import ModelOptions, OptimOptions
from vit_cls.training.trainer import check_arguments

BAD = [float("nan"), float("inf"), float("-inf")]
OPTIONS = {
    f"{kind.__name__} {field.name}": (kind, field.name, given)
    for kind, given in (
        (ModelOptions, {}),
        (OptimOptions, {}),
        (MixOptions, {}),
        (ViTConfig, {}),
        (Recipe, {}),
        (Preprocess, {"img_size": (8, 8)}),
    )
    for field in dataclasses.fields(kind)
    if "float" in str(field.type)
}


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("option", OPTIONS)
def test_no_option_takes_a_number_that_is_not_finite(option, value):
    kind, name, given = OPTIONS[option]
    with pytest.raises(ConfigError, match=f"{name} must be .*; got "):
        kind(**{**given, name: (0.5, value, 0.5) if name in ("mean", "std") else value})


@pytest.mark.parametrize(
    "words",
    [
        ["--data.mix.mixup_alpha", ".inf"],
        ["--optim.lr", ".nan"],
        ["--optim.ema_decay", ".nan"],
        ["--model.init_values", ".inf"],
        ["--data.val_fraction", ".nan"],
        ["--trainer.gradient_clip_val", ".inf"],
        ["--trainer.limit_val_batches", ".nan"],
        ["--trainer.val_check_interval", ".inf"],
    ],
    ids=" ".join,
)
def test_fit_takes_none_from_the_command_line(words):
    with pytest.raises(ConfigError, match=rf"^{words[0][2:]} must be a finite number; got (nan|inf)\.$"):
        FitCLI(["--data.name", "digits", *words])


@pytest.mark.parametrize(
    "words",
    [
        ["compare", "--model", "a", "--model", "b", "--data", "digits", "--margin", ".nan"],
        ["probe", "linear", "--model", "a", "--data", "digits", "--val_fraction", ".inf"],
        ["study", "depth", "--data", "digits", "--recipe.lr", ".inf"],
    ],
    ids=lambda words: words[0],
)
def test_no_other_verb_takes_one_either(words, capsys):
    assert main(words) == 2
    assert f"{words[-2][2:]} must be a finite number; got {words[-1][1:]}." in capsys.readouterr().err


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["gradient_clip_val", "limit_train_batches", "limit_val_batches"])
def test_no_argument_of_the_trainer_is_one(name, value):
    with pytest.raises(ConfigError, match=rf"trainer.{name} must be a finite number; got {value}\."):
        check_arguments({name: value})


def test_a_range_without_an_end_is_of_finite_numbers():
    check_range("--margin", 1e300, above=0)
    check_range("--margin", None, above=0)
    check_finite("", {"a": None, "b": "inf", "c": [1, 2.0], "d": 10**400})
    with pytest.raises(ConfigError, match=r"^--margin must be above 0 and finite; got inf\. Give a share\.$"):
        check_range("--margin", float("inf"), above=0, hint="Give a share.")

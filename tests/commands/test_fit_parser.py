"""What LightningCLI's parser makes of words and files, where it would not do what they say."""

from __future__ import annotations

import pytest
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from vit_cls.commands.fit_parser import FitCLI, whole_numbers_first
from vit_cls.errors import ConfigError

DIGITS = ("--data.name", "digits")


def _config(tmp_path, values) -> list[str]:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return ["--config", str(tmp_path / "config.yaml")]


@pytest.mark.parametrize("words", [("1", "1.0"), ("2", "0.5")])
def test_a_whole_number_of_batches_is_no_fraction(words, tmp_path):
    whole, part = words
    options = ["--trainer.limit_train_batches", whole, "--trainer.limit_val_batches", part]
    told = FitCLI([*DIGITS, *options, "--trainer.val_check_interval", whole]).trainer_options
    for name, word in (
        ("limit_train_batches", whole),
        ("limit_val_batches", part),
        ("val_check_interval", whole),
    ):
        assert repr(told[name]) == word
    config = {"data": {"name": "digits"}, "trainer": {"limit_train_batches": int(whole)}}
    assert repr(FitCLI(_config(tmp_path, config)).trainer_options["limit_train_batches"]) == whole


def test_int_is_tried_before_float_though_python_gives_them_in_the_other_order():
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--x", type=float | int | None)
    parser.add_argument("--y", type=float | None)
    assert repr(parser.parse_args(["--x", "1"]).x) == "1.0"
    whole_numbers_first(parser)
    assert repr(parser.parse_args(["--x", "1"]).x) == "1"
    assert repr(parser.parse_args(["--x", "1.0", "--y", "1"]).as_dict()) == "{'x': 1.0, 'y': 1.0}"


def test_a_callback_whose_default_is_no_plain_data_can_be_named_and_written_down(tmp_path):
    timer = {"class_path": "lightning.pytorch.callbacks.Timer", "init_args": {"duration": "00:01:00:00"}}
    cli = FitCLI(_config(tmp_path, {"data": {"name": "digits"}, "trainer": {"callbacks": [timer]}}))
    (written,) = yaml.safe_load(cli.config_yaml())["trainer"]["callbacks"]
    assert written["init_args"]["interval"] == "step"


@pytest.mark.parametrize("given", [None, [], [1], 3.5, "digits"])
@pytest.mark.parametrize("group", ["model", "data", "optim", "trainer"])
def test_a_group_that_is_none_is_told_by_its_name(group, given, tmp_path):
    with pytest.raises(ConfigError, match=rf"{group}\b") as told:
        FitCLI(_config(tmp_path, {"data": {"name": "digits"}, group: given}))
    assert "object at 0x" not in str(told.value)


@pytest.mark.parametrize(
    "key", ["data.batch_size", "optim.weight_decay", "trainer.accumulate_grad_batches", "seed"]
)
def test_a_null_in_a_file_is_refused_where_a_value_is_needed(key, tmp_path):
    group, _, name = key.rpartition(".")
    values = {"data": {"name": "digits"}}
    (values.setdefault(group, {}) if group else values)[name] = None
    with pytest.raises(ConfigError, match=f"^{key} must have a value; got null. .* the default is"):
        FitCLI(_config(tmp_path, values))


def test_a_null_is_taken_where_it_means_something(tmp_path):
    values = {"data": {"name": "digits", "num_workers": None}, "optim": {"lr": None}}
    values["trainer"] = {"check_val_every_n_epoch": None, "limit_train_batches": None}
    assert FitCLI(_config(tmp_path, values)).options.optim.lr is None

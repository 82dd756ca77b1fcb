"""LightningCLI's parser in front of `vit_cls.training.fit`."""

from __future__ import annotations

import functools
import operator
from enum import Enum
from typing import Any, get_args

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from vit_cls.commands.complaints import explain_object
from vit_cls.commands.parsing import EPILOG, add_flag, parse
from vit_cls.data.datamodule import ImageDataModule
from vit_cls.errors import ConfigError, VitClsError
from vit_cls.training.options import FitOptions, ModelOptions, OptimOptions
from vit_cls.training.task import ClassificationTask
from vit_cls.training.trainer import SHARDED, TRAINER_DEFAULTS, refuse_strategy

FIT_KEYS = (
    *("seed", "run_dir", "resume", "resume_changes", "early_stopping_patience", "compile", "metrics"),
    "logger",
)
# Defaults of some of Lightning's callbacks, such as Timer's, which YAML would not take.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_data(value.value))
TRUST_HELP = "resume a run whose configuration names classes other than Lightning's, docs/training.md"


class FitCLI(LightningCLI):
    """LightningCLI with our keys: ``model``, ``optim`` and the run's own are dataclasses, built by `fit`.

    Args:
        words: The words after ``fit``.
    """

    def __init__(self, words: list[str]) -> None:
        super().__init__(
            ClassificationTask,
            ImageDataModule,
            run=False,
            save_config_callback=None,
            auto_configure_optimizers=False,
            parser_kwargs={
                "prog": "vit-cls fit",
                "description": "Train a classifier; a run folder comes out.",
                "epilog": EPILOG,
                "exit_on_error": False,
                "allow_abbrev": False,
            },
            args=words,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The keys of the run itself."""
        parser.add_class_arguments(FitOptions, None, skip={"model", "optim"})
        add_flag(parser, "--trust_config", TRUST_HELP)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """``model``, ``data``, ``optim`` and Lightning's ``trainer``."""
        parser.add_class_arguments(ModelOptions, "model")
        parser.add_lightning_class_args(ImageDataModule, "data")
        parser.add_class_arguments(OptimOptions, "optim")
        parser.add_lightning_class_args(Trainer, "trainer")
        whole_numbers_first(parser)
        parser.set_defaults({f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words; complaints are ours."""
        self.config = parse(parser, args)

    def _set_seed(self) -> None:
        """`fit` seeds, from the key ``seed``."""

    def instantiate_classes(self) -> None:
        """Build the options and the data; the model needs the class names, so `fit` builds it."""
        strategy = str(getattr(self.config.trainer.strategy, "class_path", "")).rpartition(".")[2]
        if strategy in SHARDED:
            refuse_strategy(strategy)
        try:
            built = self.parser.instantiate(self.config)
        except VitClsError:
            raise
        except Exception as error:  # of any class that the user named
            raise ConfigError(explain_object(str(error))) from error
        self.datamodule = built.data
        run = {key: built[key] for key in FIT_KEYS}
        self.options = FitOptions(model=built.model, optim=built.optim, **run)
        self.trainer_options = dict(built.trainer)

    def config_yaml(self) -> str:
        """The resolved configuration, in a form that ``--config`` takes back, for this run or another."""
        config = self.config.clone()
        for key in ("config", "run_dir", "resume", "resume_changes", "trust_config"):
            config.pop(key, None)
        return self.parser.dump(config, skip_unset=False)


def whole_numbers_first(parser: LightningArgumentParser) -> None:
    """Try ``int`` before ``float`` wherever a value may be both: one batch is not all of them, which is 1.0.

    Python keeps one ``Optional[Union[int, float]]`` for both orders, that of whoever wrote it first.
    """
    for action in parser._actions:
        kinds = get_args(getattr(action, "_typehint", None))
        if int in kinds and float in kinds:
            others = [kind for kind in kinds if kind not in (int, float)]
            action._typehint = functools.reduce(operator.or_, [int, float, *others])  # type: ignore[attr-defined]

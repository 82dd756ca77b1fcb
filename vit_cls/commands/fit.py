"""``vit-cls fit``: LightningCLI's parser in front of `vit_cls.training.fit`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from vit_cls import formatting as fmt
from vit_cls.commands.outcome import Outcome
from vit_cls.commands.parsing import EPILOG, parse
from vit_cls.data.datamodule import ImageDataModule
from vit_cls.reports.html import write_fit_report
from vit_cls.stats.intervals import wilson_interval
from vit_cls.training.fit import TRAINER_DEFAULTS, FitResult, fit
from vit_cls.training.options import FitOptions, ModelOptions, OptimOptions
from vit_cls.training.runs import RunFolder, is_first_process
from vit_cls.training.task import ClassificationTask

FIT_KEYS = ("seed", "run_dir", "resume", "early_stopping_patience", "compile")


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

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """``model``, ``data``, ``optim`` and Lightning's ``trainer``."""
        parser.add_class_arguments(ModelOptions, "model")
        parser.add_lightning_class_args(ImageDataModule, "data")
        parser.add_class_arguments(OptimOptions, "optim")
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words; complaints are ours."""
        self.config = parse(parser, args)

    def _set_seed(self) -> None:
        """`fit` seeds, from the key ``seed``."""

    def instantiate_classes(self) -> None:
        """Build the options and the data; the model needs the class names, so `fit` builds it."""
        built = self.parser.instantiate(self.config)
        self.datamodule = built.data
        run = {key: built[key] for key in FIT_KEYS}
        self.options = FitOptions(model=built.model, optim=built.optim, **run)
        self.trainer_options = dict(built.trainer)

    def config_yaml(self) -> str:
        """The resolved configuration, in a form that ``--config`` takes back, for this run or another."""
        config = self.config.clone()
        for key in ("config", "run_dir", "resume"):
            config.pop(key, None)
        return self.parser.dump(config, skip_unset=False)


def run(words: list[str]) -> Outcome:
    """Train.

    Args:
        words: The words after ``fit``.

    Returns:
        Where the run folder is, and the validation accuracy of its best epoch.

    Raises:
        VitClsError: If the request cannot be carried out.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
    cli = FitCLI(_with_config_of_resumed_run(words))
    command = ["vit-cls", "fit", *words]
    config_yaml = cli.config_yaml()
    result = fit(cli.options, cli.datamodule, cli.trainer_options, config_yaml=config_yaml, command=command)
    outcome = _outcome(result)
    if not outcome.silent:
        interval = (outcome.data["top1_ci95"][0], outcome.data["top1_ci95"][1])
        write_fit_report(result.folder.report_file, result.folder.read_record(), result.history, interval)
    return outcome


def _with_config_of_resumed_run(words: list[str]) -> list[str]:
    """``--resume RUN`` alone is enough: the run's own configuration comes first."""
    pairs = [
        word.partition("=")[::2] if "=" in word else (word, after)
        for word, after in zip(words, [*words[1:], ""], strict=False)
    ]
    resume = next((value for word, value in pairs if word == "--resume"), None)
    if resume in (None, "", "auto") or any(word in ("--config", "-c") for word, _ in pairs):
        return words
    config = RunFolder(Path(resume)).config_file
    return ["--config", str(config), "--run_dir", "null", *words] if config.is_file() else words


def _outcome(result: FitResult) -> Outcome:
    top1 = result.correct / result.images
    low, high = wilson_interval(result.correct, result.images)
    data = {
        "run_dir": str(result.folder.path),
        "top1": top1,
        "top1_ci95": [low, high],
        "top5": result.top5,
        "correct": result.correct,
        "images": result.images,
        "epochs": result.epochs,
        "best_epoch": result.best_epoch,
        "seconds": round(result.seconds, 3),
        "train_images_per_second": round(result.train_images_per_second, 1),
        "model": str(result.folder.model_file),
    }
    text = (
        f"{result.correct} of {result.images} validation images right: top-1 {fmt.decimals(top1)} "
        f"({fmt.interval((low, high))}), best of {result.epochs} epochs "
        f"(epoch {result.best_epoch}, counted from 0).\n"
        f"Run folder: {result.folder.path}\nNext: vit-cls evaluate --model {result.folder.path} --data FOLDER"
    )
    return Outcome(data, text, silent=not is_first_process())

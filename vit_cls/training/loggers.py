"""Loggers by one word, and what each of them is told of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from vit_cls.checks import check_choice
from vit_cls.errors import ConfigError, RunError, VitClsError

PROJECT = "vit_cls"
"""Where W&B (unless ``WANDB_PROJECT`` is set) and MLflow gather the runs."""


def _tensorboard(folder: Path) -> Logger:
    return TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False)


def _csv(folder: Path) -> Logger:
    """In a new folder each time: Lightning's begins by deleting the file, and so the first half of a run."""
    taken = len(list(folder.glob("csv*")))
    return CSVLogger(folder, name="", version=f"csv_{taken}" if taken else "csv")


def _wandb(folder: Path) -> Logger:
    """Online or not as ``WANDB_MODE`` says, which W&B reads itself."""
    return WandbLogger(name=folder.name, save_dir=folder, project=os.environ.get("WANDB_PROJECT", PROJECT))


def _mlflow(folder: Path) -> Logger:
    """On the server of ``MLFLOW_TRACKING_URI``, or in the run folder."""
    server = os.environ.get("MLFLOW_TRACKING_URI")
    return MLFlowLogger(PROJECT, folder.name, tracking_uri=server, save_dir=str(folder / "mlruns"))


LOGGERS: dict[str, tuple[str, Callable[[Path], Logger]]] = {
    "tensorboard": ("tensorboard", _tensorboard),
    "csv": ("lightning", _csv),
    "wandb": ("wandb", _wandb),
    "mlflow": ("mlflow", _mlflow),
}
"""By the word of ``--logger``: the package, and the logger of a run folder."""


def make_loggers(
    words: str | list[str] | None, given: Logger | Iterable[Logger] | bool | None, folder: Path
) -> list[Logger]:
    """The loggers of a run: TensorBoard, or those that words name; and the user's own objects.

    Args:
        words: Of `LOGGERS`, in a list or separated by commas.
        given: ``trainer.logger``; False is no logger at all.

    Raises:
        ConfigError: If a word is unknown, a package is missing, or the two contradict each other.
    """
    if isinstance(given, str):
        words, given = words or given, None
    names = words.split(",") if isinstance(words, str) else words
    if given is False:
        if names:
            raise ConfigError(
                f"logger is {','.join(names)}, but trainer.logger false wants none. Leave one of them out."
            )
        return []
    for name in names or ():
        check_choice("logger", name, LOGGERS)
    users = [] if given in (None, True) else list(given) if isinstance(given, Iterable) else [given]
    for logger in users:
        if not isinstance(logger, Logger):
            raise ConfigError(
                f"trainer.logger must be true, false or loggers of Lightning; got {logger!r}. By one word: "
                f"--logger {'|'.join(LOGGERS)}."
            )
    return [*(_make(name, folder) for name in names or ["tensorboard"]), *users]


def _make(name: str, folder: Path) -> Logger:
    package, make = LOGGERS[name]
    try:
        return make(folder)
    except ImportError as error:
        raise ConfigError(
            f"logger {name} needs the package {package}, which is not installed ({error}). Install it, such "
            f"as by `pip install {package}`, or choose another of {', '.join(LOGGERS)}."
        ) from error


def begin_logging(loggers: Iterable[Logger], hyperparameters: Mapping[str, Any]) -> None:
    """Tell every logger the settings of the run; the first of them that cannot begin ends it here.

    Args:
        hyperparameters: One level, such as ``optim.lr``.

    Raises:
        RunError: If a logger raises, for want of a network or a key, say.
    """
    for logger in loggers if hyperparameters else ():
        try:
            logger.log_hyperparams(dict(hyperparameters))
        except VitClsError:
            raise
        except Exception as error:  # whatever a service's client raises
            raise RunError(
                f"{type(logger).__name__} cannot begin: {error}. See to its settings (W&B: "
                f"WANDB_MODE=offline needs no network), or choose another: {', '.join(LOGGERS)}."
            ) from error


def end_logging(loggers: Iterable[Logger], hyperparameters: Mapping[str, Any], best: float) -> None:
    """Let TensorBoard's table of hyperparameters show the best accuracy beside them."""
    for logger in loggers if hyperparameters else ():
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(dict(hyperparameters), {"best/acc1": best})
            logger.finalize("success")

"""One training of a study, through the same `fit` that users run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_cls.data.datamodule import ImageDataModule
from vit_cls.data.dataset import ImageSource
from vit_cls.inference import choose_device
from vit_cls.training.fit import fit
from vit_cls.training.options import FitOptions, ModelOptions, OptimOptions


def train_trial(
    run_dir: Path,
    train: ImageSource,
    val: ImageSource,
    *,
    origin: str,
    seed: int,
    model: Mapping[str, Any],
    optim: Mapping[str, Any],
    loader: Mapping[str, Any],
    epochs: int,
) -> Path:
    """Train one model on one device, or go on where an earlier try stopped; returns the model file.

    Args:
        origin: One sentence: where the images come from.
        seed: Of weights, order and augmentation.
        model: Settings of `ModelOptions`.
        optim: Settings of `OptimOptions`.
        loader: Settings of `ImageDataModule`, such as ``batch_size``.
        epochs: How long. The last epoch alone is validated: its model is kept, none is selected.

    Raises:
        VitClsError: If the settings do not make a run, or the run fails.
    """
    options = FitOptions(
        model=ModelOptions(**model),
        optim=OptimOptions(**optim),
        seed=seed,
        run_dir=str(run_dir),
        resume="auto",
    )
    device = choose_device("auto")
    trainer: dict[str, Any] = {
        "max_epochs": epochs,
        "check_val_every_n_epoch": epochs,
        "logger": False,
        "enable_progress_bar": False,
        "accelerator": device.type,
        "devices": [device.index or 0] if device.type == "cuda" else 1,
    }
    # Of Lightning's own, about what it calls in torch; a study runs it in many processes.
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
    logger = logging.getLogger("vit_cls")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))  # a study speaks for all of its runs
    try:
        result = fit(options, ImageDataModule.of_sources(train, val, origin, **loader), trainer)
    finally:
        logger.setLevel(level)
    return result.folder.model_file

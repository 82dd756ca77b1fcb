"""Tiny runs of training, what they leave, and callbacks that stop them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from vit_cls.data.datamodule import ImageDataModule
from vit_cls.training.fit import fit
from vit_cls.training.options import FitOptions, ModelOptions, OptimOptions
from vit_cls.training.result import FitResult

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def run_tiny(
    root, run_dir, *, epochs=2, model=None, optim=None, data=None, trainer=None, **options
) -> tuple[FitResult, ImageDataModule]:
    """Train a tiny model with drop path on a CPU; settings of each part are dictionaries."""
    settings = {"name": "vit_pico_patch7_28", **TINY, "drop_path_rate": 0.2, **(model or {})}
    module = ImageDataModule(str(root), **{"batch_size": 5, "num_workers": 0, **(data or {})})
    place = None if run_dir is None else str(run_dir)
    run = FitOptions(
        ModelOptions(**settings), OptimOptions(**{"lr": 3e-3, **(optim or {})}), run_dir=place, **options
    )
    cpu = {"accelerator": "cpu", "log_every_n_steps": 1, "max_epochs": epochs, **(trainer or {})}
    return fit(run, module, cpu, config_yaml="seed: 0\n"), module


def fit_tiny(root, run_dir, **settings) -> FitResult:
    """As `run_tiny`."""
    return run_tiny(root, run_dir, **settings)[0]


def record_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "run.json").read_text())


def rows_of(run_dir: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))


def weights_of(run_dir: Path, which: str = "last") -> dict[str, Tensor]:
    """Of the model in a checkpoint, by its own names."""
    state = torch.load(run_dir / f"checkpoints/{which}.ckpt", weights_only=True)["state_dict"]
    prefix = "classifier.model."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def same_weights(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


class StopAfter(Callback):
    """Ends training as Lightning does by itself, after that many epochs."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs

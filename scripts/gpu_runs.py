"""Runs of `fit` for the GPU check, by the command line or by Python, and photos to train on."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from pairs import Row
from PIL import Image

from vit_cls.data.datamodule import ImageDataModule
from vit_cls.data.mixing import MixOptions
from vit_cls.environment import cpu_count
from vit_cls.reports.folder import write_folder
from vit_cls.training.fit import fit
from vit_cls.training.options import FitOptions, ModelOptions, OptimOptions
from vit_cls.training.runs import RunFolder

MOST_BATCHES = 100
"""Of training and of validation, in an epoch of somebody's own photos."""


class Failed(Exception):
    """A step came to its end, and its answer is bad."""


def make_photos(root: Path, *, classes: int, counts: tuple[int, int], side: int) -> int:
    """Write JPEGs of all sizes, with waves of a colour and a direction for each class; gives their number.

    Args:
        root: Is made, with ``train/`` and ``val/``.
        counts: Images a class, to train and to validate on.
        side: About so many pixels.
    """
    jobs = []
    for part, count in zip(("train", "val"), counts, strict=True):
        for label in range(classes):
            (root / part / f"class_{label}").mkdir(parents=True)
            jobs += [
                (root / part / f"class_{label}" / f"{i}.jpg", label / classes, side) for i in range(count)
            ]
    with ThreadPoolExecutor(cpu_count()) as pool:
        list(pool.map(_make_photo, range(len(jobs)), jobs))
    return len(jobs)


def _make_photo(seed: int, job: tuple[Path, float, int]) -> None:
    file, turn, side = job
    rng = np.random.default_rng(seed)
    height, width = rng.integers(side * 3 // 4, side * 5 // 4, 2)
    y, x = np.mgrid[:height, :width].astype(np.float32) / side
    angle = math.pi * turn + rng.normal(0, 0.1)
    wave = np.sin(20 * (math.cos(angle) * x + math.sin(angle) * y) + rng.uniform(0, 6))
    wave += 0.4 * rng.standard_normal((height, width), dtype=np.float32)
    colour = 40 * np.cos(2 * math.pi * (turn + np.arange(3, dtype=np.float32) / 3))
    pixels = 128 + colour + 50 * wave[..., None]
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=90)


def train(options: Row, callbacks: Sequence[Callback] = ()) -> Path:
    """Run `fit`, by the command line where it can be used and no callback is given, and write its pages."""
    run_dir = Path(options["run_dir"])
    if importlib.util.find_spec("jsonargparse") is not None and not callbacks:
        from vit_cls.cli import main

        words = [
            f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in options.items()
        ]
        complaint = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(complaint):
            code = main(["fit", *words, "--json"])
        if code:
            raise Failed(complaint.getvalue().strip().splitlines()[-1])
        return run_dir
    parts: dict[str, Row] = {"model": {}, "optim": {}, "data": {}, "trainer": {}, "": {}}
    for key, value in options.items():
        part, _, name = key.rpartition(".")
        parts[part][name] = value
    run = FitOptions(ModelOptions(**parts["model"]), OptimOptions(**parts["optim"]), **parts[""])
    mix = MixOptions(**parts["data"].pop("mix", {}))
    trainer = {**parts["trainer"], "callbacks": list(callbacks)}
    result = fit(run, ImageDataModule(**parts["data"], mix=mix), trainer)
    write_folder(run_dir, result, record=result.folder.read_record(), option="--run_dir")
    return run_dir


def told_of_run(run_dir: Path, *, falls: bool = False) -> Row:
    """What a run has to show; `Failed` where a part of it is missing, or a loss not finite or not falling."""
    missing = [
        name for name in ("model.safetensors", "report.html", "run.json") if not (run_dir / name).is_file()
    ]
    if missing:
        raise Failed(f"{run_dir.name} lacks {', '.join(missing)}")
    record, rows = RunFolder(run_dir).read_record(), RunFolder(run_dir).read_history()
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    if not all(map(math.isfinite, losses)):
        raise Failed(f"the training loss of {run_dir.name} is not finite: {losses}")
    if falls and losses[-1] >= losses[0]:
        raise Failed(f"the training loss of {run_dir.name} does not fall: {losses}")
    return {
        "device": record["device_name"] or record["device"],
        "precision": record["precision"],
        "top1": record["result"]["correct"] / record["result"]["images"],
        "kept": record["result"].get("weights"),
        "losses": losses,
        "images_per_second": [row["train_images_per_second"] for row in rows],
        "data_wait": [row["data_wait"] for row in rows],
    }


class NoWait(Callback):
    """From a run's second step on, whatever waits for the GPU within a step is an error."""

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The first batch of an epoch makes the metrics' buffers."""
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error" if batch_idx else "default")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """What comes between steps may wait."""
        self.steps += batch_idx > 0
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")

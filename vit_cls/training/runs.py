"""The run folder: whether a run may begin or go on there, its record, the lines before the first step."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from vit_cls import formatting as fmt
from vit_cls.data.datamodule import ImageDataModule
from vit_cls.environment import environment
from vit_cls.errors import ConfigError, RunError
from vit_cls.files import TEMPORARY, write_text
from vit_cls.locks import is_lock
from vit_cls.model.classifier import ImageClassifier
from vit_cls.own_code import import_options, not_imported
from vit_cls.training.checkpoint_io import BEST, LAST, has_checkpoint, record_in
from vit_cls.training.launch import is_first_process
from vit_cls.training.losses import is_smoothed
from vit_cls.training.optim import lr_table, optimizer_groups
from vit_cls.training.options import AUTO, FitOptions
from vit_cls.training.task import Schedule
from vit_cls.weights.bundle import MODEL_FILE

log = logging.getLogger("vit_cls")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run folder.

    Args:
        path: The folder.
    """

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved configuration; ``fit --config`` takes it back."""
        return self.path / "config.yaml"

    @property
    def record_file(self) -> Path:
        """Versions, seeds, data fingerprint, result."""
        return self.path / "run.json"

    @property
    def metrics_file(self) -> Path:
        """One row an epoch."""
        return self.path / "metrics.csv"

    @property
    def checkpoint_dir(self) -> Path:
        """``last.ckpt`` and ``best.ckpt``, for resuming."""
        return self.path / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        """The training state after the last complete epoch."""
        return self.checkpoint_dir / LAST

    @property
    def best_checkpoint(self) -> Path:
        """The training state after the best epoch."""
        return self.checkpoint_dir / BEST

    @property
    def files_file(self) -> Path:
        """Digests of the single files of the data."""
        return self.checkpoint_dir / "files.npz"

    @property
    def model_file(self) -> Path:
        """The best model, for everything but resuming."""
        return self.path / MODEL_FILE

    @property
    def report_file(self) -> Path:
        """The page for people."""
        return self.path / "report.html"

    @property
    def is_taken(self) -> bool:
        """Whether it holds anything but the lock of a run that begins."""
        return self.path.is_dir() and not all(
            is_lock(path) or path.name.endswith(TEMPORARY) for path in self.path.iterdir()
        )

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is anything to go on from."""
        return has_checkpoint(self.checkpoint_dir)

    def clear(self) -> None:
        """Take away what is in it, but for the lock of the run that does so."""
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif not is_lock(path):
                path.unlink(missing_ok=True)

    def read_record(self) -> dict[str, Any]:
        """What ``run.json`` holds, or else the checkpoints; RunError if both are missing or damaged."""
        try:
            record = json.loads(self.record_file.read_text(encoding="utf-8"))
            if not isinstance(record, dict) or not isinstance(record.get("identity", {}), dict):
                raise ValueError("no record of a run")
            return record
        except (OSError, ValueError, RecursionError) as error:
            if (kept := record_in(self.checkpoint_dir)) is None:
                raise RunError(
                    f"{self.record_file} cannot be read ({error}), and no whole checkpoint says the same. "
                    "Restore it from a copy, or begin the run again in another folder."
                ) from error
            log.warning(f"{self.record_file} cannot be read ({error}): it is written anew from a checkpoint")
            return kept

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replace ``run.json``."""
        write_text(self.record_file, json.dumps(record, indent=2) + "\n")

    def read_history(self) -> list[dict[str, float]]:
        """The rows of ``metrics.csv``; empty where there is none yet, RunError where it is damaged."""
        if not self.metrics_file.is_file():
            return []
        try:
            with self.metrics_file.open(newline="", encoding="utf-8") as file:
                return [{k: float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]
        except (ValueError, TypeError, csv.Error) as error:  # TypeError: a row with too few or too many cells
            raise RunError(
                f"{self.metrics_file} is damaged ({error}), and the checkpoint is of an older version, which "
                "does not hold the rows. Restore it from a copy; or take it away, to go on without them."
            ) from error

    def write_history(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Replace ``metrics.csv``; whole numbers are written as such."""
        whole_epochs_first = sorted(rows, key=lambda row: "seconds" not in row)
        columns = list(dict.fromkeys(name for row in whole_epochs_first for name in row))
        lines = [",".join(columns)]
        for row in rows:
            lines.append(",".join(_number(row[name]) if name in row else "" for name in columns))
        write_text(self.metrics_file, "\n".join(lines) + "\n")


def choose_folder(run_dir: str | None, resume: str | None, *, stem: str) -> RunFolder:
    """Where a run goes; without ``run_dir`` to ``runs/STEM_N`` with the first free N. Creates nothing.

    Raises:
        ConfigError: If ``run_dir`` and ``resume`` contradict each other.
    """
    if resume not in (None, "auto"):
        if run_dir is not None and Path(run_dir).resolve() != Path(resume).resolve():
            raise ConfigError(
                f"resume {resume} continues that folder, but run_dir is {run_dir}. Give one of the two."
            )
        return RunFolder(Path(resume))
    if run_dir is not None:
        return RunFolder(Path(run_dir))
    if resume == "auto":
        raise ConfigError("resume auto needs run_dir: the folder to continue if it was begun.")
    number = 0
    while (Path("runs") / f"{stem}_{number}").exists():
        number += 1
    return RunFolder(Path("runs") / f"{stem}_{number}")


def is_resumed(folder: RunFolder, resume: str | None, *, first_process: bool = True) -> bool:
    """Whether the last checkpoint of a folder is to be continued.

    The first process makes the folder; the others of a run find it made.

    Raises:
        RunError: If the folder is taken, or there is nothing to resume.
    """
    if resume not in (None, "auto"):
        if not folder.has_checkpoint:
            raise RunError(
                f"resume {resume}: there is no {folder.last_checkpoint}. A run can be resumed once it has "
                "made a step; to begin one again use --run_dir FOLDER --resume auto."
            )
        return True
    if folder.path.exists() and not folder.path.is_dir():
        raise RunError(f"run_dir {folder.path} is a file. Give a new folder.")
    if resume == "auto" and folder.has_checkpoint:
        return True
    if not (first_process and folder.is_taken):
        return False
    begun = folder.record_file.is_file()
    if begun and resume is None and not folder.has_checkpoint:
        raise RunError(
            f"run_dir {folder.path} holds a run without a finished step. Begin it again with --resume auto, "
            "or give a new folder."
        )
    if not (resume == "auto" and begun):
        raise RunError(
            f"run_dir {folder.path} is not empty. Give a new folder, or continue the run in it with "
            f"--resume {folder.path}."
        )
    return False


def check_imports(folder: RunFolder) -> dict[str, Any]:
    """The record of a run; RunError if the own code that it was given is missing now; imports nothing."""
    record = folder.read_record()
    missing = not_imported(record.get("imports", {}))
    if missing:
        raise RunError(
            f"the run in {folder.path} was given own code: {', '.join(missing)}. Give it again: --resume "
            f"{folder.path}{import_options(missing)}. Nothing is imported by itself."
        )
    return record


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:.6g}"


def run_record(
    options: FitOptions,
    data: ImageDataModule,
    classifier: ImageClassifier,
    trainer: Trainer,
    schedule: Schedule,
    identity: dict[str, Any],
    imports: Mapping[str, str],
    command: list[str] | None,
) -> dict[str, Any]:
    """What ``run.json`` says from the start."""
    model = classifier.model
    return {
        "format_version": 1,
        "command": command,
        "imports": dict(imports),
        "started": now(),
        **environment(),
        "seed": options.seed,
        "identity": identity,
        "data": {
            "name": data.name,
            "root": data.root,
            "split": data.origin,
            "allowed": data.allow,
            "problems": {problem.kind: problem.count for problem in data.problems},
            "train_images": len(data.train_set),
            "val_images": len(data.val_set),
            "scored_val_images": data.scored_images(trainer.limit_val_batches, trainer.world_size),
            "train_counts": dict(
                zip(data.class_names, data.train_source.index.counts().tolist(), strict=True)
            ),
        },
        "model": {
            "name": classifier.weights_source if options.model.name == AUTO else options.model.name,
            "pool": model.config.pool,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens": model.layout.num_tokens,
            "preprocess": _plain(dataclasses.asdict(classifier.preprocess)),
            "colour": classifier.preprocess.colour,
            "weights_licence": classifier.weights_licence,
            "weights_source": classifier.weights_source,
            "load_report": None if model.load_report is None else model.load_report.to_dict(),
        },
        "optim": {
            **dataclasses.asdict(options.optim),
            "peak_lr": schedule.lr,
            "total_steps": schedule.total_steps,
            "recipe": options.model.recipe.family,
        },
        "device": str(trainer.strategy.root_device),
        "device_name": torch.cuda.get_device_name(trainer.strategy.root_device)
        if trainer.strategy.root_device.type == "cuda"
        else None,
        "precision": str(trainer.precision),
        "processes": trainer.world_size,
    }


USUAL_SIZE = 224
"""Side in pixels at which most weights are fine-tuned."""
LARGE = 4
"""Times the patches of `USUAL_SIZE`."""


def announce_weights(options: FitOptions, classifier: ImageClassifier, schedule: Schedule) -> None:
    """Say what became of the weights, and at which rate each layer learns."""
    if not is_first_process():
        return
    if classifier.model.load_report is not None:
        log.info(classifier.model.load_report.table())
    if options.model.img_size is None and (hint := size_hint(classifier)) is not None:
        log.info(hint)
    optim = options.optim
    if optim.freeze is not None:
        counts = [p.numel() for p in classifier.model.parameters() if not p.requires_grad]
        log.info(f"{fmt.count(sum(counts))} parameters are frozen (optim.freeze {optim.freeze})")
    if optim.head_first_epochs:
        log.info(
            f"epochs 0 to {optim.head_first_epochs - 1}: the head alone, learning rate "
            f"{optim.head_first_lr:g}; then all"
        )
    if optim.label_smoothing and not is_smoothed(optim.loss):
        log.info(
            f"the loss {optim.loss} is your own, so optim.label_smoothing ({optim.label_smoothing:g}) has no "
            "effect: smooth in it"
        )
    groups = optimizer_groups(classifier.model, optim, lr=schedule.lr)
    if len({group["lr"] for group in groups}) > 1:
        log.info(lr_table(groups))


def size_hint(classifier: ImageClassifier) -> str | None:
    """What 224 pixels would save, where the model's own size has `LARGE` times as many patches or more."""
    config = classifier.model.config
    patches, patch = classifier.model.layout.num_patches, config.patch_size
    usual = (USUAL_SIZE // patch) ** 2
    if USUAL_SIZE % patch or patches < LARGE * usual:
        return None
    return (
        f"{' x '.join(map(str, config.image_hw))} pixels are the model's own size, and make "
        f"{fmt.count(patches)} patches of an image. --model.img_size {USUAL_SIZE} would make "
        f"{fmt.count(usual)}, {patches / usual:.1f} times fewer, for less memory and time"
    )


def announce_run(record: Mapping[str, Any], data: ImageDataModule, schedule: Schedule) -> None:
    """Say before the first step what is about to be trained, on what."""
    if not is_first_process():
        return
    model = record["model"]
    pre = model["preprocess"]
    log.info(
        f"{model['name']}, pool {model['pool']}: {fmt.count(model['parameters'])} parameters, "
        f"{model['tokens']} tokens, {len(data.class_names)} classes"
    )
    colour = "" if model["colour"] == "RGB" else f"{model['colour']}, "
    log.info(
        f"input {' x '.join(map(str, pre['img_size']))} pixels, {colour}mean {pre['mean']}, std "
        f"{pre['std']}, crop {pre['crop_pct']:g} {pre['crop_mode']}, {pre['interpolation']}"
    )
    log.info(
        f"{fmt.count(len(data.train_set))} images to train on, {fmt.count(len(data.val_set))} to validate "
        f"on: {data.origin}"
    )
    log.info(
        f"{record['processes']} process(es) on {record['device_name'] or record['device']}, "
        f"{record['precision']}, {fmt.count(schedule.total_steps)} steps, peak learning rate "
        f"{fmt.significant(schedule.lr, 3)}, seed {record['seed']}"
    )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples are lists."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def now() -> str:
    """The time of day in UTC, to the second, as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")

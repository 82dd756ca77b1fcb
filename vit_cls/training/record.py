"""What a run says of itself: the record on disk, the lines before the first step."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch
from lightning.pytorch import Trainer

from vit_cls.data.datamodule import ImageDataModule
from vit_cls.environment import environment
from vit_cls.model.classifier import ImageClassifier
from vit_cls.training.optim import lr_table, optimizer_groups
from vit_cls.training.options import AUTO, FitOptions
from vit_cls.training.runs import is_first_process
from vit_cls.training.task import Schedule

log = logging.getLogger("vit_cls")


def run_identity(options: FitOptions, data: ImageDataModule, classifier: ImageClassifier) -> dict[str, Any]:
    """What must not change between the parts of a resumed run.

    Args:
        options: Of the run.
        data: Configured.
        classifier: What is trained.
    """
    return {
        "architecture": _plain(classifier.model.config.to_dict()),
        "class_names": data.class_names,
        "train_fingerprint": data.train_source.index.fingerprint(),
        "val_fingerprint": data.val_source.index.fingerprint(),
        "seed": options.seed,
        "batch_size": data.batch_size,
        "augment": data.augment,
    }


def run_record(
    options: FitOptions,
    data: ImageDataModule,
    classifier: ImageClassifier,
    trainer: Trainer,
    schedule: Schedule,
    identity: dict[str, Any],
    command: list[str] | None,
) -> dict[str, Any]:
    """What ``run.json`` says from the start.

    Args:
        options: Of the run.
        data: Configured.
        classifier: What is trained.
        trainer: Lightning's.
        schedule: Steps and peak learning rate.
        identity: From `run_identity`.
        command: The words that started the run.
    """
    model = classifier.model
    return {
        "format_version": 1,
        "command": command,
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


def announce_weights(options: FitOptions, classifier: ImageClassifier, schedule: Schedule) -> None:
    """Say what became of the weights, and at which rate each layer learns.

    Args:
        options: Of the run.
        classifier: What is trained.
        schedule: Steps and peak learning rate.
    """
    if not is_first_process():
        return
    if classifier.model.load_report is not None:
        log.info(classifier.model.load_report.table())
    optim = options.optim
    if optim.freeze is not None:
        counts = [p.numel() for p in classifier.model.parameters() if not p.requires_grad]
        log.info(f"{sum(counts):,} parameters are frozen (optim.freeze {optim.freeze})")
    if optim.head_first_epochs:
        log.info(
            f"epochs 0 to {optim.head_first_epochs - 1}: the head alone, learning rate "
            f"{optim.head_first_lr:g}; then all"
        )
    groups = optimizer_groups(classifier.model, optim, lr=schedule.lr)
    if len({group["lr"] for group in groups}) > 1:
        log.info(lr_table(groups))


def announce_run(record: Mapping[str, Any], data: ImageDataModule, schedule: Schedule) -> None:
    """Say before the first step what is about to be trained, on what.

    Args:
        record: From `run_record`.
        data: Configured.
        schedule: Steps and peak learning rate.
    """
    if not is_first_process():
        return
    model = record["model"]
    pre = model["preprocess"]
    log.info(
        f"{model['name']}, pool {model['pool']}: {model['parameters']:,} parameters, {model['tokens']} "
        f"tokens, {len(data.class_names)} classes"
    )
    log.info(
        f"input {' x '.join(map(str, pre['img_size']))} pixels, mean {pre['mean']}, std {pre['std']}, crop "
        f"{pre['crop_pct']:g} {pre['crop_mode']}, {pre['interpolation']}"
    )
    log.info(
        f"{len(data.train_set):,} images to train on, {len(data.val_set):,} to validate on: {data.origin}"
    )
    log.info(
        f"{record['processes']} process(es) on {record['device_name'] or record['device']}, "
        f"{record['precision']}, {schedule.total_steps:,} steps, peak learning rate {schedule.lr:.3g}, "
        f"seed {record['seed']}"
    )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples are lists."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def now() -> str:
    """The time of day in UTC, to the second, as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")

"""What must not change between the parts of a resumed run: its settings and the content of its files."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
)

from vit_cls.data.datamodule import ImageDataModule
from vit_cls.errors import ConfigError, RunError, did_you_mean
from vit_cls.model.classifier import ImageClassifier
from vit_cls.own_code import file_digests
from vit_cls.training.optim import Schedule
from vit_cls.training.options import FitOptions
from vit_cls.training.settings import flat, run_settings

log = logging.getLogger("vit_cls")

FREE = (
    *("run_dir", "resume", "resume_changes", "trust_config", "logger", "compile"),
    *("data.root", "data.name", "data.num_workers", "data.timeout_seconds", "data.cache", "data.allow"),
    *("data.max_bad_images", "data.group_by", "data.val_fraction"),
    *("model.name", "model.pretrained", "model.keep_head", "model.max_fresh", "model.grad_checkpointing"),
    "optim.max_skipped_steps",
)
"""Settings that may change: they change no result, or what they do is compared itself: architecture, files,
their split."""

TRAINER = (
    *("limit_train_batches", "limit_val_batches", "val_check_interval", "check_val_every_n_epoch"),
    *("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "deterministic"),
    *("sync_batchnorm", "plugins"),
)
"""Arguments of Lightning's that change the result; its others do not, or are compared as what they do."""

LENGTHS = ("trainer.max_epochs", "trainer.max_steps")
"""They may be made larger."""

PASSIVE = (ProgressBar, LearningRateMonitor, DeviceStatsMonitor, ModelSummary, ModelCheckpoint)
"""Callbacks of Lightning's that change no weight."""

BEFORE = {
    "optim.name": "adamw",
    "optim.loss": "cross_entropy",
    "optim.ema_decay": None,
}
"""What runs did before there was a setting for it: their records lack it. Other keys that a record lacks are
not compared."""
RENAMED = {"batch_size": "data.batch_size", "augment": "data.augment"}
"""Keys of older records."""


def run_identity(
    options: FitOptions,
    data: ImageDataModule,
    classifier: ImageClassifier,
    schedule: Schedule,
    trainer: Trainer,
    arguments: Mapping[str, Any],
    content: Mapping[str, str],
    imports: Mapping[str, str],
) -> dict[str, Any]:
    """The settings that must stay, and digests of files, of names and of labels; plain data.

    Args:
        trainer: Made of the arguments.
        arguments: Lightning's.
        content: Digests of the files.
        imports: The modules of own code, as `vit_cls.own_code.imported` gives them.
    """
    settings = flat(run_settings(options, data, arguments))
    kept = {k: v for k, v in settings.items() if k not in FREE and not k.startswith("trainer.")}
    callbacks = [type(one).__name__ for one in trainer.callbacks if _acts(one)]  # type: ignore[attr-defined]
    return {
        "architecture": _plain(classifier.model.config.to_dict()),
        "preprocess": _plain(vars(classifier.preprocess)),
        "class_names": data.class_names,
        "train_fingerprint": data.train_source.index.fingerprint(),
        "val_fingerprint": data.val_source.index.fingerprint(),
        **content,
        **kept,
        **{f"trainer.{name}": settings[f"trainer.{name}"] for name in TRAINER},
        **{name: settings[name] for name in LENGTHS},
        "trainer.callbacks": sorted(callbacks),
        "trainer.precision": str(trainer.precision),
        "device": trainer.strategy.root_device.type,
        "processes": trainer.world_size,
        "peak_lr": schedule.lr,
        "own_code": file_digests(imports),
    }


def _acts(callback: Any) -> bool:
    return type(callback).__module__.startswith("lightning.") and not isinstance(callback, PASSIVE)


def changes_of(record: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What is not as it was, by key: then and now.

    Args:
        record: The identity in ``run.json``; what it does not know is as it is now.
    """
    before = {**BEFORE, **{RENAMED.get(key, key): value for key, value in record.items()}}
    return {key: (before[key], now[key]) for key in now if key in before and before[key] != now[key]}


def check_same_run(
    record: Mapping[str, Any], now: Mapping[str, Any], folder: Path, taken: Sequence[str] = ()
) -> dict[str, list[Any]]:
    """What has changed on purpose since the identity in ``run.json``, by key: then and now.

    Args:
        taken: Keys that may change: ``--resume_changes``.

    Raises:
        RunError: If anything else has changed; says what.
        ConfigError: If a key is none of the identity.
    """
    for key in taken:
        if key not in now:
            raise ConfigError(
                f"resume_changes {key} is nothing that must stay in a resumed run.{did_you_mean(key, now)}"
            )
    changed = changes_of(record, now)
    longer = [key for key in LENGTHS if key in changed and _is_longer(*changed[key])]
    wrong = {key: pair for key, pair in changed.items() if key not in (*taken, *longer)}
    if wrong:
        told = "; ".join(f"{key} changed ({_told(*pair)})" for key, pair in wrong.items())
        raise RunError(
            f"the run in {folder} cannot be continued: {told}. Restore what it was; or take the change on "
            f"purpose, which its record then says, with --resume_changes {','.join(wrong)}; or begin a new "
            "run in another folder."
        )
    for key in longer:
        log.warning(f"the run is made longer: {key} was {changed[key][0]} and is {changed[key][1]}")
    for key in taken:
        if key in changed:
            log.warning(f"taken on purpose: {key} changed ({_told(*changed[key])})")
    return {key: list(pair) for key, pair in changed.items()}


def _is_longer(before: Any, now: Any) -> bool:
    steps = [float("inf") if value in (None, -1) else value for value in (before, now)]
    return bool(steps[1] > steps[0])


def _told(before: Any, now: Any) -> str:
    """Then and now; of tables and lists what differs."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        before, now = ({key: one.get(key) for key in keys} for one in (before, now))
    return f"then {_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples are lists."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

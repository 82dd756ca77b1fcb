"""One training run, from options to a run folder."""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from vit_cls.boundary import paragraph
from vit_cls.data.datamodule import ImageDataModule
from vit_cls.data.file_digests import FileDigests
from vit_cls.errors import ConfigError, DivergedError, RunError, VitClsError
from vit_cls.files import sweep, write_text
from vit_cls.locks import LOCK, alone_in
from vit_cls.model.classifier import ImageClassifier
from vit_cls.own_code import import_options, imported
from vit_cls.signals import StopSignals
from vit_cls.training.callbacks import EpochLog, RunCheckpoint, StopBetweenSteps
from vit_cls.training.company import first_process_speaks, one_voice
from vit_cls.training.determinism import deterministic_attention, numerics, warn_of_threads
from vit_cls.training.failures import named_failures
from vit_cls.training.guards import recorded_skips
from vit_cls.training.identity import check_same_run, run_identity
from vit_cls.training.launch import is_first_process, take_place
from vit_cls.training.length import make_schedule_of, run_length
from vit_cls.training.loggers import begin_logging, end_logging, make_loggers
from vit_cls.training.options import AUTO, FitOptions
from vit_cls.training.result import FitResult, result_of
from vit_cls.training.resume import LIMITS, TakeUp
from vit_cls.training.runs import (
    RunFolder,
    announce_run,
    announce_weights,
    check_imports,
    choose_folder,
    is_resumed,
    now,
    run_record,
)
from vit_cls.training.settings import flat, run_settings, settings_yaml
from vit_cls.training.task import ClassificationTask
from vit_cls.training.trainer import (
    TRAINER_DEFAULTS,
    callback_list,
    check_arguments,
    lightnings_refusals,
    make_trainer,
    quiet_lightning,
    with_defaults,
)
from vit_cls.training.validation import make_metrics

__all__ = ["TRAINER_DEFAULTS", "FitResult", "fit"]

log = logging.getLogger("vit_cls")


def fit(
    options: FitOptions,
    data: ImageDataModule,
    trainer_options: Mapping[str, Any] | None = None,
    *,
    config_yaml: str | None = None,
    command: list[str] | None = None,
) -> FitResult:
    """Train one classifier and leave a run folder; what it returns is of the best epoch.

    Args:
        data: The images, not yet configured.
        trainer_options: Arguments of Lightning's Trainer, on top of `TRAINER_DEFAULTS`. With ``fast_dev_run``
            nothing is left, and the result's folder is gone.
        config_yaml: The resolved configuration, stored as ``config.yaml``; None writes it from the options.
        command: The words that started the run, for the record.

    Raises:
        VitClsError: If the request cannot be carried out. Before the first epoch is complete nothing is
            left behind.
        Stopped: If a signal came; the step was finished and is kept.
    """
    quiet_lightning()
    arguments = with_defaults(trainer_options or {})
    check_arguments(arguments)
    take_place(arguments)
    if not arguments.get("fast_dev_run"):
        with first_process_speaks():
            return _fit(options, data, arguments, config_yaml, command)
    if options.resume is not None:
        raise ConfigError(
            f"trainer.fast_dev_run keeps nothing, so it cannot resume {options.resume}. Leave one of the two "
            "out."
        )
    with tempfile.TemporaryDirectory(prefix="vit_cls_") as place:
        tried = dataclasses.replace(options, run_dir=str(Path(place) / "run"))
        return dataclasses.replace(_fit(tried, data, arguments, config_yaml, command), kept=False)


def _fit(
    options: FitOptions,
    data: ImageDataModule,
    arguments: dict[str, Any],
    config_yaml: str | None,
    command: list[str] | None,
) -> FitResult:
    stem = _stem(options) if options.run_dir is None and options.resume is None else ""
    folder, first = choose_folder(options.run_dir, options.resume, stem=stem), is_first_process()
    if not (folder.path / LOCK).exists():
        is_resumed(folder, options.resume, first_process=first)  # before anything is written
    option = "run_dir" if options.resume in (None, "auto") else "resume"
    with alone_in(folder.path if first else None, option):
        resuming = is_resumed(folder, options.resume, first_process=first)  # nobody else can take it now
        if first:
            for place in (folder.path, folder.checkpoint_dir):
                sweep(place)
        return _train(options, data, arguments, config_yaml, command, folder, resuming=resuming)


def _train(
    options: FitOptions,
    data: ImageDataModule,
    arguments: dict[str, Any],
    config_yaml: str | None,
    command: list[str] | None,
    folder: RunFolder,
    *,
    resuming: bool,
) -> FitResult:
    before = check_imports(folder) if resuming else {}
    loggers = make_loggers(options.logger, arguments.get("logger"), folder.path)
    options = dataclasses.replace(options, optim=options.optim.resolved(options.model.recipe))
    classifier = _prepare(options, data, load_weights=not resuming)
    # Dropout and drop path draw from here on: the same whatever the model drew before.
    torch.manual_seed(options.seed)
    states = RunCheckpoint(folder)
    epoch_log, stop = EpochLog(folder, states), StopSignals(lambda: _how_to_go_on(folder))
    take_up = TakeUp(_limits(options, arguments), before.get("run_id") or secrets.token_hex(8))
    callbacks: list[Callback] = [epoch_log, take_up, states, StopBetweenSteps(stop, states)]
    trainer = make_trainer(options, arguments, folder=folder.path, loggers=loggers, callbacks=callbacks)
    _check_processes(options, trainer)
    world_size = trainer.world_size
    length = run_length(len(data.train_set) // world_size, data.batch_size, trainer, arguments)
    schedule = make_schedule_of(length, options.optim, images_per_batch=data.batch_size * world_size)
    task = ClassificationTask(
        classifier,
        options.optim,
        schedule,
        mix=data.mix,
        metrics=make_metrics(options.metrics or [], len(data.class_names)),
        class_weights=_class_weights(options, data),
        seed=options.seed,
    )
    parts = {"train": data.train_source, "val": data.val_source}
    files = FileDigests(parts, folder.files_file if resuming else None)
    imports = {**before.get("imports", {}), **imported()}
    identity = run_identity(options, data, classifier, schedule, trainer, arguments, files.content, imports)
    record = run_record(options, data, classifier, trainer, schedule, identity, imports, command) | numerics(
        arguments
    )
    record |= {"run_id": take_up.run_id, "segments": [*before.get("segments", []), take_up.segment]}
    if resuming:
        keys = _words(options.resume_changes)
        changes = check_same_run(before.get("identity", {}), identity, folder.path, keys)
        take_up.segment["changes"] = changes
        warn_of_threads(before)
        record["model"]["load_report"] = before.get("model", {}).get("load_report")
    take_up.record = record
    settings = run_settings(options, data, arguments)
    announce_run(record, data, schedule)
    announce_weights(options, classifier, schedule)
    with (
        one_voice(trainer, identity),
        stop,
        _run_folder(folder, record, trainer, stop),
    ):
        if trainer.is_global_zero:
            text = settings_yaml(settings) if config_yaml is None else config_yaml
            if take_up.segment["changes"] and folder.config_file.is_file():  # what the steps until now had
                kept = folder.config_file.with_name(f"config_{len(record['segments']) - 2}.yaml")
                os.replace(folder.config_file, kept)
            write_text(folder.config_file, text)
        told = flat(settings) if arguments.get("enable_autolog_hparams", True) else {}
        begin_logging(loggers, told)
        checkpoint = str(folder.last_checkpoint) if resuming else None
        memory = named_failures(
            batch_size=data.batch_size,
            accumulate=length.accumulate[0],
            img_size=classifier.preprocess.img_size,
        )
        attention = deterministic_attention(arguments.get("deterministic"))
        digests = _kept_digests(files, folder, trainer)
        with lightnings_refusals(), memory, recorded_skips(task, record), attention, digests:
            trainer.fit(task, data, ckpt_path=checkpoint, weights_only=True)
        result = result_of(folder, epoch_log.rows or folder.read_history())
        if take_up.is_over and trainer.is_global_zero:
            folder.write_history(result.history)
        if not take_up.is_over:
            end_logging(loggers, told, result.top1)
        shown = ("folder", "history", "kept")
        summary = {k: v for k, v in dataclasses.asdict(result).items() if k not in shown}
        if trainer.is_global_zero:
            record["optim"]["peak_lr"] = task.lr  # LearningRateFinder may have set it
            record["data"]["bad_images"] = data.bad_images
            folder.write_record({**record, "status": "finished", "finished": now(), "result": summary})
    return result


def _stem(options: FitOptions) -> str:
    """Start of the run folder's name where none was given: what is trained, and what its head reads."""
    model = options.model
    name = model.name if model.name != AUTO else Path(str(model.pretrained)).stem
    return f"{name}_{model.pool_name.replace(':', '')}"


def _words(given: Sequence[str] | str | None) -> list[str]:
    words = given.split(",") if isinstance(given, str) else given or []
    return [word.strip() for word in words if word.strip()]


def _limits(options: FitOptions, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What says when the run is over; any callback of the user's may."""
    given = {name: arguments.get(name) for name in LIMITS}
    callbacks = sorted(type(callback).__name__ for callback in callback_list(arguments.get("callbacks")))
    return {**given, "early_stopping_patience": options.early_stopping_patience, "callbacks": callbacks}


def _class_weights(options: FitOptions, data: ImageDataModule) -> torch.Tensor | None:
    """Inverse of each class's training images, with a mean of 1 over the images."""
    if options.optim.class_weights is None:
        return None
    counts = torch.from_numpy(data.train_source.index.counts()).float()
    return counts.sum() / (len(counts) * counts.clamp_min(1))


def _check_processes(options: FitOptions, trainer: Trainer) -> None:
    """Several processes need one folder; and DDP must be told of two stages, in the first of which
    parameters are without gradient.
    """
    if trainer.world_size == 1:
        return
    if options.run_dir is None and options.resume is None:
        raise ConfigError(
            f"run_dir is missing: {trainer.world_size} processes must agree on one folder. Give --run_dir, "
            "or train in one process with --trainer.devices 1."
        )
    told = getattr(trainer.strategy, "_ddp_kwargs", {}).get("find_unused_parameters", False)
    if options.optim.head_first_epochs and not told:
        raise ConfigError(
            f"optim.head_first_epochs with {trainer.world_size} processes needs "
            "--trainer.strategy ddp_find_unused_parameters_true: parameters are without gradient in the "
            "first stage."
        )


def _prepare(options: FitOptions, data: ImageDataModule, *, load_weights: bool) -> ImageClassifier:
    """The classifier that the data's classes ask for, and the data as the classifier's input asks for it."""
    seed_everything(options.seed, verbose=False)
    data.load_index(options.seed)
    classifier = options.model.build(data.class_names, load_weights=load_weights)
    if options.compile:
        classifier.model.compile_encoder()
    data.configure(seed=options.seed, preprocess=classifier.preprocess)
    return classifier


@contextmanager
def _run_folder(
    folder: RunFolder, record: dict[str, Any], trainer: Trainer, stop: StopSignals
) -> Iterator[None]:
    """Begin the record; take away what is in the folder if the run fails before it has anything to show."""
    if not trainer.is_global_zero:
        yield
        return
    new = not folder.is_taken
    try:
        folder.write_record({**record, "status": "running"})
    except OSError as error:
        raise RunError(
            f"run_dir {folder.path} cannot be written: {error.strerror}. Choose another folder."
        ) from error
    try:
        yield
    except BaseException as error:
        diverged = isinstance(error, DivergedError)
        has_model = folder.model_file.exists() and not isinstance(error, ConfigError)  # asked for wrongly
        with suppress(OSError):  # perhaps the very error
            if folder.has_checkpoint or has_model or not new or diverged:
                status = "diverged" if diverged else "failed" if stop.signum is None else "interrupted"
                folder.write_record({**record, "status": status, "finished": now()})
            else:
                folder.clear()
        told = None if isinstance(error, VitClsError) else paragraph(error, f"run_dir {folder.path}")
        if told is None:
            raise
        raise RunError(f"{told} Of the run: {_how_to_go_on(folder)}.") from error


@contextmanager
def _kept_digests(files: FileDigests, folder: RunFolder, trainer: Trainer) -> Iterator[None]:
    """A run that is resumed need not read files again that have not changed."""
    try:
        yield
    finally:
        if trainer.is_global_zero and folder.has_checkpoint:
            with suppress(OSError):
                files.save(folder.files_file)


def _how_to_go_on(folder: RunFolder) -> str:
    if folder.has_checkpoint:
        return f"continue with --resume {folder.path}{import_options()}"
    return "no step was complete, so nothing is kept"

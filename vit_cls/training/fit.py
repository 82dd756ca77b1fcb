"""One training run, from options to a run folder."""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import Precision as PrecisionPlugin
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from vit_cls.data.datamodule import ImageDataModule
from vit_cls.errors import ConfigError, RunError
from vit_cls.files import write_text
from vit_cls.inference import BF16, FP16, FP32, reduced_precision
from vit_cls.model.classifier import ImageClassifier
from vit_cls.own_code import import_options
from vit_cls.signals import StopSignals
from vit_cls.training.callbacks import EpochLog, RunCheckpoint, StopBetweenSteps
from vit_cls.training.optim import peak_lr
from vit_cls.training.options import AUTO, FitOptions
from vit_cls.training.result import FitResult, result_of
from vit_cls.training.runs import (
    RunFolder,
    announce_run,
    announce_weights,
    check_imports,
    check_same_run,
    is_first_process,
    now,
    open_run,
    run_identity,
    run_record,
)
from vit_cls.training.task import ClassificationTask, Schedule
from vit_cls.training.validation import make_metrics

log = logging.getLogger("vit_cls")

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 100,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 20,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
"""Where our defaults differ from Lightning's. The sampler is ours: Lightning's repeats validation images."""

LIGHTNING_PRECISION = {FP32: "32-true", BF16: "bf16-mixed", FP16: "16-mixed"}
"""Lightning's words; its fp16 scales the loss."""


def fit(
    options: FitOptions,
    data: ImageDataModule,
    trainer_options: Mapping[str, Any] | None = None,
    *,
    config_yaml: str = "",
    command: list[str] | None = None,
) -> FitResult:
    """Train one classifier and leave a run folder; what it returns is of the best epoch.

    Args:
        data: The images, not yet configured.
        trainer_options: Arguments of Lightning's Trainer, on top of `TRAINER_DEFAULTS`.
        config_yaml: The resolved configuration, stored as ``config.yaml``.
        command: The words that started the run, for the record.

    Raises:
        VitClsError: If the request cannot be carried out. Before the first epoch is complete nothing is
            left behind.
        Stopped: If SIGINT or SIGTERM came; complete epochs are kept.
    """
    _quiet_lightning()
    stem = _stem(options) if options.run_dir is None and options.resume is None else ""
    folder, resuming = open_run(options.run_dir, options.resume, stem=stem, first_process=is_first_process())
    if resuming:
        check_imports(folder)
    existed = folder.path.exists()
    options = dataclasses.replace(options, optim=options.optim.resolved(options.model.recipe))
    classifier = _prepare(options, data, load_weights=not resuming)
    # Dropout and drop path draw from here on: the same whatever the model drew before.
    torch.manual_seed(options.seed)
    identity = run_identity(options, data, classifier)
    states = RunCheckpoint(folder)
    epoch_log, stop = EpochLog(folder, states), StopSignals(lambda: _how_to_go_on(folder))
    callbacks: list[Callback] = [epoch_log, states, StopBetweenSteps(stop)]
    trainer = _make_trainer(options, folder, dict(trainer_options or {}), callbacks)
    if trainer.world_size > 1 and options.run_dir is None and options.resume is None:
        raise ConfigError(
            f"run_dir is missing: {trainer.world_size} processes must agree on one folder. Give --run_dir, "
            "or train in one process with --trainer.devices 1."
        )
    schedule = _schedule(options, data, trainer)
    _check_strategy(options, trainer)
    task = ClassificationTask(
        classifier,
        options.optim,
        schedule,
        mix=data.mix,
        metrics=make_metrics(options.metrics or [], len(data.class_names)),
        class_weights=_class_weights(options, data),
        seed=options.seed,
    )
    identity |= {f"optim.{k}": v for k, v in dataclasses.asdict(options.optim).items()} | {
        "peak_lr": schedule.lr
    }
    if resuming:
        check_same_run(folder.read_record().get("identity", {}), identity, folder.path)
    record = run_record(options, data, classifier, trainer, schedule, identity, command)
    if resuming:
        record["model"]["load_report"] = folder.read_record().get("model", {}).get("load_report")
    announce_run(record, data, schedule)
    announce_weights(options, classifier, schedule)
    with stop, _run_folder(folder, record, trainer, stop, existed=existed):
        if trainer.is_global_zero:
            write_text(folder.config_file, config_yaml)
        checkpoint = str(folder.last_checkpoint) if resuming else None
        trainer.fit(task, data, ckpt_path=checkpoint, weights_only=True)
        result = result_of(folder, epoch_log.rows or folder.read_history())
    summary = {k: v for k, v in dataclasses.asdict(result).items() if k not in ("folder", "history")}
    if trainer.is_global_zero:
        record["data"]["bad_images"] = data.bad_images
        folder.write_record({**record, "status": "finished", "finished": now(), "result": summary})
    return result


def _stem(options: FitOptions) -> str:
    """Start of the run folder's name where none was given: what is trained, and what its head reads."""
    model = options.model
    name = model.name if model.name != AUTO else Path(str(model.pretrained)).stem
    return f"{name}_{model.pool_name.replace(':', '')}"


def _class_weights(options: FitOptions, data: ImageDataModule) -> torch.Tensor | None:
    """Inverse of each class's training images, with a mean of 1 over the images."""
    if options.optim.class_weights is None:
        return None
    counts = torch.from_numpy(data.train_source.index.counts()).float()
    return counts.sum() / (len(counts) * counts.clamp_min(1))


def _check_strategy(options: FitOptions, trainer: Trainer) -> None:
    """Two stages leave parameters without gradient for a while, which DDP must be told."""
    told = getattr(trainer.strategy, "_ddp_kwargs", {}).get("find_unused_parameters", False)
    if options.optim.head_first_epochs and trainer.world_size > 1 and not told:
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


def _make_trainer(
    options: FitOptions, folder: RunFolder, given: dict[str, Any], callbacks: list[Callback]
) -> Trainer:
    """Lightning's Trainer with our defaults, our callbacks and the user's."""
    arguments = {**TRAINER_DEFAULTS, **given}
    if arguments.get("overfit_batches"):
        raise ConfigError(
            f"trainer.overfit_batches swaps the sampler that makes runs repeatable; got "
            f"{arguments['overfit_batches']}. Use trainer.limit_train_batches."
        )
    loggers: list[Any] = []
    if arguments.get("logger") is not False:
        loggers = [TensorBoardLogger(folder.path, name="", version="tensorboard", default_hp_metric=False)]
        callbacks = [*callbacks, LearningRateMonitor("step")]
        extra = arguments.get("logger")
        loggers += extra if isinstance(extra, list) else [extra] if extra not in (None, True) else []
    if options.early_stopping_patience is not None:
        stopping = EarlyStopping("val/acc1", mode="max", patience=options.early_stopping_patience)
        callbacks = [*callbacks, stopping]
    bar = arguments.pop("enable_progress_bar", None)
    if bar is None:
        bar = sys.stderr.isatty()
    if bar:
        callbacks = [*callbacks, RichProgressBar(refresh_rate=10, console_kwargs={"stderr": True})]
    arguments["callbacks"] = [*callbacks, *(arguments.get("callbacks") or [])]
    arguments["logger"] = loggers or False
    if arguments.get("precision") is None:
        arguments["precision"] = _default_precision(arguments)
    arguments["default_root_dir"] = folder.path
    try:
        return Trainer(enable_progress_bar=bool(bar), **arguments)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"Lightning's trainer refuses these settings: {error}") from error


def _default_precision(arguments: Mapping[str, Any]) -> str | None:
    """What a run on this device is trained in; None where a plugin or a strategy brings its own."""
    plugins = arguments.get("plugins") or ()
    plugins = plugins if isinstance(plugins, list | tuple) else (plugins,)
    strategy = arguments.get("strategy")
    if any(isinstance(plugin, PrecisionPlugin) for plugin in plugins) or (
        isinstance(strategy, Strategy) and strategy._precision_plugin is not None
    ):
        return None
    accelerator = arguments.get("accelerator") or "auto"
    named = accelerator in ("auto", "gpu", "cuda") or isinstance(accelerator, CUDAAccelerator)
    on_gpu = named and torch.cuda.is_available()
    precision = reduced_precision(torch.device("cuda" if on_gpu else "cpu")) or FP32
    return LIGHTNING_PRECISION[precision]


def _schedule(options: FitOptions, data: ImageDataModule, trainer: Trainer) -> Schedule:
    """Steps of the run. Lightning's own estimate drops the state of a resumed loader."""
    if trainer.limit_val_batches == 0:
        raise ConfigError(
            "trainer.limit_val_batches must not be 0: without validation there is no best epoch."
        )
    images = len(data.train_set) // trainer.world_size
    batches = math.ceil(images / max(1, data.batch_size))
    limit = trainer.limit_train_batches
    batches = (
        min(batches, limit)
        if isinstance(limit, int)
        else int(batches * limit)
        if limit is not None
        else batches
    )
    accumulate = trainer.accumulate_grad_batches
    first = options.optim.head_first_epochs
    steps_per_epoch = max(1, math.ceil(batches / accumulate))
    epochs = trainer.max_epochs
    if (epochs is None or epochs < 1) and trainer.max_steps < 1:
        raise ConfigError(
            f"trainer.max_epochs must be at least 1 (the learning rate ends there); got {epochs}."
        )
    by_epochs = epochs * steps_per_epoch if epochs is not None and epochs > 0 else math.inf
    total_steps = int(min(by_epochs, trainer.max_steps if trainer.max_steps > 0 else math.inf))
    if first * steps_per_epoch >= total_steps:
        raise ConfigError(
            f"optim.head_first_epochs must be fewer than the run's; got {first} of "
            f"{total_steps / steps_per_epoch:g}. To train the head alone use optim.freeze backbone."
        )
    warmup = options.optim.warmup_epochs
    if warmup is not None and warmup * steps_per_epoch >= total_steps - first * steps_per_epoch:
        raise ConfigError(
            f"optim.warmup_epochs must be shorter than the run; got {warmup:g} of "
            f"{total_steps / steps_per_epoch:g} epochs. Leave it out for a tenth of the run."
        )
    images_per_step = data.batch_size * trainer.world_size * accumulate
    return Schedule(steps_per_epoch, total_steps, peak_lr(options.optim, images_per_step=images_per_step))


@contextmanager
def _run_folder(
    folder: RunFolder, record: dict[str, Any], trainer: Trainer, stop: StopSignals, *, existed: bool
) -> Iterator[None]:
    """Make the folder; take away what is in it if the run fails before it has anything to show."""
    if not trainer.is_global_zero:
        yield
        return
    new = not existed or not any(folder.path.iterdir())
    try:
        # Two runs that start together may have chosen the same new folder: the second is refused.
        folder.path.mkdir(parents=True, exist_ok=existed)
        folder.write_record({**record, "status": "running"})
    except FileExistsError:
        raise RunError(f"another run has just taken {folder.path}. Start this one again.") from None
    except OSError as error:
        raise RunError(
            f"run_dir {folder.path} cannot be written: {error.strerror}. Choose another folder."
        ) from error
    try:
        yield
    except BaseException:
        if folder.last_checkpoint.exists() or not new:
            status = "failed" if stop.signum is None else "interrupted"
            folder.write_record({**record, "status": status, "finished": now()})
        else:
            shutil.rmtree(folder.path, ignore_errors=True)
            if existed:
                folder.path.mkdir()
        raise


def _how_to_go_on(folder: RunFolder) -> str:
    if folder.last_checkpoint.exists():
        return f"continue with --resume {folder.path}{import_options()}"
    return "no epoch was complete, so nothing is kept"


def _quiet_lightning() -> None:
    """Keep Lightning's hints off the screen; what matters is said by us, errors still are by it."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    messages = (
        ".*does not have many workers.*",
        ".*`training_step` returned `None`.*",  # no image of the batch could be read
        ".*module.s. in eval mode at the start of training.*",  # frozen ones, on purpose
        ".*exists and is not empty.*",
        ".*lr_scheduler.step.. before .optimizer.step.*",  # fp16 skips steps until it has its scale
        ".*number of training batches.*",
        ".*It is recommended to use `self.log.*sync_dist.*",  # torchmetrics has reduced those values already
    )
    for message in messages:
        warnings.filterwarnings("ignore", message=message)

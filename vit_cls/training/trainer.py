"""Lightning's Trainer for a run: its arguments either mean what Lightning says, or are refused."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.callbacks import BatchSizeFinder, EarlyStopping, LearningRateMonitor, ProgressBar
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision, TorchCheckpointIO
from lightning.pytorch.plugins import Precision as PrecisionPlugin
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    Strategy,
    XLAStrategy,
)
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from vit_cls.checks import check_finite, check_range
from vit_cls.environment import unusable_gpu
from vit_cls.errors import ConfigError, RunError, did_you_mean
from vit_cls.inference import BF16, FP16, FP32, reduced_precision
from vit_cls.training.checkpoint_io import RunCheckpointIO
from vit_cls.training.launch import environment_of
from vit_cls.training.options import FitOptions
from vit_cls.training.progress import RunProgressBar

TRAINER_DEFAULTS: dict[str, Any] = {
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 20,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
"""Where our defaults differ from Lightning's. The sampler is ours: Lightning's repeats validation images."""

DEFAULT_EPOCHS = 100
"""Of a run that is given neither epochs nor steps."""

LIGHTNING_PRECISION = {FP32: "32-true", BF16: "bf16-mixed", FP16: "16-mixed"}
"""Lightning's words; its fp16 scales the loss."""

AS_LIGHTNING = (
    *("accelerator", "devices", "num_nodes", "plugins", "precision", "strategy", "sync_batchnorm"),
    *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "fast_dev_run"),
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"),
    *("val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps"),
    *("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
    *("callbacks", "logger", "log_every_n_steps", "enable_autolog_hparams"),
    *("enable_progress_bar", "enable_model_summary", "profiler", "detect_anomaly"),
    *("benchmark", "deterministic", "inference_mode", "reload_dataloaders_every_n_epochs"),
)
"""Arguments that mean what they mean to Lightning; single values of some are refused below."""


def _is_given(value: Any) -> bool:
    return value is not None


REFUSED: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "overfit_batches": (
        bool,
        "swaps the sampler that makes runs repeatable",
        "Use trainer.limit_train_batches.",
    ),
    "use_distributed_sampler": (
        bool,
        "must be false: Lightning's sampler would deal out the images that ours has dealt out already, so "
        "that a part of them would be trained on and some be validated twice",
        "Leave it out: several processes share the images without it.",
    ),
    "enable_checkpointing": (
        lambda value: value is False,
        "must be true: a run keeps its state, to be resumed, and its best model",
        "Leave it out.",
    ),
    "barebones": (
        bool,
        "must be false: it measures the Trainer alone, without metrics, and so without a best model",
        "To measure images a second, see train_images_per_second in metrics.csv.",
    ),
    "default_root_dir": (_is_given, "has no effect: all of a run goes to run_dir", "Use --run_dir."),
    "model_registry": (_is_given, "has no effect: a run keeps its model in run_dir", "Leave it out."),
}
"""Values that are refused, why, and what to do. A value that has no effect is refused too."""

COMPLAINTS = (*(MisconfigurationException, AttributeError, ImportError, RuntimeError, TypeError, ValueError),)
"""What Lightning raises where settings do not suit it."""

STRATEGIES = (
    *("auto", "single_device", "ddp"),
    *("ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true"),
)
"""One device, or DDP in processes that begin by themselves."""


def with_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Lightning's arguments with our defaults: its own epochs, 1000, are for runs that nobody waits for."""
    arguments = {**TRAINER_DEFAULTS, **given}
    if arguments.get("max_epochs") is None and arguments.get("max_steps", -1) == -1:
        arguments["max_epochs"] = DEFAULT_EPOCHS
    return arguments


def make_trainer(
    options: FitOptions,
    arguments: Mapping[str, Any],
    *,
    folder: Path,
    loggers: list[Any],
    callbacks: list[Callback],
) -> Trainer:
    """Lightning's Trainer with our defaults, our callbacks and the user's.

    Args:
        arguments: Lightning's, of `with_defaults`.
        loggers: The run's own and the user's, in place of the argument ``logger``.

    Raises:
        ConfigError: If an argument is refused, by us or by Lightning.
    """
    check_arguments(arguments)
    users = callback_list(arguments.get("callbacks"))
    if loggers and not any(isinstance(callback, LearningRateMonitor) for callback in users):
        callbacks = [*callbacks, LearningRateMonitor("step")]
    if options.early_stopping_patience is not None:
        stopping = EarlyStopping("val/acc1", mode="max", patience=options.early_stopping_patience)
        callbacks = [*callbacks, stopping]
    own_bar = any(isinstance(callback, ProgressBar) for callback in users)
    bar = arguments.get("enable_progress_bar")
    if bar is None:
        bar = own_bar or sys.stderr.isatty()
    if bar and not own_bar:
        callbacks = [*callbacks, RunProgressBar()]
    arguments = {
        **arguments,
        "callbacks": [*callbacks, *users],
        "logger": loggers or False,
        "enable_progress_bar": bool(bar),
        "enable_autolog_hparams": False,  # `fit` tells every logger all settings, by their full names
        "default_root_dir": folder,
    }
    if (environment := environment_of(arguments)) is not None:
        plugins = arguments.get("plugins") or ()
        arguments["plugins"] = [*(plugins if isinstance(plugins, Iterable) else [plugins]), environment]
    if arguments.get("precision") is None:
        arguments["precision"] = default_precision(arguments)
    if arguments.get("accelerator") in (None, "auto", "gpu", "cuda") and (reason := unusable_gpu()):
        raise RunError(
            f"this machine has an NVIDIA device that cannot be used: {reason}. Update the driver, or install "
            "a torch built for it; to train without, --trainer.accelerator cpu."
        )
    with lightnings_refusals():
        trainer = Trainer(**arguments)
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # none of the user's own
        trainer.strategy.checkpoint_io = RunCheckpointIO()
    trainer._signal_connector = _NoSignals(trainer)
    rank_zero_only.rank = trainer.global_rank  # type: ignore[attr-defined]
    if not _is_supported(trainer.strategy):
        refuse_strategy(type(trainer.strategy).__name__)
    return trainer


class _NoSignals(_SignalConnector):
    """Signals are `StopSignals`' own: Lightning's handlers save within a step, and requeue in Slurm."""

    def register_signal_handlers(self) -> None:
        """None."""


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse what cannot take effect, or would do harm, before a Trainer is made of it.

    Raises:
        ConfigError: If a value is refused.
    """
    check_finite("trainer.", arguments)
    for name, (refuses, reason, instead) in REFUSED.items():
        value = arguments.get(name)
        if refuses(value):
            raise ConfigError(f"trainer.{name} {reason}; got {value}. {instead}")
    if arguments.get("limit_val_batches") == 0:
        raise ConfigError(
            "trainer.limit_val_batches must not be 0: without validation there is no best epoch."
        )
    if arguments.get("max_steps") == 0:
        raise ConfigError("trainer.max_steps must be at least 1, or -1 for no limit; got 0.")
    for name in ("limit_train_batches", "val_check_interval"):
        value = arguments.get(name)
        check_range(f"trainer.{name}", value if isinstance(value, int | float) else None, above=0)
    check_range("trainer.accumulate_grad_batches", arguments.get("accumulate_grad_batches"), at_least=1)
    check_range("trainer.gradient_clip_val", arguments.get("gradient_clip_val"), at_least=0)
    _check_strategy(arguments.get("strategy") or "auto")
    _check_precision(arguments)


def callback_list(given: Callback | Iterable[Callback] | None) -> list[Callback]:
    """The user's callbacks, whether given as one or as many.

    Raises:
        ConfigError: If one of them is something else.
    """
    callbacks = [given] if isinstance(given, Callback) else list(given or [])
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"trainer.callbacks must be callbacks of Lightning; got {callback!r}. On the command line: "
                "--trainer.callbacks+=EarlyStopping, in YAML a list of class_path."
            )
        if isinstance(callback, BatchSizeFinder):
            raise ConfigError(
                "the callback BatchSizeFinder changes data.batch_size when the schedule and its learning "
                "rate have been made for another. Try data.batch_size out with --trainer.fast_dev_run 10."
            )
    return callbacks


def _check_strategy(strategy: str | Strategy) -> None:
    """Refuse whatever is neither one device nor DDP: by its name, or as an object."""
    if isinstance(strategy, str):
        if strategy.lower() not in STRATEGIES:
            refuse_strategy(repr(strategy), did_you_mean(strategy, STRATEGIES))
    elif not _is_supported(strategy):
        refuse_strategy(type(strategy).__name__)


def _is_supported(strategy: Strategy) -> bool:
    if isinstance(strategy, SingleDeviceXLAStrategy | XLAStrategy | DeepSpeedStrategy):
        return False
    if isinstance(strategy, DDPStrategy):
        return strategy._start_method == "popen"  # others leave what callbacks know in another process
    return isinstance(strategy, SingleDeviceStrategy)


SHARDED = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy", "XLAStrategy")
"""Classes that are refused by name: some cannot even be made without their package."""


def refuse_strategy(given: str, near: str = "") -> None:
    """Say that a strategy cannot be used.

    Args:
        given: As the user wrote it.
        near: What was meant, as `did_you_mean` says it.

    Raises:
        ConfigError: Always.
    """
    raise ConfigError(
        f"trainer.strategy must be one device or DDP ({', '.join(STRATEGIES)}, or an object of those); got "
        f"{given}.{near} Models up to ViT-g train with DDP; shards of a model would be clipped, decayed and "
        "saved wrongly, and forked or spawned processes would keep the run's record to themselves. Use "
        "--trainer.strategy ddp."
    )


def _precision_plugin(arguments: Mapping[str, Any]) -> PrecisionPlugin | None:
    """That of the user's own plugins or strategy."""
    plugins, strategy = arguments.get("plugins") or (), arguments.get("strategy")
    plugins = plugins if isinstance(plugins, Iterable) else (plugins,)
    given = [plugin for plugin in plugins if isinstance(plugin, PrecisionPlugin)]
    if isinstance(strategy, Strategy) and strategy._precision_plugin is not None:
        given.append(strategy._precision_plugin)
    return given[0] if given else None


def _check_precision(arguments: Mapping[str, Any]) -> None:
    """Refuse what swaps the model's layers, whose weights would have other names, and what cannot train."""
    word, plugin = str(arguments.get("precision")), _precision_plugin(arguments)
    if word == "16-true":
        raise ConfigError(
            "trainer.precision 16-true steps in fp16 too, in which the optimiser's eps is 0: the loss is NaN "
            "soon. Use 16-mixed."
        )
    known = PrecisionPlugin, MixedPrecision, HalfPrecision, DoublePrecision
    if word.startswith("transformer-engine") or type(plugin) not in (type(None), *known):
        given = f"trainer.precision {word}" if plugin is None else f"the plugin {type(plugin).__name__}"
        raise ConfigError(
            f"{given} swaps the model's layers for others, whose weights no model file of ours holds. Use "
            "bf16-mixed, 16-mixed or 32-true."
        )


def default_precision(arguments: Mapping[str, Any]) -> str | None:
    """What a run on this device is trained in; None where a plugin or a strategy brings its own.

    Args:
        arguments: Lightning's.
    """
    if _precision_plugin(arguments) is not None:
        return None
    accelerator = arguments.get("accelerator") or "auto"
    named = accelerator in ("auto", "gpu", "cuda") or isinstance(accelerator, CUDAAccelerator)
    on_gpu = named and torch.cuda.is_available()
    precision = reduced_precision(torch.device("cuda" if on_gpu else "cpu")) or FP32
    return LIGHTNING_PRECISION[precision]


@contextmanager
def lightnings_refusals() -> Iterator[None]:
    """What Lightning's own code complains of in the block is a request that cannot be carried out.

    Raises:
        ConfigError: In its place.
    """
    try:
        yield
    except COMPLAINTS as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_globals.get("__name__", "").startswith("lightning."):
            raise
        raise ConfigError(f"Lightning's trainer refuses these settings: {error}") from error


def quiet_lightning() -> None:
    """Keep Lightning's hints off the screen; what matters is said by us, errors still are by it."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # A profile that was asked for is said at this level.
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)
    messages = (
        ".*does not have many workers.*",
        ".*`training_step` returned `None`.*",  # no image of the batch could be read
        ".*module.s. in eval mode at the start of training.*",  # frozen ones, on purpose
        ".*exists and is not empty.*",
        ".*overriding `LightningModule.optimizer_.*",  # the average follows steps, not batches, on purpose
        ".*lr_scheduler.step.. before .optimizer.step.*",  # fp16 skips steps until it has its scale
        ".*number of training batches.*",
        ".*It is recommended to use `self.log.*sync_dist.*",  # torchmetrics has reduced those values already
    )
    for message in messages:
        warnings.filterwarnings("ignore", message=message)

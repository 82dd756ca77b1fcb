"""Every argument of Lightning's Trainer means what it means to Lightning, or is refused in one paragraph."""

from __future__ import annotations

import inspect
import os
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision, TorchCheckpointIO
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from tests.training.runs import fit_tiny, record_of, rows_of, same_weights, weights_of
from vit_cls.errors import ConfigError, RunError
from vit_cls.training.length import Length, run_length
from vit_cls.training.trainer import (
    AS_LIGHTNING,
    REFUSED,
    check_arguments,
    lightnings_refusals,
    with_defaults,
)

HARMLESS = {
    "accelerator": "cpu",
    "strategy": "single_device",
    "devices": 1,
    "num_nodes": 1,
    "precision": 32,
    "callbacks": Timer("00:01:00:00"),
    "fast_dev_run": 0,
    "min_epochs": 1,
    "min_steps": 1,
    "max_steps": 1000,
    "max_time": {"hours": 1},
    "limit_train_batches": 1.0,
    "limit_val_batches": 1.0,
    "limit_test_batches": 2,
    "limit_predict_batches": 2,
    "val_check_interval": 1.0,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 1,
    "enable_progress_bar": True,
    "enable_model_summary": True,
    "accumulate_grad_batches": 1,
    "gradient_clip_algorithm": "norm",
    "gradient_clip_val": 1,
    "deterministic": "warn",
    "benchmark": False,
    "inference_mode": False,
    "profiler": "simple",
    "detect_anomaly": True,
    "plugins": TorchCheckpointIO(),
    "sync_batchnorm": True,
    "reload_dataloaders_every_n_epochs": 1,
    "enable_autolog_hparams": False,
    "max_epochs": 2,
}
"""Values that change no weight; with those that are tested by their effect they are all arguments."""

TESTED_BY_EFFECT = {"logger", "num_sanity_val_steps"}

SHARDED = r"trainer.strategy must be one device or DDP .*; got {}\..* Use --trainer.strategy ddp"
REFUSALS = [
    ("overfit_batches", 2, "trainer.overfit_batches swaps the sampler .*; got 2. Use trainer.limit_train"),
    (
        "use_distributed_sampler",
        True,
        "trainer.use_distributed_sampler must be false: .*; got True. Leave it",
    ),
    ("enable_checkpointing", False, "trainer.enable_checkpointing must be true: .*; got False. Leave it out"),
    ("barebones", True, "trainer.barebones must be false"),
    ("default_root_dir", "logs", "trainer.default_root_dir has no effect: .* got logs. Use --run_dir"),
    ("model_registry", "me/model", "trainer.model_registry has no effect"),
    ("strategy", "fsdp", SHARDED.format("'fsdp'")),
    ("strategy", "deepspeed_stage_2", SHARDED.format("'deepspeed_stage_2'")),
    ("strategy", "ddp_spawn", SHARDED.format("'ddp_spawn'")),
    ("strategy", "dpp", r"got 'dpp'. Did you mean `ddp`\?"),
    ("strategy", FSDPStrategy(), SHARDED.format("FSDPStrategy")),
    ("strategy", ModelParallelStrategy(), SHARDED.format("ModelParallelStrategy")),
    ("strategy", DDPStrategy(start_method="fork"), SHARDED.format("DDPStrategy")),
    ("precision", "transformer-engine", "trainer.precision transformer-engine swaps the model's layers"),
    ("precision", "16-true", "trainer.precision 16-true steps in fp16 too.* Use 16-mixed"),
    ("precision", "8", "Lightning's trainer refuses these settings: Precision '8' is invalid"),
    ("gradient_clip_val", -1.0, "trainer.gradient_clip_val must be at least 0; got -1.0"),
    ("accumulate_grad_batches", 0, "trainer.accumulate_grad_batches must be at least 1; got 0"),
    ("limit_train_batches", 0, "trainer.limit_train_batches must be above 0; got 0"),
    ("limit_train_batches", 0.1, "limit_train_batches 0.1 of 5 batches .* Give at least 0.2"),
    ("limit_val_batches", 0, "trainer.limit_val_batches must not be 0"),
    ("max_steps", 0, "trainer.max_steps must be at least 1, or -1"),
    ("max_epochs", -1, "trainer.max_epochs must be at least 1"),
    ("val_check_interval", 7, "val_check_interval 7 is more than the 5 batches of an epoch"),
    ("check_val_every_n_epoch", 3, "check_val_every_n_epoch 3 is more than the run's 2 epochs"),
    ("callbacks", ["EarlyStopping"], "trainer.callbacks must be callbacks of Lightning; got 'EarlyStopping'"),
    ("callbacks", BatchSizeFinder(), "BatchSizeFinder changes data.batch_size"),
    ("callbacks", EarlyStopping("val_acc"), "metric `val_acc` which is not available. .* `val/acc1`"),
    ("logger", [1], "trainer.logger must be true, false or loggers of Lightning; got 1"),
    ("logger", "tensorbord", "logger must be one of .*Did you mean `tensorboard`"),
    ("devices", 0, "Lightning's trainer refuses"),
    ("num_nodes", 0, "Lightning's trainer refuses"),
    ("accelerator", "gpu", "Lightning's trainer refuses"),
    ("profiler", "stopwatch", "Lightning's trainer refuses"),
    ("fast_dev_run", -1, "Lightning's trainer refuses"),
    ("max_epoch", 3, "Lightning's trainer refuses.*max_epoch'"),
]


def test_every_argument_of_lightnings_trainer_is_in_one_of_the_tables():
    """One that Lightning adds makes this fail: say in `vit_cls.training.trainer` what becomes of it."""
    arguments = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert set(AS_LIGHTNING) | set(REFUSED) == arguments
    assert not set(AS_LIGHTNING) & set(REFUSED)
    assert set(HARMLESS) | TESTED_BY_EFFECT == set(AS_LIGHTNING)
    assert set(REFUSED) <= {name for name, _, _ in REFUSALS}


@pytest.fixture(scope="module")
def plain(image_root, tmp_path_factory):
    """A run without any of them."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    fit_tiny(image_root, folder)
    return folder


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_arguments_that_change_no_weight_change_none(image_root, tmp_path, plain, caplog):
    caplog.set_level("INFO", "lightning.pytorch.profilers")
    try:
        fit_tiny(image_root, tmp_path / "run", trainer=HARMLESS)
    finally:
        torch.use_deterministic_algorithms(False)  # Lightning sets it for the process
    assert same_weights(weights_of(plain), weights_of(tmp_path / "run"))
    assert "run_training_epoch" in caplog.text  # the profile is shown


@pytest.mark.parametrize(("name", "value", "message"), REFUSALS, ids=str)
def test_what_would_train_wrongly_is_refused_and_nothing_is_left(name, value, message, image_root, tmp_path):
    with pytest.raises((ConfigError, RunError), match=message):
        fit_tiny(image_root, tmp_path / "run", trainer={name: value})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "given",
    [
        *({name: off} for name, off in [("overfit_batches", 0.0), ("use_distributed_sampler", False)]),
        *({"strategy": strategy} for strategy in ("auto", "DDP", DDPStrategy(), SingleDeviceStrategy())),
        {"enable_checkpointing": None, "barebones": False, "default_root_dir": None, "model_registry": None},
        {"plugins": MixedPrecision("bf16-mixed", "cpu")},
        {"val_check_interval": timedelta(hours=1)},
    ],
    ids=str,
)
def test_values_that_do_no_harm_are_taken(given):
    check_arguments(with_defaults(given))


def _length(images=24, batch_size=5, **given) -> Length:
    arguments = with_defaults({"accelerator": "cpu", "logger": False, **given})
    return run_length(images, batch_size, Trainer(**arguments), arguments)


@pytest.mark.parametrize(
    ("given", "steps", "total"),
    [
        ({}, 5, 500),
        ({"max_epochs": 3}, 5, 15),
        ({"max_steps": 7}, 5, 7),  # as with Lightning, no epochs end it
        ({"max_steps": 7, "max_epochs": 1}, 5, 5),
        ({"max_steps": 7000, "max_epochs": None}, 5, 7000),
        ({"max_epochs": 3, "limit_train_batches": 3}, 3, 9),
        ({"max_epochs": 3, "limit_train_batches": 99}, 5, 15),
        ({"max_epochs": 3, "limit_train_batches": 1.0}, 5, 15),
        ({"max_epochs": 3, "limit_train_batches": 0.5}, 2, 6),
        ({"max_epochs": 3, "accumulate_grad_batches": 2}, 3, 9),
        ({"max_epochs": 3, "limit_train_batches": 4, "accumulate_grad_batches": 3}, 2, 6),
        ({"max_epochs": 4, "callbacks": GradientAccumulationScheduler({1: 2, 3: 5})}, 5, 12),
        ({"max_epochs": 4, "fast_dev_run": 2}, 5, 20),  # the schedule of the run that it tries out
        ({"max_epochs": 4, "val_check_interval": 2}, 5, 20),
        ({"max_epochs": 4, "max_time": "00:00:00:01"}, 5, 20),
    ],
    ids=str,
)
def test_steps_are_counted_as_lightning_makes_them(given, steps, total):
    length = _length(**given)
    assert (length.steps(0), length.total_steps) == (steps, total)


@pytest.mark.parametrize(
    ("trainer", "steps"),
    [
        ({"limit_train_batches": 0.5}, [2, 4]),
        ({"limit_train_batches": 3, "accumulate_grad_batches": 2}, [2, 4]),
        ({"callbacks": [GradientAccumulationScheduler({1: 2})]}, [5, 8]),
    ],
    ids=str,
)
def test_the_schedule_ends_with_the_run(trainer, steps, image_root, tmp_path):
    result = fit_tiny(image_root, tmp_path / "run", trainer=trainer)
    assert [row["step"] for row in result.history] == steps
    assert record_of(tmp_path / "run")["optim"]["total_steps"] == steps[-1]
    assert result.history[-1]["lr"] == pytest.approx(3e-3 * 0.01, rel=0.01)


def test_a_stage_in_epochs_and_a_changing_accumulation_are_refused(image_root, tmp_path):
    trainer = {"callbacks": (GradientAccumulationScheduler({1: 2}),)}
    with pytest.raises(ConfigError, match="head_first_epochs cannot be combined"):
        fit_tiny(image_root, tmp_path / "run", trainer=trainer, optim={"head_first_epochs": 1})
    with pytest.raises(ConfigError, match="accumulate_grad_batches is 2, and the callback"):
        fit_tiny(image_root, tmp_path / "run", trainer={**trainer, "accumulate_grad_batches": 2})


def test_a_fast_dev_run_tries_the_settings_out_and_leaves_nothing(image_root, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    trainer, optim = {"fast_dev_run": 2, "max_epochs": 10}, {"warmup_epochs": 2}
    result = fit_tiny(image_root, tmp_path / "run", trainer=trainer, optim=optim)
    assert (result.epochs, result.history[0]["step"]) == (1, 2)
    assert result.images > 0
    assert result.to_dict()["run_dir"] is result.to_dict()["model"] is None
    assert os.listdir(tmp_path) == []
    with pytest.raises(ConfigError, match="fast_dev_run keeps nothing, so it cannot resume"):
        fit_tiny(image_root, tmp_path / "run", trainer=trainer, resume="auto")


def test_the_users_own_bar_is_the_only_one_and_lightnings_callbacks_go_on_after_a_resume(
    image_root, tmp_path, capsys
):
    def callbacks():
        checkpoint = ModelCheckpoint(monitor="val/acc1", mode="max", save_last=True)
        stopping = EarlyStopping("val/acc1", mode="max", patience=9)
        return [checkpoint, stopping, LearningRateMonitor("epoch"), TQDMProgressBar(), Timer("00:01:00:00")]

    folder = tmp_path / "run"
    fit_tiny(image_root, folder, epochs=1, trainer={"callbacks": callbacks()})
    result = fit_tiny(image_root, folder, trainer={"callbacks": callbacks()}, resume="auto")
    assert [row["epoch"] for row in result.history] == [0, 1]
    assert "Epoch 1: 100%" in capsys.readouterr().out
    names = ["best.ckpt", "files.npz", "last.ckpt", "previous.ckpt"]
    assert sorted(os.listdir(folder / "checkpoints")) == names
    assert (folder / "tensorboard/checkpoints/last.ckpt").is_file()


def test_the_rate_that_lightnings_finder_finds_is_trained_with(image_root, tmp_path):
    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    settings = {"optim": {"layer_decay": 0.5}, "data": {"batch_size": 1}}
    result = fit_tiny(image_root, tmp_path / "run", trainer={"callbacks": finder}, **settings)
    found = finder.optimal_lr.suggestion()
    assert found != 3e-3
    assert record_of(tmp_path / "run")["optim"]["peak_lr"] == found
    assert result.history[-1]["lr"] == pytest.approx(found * 0.01, rel=0.01)


def test_early_stopping_waits_for_min_epochs(image_root, tmp_path):
    still = {"optim": {"lr": 1e-12}, "early_stopping_patience": 1}
    assert fit_tiny(image_root, tmp_path / "run", epochs=5, trainer={"min_epochs": 4}, **still).epochs == 4


def test_loggers_may_come_in_a_tuple(image_root, tmp_path):
    loggers = (CSVLogger(tmp_path, name="a"), CSVLogger(tmp_path, name="b"))
    fit_tiny(image_root, tmp_path / "run", epochs=1, trainer={"logger": loggers})
    assert len(list(tmp_path.glob("[ab]/version_0/metrics.csv"))) == 2
    assert len(rows_of(tmp_path / "run")) == 1


def test_a_checkpoint_by_an_unknown_metric_is_refused_and_the_epoch_is_kept(image_root, tmp_path):
    trainer = {"callbacks": ModelCheckpoint(monitor="val_acc")}
    with pytest.raises(ConfigError, match=r"monitor='val_acc'\)` could not find"):
        fit_tiny(image_root, tmp_path / "run", trainer=trainer)
    assert record_of(tmp_path / "run")["status"] == "failed"


def test_errors_of_other_code_are_not_taken_for_lightnings():
    with pytest.raises(ValueError, match="mine") as caught, lightnings_refusals():
        raise ValueError("mine")
    assert not isinstance(caught.value, ConfigError)
    with pytest.raises(ConfigError, match="refuses these settings"), lightnings_refusals():
        SimpleProfiler().stop("never started")

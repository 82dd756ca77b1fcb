"""Loggers by one word, what they are told, and the settings of a run as plain data."""

from __future__ import annotations

import csv
import sys
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, mlflow, wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.runs import fit_tiny
from vit_cls.commands.fit_parser import FitCLI
from vit_cls.data.datamodule import ImageDataModule
from vit_cls.errors import ConfigError, RunError
from vit_cls.training.fit import fit
from vit_cls.training.loggers import LOGGERS, begin_logging, make_loggers
from vit_cls.training.options import FitOptions, ModelOptions
from vit_cls.training.settings import flat, run_settings, settings_yaml


class FakeWandb(ModuleType):
    """As much of W&B as Lightning calls."""

    def __init__(self):
        super().__init__("wandb")
        self.run, self.begun, self.logged, self.config = None, [], [], {}

    def init(self, **settings):
        self.begun.append(settings)
        update = SimpleNamespace(update=lambda params, **_: self.config.update(params))
        log = lambda metrics, **_: self.logged.append(metrics)  # noqa: E731
        return SimpleNamespace(config=update, log=log, define_metric=lambda *a, **k: None, name="run", id="1")


class FakeMlflow:
    """A client of MLflow, as far as Lightning calls it."""

    def __init__(self, uri):
        self.uri, self.params, self.metrics = uri, {}, []

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id=name, lifecycle_stage="active")

    def create_run(self, experiment_id, tags):
        return SimpleNamespace(info=SimpleNamespace(run_id="1", experiment_id=experiment_id))

    def get_run(self, run_id):
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id, experiment_id="vit_cls"))

    def log_batch(self, run_id, params=(), metrics=()):
        self.params |= {param.key: param.value for param in params}
        self.metrics += list(metrics)

    def set_terminated(self, run_id, status):
        self.status = status


@pytest.fixture
def fake_wandb(monkeypatch):
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(wandb, "_WANDB_AVAILABLE", True)
    monkeypatch.setattr(wandb.WandbLogger, "experiment", property(lambda logger: _experiment(logger, module)))
    return module


def _experiment(logger, module):
    if logger._experiment is None:
        logger._experiment = module.init(**logger._wandb_init)
    return logger._experiment


@pytest.fixture
def fake_mlflow(monkeypatch):
    clients = []

    def client(uri):
        clients.append(FakeMlflow(uri))
        return clients[-1]

    def entity(key, value, timestamp=0, step=0):
        return SimpleNamespace(key=key, value=value, step=step)

    modules = {
        "mlflow": SimpleNamespace(set_tracking_uri=lambda uri: None),
        "mlflow.tracking": SimpleNamespace(MlflowClient=client, context=None),
        "mlflow.entities": SimpleNamespace(Metric=entity, Param=entity),
        "mlflow.utils.mlflow_tags": SimpleNamespace(MLFLOW_RUN_NAME="mlflow.runName"),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(mlflow, "_MLFLOW_AVAILABLE", True)
    monkeypatch.setattr(mlflow, "_get_resolve_tags", lambda: dict)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return clients


def test_every_word_logs_losses_and_flat_hyperparameters(
    image_root, tmp_path, fake_wandb, fake_mlflow, monkeypatch
):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    folder = tmp_path / "run"
    result = fit_tiny(image_root, folder, epochs=1, logger=",".join(LOGGERS))
    expected = {
        "model.depth": 2,
        "optim.lr": 3e-3,
        "data.batch_size": 5,
        "data.mix.erase_prob": 0.0,
        "seed": 0,
    }
    written = (folder / "tensorboard/hparams.yaml").read_text(), (folder / "csv/hparams.yaml").read_text()
    for text in written:
        assert expected.items() <= yaml.safe_load(text).items()
    assert expected.items() <= fake_wandb.config.items()
    (client,) = fake_mlflow
    assert {key: str(value) for key, value in expected.items()}.items() <= client.params.items()
    assert any("train/loss_step" in metrics for metrics in fake_wandb.logged)
    assert "val/acc1" in {metric.key for metric in client.metrics}
    rows = list(csv.DictReader((folder / "csv/metrics.csv").read_text().splitlines()))
    assert any(row["val/acc1"] for row in rows)
    scalars = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {"train/loss_step", "val/acc1", "best/acc1"} <= set(scalars.Tags()["scalars"])
    assert scalars.Scalars("best/acc1")[0].value == pytest.approx(result.top1)
    begun = fake_wandb.begun[0]
    assert (begun["name"], begun["project"], begun["dir"]) == ("run", "vit_cls", str(folder))
    assert "mode" not in begun  # WANDB_MODE is W&B's own to read
    assert (client.uri, client.status) == (f"file:{folder / 'mlruns'}", "FINISHED")


@pytest.mark.parametrize("word", ["wandb", "mlflow"])
def test_a_package_that_is_missing_is_named(word, tmp_path):
    with pytest.raises(ConfigError, match=rf"logger {word} needs the package {word}, .*pip install {word}`"):
        make_loggers(word, None, tmp_path)


def test_words_and_objects_are_put_together(tmp_path):
    own = CSVLogger(tmp_path)
    assert [type(one) for one in make_loggers(None, None, tmp_path)] == [TensorBoardLogger]
    assert [type(one) for one in make_loggers(["csv"], True, tmp_path)] == [CSVLogger]
    assert make_loggers("csv", [own], tmp_path)[1:] == [own]
    assert make_loggers(None, own, tmp_path)[1:] == [own]
    assert make_loggers(None, False, tmp_path) == []
    with pytest.raises(ConfigError, match=r"logger is csv, but trainer.logger false wants none"):
        make_loggers("csv", False, tmp_path)


def test_a_logger_that_cannot_begin_ends_the_run_before_its_first_step(tmp_path):
    class Unreachable(CSVLogger):
        def log_hyperparams(self, params):
            raise OSError("no route to host")

    with pytest.raises(RunError, match=r"Unreachable cannot begin: no route to host.*WANDB_MODE=offline"):
        begin_logging([Unreachable(tmp_path)], {"seed": 0})


def test_a_run_from_python_leaves_a_configuration_that_the_command_line_takes(image_root, tmp_path):
    options = FitOptions(ModelOptions("vit_pico_patch7_28", depth=1, pool="gap"), seed=3)
    settings = {"max_epochs": 7, "accelerator": "cpu", "callbacks": [object()]}
    data = ImageDataModule(str(image_root), batch_size=6)
    text = settings_yaml(run_settings(options, data, settings))
    assert text.startswith("# trainer.callbacks was given as an object")
    (tmp_path / "config.yaml").write_text(text)
    cli = FitCLI(["--config", str(tmp_path / "config.yaml")])
    assert cli.options == options
    assert flat(run_settings(cli.options, cli.datamodule, cli.trainer_options)) == flat(yaml.safe_load(text))
    assert set(flat(yaml.safe_load(cli.config_yaml()))) == set(flat(yaml.safe_load(text)))


def test_fit_writes_that_configuration(image_root, tmp_path):
    model = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
    options = FitOptions(ModelOptions("vit_pico_patch7_28", **model), run_dir=str(tmp_path / "run"))
    trainer = {"max_epochs": 1, "limit_train_batches": 1, "logger": False, "accelerator": "cpu"}
    fit(options, ImageDataModule(str(image_root), num_workers=0), trainer)
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (written["model"]["depth"], written["trainer"]["limit_train_batches"]) == (1, 1)
    assert "run_dir" not in written

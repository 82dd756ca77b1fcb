"""A study trains on one device per job, and deals its jobs out to the GPUs of the machine."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vit_cls.inference import AUTO_DEVICE, InferenceConfig, choose_device
from vit_cls.lab.studies.jobs import begin_job, default_jobs, devices_of_jobs
from vit_cls.training import trial


@pytest.fixture(autouse=True)
def _restored():
    before = AUTO_DEVICE.set("auto")
    yield
    AUTO_DEVICE.reset(before)


@pytest.fixture
def three_gpus(monkeypatch):
    """A machine with three GPUs, as far as anybody asks; gives what was set."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    return chosen


def _trainer_of_a_trial(monkeypatch):
    """Arguments of Lightning's Trainer that one training is given."""
    given = {}

    def fit(options, data, trainer):
        given.update(trainer)
        return SimpleNamespace(folder=SimpleNamespace(model_file=Path("model")))

    monkeypatch.setattr(trial, "fit", fit)
    source = SimpleNamespace(index=SimpleNamespace(root=Path("memory")))
    shared = {"origin": "memory", "seed": 0, "model": {}, "optim": {}, "loader": {}}
    trial.train_trial(Path("run"), source, source, epochs=1, **shared)
    return given


def test_jobs_go_round_the_gpus_and_each_trains_and_scores_on_its_own(three_gpus, monkeypatch):
    count = multiprocessing.get_context("spawn").Value("i", 0)
    devices = devices_of_jobs()
    assert devices == [torch.device("cuda", i) for i in range(3)]
    for job in range(5):
        begin_job(count, devices, threads=1)
        device = torch.device("cuda", job % 3)
        assert choose_device(InferenceConfig().device) == device
        given = _trainer_of_a_trial(monkeypatch)
        assert (given["accelerator"], given["devices"]) == ("cuda", [job % 3])
        AUTO_DEVICE.set("auto")
    assert three_gpus == [torch.device("cuda", job % 3) for job in range(5)]


def test_by_default_there_is_one_job_a_gpu_and_one_training_takes_one(three_gpus, monkeypatch):
    assert default_jobs("photos") == default_jobs("digits") == 3
    given = _trainer_of_a_trial(monkeypatch)
    assert (given["accelerator"], given["devices"]) == ("cuda", [0])
    AUTO_DEVICE.set("cpu")
    assert default_jobs("photos") == 1
    assert devices_of_jobs() == [torch.device("cpu")]


def test_mps_is_used_where_it_is_and_the_cpu_where_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert _trainer_of_a_trial(monkeypatch)["accelerator"] == "mps"
    assert devices_of_jobs() == [torch.device("mps")]
    AUTO_DEVICE.set("cpu")
    given = _trainer_of_a_trial(monkeypatch)
    assert (given["accelerator"], given["devices"]) == ("cpu", 1)

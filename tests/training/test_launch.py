"""Which process of a run this one is, whatever something else has left in the environment."""

from __future__ import annotations

import json
import logging

import pytest
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from tests.training.runs import fit_tiny
from vit_cls.errors import ConfigError, RunError
from vit_cls.training.fit import fit
from vit_cls.training.launch import Alone, environment_of, is_first_process, take_place

SLURM = {"NTASKS": "4", "PROCID": "2", "LOCALID": "2", "NODEID": "0", "JOB_ID": "4711", "STEP_NUM_TASKS": "4"}
STRAY = {
    "RANK": {"RANK": "1", "WORLD_SIZE": "8"},
    "LOCAL_RANK": {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"},
    "SLURM_PROCID": {"SLURM_PROCID": "2"},
    "GROUP_RANK": {"GROUP_RANK": "3", "NODE_RANK": "3"},
    "srun": {f"SLURM_{name}": value for name, value in SLURM.items()},
    "MASTER_PORT": {"LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"},
}


@pytest.fixture(autouse=True)
def rank_as_of_import(monkeypatch):
    """As Lightning reads it from the environment when it is imported."""
    monkeypatch.setattr(rank_zero_only, "rank", 1)


@pytest.mark.parametrize("name", STRAY)
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_a_run_of_one_process_is_its_first_whatever_is_left_in_the_environment(monkeypatch, name, strategy):
    for variable, value in STRAY[name].items():
        monkeypatch.setenv(variable, value)
    arguments = {"accelerator": "cpu", "devices": 1, "strategy": strategy}
    assert isinstance(environment_of(arguments), Alone)
    take_place(arguments)
    assert is_first_process()


@pytest.mark.parametrize("name", ["RANK", "srun"])
def test_a_stray_rank_neither_writes_over_a_run_nor_keeps_silent(
    monkeypatch, image_root, tmp_path, name, caplog
):
    for variable, value in STRAY[name].items():
        monkeypatch.setenv(variable, value)
    with caplog.at_level(logging.INFO, "vit_cls"):
        result = fit_tiny(image_root, tmp_path / "run", epochs=1)
    assert rank_zero_only.rank == 0
    assert json.loads(result.folder.record_file.read_text())["status"] == "finished"
    assert list(result.folder.path.glob("tensorboard/events*"))  # Lightning's loggers ask for the rank
    assert any("images to train on" in line for line in caplog.messages)
    said = [line for line in caplog.messages if "tasks of a Slurm step" in line]
    assert len(said) == (name == "srun")
    before = result.folder.model_file.read_bytes()
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with pytest.raises(RunError, match="is not empty"):
        fit_tiny(image_root, tmp_path / "run", epochs=1, seed=5)
    assert result.folder.model_file.read_bytes() == before


def test_processes_that_are_started_for_the_run_have_their_own_numbers(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "12345")
    two = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    for variables in (
        {"LOCAL_RANK": "1"},
        {f"SLURM_{name}": value for name, value in SLURM.items()} | {"SLURM_NTASKS_PER_NODE": "4"},
        {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"},
    ):
        with monkeypatch.context() as patch:
            for variable, value in variables.items():
                patch.setenv(variable, value)
            assert environment_of(two) is None
            take_place(two)
            assert not is_first_process()
    own = {**two, "devices": 1, "strategy": DDPStrategy(cluster_environment=SLURMEnvironment())}
    assert environment_of(own) is None  # the user's own is asked


@pytest.mark.parametrize(
    ("variables", "devices", "message"),
    [
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}, 1, "has started 2 processes.*-u TORCHELASTIC"),
        ({"LOCAL_RANK": "2", "MASTER_PORT": "1"}, 2, "LOCAL_RANK=2.* is process 2, .* of a run of 2"),
        ({"GROUP_RANK": "1"}, 2, "GROUP_RANK=1.* is process 2.*env -u LOCAL_RANK -u NODE_RANK -u GROUP"),
        ({"LOCAL_RANK": "0"}, 2, "somebody else starts the 2 processes.*no MASTER_PORT"),
    ],
)
def test_an_environment_that_contradicts_the_trainer_is_refused_before_anything(
    monkeypatch, variables, devices, message
):
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message):
        fit(None, None, {"accelerator": "cpu", "devices": devices, "strategy": "ddp"})  # type: ignore[arg-type]


def test_what_the_trainer_refuses_is_left_for_it():
    take_place({"accelerator": "cpu", "devices": "none"})
    assert is_first_process()

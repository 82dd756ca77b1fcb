"""Several processes of one run: they train as one would, one speaks for all, and none outlives the others."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from tests.forked import Forked
from tests.training import two_processes
from tests.training.runs import record_of, rows_of

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 240
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC"))},
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "PYTHONWARNINGS": "ignore",
}
WORDS = (
    "fit --model.name vit_pico_patch7_28 --data.name digits --trainer.limit_train_batches 2 --trainer.logger "
)
WORDS += (
    "false --trainer.limit_val_batches 1 --trainer.accelerator cpu --trainer.devices 2 --trainer.strategy ddp"
)


def _end(process: Forked) -> tuple[int, str]:
    """Exit code and stderr; fails where a process was left behind."""
    with process:
        _, err = process.communicate(timeout=LIMIT_SECONDS)
        end = time.monotonic() + 10
        while process.left() and time.monotonic() < end:
            time.sleep(0.1)
        assert not process.left()
    return process.wait(), err


def _own_module(folder: Path, body: str) -> list[str]:
    """Words that import a module which does something to a process of a run before step ``i``."""
    lines = [
        "import os, signal, time",
        "from vit_cls.errors import DataError",
        "from vit_cls.training.task import ClassificationTask as Task",
        "rank = int(os.environ.get('LOCAL_RANK', os.environ.get('SLURM_PROCID', 0)))",
        "step = Task.training_step",
        "def training_step(task, batch, i):",
        f"    {body}",
        "    return step(task, batch, i)",
        "Task.training_step = training_step",
    ]
    (folder / "own_fault.py").write_text("\n".join(lines))
    return ["--import", str(folder / "own_fault.py")]


@pytest.fixture(scope="module")
def few_to_validate(tmp_path_factory, image_root) -> Path:
    """One image to validate on, for two processes."""
    root = tmp_path_factory.mktemp("few")
    shutil.copytree(image_root / "train", root / "train")
    (root / "val/red").mkdir(parents=True)
    shutil.copy(image_root / "val/red/0.png", root / "val/red/0.png")
    return root


@pytest.fixture(scope="module")
def two(tmp_path_factory, image_root, few_to_validate, python) -> list[dict]:
    """What each of two processes of torchrun saw of the same runs."""
    folder = tmp_path_factory.mktemp("two")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    words = [two_processes.__file__, folder, image_root, few_to_validate]
    code, err = _end(python.start(*torchrun, *words, env=ENVIRONMENT))
    assert code == 0, err
    return [json.loads((folder / f"{name}.json").read_text()) for name in ("first", "second")]


@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-9), ("32-true", 1e-5)])
def test_two_processes_train_as_one_does(two, image_root, tmp_path, one_thread, precision, tolerance):
    trainer = {"precision": precision}
    alone = two_processes.train(image_root, tmp_path / "run", trainer=trainer, **two_processes.ALIKE)
    losses = torch.tensor([seen[precision]["losses"] for seen in two], dtype=torch.float64)
    expected = torch.tensor(alone["losses"], dtype=torch.float64)
    assert losses.shape == (2, 21)
    assert not torch.allclose(losses[0], losses[1], atol=1e-3)  # they have other images
    torch.testing.assert_close(losses.mean(0), expected, rtol=0, atol=tolerance)
    weights = torch.tensor([two[0][precision]["weights"], alone["weights"]], dtype=torch.float64)
    torch.testing.assert_close(*weights, rtol=0, atol=10 * tolerance)
    assert two[0][precision]["images"] == alone["images"] == [8] * 7


def test_each_process_draws_dropout_of_its_own_that_epoch_and_batch_give(two):
    first, second = (seen["drop path"]["seeds"] for seen in two)
    assert len(set(first)) == 1  # drawn on from the run's seed, as in a run of one process
    assert len(set(second)) == len(second) == 6
    assert not set(first) & set(second)


def test_a_process_without_an_image_to_validate_validates_with_the_others(two):
    assert [seen["few"]["images"] for seen in two] == [[1], [1]]


def test_processes_with_other_settings_do_not_begin_and_one_says_so(two):
    first, second = (seen["other data"] for seen in two)
    assert first == {"class": "SystemExit", "said": "2", "steps": 0}
    assert second["class"] == "ConfigError"
    assert second["said"].startswith("process 1 of the run has other settings or data than process 0: ")
    assert "seed" in second["said"]


def test_a_signal_that_one_process_gets_stops_all_after_the_same_step_and_the_first_says_so(two):
    first, second = (seen["SIGTERM"] for seen in two)
    assert first["class"] == "Stopped"
    assert first["said"].startswith("stopped by SIGTERM; ")
    assert (second["class"], second["said"]) == ("SystemExit", "143")
    assert first["steps"] == second["steps"] == 5


def test_a_run_of_two_processes_that_is_stopped_and_resumed_is_the_whole_run(two):
    resumed, whole = two[0]["resumed"], two[0]["whole"]
    assert resumed["rows"] == whole["rows"]
    assert len(whole["rows"]) == 3
    assert resumed["weights"] == whole["weights"]
    assert 0 < len(resumed["losses"]) < len(whole["losses"])


def test_an_error_in_one_process_is_said_by_it_alone_and_is_the_others_exit_code(two):
    assert two[1]["failure"] == {"class": "DataError", "said": "this disk is gone.", "steps": 4}
    assert (two[0]["failure"]["class"], two[0]["failure"]["said"]) == ("SystemExit", "2")


def test_a_process_that_is_killed_ends_the_run_in_one_paragraph_and_each_line_was_said_once(tmp_path, python):
    words = [*WORDS.split(), "--trainer.max_epochs", "9", "--run_dir", str(tmp_path / "run")]
    module = _own_module(tmp_path, "if rank == 1 and task.current_epoch == 1: os.kill(os.getpid(), 9)")
    code, err = _end(python.start("-m", "vit_cls", *words, *module, env=ENVIRONMENT))
    lines = err.splitlines()
    assert [line for line in lines if line.startswith("vit-cls:")] == [
        "vit-cls: process 1 of the run was killed by SIGKILL. The others have ended: a run cannot go on "
        "without one."
    ], err
    assert code == 2
    assert "Traceback" not in err
    assert len(lines) == len(set(lines)), err
    assert sum(line.startswith("2 process(es) on cpu") for line in lines) == 1
    assert [(row["epoch"], row["val/images"]) for row in rows_of(tmp_path / "run")] == [("0", "120")]
    record = record_of(tmp_path / "run")
    assert (record["status"], record["processes"]) == ("failed", 2)


def _of_slurm(rank: int, port: int) -> dict[str, str]:
    """The environment of a task of srun, as Lightning reads it."""
    settings = {
        "NTASKS": 2,
        "NTASKS_PER_NODE": 2,
        "PROCID": rank,
        "LOCALID": rank,
        "NODEID": 0,
        "JOB_ID": 4711,
    }
    settings |= {"NODELIST": "127.0.0.1", "JOB_NAME": "training"}
    return {"MASTER_PORT": str(port), **{f"SLURM_{name}": str(value) for name, value in settings.items()}}


def test_tasks_of_slurm_train_together_and_a_second_signal_ends_one_that_waits_for_another(
    tmp_path, free_port, python
):
    """The second process stands still in the second epoch; the first waits for it in a sum of gradients."""
    body = f"open(r'{tmp_path}/at_' + str(rank), 'w').close() if task.current_epoch == 1 else None"
    body += "\n    while rank == 1 and task.current_epoch == 1: time.sleep(1)"
    words = [*WORDS.split(), "--trainer.max_epochs", "9", "--run_dir", str(tmp_path / "run")]
    words = ["-m", "vit_cls", *words, *_own_module(tmp_path, body)]
    tasks = [python.start(*words, env={**ENVIRONMENT, **_of_slurm(rank, free_port)}) for rank in range(2)]
    until = time.monotonic() + LIMIT_SECONDS
    while not all((tmp_path / f"at_{rank}").exists() for rank in range(2)) and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(1)
    for task in tasks:
        os.kill(task.pid, signal.SIGTERM)
    time.sleep(0.5)
    for task in tasks:
        os.kill(task.pid, signal.SIGTERM)
    begun = time.monotonic()
    ends = [_end(task) for task in tasks]
    assert time.monotonic() - begun < 30
    assert [code for code, _ in ends] == [143, 143], ends
    said = [line for _, err in ends for line in err.splitlines() if line.startswith("vit-cls:")]
    assert len(said) <= 1, ends
    assert [row["epoch"] for row in rows_of(tmp_path / "run")] == ["0"]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        return end.getsockname()[1]

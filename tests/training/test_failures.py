"""What ends for want of memory, of a loading process or of a driver says so in one paragraph."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.training.runs import fit_tiny
from vit_cls import environment
from vit_cls.errors import ConfigError, RunError
from vit_cls.inference import choose_device
from vit_cls.training.failures import named_failures
from vit_cls.training.task import ClassificationTask

OOM = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 8 MiB free. See docs."
)


def _raise(error):
    def raises(*args, **kwargs):
        raise error

    return raises


def test_a_training_out_of_memory_names_settings_that_keep_the_images_of_a_step(
    image_root, tmp_path, monkeypatch
):
    monkeypatch.setattr(ClassificationTask, "training_step", _raise(OOM))
    trainer = {"accumulate_grad_batches": 2}
    pattern = (
        r"data.batch_size 4 at 16x16 pixels \(CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 8 "
        r"MiB free\). Try data.batch_size 2 with trainer.accumulate_grad_batches 4 \(now 4 and 2\)"
    )
    with pytest.raises(RunError, match=pattern):
        fit_tiny(image_root, tmp_path / "run", data={"batch_size": 4}, trainer=trainer)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("batch_size", "advice"),
    [
        (256, "batch_size 128 .*batches 2 "),
        (15, "batch_size 5 .*batches 3 "),
        (1, r"\)\. model.grad_checkpointing true"),
    ],
)
def test_the_advice_keeps_the_images_of_a_step_exactly(batch_size, advice):
    with (
        pytest.raises(RunError, match=advice),
        named_failures(batch_size=batch_size, accumulate=1, img_size=(224, 224)),
    ):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")


def test_a_training_whose_loading_process_is_killed_names_the_shared_memory(
    image_root, tmp_path, monkeypatch
):
    monkeypatch.setattr("vit_cls.data.dataset.read_file", lambda path: os._exit(9))
    pattern = r"a loading process died .*/dev/shm has [\d.,]+ MB.* Use fewer data.num_workers, or 0"
    with pytest.raises(RunError, match=pattern):
        fit_tiny(image_root, tmp_path / "run", data={"num_workers": 1})
    assert os.listdir(tmp_path) == []


def test_an_error_of_another_kind_stays_what_it_is():
    with (
        pytest.raises(RuntimeError, match="shapes") as caught,
        named_failures(batch_size=2, accumulate=1, img_size=(8, 8)),
    ):
        raise RuntimeError("shapes differ")
    assert not isinstance(caught.value, RunError)


@pytest.fixture
def old_driver(monkeypatch):
    """A GPU that the installed torch cannot use."""
    reason = "The NVIDIA driver on your system is too old (found version 11040)."
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", _raise(RuntimeError(reason)))
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [self / "nvidia0"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_driver_that_does_not_suit_is_named_instead_of_a_run_on_the_cpu(
    old_driver, image_root, tmp_path, monkeypatch
):
    pattern = (
        r"cannot be used: torch .* built for CUDA 12.8, and The NVIDIA driver .*too old.*accelerator cpu"
    )
    with pytest.raises(
        ConfigError, match=r"--device cuda is not available .*driver on your system is too old"
    ):
        choose_device("cuda")
    assert choose_device("auto").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert environment.unusable_gpu() is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(RunError, match=pattern):
        fit_tiny(image_root, tmp_path / "run", trainer={"accelerator": "auto"})

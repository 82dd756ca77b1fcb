"""A run that was stopped anywhere and resumed is, to the bit, the run that nobody stopped."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vit_cls
from tests.training.runs import TINY, fit_tiny, record_of, rows_of, run_tiny, same_weights, weights_of
from vit_cls.data.datamodule import ImageDataModule
from vit_cls.data.mixing import MixOptions
from vit_cls.data.sampler import EpochSampler, EvenBatches
from vit_cls.signals import Stopped
from vit_cls.training.options import OptimOptions
from vit_cls.training.task import ClassificationTask

EPOCHS, EVERYTHING = 3, os.environ.get("EVERY_STOP") == "1"
OWN = ("/loops", "/vit_cls_digest", "/vit_cls_run_id", "/vit_cls_record")
"""Of a checkpoint, what counts the parts of a run or is of this one alone."""
TIMES = {"seconds", "train_images_per_second", "data_wait", "waited", "validated_for"}

PLAIN = {}, {}
"""Settings of the run, and arguments of the Trainer."""
RICH = (
    {
        "optim": {"ema_decay": 0.9},
        "data": {"mix": MixOptions(mixup_alpha=0.8, cutmix_alpha=1.0, erase_prob=0.3), "batch_size": 3},
    },
    {"accumulate_grad_batches": 2, "val_check_interval": 4},
)
STEPS = {"data": {"batch_size": 4}}, {"max_steps": 9}
RUNS = {"plain": PLAIN, "rich": RICH, "steps": STEPS}


class _SignalAt(Callback):
    """Sends SIGTERM in that batch of an epoch, or in the validation that follows it."""

    def __init__(self, epoch: int, batch: int, validating: bool) -> None:
        self.place, self.validating = (epoch, batch), validating

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if not self.validating and (trainer.current_epoch, batch_idx) == self.place:
            signal.raise_signal(signal.SIGTERM)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if self.validating and (trainer.current_epoch, trainer.fit_loop.batch_idx) == self.place:
            signal.raise_signal(signal.SIGTERM)


def _state(folder: Path) -> dict[str, object]:
    """Of the last checkpoint, by path; without times, and what counts the parts of a run."""

    def walk(value, path):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(inner, f"{path}/{key}")
        elif isinstance(value, list | tuple):
            for key, inner in enumerate(value):
                yield from walk(inner, f"{path}/{key}")
        else:
            yield path, value

    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    found = dict(walk(checkpoint, ""))
    return {
        path: value
        for path, value in found.items()
        if path.rsplit("/", 1)[-1] not in TIMES and not path.startswith(OWN)
    }


def _points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag not in TIMES
    }


def assert_same_run(whole: Path, parts: Path) -> None:
    first, second = _state(whole), _state(parts)
    assert first.keys() == second.keys()
    for path, value in first.items():
        other = second[path]
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same, f"{path}: {value} and {other}"
    rows = [[{k: v for k, v in row.items() if k not in TIMES} for row in rows_of(x)] for x in (whole, parts)]
    assert rows[0] == rows[1]
    assert _points(whole) == _points(parts)
    assert (whole / "model.safetensors").stat().st_size == (parts / "model.safetensors").stat().st_size


@pytest.fixture(scope="module")
def wholes(tmp_path_factory, image_root):
    """Runs that nobody stops, made when they are first asked for."""
    made: dict[str, Path] = {}

    def whole(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("wholes") / name
            settings, trainer = RUNS[name]
            fit_tiny(image_root, made[name], epochs=EPOCHS, trainer=trainer, **settings)
        return made[name]

    return whole


FEW = [
    ("plain", 0, 0, False),  # after the first step
    ("plain", 1, 4, False),  # after the last one of an epoch, before its validation
    ("rich", 1, 2, False),  # in accumulation
    ("rich", 1, 3, True),  # in a validation within an epoch
    ("rich", 2, 7, True),  # in the last validation
    ("steps", 1, 2, True),  # in the validation after the last of max_steps, within an epoch
]
ALL = [(name, e, b, v) for name in RUNS for e in range(EPOCHS) for b in range(8) for v in (False, True)]


@pytest.mark.parametrize(("name", "epoch", "batch", "validating"), ALL if EVERYTHING else FEW)
def test_a_run_stopped_anywhere_and_resumed_is_the_whole_run(
    name, epoch, batch, validating, wholes, image_root, tmp_path
):
    settings, trainer = RUNS[name]
    stop = {**trainer, "callbacks": [_SignalAt(epoch, batch, validating)]}
    try:
        fit_tiny(image_root, tmp_path / "run", epochs=EPOCHS, trainer=stop, **settings)
    except Stopped:
        assert record_of(tmp_path / "run")["status"] == "interrupted"
    else:
        assert EVERYTHING, "there is no such place"
        pytest.skip("there is no such place")
    fit_tiny(image_root, None, epochs=EPOCHS, resume=str(tmp_path / "run"), trainer=trainer, **settings)
    assert_same_run(wholes(name), tmp_path / "run")


def test_a_run_with_loading_processes_goes_on_with_another_number_of_them(wholes, image_root, tmp_path):
    settings, trainer = RICH
    for workers, callbacks in ((2, [_SignalAt(1, 5, False)]), (1, [_SignalAt(2, 1, False)]), (2, [])):
        data = {**settings["data"], "num_workers": workers}
        run = {**settings, "data": data, "trainer": {**trainer, "callbacks": callbacks}, "resume": "auto"}
        try:
            fit_tiny(image_root, tmp_path / "run", epochs=EPOCHS, **run)
        except Stopped:
            continue
    assert_same_run(wholes("rich"), tmp_path / "run")


def test_a_kill_after_the_checkpoint_repeats_no_row_and_no_point(wholes, image_root, tmp_path):
    """What a run wrote after the checkpoint from which it goes on is written again, and shown once."""

    class Crash(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 8:
                raise RuntimeError("the power is gone")

    with pytest.raises(RuntimeError, match="power"):
        fit_tiny(image_root, tmp_path / "run", epochs=EPOCHS, trainer={"callbacks": [Crash()]})
    fit_tiny(image_root, None, epochs=EPOCHS, resume=str(tmp_path / "run"))
    assert_same_run(wholes("plain"), tmp_path / "run")


@pytest.mark.parametrize("name", ["plain", "steps"])
def test_a_finished_run_stays_as_it_is(name, wholes, image_root, tmp_path):
    settings, trainer = RUNS[name]
    shutil.copytree(wholes(name), tmp_path / "run")
    fit_tiny(image_root, None, epochs=EPOCHS, resume=str(tmp_path / "run"), trainer=trainer, **settings)
    assert_same_run(wholes(name), tmp_path / "run")


def test_an_early_stopped_run_stays_as_it_is(image_root, tmp_path):
    def run(**settings):
        callbacks = [EarlyStopping("train/loss", mode="max", patience=1, check_on_train_epoch_end=True)]
        return fit_tiny(
            image_root,
            tmp_path / "run",
            epochs=9,
            trainer={"callbacks": callbacks},
            resume="auto",
            **settings,
        )

    epochs = run().epochs
    assert epochs < 9
    before = weights_of(tmp_path / "run")
    assert run().epochs == epochs
    assert same_weights(before, weights_of(tmp_path / "run"))


def test_a_run_cut_short_by_steps_goes_on_within_its_epoch_when_it_gets_more(image_root, tmp_path):
    fit_tiny(image_root, tmp_path / "run", epochs=3, trainer={"max_steps": 7})  # 5 steps an epoch
    _, data = run_tiny(image_root, None, epochs=3, trainer={"max_steps": 12}, resume=str(tmp_path / "run"))
    assert data.begins == (1, 2)
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows if row["train/loss"]] == ["5", "10", "12"]


def test_sanity_checks_before_training_change_nothing(wholes, image_root, tmp_path):
    fit_tiny(image_root, tmp_path / "run", epochs=EPOCHS, trainer={"num_sanity_val_steps": 2})
    assert_same_run(wholes("plain"), tmp_path / "run")


def test_images_that_could_not_be_read_are_counted_on(image_root, tmp_path):
    root = tmp_path / "images"
    shutil.copytree(image_root, root)
    bad = next((root / "train").glob("*/*.*"))
    bad.write_bytes(b"no image")
    settings = {"epochs": 2, "data": {"max_bad_images": 1}}
    with pytest.raises(Stopped):
        fit_tiny(root, tmp_path / "run", trainer={"callbacks": [_SignalAt(1, 0, False)]}, **settings)
    _, data = run_tiny(root, None, resume=str(tmp_path / "run"), **settings)
    assert list(data.bad_images) == [str(bad)]


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_the_data_module_goes_on_within_an_epoch_in_anybodys_trainer(image_root, tmp_path):
    def run(checkpoint: Path | None = None, workers: int = 0) -> dict[str, torch.Tensor]:
        data = ImageDataModule(str(image_root), batch_size=5, num_workers=workers)
        torch.manual_seed(0)
        model = vit_cls.create_model("vit_pico_patch7_28", num_classes=2, **TINY)
        classifier = vit_cls.ImageClassifier(model, class_names=data.class_names)
        keep = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            callbacks=[keep],
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        task = ClassificationTask(classifier, OptimOptions(lr=1e-2))
        trainer.fit(task, data, ckpt_path=checkpoint, weights_only=True)
        return task.classifier.model.state_dict()

    whole = run()
    parts = run(tmp_path / "kept/step=3.ckpt", workers=2)
    assert same_weights(whole, parts)


def test_batches_begin_in_the_epoch_and_at_the_batch_they_are_told():
    def sampler() -> EpochSampler:
        return EpochSampler(11, seed=3, shuffle=True)

    whole = EvenBatches(sampler(), 3)
    whole.sampler.set_epoch(2)
    later = EvenBatches(sampler(), 3, begins=(2, 2))
    assert list(later) == list(whole)[2:]
    assert len(later) == len(whole) == 4
    later.sampler.set_epoch(3)
    assert len(list(later)) == 4

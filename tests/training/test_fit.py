"""Whole runs, tiny ones: what they leave, and that order, resume and signals keep their promises."""

from __future__ import annotations

import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import vit_cls
from tests.training.runs import fit_tiny, record_of, rows_of, same_weights, weights_of
from vit_cls.errors import ConfigError, DataError, RunError, VitClsError
from vit_cls.model.token_model import TokenModel
from vit_cls.signals import SIGNALS, Stopped, StopSignals
from vit_cls.training import callbacks
from vit_cls.weights.bundle import read_metadata

PLAIN = {"drop_path_rate": 0.0}


def test_a_run_leaves_the_folder_that_is_promised(image_root, tmp_path):
    result = fit_tiny(image_root, tmp_path / "run")
    folder = tmp_path / "run"
    found = "checkpoints config.yaml metrics.csv model.safetensors run.json tensorboard"
    assert " ".join(sorted(os.listdir(folder))) == found
    assert sorted(os.listdir(folder / "checkpoints")) == [
        "best.ckpt",
        "files.npz",
        "last.ckpt",
        "previous.ckpt",
    ]
    assert any(name.startswith("events.out") for name in os.listdir(folder / "tensorboard"))
    rows = rows_of(folder)
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert [row["step"] for row in rows] == ["5", "10"]  # 24 images in batches of 5, 5, 5, 5 and 4
    record = record_of(folder)
    assert record["status"] == "finished"
    assert record["data"]["train_counts"] == {"blue": 12, "red": 12}
    assert record["model"]["tokens"] == 17
    assert record["versions"]["vit_cls"] == vit_cls.__version__
    assert record["seed"] == 0
    assert len(record["identity"]["train_fingerprint"]) == 32
    best = max(rows, key=lambda row: float(row["val/acc1"]))
    assert (result.correct, result.images) == (int(best["val/correct"]), 8)
    assert read_metadata(folder / "model.safetensors")["metrics"]["epoch"] == result.best_epoch


def test_a_classifier_learns_two_colours(image_root, tmp_path):
    optim = {"label_smoothing": 0.0}
    result = fit_tiny(image_root, tmp_path / "run", epochs=8, model=PLAIN, optim=optim)
    assert result.correct == result.images == 8
    assert result.history[-1]["train/loss"] < 0.5 * result.history[0]["train/loss"]


class _WreckFrom(Callback):
    """From that epoch on the model is validated with a head that says one class for everything."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_validation_start(self, trainer, pl_module):
        if trainer.current_epoch >= self.epoch:
            head = pl_module.classifier.model.head
            with torch.no_grad():
                head.weight.zero_()
                head.bias.copy_(torch.tensor([1.0, 0.0]))


def test_the_model_file_is_the_best_epoch_not_the_last(image_root, tmp_path):
    result = fit_tiny(
        image_root, tmp_path / "run", epochs=6, model=PLAIN, trainer={"callbacks": [_WreckFrom(4)]}
    )
    assert result.best_epoch < 4
    assert result.correct > 4 == result.history[-1]["val/correct"]
    state = load_file(tmp_path / "run/model.safetensors")
    best = torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)
    assert best["epoch"] == result.best_epoch
    assert same_weights(weights_of(tmp_path / "run", "best"), state)
    assert same_weights(vit_cls.load(tmp_path / "run/checkpoints/best.ckpt").model.state_dict(), state)


def test_weights_do_not_depend_on_the_number_of_workers(image_root, tmp_path):
    for workers in (0, 2):
        fit_tiny(image_root, tmp_path / f"w{workers}", data={"num_workers": workers})
    assert same_weights(weights_of(tmp_path / "w0"), weights_of(tmp_path / "w2"))


def test_weights_depend_on_the_seed(image_root, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit_tiny(image_root, tmp_path / name, epochs=1, seed=seed)
        torch.rand(1000)  # a run after another in the same process is the same as alone
    assert same_weights(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))
    assert not same_weights(weights_of(tmp_path / "a"), weights_of(tmp_path / "c"))


def test_an_epoch_without_validation_has_no_validation_numbers_and_is_never_the_best(image_root, tmp_path):
    trainer = {"check_val_every_n_epoch": 2, "max_steps": 28}  # 5 steps an epoch: it ends inside epoch 5
    result = fit_tiny(image_root, tmp_path / "run", epochs=10, trainer=trainer)
    assert [row["epoch"] for row in result.history if "val/acc1" in row] == [1, 3, 5]
    assert result.best_epoch in (1, 3, 5)  # the last epoch ends early, and is validated all the same
    assert read_metadata(tmp_path / "run/model.safetensors")["metrics"]["epoch"] == result.best_epoch


def test_validations_within_an_epoch_are_rows_and_may_be_the_best(image_root, tmp_path):
    class Spoil(Callback):
        """The second half of each epoch undoes what the first has learned."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 3:
                torch.nn.init.zeros_(pl_module.classifier.model.head.weight)
                torch.nn.init.constant_(pl_module.classifier.model.head.bias[:1], 9.0)

    trainer = {"val_check_interval": 0.5, "callbacks": [Spoil()]}
    result = fit_tiny(
        image_root, tmp_path / "run", epochs=6, data={"batch_size": 6}, trainer=trainer, optim={"lr": 1e-2}
    )
    rows = rows_of(tmp_path / "run")
    assert [(row["epoch"], row["step"]) for row in rows[:4]] == [
        ("0", "2"),
        ("0", "4"),
        ("1", "6"),
        ("1", "8"),
    ]
    assert [bool(row["train/loss"]) for row in rows] == [False, True] * 6
    assert all(row["val/acc1"] == "0.5" for row in rows[1::2])  # one class of two
    best = read_metadata(tmp_path / "run/model.safetensors")["metrics"]
    assert best["step"] % 4 == 2
    assert best["val/correct"] == result.correct > 4
    assert vit_cls.load(tmp_path / "run/checkpoints/best.ckpt").model.head.weight.any()
    assert sum(row["seconds"] for row in result.history if "seconds" in row) == result.seconds


def test_waiting_for_images_is_not_validation_and_an_epoch_has_its_own_time(
    image_root, tmp_path, monkeypatch
):
    """A step takes 1 s, the images of the next another 3, a validation 10."""
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)

    class Tick(Callback):
        def on_train_batch_start(self, *args):
            clock.now += 1

        def on_train_batch_end(self, *args):
            clock.now += 3

        def on_validation_batch_start(self, *args):
            clock.now += 10

    monkeypatch.setattr(callbacks, "time", clock)
    trainer = {"val_check_interval": 1, "check_val_every_n_epoch": 2, "callbacks": [Tick()]}
    trainer["limit_val_batches"] = 1
    result = fit_tiny(image_root, tmp_path / "run", epochs=4, trainer=trainer)
    ends = [row for row in result.history if "seconds" in row]
    assert [row["seconds"] for row in ends] == [20, 70, 20, 70]  # five steps, and five validations
    assert [row["train_images_per_second"] for row in ends] == [24 / 20] * 4
    # Between a step and its validation nothing is waited for.
    assert [row["data_wait"] for row in ends] == pytest.approx([12 / 20, 0, 12 / 20, 0])


def test_a_moved_run_remembers_its_best_epoch(image_root, tmp_path):
    first = fit_tiny(image_root, tmp_path / "run", epochs=6, model=PLAIN)
    before = load_file(tmp_path / "run/model.safetensors")
    (tmp_path / "run").rename(tmp_path / "moved")
    trainer = {"callbacks": [_WreckFrom(0)]}
    second = fit_tiny(
        image_root, None, epochs=8, model=PLAIN, resume=str(tmp_path / "moved"), trainer=trainer
    )
    assert second.best_epoch == first.best_epoch
    assert same_weights(load_file(tmp_path / "moved/model.safetensors"), before)


class _SignalAtStart(Callback):
    def on_fit_start(self, trainer, pl_module):
        os.kill(os.getpid(), signal.SIGTERM)


class _SignalAfter(Callback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epochs:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("callback", [_SignalAtStart()], ids=["at the start"])
@pytest.mark.parametrize("there", [[], ["run"]], ids=["new folder", "empty folder"])
def test_a_run_without_a_complete_epoch_leaves_what_was_there(there, callback, image_root, tmp_path):
    for name in there:
        (tmp_path / name).mkdir()
    with pytest.raises(Stopped, match=r"stopped by SIGTERM; no step was complete"):
        fit_tiny(image_root, tmp_path / "run", trainer={"callbacks": [callback]})
    assert [path.name for path in tmp_path.rglob("*")] == there


def test_a_run_that_was_killed_before_its_first_epoch_is_begun_again(image_root, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("{}")
    with pytest.raises(RunError, match=r"without a finished step.*--resume auto"):
        fit_tiny(image_root, tmp_path / "run")
    assert fit_tiny(image_root, tmp_path / "run", epochs=1, resume="auto").epochs == 1


class _During(Callback):
    """Does something once while a run trains, and keeps how that was refused."""

    def __init__(self, *acts) -> None:
        self.acts, self.refusals = acts, []

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        acts, self.acts = self.acts, ()
        for act in acts:
            with pytest.raises(VitClsError) as refused:
                act()
            self.refusals.append(str(refused.value))


def test_while_a_run_trains_no_other_takes_its_folder_or_goes_on_with_it(image_root, tmp_path):
    run = tmp_path / "run"
    during = _During(
        lambda: fit_tiny(image_root, run, epochs=1),
        lambda: fit_tiny(image_root, run, epochs=1, resume="auto"),
    )
    result = fit_tiny(image_root, run, epochs=2, trainer={"callbacks": [during]})
    assert len(during.refusals) == 2
    assert all(f"process {os.getpid()} has been writing there" in text for text in during.refusals)
    assert (result.epochs, record_of(run)["status"]) == (2, "finished")
    again = _During(lambda: fit_tiny(image_root, None, epochs=3, resume=str(run)))
    fit_tiny(image_root, None, epochs=3, resume=str(run), trainer={"callbacks": [again]})
    assert f"resume {run}: process {os.getpid()} has been writing there" in again.refusals[0]
    assert [row["epoch"] for row in rows_of(run)] == ["0", "1", "2"]
    assert not list(run.glob(".lock*"))


def test_of_two_runs_that_begin_in_one_empty_folder_the_second_is_refused_and_takes_nothing_away(
    image_root, tmp_path, monkeypatch
):
    """The first has the folder, and nothing in it yet."""
    run, seen = tmp_path / "run", []
    run.mkdir()

    def make_while_another_begins(*args):
        monkeypatch.undo()
        with pytest.raises(ConfigError, match="has been writing there"):
            fit_tiny(image_root, run, epochs=1)
        seen.append(os.listdir(run))
        return vit_cls.training.fit.make_loggers(*args)

    monkeypatch.setattr("vit_cls.training.fit.make_loggers", make_while_another_begins)
    assert fit_tiny(image_root, run, epochs=1).epochs == 1
    assert seen == [[".lock"]]


def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_weights_and_rows(image_root, tmp_path):
    fit_tiny(image_root, tmp_path / "whole", epochs=4)
    with pytest.raises(Stopped) as stopped:
        fit_tiny(image_root, tmp_path / "parts", epochs=4, trainer={"callbacks": [_SignalAfter(2)]})
    assert stopped.value.signum == signal.SIGTERM
    assert record_of(tmp_path / "parts")["status"] == "interrupted"
    fit_tiny(image_root, None, epochs=4, resume=str(tmp_path / "parts"))
    assert same_weights(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))
    timing = {"seconds", "train_images_per_second", "data_wait"}
    rows = [
        [{k: v for k, v in row.items() if k not in timing} for row in rows_of(tmp_path / name)]
        for name in ("whole", "parts")
    ]
    assert len(rows[0]) == 4
    assert rows[0] == rows[1]


def test_signals_are_given_back_after_a_run(image_root, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    fit_tiny(image_root, tmp_path / "run", epochs=1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


class _HandlersAtStart(Callback):
    def on_fit_start(self, trainer, pl_module):
        self.handlers = [getattr(signal.getsignal(number), "__self__", None) for number in SIGNALS]


def test_lightnings_own_handlers_are_not_there(image_root, tmp_path):
    """In Slurm they would save in the middle of a step, and requeue."""
    seen = _HandlersAtStart()
    fit_tiny(image_root, tmp_path / "run", epochs=1, trainer={"callbacks": [seen]})
    assert [type(owner) for owner in seen.handlers] == [StopSignals] * len(SIGNALS)


def test_resume_auto_begins_a_new_run_and_continues_a_begun_one(image_root, tmp_path):
    fit_tiny(image_root, tmp_path / "run", epochs=2, resume="auto")
    result = fit_tiny(image_root, tmp_path / "run", epochs=3, resume="auto")
    assert result.epochs == 3
    assert [row["epoch"] for row in result.history] == [0, 1, 2]


def test_a_resumed_run_must_be_the_same_run(image_root, tmp_path):
    fit_tiny(image_root, tmp_path / "run", epochs=1)
    with pytest.raises(RunError, match=r"cannot be continued: seed changed \(then 0, now 1\)"):
        fit_tiny(image_root, tmp_path / "run", epochs=2, resume="auto", seed=1)
    with pytest.raises(RunError, match="architecture changed"):
        fit_tiny(image_root, tmp_path / "run", epochs=2, resume="auto", model={"depth": 1})
    with pytest.raises(RunError, match=r"optim.weight_decay changed \(then 0.05, now 0.5\)"):
        fit_tiny(image_root, tmp_path / "run", epochs=2, resume="auto", optim={"weight_decay": 0.5})


def test_a_taken_folder_is_refused_and_left_alone(image_root, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    for resume in (None, "auto"):
        with pytest.raises(RunError, match="is not empty"):
            fit_tiny(image_root, tmp_path / "run", resume=resume)
    assert os.listdir(tmp_path / "run") == ["notes.txt"]


def test_without_a_folder_runs_are_numbered(image_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        result = fit_tiny(image_root, None, epochs=1)
        assert str(result.folder.path) == f"runs/vit_pico_patch7_28_cls_{number}"


def test_an_unreadable_image_stops_the_run_with_its_path_and_leaves_nothing(image_root, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(image_root, root)
    (root / "val/red/0.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"data/val/red/0.png cannot be read as an image: .*known format"):
        fit_tiny(root, tmp_path / "run")
    assert os.listdir(tmp_path) == ["data"]


def test_accumulation_counts_optimiser_steps(image_root, tmp_path):
    result = fit_tiny(image_root, tmp_path / "run", trainer={"accumulate_grad_batches": 2})
    assert [row["step"] for row in result.history] == [3, 6]
    record = record_of(tmp_path / "run")
    assert record["optim"]["total_steps"] == 6
    # the schedule has come down: the cosine reaches its end with the run
    assert result.history[-1]["lr"] == pytest.approx(3e-3 * 0.01, rel=0.01)


def test_early_stopping_ends_a_run_that_stands_still(image_root, tmp_path):
    optim = {"lr": 1e-12}
    result = fit_tiny(image_root, tmp_path / "run", epochs=30, optim=optim, early_stopping_patience=2)
    assert result.epochs == 3
    # of equal epochs the last is the best
    assert result.best_epoch == 2
    assert read_metadata(tmp_path / "run/model.safetensors")["metrics"]["epoch"] == 2
    assert torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)["epoch"] == 2


def test_gradients_are_clipped_as_asked(image_root, tmp_path):
    norms = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            norms.append(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])).item())

    for clip in (1e-3, None):
        trainer = {"gradient_clip_val": clip, "callbacks": [Look()]}
        fit_tiny(image_root, tmp_path / f"{clip}", epochs=1, trainer=trainer)
    assert max(norms[:5]) <= 1.001e-3 < min(norms[5:])


def test_bf16_trains_and_is_recorded(image_root, tmp_path):
    result = fit_tiny(image_root, tmp_path / "run", epochs=1, trainer={"precision": "bf16-mixed"})
    assert record_of(tmp_path / "run")["precision"] == "bf16-mixed"
    assert all(v == v for v in result.history[0].values())
    assert {t.dtype for t in load_file(tmp_path / "run/model.safetensors").values()} == {torch.float32}


def test_compiled_blocks_leave_plain_keys(image_root, tmp_path, monkeypatch):
    monkeypatch.setattr(TokenModel.compile_encoder, "__defaults__", ("eager",))  # C++ takes long to compile
    fit_tiny(image_root, tmp_path / "run", epochs=1, compile=True, trainer={"limit_train_batches": 1})
    assert not [k for k in load_file(tmp_path / "run/model.safetensors") if "_orig_mod" in k]
    vit_cls.load(tmp_path / "run")


class _CountReads(TorchDispatchMode):
    """Counts copies of a device value to Python: on a GPU each would wait for all work before it."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            type(self).reads += 1
        return func(*args, **(kwargs or {}))


def test_the_training_step_reads_nothing_back_from_the_device(image_root, tmp_path):
    counts = []

    class Count(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.mode = _CountReads()
            _CountReads.reads = 0
            self.mode.__enter__()

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            counts.append(_CountReads.reads)  # forward, loss, logging and backward are behind us

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.mode.__exit__(None, None, None)

    fit_tiny(
        image_root, tmp_path / "run", epochs=1, trainer={"callbacks": [Count()], "log_every_n_steps": 1000}
    )
    assert counts == [0] * 5


@pytest.mark.parametrize(
    ("trainer", "options", "message"),
    [
        ({"max_epochs": 0}, {}, "trainer.max_epochs must be at least 1"),
        (
            {},
            {"optim": {"warmup_epochs": 2}},
            "optim.warmup_epochs must be shorter than the run; got 2 of 2",
        ),
        ({}, {"early_stopping_patience": 0}, "early_stopping_patience must be at least 1"),
        ({"accelerator": "no"}, {}, "Lightning's trainer refuses"),
        ({"limit_val_batches": 0}, {}, "trainer.limit_val_batches must not be 0"),
        ({"overfit_batches": 1}, {}, "trainer.overfit_batches swaps the sampler"),
        ({}, {"seed": -1}, "seed must be at least 0 and at most 4294967295; got -1"),
        ({}, {"resume": "nowhere"}, "resume nowhere continues that folder, but run_dir is"),
    ],
    ids=str,
)
def test_impossible_runs_are_refused_before_anything_is_written(
    trainer, options, message, image_root, tmp_path
):
    with pytest.raises((ConfigError, RunError), match=message):
        fit_tiny(image_root, tmp_path / "run", trainer=trainer, **options)
    assert os.listdir(tmp_path) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_run_uses_bf16_and_no_step_waits_for_it(image_root, tmp_path):
    class Strict(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("error" if batch_idx else "default")

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("default")

    trainer = {"accelerator": "auto", "callbacks": [Strict()], "log_every_n_steps": 1000}
    fit_tiny(image_root, tmp_path / "run", trainer=trainer)
    record = record_of(tmp_path / "run")
    assert record["precision"] == "bf16-mixed"
    assert record["device"].startswith("cuda")

"""Steps that are not finite change nothing, are counted and named, and too many of them end the run."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import load_file
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from tests.training.runs import StopAfter, fit_tiny, record_of, rows_of
from tests.training.test_progress import CountReads
from vit_cls.cli import main
from vit_cls.errors import DivergedError
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.presets import preset_config
from vit_cls.model.vit import VisionTransformer
from vit_cls.training import diagnosis, guards
from vit_cls.training.guards import StepGuard
from vit_cls.training.optimizers import OPTIMIZERS
from vit_cls.training.options import OptimOptions
from vit_cls.training.task import ClassificationTask

COMMAND = (
    *("fit", "--model.name", "vit_pico_patch7_28", "--model.img_size", "14", "--model.depth", "1"),
    *("--data.num_workers", "0", "--data.batch_size", "8", "--optim.warmup_epochs", "0"),
    *("--trainer.max_epochs", "3", "--trainer.accelerator", "cpu", "--trainer.logger", "false"),
)


class _OwnSGD(Optimizer):
    """As somebody may write it: its momentum is another tensor after each step."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            closure()
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            state["momentum"] = 0.9 * state.get("momentum", torch.zeros_like(p)) + p.grad
            p -= self.param_groups[0]["lr"] * state["momentum"]


class _Counting(_OwnSGD):
    """Its rate goes by steps that it counts itself, in a number."""

    def step(self, closure=None):
        super().step(closure)
        group = self.param_groups[0]
        group["steps"] = group.get("steps", 0) + 1
        group["lr"] = 0.1 / group["steps"]


MAKES = {
    "adamw fused": lambda params: torch.optim.AdamW(params, 0.1, fused=True),
    "sgd fused": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9, fused=True),
    "adamw": lambda params: torch.optim.AdamW(params, 0.1, foreach=True),
    "own": lambda params: _OwnSGD(params, 0.1),
    "counting": lambda params: _Counting(params, 0.1),
}


def _state(model, optimizer):
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return copy.deepcopy([model.state_dict(), list(optimizer.state.values()), groups])


def _equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


def _run(make, bad_steps, *, free, limit=100):
    """Eight steps, of which some have a gradient that is not finite; the states after each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer, guard, states, skips, reads = make(list(model.parameters())), StepGuard(limit), [], [], []
    trainer = SimpleNamespace(precision_plugin=None, callbacks=[], is_global_zero=True, world_size=1)
    task = SimpleNamespace(trainer=trainer, current_epoch=0)
    trainer.datamodule, task.classifier = None, SimpleNamespace(model=model)
    for step in range(8):
        trainer.global_step = step

        def closure(step=step):
            optimizer.zero_grad()
            loss = model(torch.full((5, 3), float(step))).square().mean()
            loss.backward()
            if step in bad_steps:
                model[0].weight.grad[1, 1] = torch.inf
            guard.add(loss, None, step)
            guard.judge(
                optimizer, torch.nn.utils.get_total_norm(p.grad for p in model.parameters()), free=free
            )

        with CountReads() as mode:
            skips.append(guard.step(lambda closure=closure: optimizer.step(closure), task, optimizer))
        reads.append(mode.reads)
        states.append(_state(model, optimizer))
    guard.settle(task)
    return states, skips, guard, reads


@pytest.mark.parametrize("free", [True, False], ids=["read", "on the device"])
@pytest.mark.parametrize("make", MAKES.values(), ids=list(MAKES))
def test_a_skipped_step_changes_nothing_and_the_next_goes_on_as_if_it_had_not_been(make, free):
    states, skips, guard, _ = _run(make, {0, 3, 4}, free=free)
    assert [step for step, skipped in enumerate(skips) if skipped] == [0, 3, 4]
    assert guard.skipped == 3
    assert [row["step"] for row in guard.named] == [1, 4, 5]
    assert _equal(states[2], states[3])
    assert _equal(states[2], states[4])
    assert not _equal(states[4], states[5])
    reference = _run(make, {0, 3, 4}, free=True)[0]
    assert _equal(states[-1], reference[-1])


@pytest.mark.parametrize("name", ["adamw fused", "sgd fused", "own"])
def test_no_step_waits_for_the_device_but_the_one_that_makes_the_optimisers_state(name):
    _, skips, _, reads = _run(MAKES[name], {3}, free=False)
    assert [isinstance(skipped, bool) for skipped in skips] == [True] + 7 * [False]
    assert reads == [1] + 7 * [0]


def test_too_many_in_a_row_end_it_and_a_good_one_begins_to_count_anew():
    assert _run(MAKES["own"], {1, 2, 4, 5}, free=True, limit=3)[2].skipped == 4
    for free in (True, False):
        with pytest.raises(
            DivergedError, match=r"3 steps in a row .*max_skipped_steps 3\), up to step 4 of epoch 0.*batch 3"
        ):
            _run(MAKES["own"], {1, 2, 3, 4, 5}, free=free, limit=3)


class _Spoil(Callback):
    """Spoils the loss, or a gradient, of some steps, and sees whether they change anything."""

    def __init__(self, kind, steps):
        self.kind, self.steps, self.changed = kind, steps, []

    def _state(self, trainer, task):
        ema = {} if task.ema is None else task.ema.state_dict()
        return copy.deepcopy([task.classifier.state_dict(), ema, list(trainer.optimizers[0].state.values())])

    def on_train_start(self, trainer, pl_module):
        loss = pl_module.loss.forward
        factors = {"loss": torch.nan, "infinite loss": torch.inf}

        def forward(logits, targets):
            value = loss(logits, targets)
            if trainer.global_step not in self.steps:
                return value
            if self.kind == "loss alone":  # its gradient is finite
                return value + torch.nan
            return value * factors.get(self.kind, 1.0)

        pl_module.loss.forward = forward

    def on_after_backward(self, trainer, pl_module):
        if self.kind == "gradient" and trainer.global_step in self.steps:
            pl_module.classifier.model.head.weight.grad[0, 0] = torch.inf

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before, self.step = self._state(trainer, pl_module), trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > self.step and not _equal(self.before, self._state(trainer, pl_module)):
            self.changed.append(self.step)


@pytest.mark.parametrize(
    ("kind", "free", "name"),
    [
        ("loss", True, "adamw"),
        ("loss", False, "adamw"),
        ("infinite loss", False, "sgd"),
        ("loss alone", True, "sgd"),
        ("loss alone", False, "adamw"),
        ("gradient", False, "sgd"),
        ("gradient", True, "adamw"),
    ],
)
def test_a_run_skips_what_is_not_finite_counts_it_and_names_its_images(
    kind, free, name, image_root, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(guards, "reads_for_free", lambda task: free)
    spoil, optim = _Spoil(kind, {2, 6, 7}), {"name": name, "ema_decay": 0.5, "head_first_epochs": 1}
    trainer = {"callbacks": [spoil], "gradient_clip_val": None if kind == "loss" else 1.0}
    fit_tiny(image_root, tmp_path / "run", epochs=3, optim=optim, trainer=trainer)
    assert spoil.changed == [step for step in range(15) if step not in spoil.steps]
    rows = rows_of(tmp_path / "run")
    assert [row["train/skipped_steps"] for row in rows] == ["1", "2", ""]
    assert all("nan" not in row.values() for row in rows if row.pop("train/loss"))
    skipped = record_of(tmp_path / "run")["skipped_steps"]
    assert (skipped["count"], skipped["fault"]) == (3, None)
    assert [(row["epoch"], row["step"]) for row in skipped["steps"]] == [(0, 3), (1, 7), (1, 8)]
    assert {len(row["images"]) for row in skipped["steps"]} == {5}
    assert skipped["steps"][0]["images"][0].startswith(str(image_root / "train"))
    assert f"step 3 of epoch 0 is skipped: its loss or gradient is not finite: {image_root}" in caplog.text


@pytest.mark.parametrize("kind", ["accumulated", "fp16", "own"])
def test_a_step_of_several_batches_is_skipped_as_a_whole_and_so_are_those_of_a_scaler(
    kind, image_root, tmp_path, monkeypatch
):
    spoil, trainer, optim = _Spoil("loss", {1}), {}, {}
    if kind == "accumulated":
        trainer = {"accumulate_grad_batches": 2}
    elif kind == "fp16":
        trainer = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))]}
    else:
        monkeypatch.setitem(OPTIMIZERS, "mine", lambda groups, lr, **_: _OwnSGD(groups, lr))
        optim = {"name": "mine"}
    fit_tiny(image_root, tmp_path / "run", epochs=1, optim=optim, trainer={"callbacks": [spoil], **trainer})
    assert spoil.changed == [step for step in range(3 if kind == "accumulated" else 5) if step != 1]
    skipped = record_of(tmp_path / "run").get("skipped_steps")
    if kind == "fp16":  # by design: the scale goes down
        assert skipped is None
    else:
        assert len(skipped["steps"][0]["images"]) == (10 if kind == "accumulated" else 5)


def test_what_a_scaler_skips_counts_once_its_scale_is_at_its_floor(image_root, tmp_path):
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    spoil = _Spoil("loss", range(1, 100))
    trainer = {"callbacks": [spoil], "plugins": [plugin]}
    with pytest.raises(DivergedError, match=r"3 steps in a row .* up to step 6 of epoch 1"):
        fit_tiny(image_root, tmp_path / "run", optim={"max_skipped_steps": 3}, trainer=trainer)
    assert plugin.scaler.get_scale() < 1


class _Overflow(Callback):
    """From some step on a layer makes infinite numbers of the third image of each batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 8:
            layer = pl_module.classifier.model.blocks[1].mlp.fc1
            layer.register_forward_hook(lambda *args: args[2].index_fill(0, torch.tensor([2]), torch.inf))


def test_too_many_in_a_row_end_the_run_and_say_in_which_layer_and_for_which_images(image_root, tmp_path):
    with pytest.raises(DivergedError) as ending:
        fit_tiny(
            image_root,
            tmp_path / "run",
            epochs=4,
            optim={"max_skipped_steps": 2},
            trainer={"callbacks": [_Overflow()]},
        )
    message = str(ending.value)
    assert "2 steps in a row" in message
    assert "up to step 10 of epoch 1. First not finite: the output of blocks.1.mlp.fc1: " in message
    assert "/train/" in message
    assert ".png. Skipped steps changed no weight. Use a lower learning rate" in message
    record = record_of(tmp_path / "run")
    assert record["status"] == "diverged"
    assert record["skipped_steps"]["count"] == 2
    assert record["skipped_steps"]["fault"]["what"] == "the output of blocks.1.mlp.fc1"
    assert record["skipped_steps"]["fault"]["images"] == record["skipped_steps"]["steps"][1]["images"][2:3]
    assert len(rows_of(tmp_path / "run")) == 1  # the model of epoch 0 is kept
    assert all(value.isfinite().all() for value in load_file(tmp_path / "run/model.safetensors").values())


def test_a_run_that_ends_in_its_first_epoch_leaves_its_record(image_root, tmp_path):
    trainer = {"callbacks": [_Spoil("loss alone", range(100))]}
    with pytest.raises(
        DivergedError,
        match=r"no step of epoch 0 had a loss and a gradient that are finite\. First not finite: the loss \(",
    ):
        fit_tiny(image_root, tmp_path / "run", trainer=trainer)
    assert record_of(tmp_path / "run")["status"] == "diverged"
    assert not (tmp_path / "run/checkpoints").exists()


class _Nan(Callback):
    """The weights, or the logits of a validation, are NaN from that epoch on."""

    def __init__(self, epoch, what):
        self.epoch, self.what = epoch, what

    def on_validation_start(self, trainer, pl_module):
        if trainer.current_epoch >= self.epoch and self.what == "validation":
            pl_module.classifier.model.head.register_forward_hook(lambda *args: args[2] * torch.nan)

    def on_validation_end(self, trainer, pl_module):
        if trainer.current_epoch >= self.epoch and self.what == "weights":
            with torch.no_grad():
                pl_module.classifier.model.head.weight[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("validation", "the validation of epoch 1 has the loss nan. First not finite: the output of head: "),
        (
            "weights",
            "classifier.model.head.weight holds numbers that are not finite. Such a state is not saved",
        ),
    ],
)
@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_a_state_that_is_not_finite_is_neither_ranked_nor_saved(what, words, ema_decay, image_root, tmp_path):
    trainer = {"callbacks": [_Nan(1, what)]}
    if what == "validation" and ema_decay:
        return  # the average is finite, and goes on
    with pytest.raises(DivergedError, match=words):
        fit_tiny(image_root, tmp_path / "run", epochs=3, optim={"ema_decay": ema_decay}, trainer=trainer)
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert last["epoch"] == 0
    assert all(value.isfinite().all() for value in last["state_dict"].values())
    assert all(value.isfinite().all() for value in load_file(tmp_path / "run/model.safetensors").values())


def test_skips_in_a_row_are_counted_over_a_stop(image_root, tmp_path):
    run, optim = tmp_path / "run", {"max_skipped_steps": 4}
    trainer = {"callbacks": [_Spoil("loss", {3, 4}), StopAfter(1)]}
    fit_tiny(image_root, run, epochs=2, optim=optim, trainer=trainer)
    assert record_of(run)["skipped_steps"]["count"] == 2
    trainer = {"callbacks": [_Spoil("loss", {5, 6})]}
    with pytest.raises(DivergedError, match=r"4 steps in a row .* step 7 of epoch 1"):
        fit_tiny(image_root, run, epochs=2, optim=optim, trainer=trainer, resume=str(run))
    assert [row["step"] for row in record_of(run)["skipped_steps"]["steps"]] == [4, 5, 6, 7]


def test_a_search_for_the_learning_rate_may_find_one_that_is_too_high(image_root, tmp_path):
    finder = LearningRateFinder(min_lr=1e-4, max_lr=1e30, num_training_steps=12, early_stop_threshold=None)
    fit_tiny(image_root, tmp_path / "run", optim={"max_skipped_steps": 1}, trainer={"callbacks": [finder]})
    assert "skipped_steps" not in record_of(tmp_path / "run")


def test_a_loss_that_is_not_finite_in_one_process_is_a_gradient_that_is_not_in_all():
    model = VisionTransformer(preset_config("vit_pico_patch7_28", num_classes=2, depth=1))
    task = ClassificationTask(ImageClassifier(model, Preprocess((28, 28)), ["a", "b"]))
    optimizer = torch.optim.SGD(task.parameters(), 0.1)
    for mine, theirs, finite in ((1.0, 1.0, True), (torch.nan, 1.0, False), (1.0, torch.nan, False)):
        sent = []
        strategy = SimpleNamespace(
            reduce=lambda weight, reduce_op, sent=sent, theirs=theirs: sent.append(weight) or weight + theirs
        )
        task._trainer = SimpleNamespace(world_size=2, accumulate_grad_batches=1, strategy=strategy)
        task._batch_weight, task._step_weight = 4.0, 4.0
        task.guard.doubt = mine * torch.zeros(())
        for p in task.parameters():
            p.grad = torch.ones_like(p)
        task.on_before_optimizer_step(optimizer)
        assert {bool(p.grad.isfinite().all()) for p in task.parameters()} == {finite}
        assert len(sent) == 1  # no message more than before


def test_a_plain_trainer_skips_and_ends_too_and_names_batches_of_a_loader_that_is_not_ours():
    model = VisionTransformer(preset_config("vit_pico_patch7_28", num_classes=2, depth=1))
    classifier = ImageClassifier(model, Preprocess((28, 28)), ["a", "b"])
    images, targets = torch.zeros(12, 3, 28, 28, dtype=torch.uint8), torch.arange(12) % 2
    loader = DataLoader(TensorDataset(images, targets), batch_size=4)
    task = ClassificationTask(
        classifier,
        OptimOptions(lr=1e-3, max_skipped_steps=2),
        loss=lambda logits, classes: torch.nn.functional.cross_entropy(logits, classes) + torch.nan,
    )
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(DivergedError, match=r"the loss \(the logits are finite\): batch 1\. Skipped"):
        trainer.fit(task, loader, loader)
    assert task.guard.skipped == 2


def test_the_reason_of_an_end_is_said_also_where_the_step_cannot_be_computed_again(
    image_root, tmp_path, monkeypatch
):
    def fail(*args):
        raise RuntimeError("no memory is left")

    monkeypatch.setattr(diagnosis, "_fault_of_step", fail)
    trainer = {"callbacks": [_Spoil("loss", range(100))]}
    with pytest.raises(DivergedError, match=r"2 steps in a row .* of epoch 0\. The last of them was of: /"):
        fit_tiny(image_root, tmp_path / "run", optim={"max_skipped_steps": 2}, trainer=trainer)


@pytest.mark.parametrize("lr", ["1e30", "1e39"])
def test_a_rate_that_is_far_too_high_ends_with_one_paragraph_and_exit_code_1(
    lr, image_root, tmp_path, capsys
):
    run = tmp_path / "run"
    words = [*COMMAND, "--data.root", str(image_root), "--run_dir", str(run), "--optim.lr", lr]
    assert main(words) == 1
    message = capsys.readouterr().err
    assert (
        "vit-cls: training ended: the validation of epoch 0 has the loss nan. First not finite: the "
        in message
    )
    assert ("the weight" if lr == "1e39" else "/val/blue/0.png, ") in message
    assert record_of(run)["status"] == "diverged"

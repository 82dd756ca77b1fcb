"""The task in anybody's Trainer: what people who know Lightning expect of a LightningModule."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.tuner.tuning import Tuner
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassF1Score

import vit_cls
from tests.training.runs import TINY, StopAfter, same_weights
from vit_cls.data.mixing import MixOptions
from vit_cls.errors import ConfigError
from vit_cls.training.optim import warmup_steps
from vit_cls.training.options import OptimOptions
from vit_cls.training.task import Schedule
from vit_cls.weights.bundle import read_own_file

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    model = vit_cls.create_model("vit_pico_patch7_28", num_classes=3, **TINY)
    return vit_cls.ImageClassifier(model, class_names=["a", "b", "c"])


@pytest.fixture
def images():
    """21 images of three brightnesses, as pairs."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(21) % 3
    pixels = torch.randint(0, 60, (21, 3, 16, 16), generator=generator) + 90 * targets[:, None, None, None]
    return TensorDataset(pixels.to(torch.uint8), targets)


def _fit(task, loader, *, val=None, **settings):
    trainer = Trainer(**{**QUIET, "max_epochs": 2, **settings})
    trainer.fit(task, loader, val)
    return trainer


def test_two_calls_and_pairs_of_anybodys_loader_suffice(classifier, images):
    task = vit_cls.ClassificationTask(classifier)
    loader = DataLoader(images, batch_size=4)
    trainer = _fit(task, loader, val=loader, max_epochs=30)
    assert trainer.callback_metrics["val/acc1"] > 0.6
    (tested,) = trainer.test(task, loader, verbose=False)
    assert tested["test/acc1"] == trainer.callback_metrics["test/acc1"] > 0.6
    logits = torch.cat(trainer.predict(task, loader))
    assert logits.shape == (21, 3)
    task.eval()
    assert torch.allclose(task(images.tensors[0]), logits, atol=1e-5)
    (validated,) = trainer.validate(task, loader, verbose=False)
    assert (
        validated["val/acc1"] == tested["test/acc1"] == (logits.argmax(1) == images.tensors[1]).float().mean()
    )


def test_steps_epochs_and_accumulation_are_counted_from_the_trainer(classifier, images):
    optim = OptimOptions(lr=0.01, warmup_epochs=1)
    task = vit_cls.ClassificationTask(classifier, optim)
    rates = []

    class Watch(StopAfter):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    loader = DataLoader(images, batch_size=4)  # 6 batches, 3 steps an epoch
    trainer = _fit(task, loader, max_epochs=4, accumulate_grad_batches=2, callbacks=[Watch(4)])
    assert trainer.global_step == 12
    assert warmup_steps(optim, steps_per_epoch=3, total_steps=12) == 3
    assert max(rates) == pytest.approx(0.01) == rates[4]
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * optim.min_lr_ratio, rel=0.1)


def test_the_learning_rate_goes_by_the_images_of_a_step(classifier, images):
    task = vit_cls.ClassificationTask(classifier, OptimOptions(base_lr_per_256_images=1.0))
    trainer = _fit(task, DataLoader(images, batch_size=4), accumulate_grad_batches=2)
    assert trainer.lr_scheduler_configs[0].scheduler.base_lrs[0] == pytest.approx(8 / 256)
    endless = vit_cls.ClassificationTask(copy.deepcopy(classifier))
    with pytest.raises(ConfigError, match="give the Trainer max_epochs or max_steps"):
        _fit(endless, DataLoader(images, batch_size=4), max_epochs=-1)


def test_a_schedule_that_is_shorter_than_the_training_is_told(classifier, images, caplog):
    schedule = Schedule(steps_per_epoch=6, total_steps=6, lr=1e-3)
    with caplog.at_level(logging.WARNING, "vit_cls"):
        _fit(vit_cls.ClassificationTask(classifier, schedule=schedule), DataLoader(images, batch_size=4))
    assert "ends after 6 steps" in caplog.text
    assert "makes 12" in caplog.text


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sizes", [(7, 7, 7), (8, 8, 5), (4, 4, 4, 4, 4, 1)])
def test_accumulated_batches_step_by_the_mean_over_their_images(sizes, weighted, classifier, images):
    """Three batches a step: the same weights as those of one batch with all images of the step."""
    optim = OptimOptions(name="sgd", lr=0.1, beta1=0.0)
    weights = torch.tensor([1.0, 3.0, 0.2]) if weighted else None

    def trained(batches, accumulate):
        task = vit_cls.ClassificationTask(copy.deepcopy(classifier), optim, class_weights=weights)
        start = [sum(batches[:i]) for i in range(len(batches))]
        parts = [[*range(first, first + size)] for first, size in zip(start, batches, strict=True)]
        loader = DataLoader(images, batch_sampler=parts)
        _fit(task, loader, max_epochs=1, accumulate_grad_batches=accumulate, gradient_clip_val=0.5)
        return task.classifier.model.state_dict()

    merged = [sum(sizes[i : i + 3]) for i in range(0, len(sizes), 3)]
    few, whole = trained(list(sizes), 3), trained(merged, 1)
    assert all(torch.allclose(few[key], whole[key], atol=2e-6) for key in whole)
    assert not same_weights(whole, classifier.model.state_dict())


def test_the_last_step_of_an_epoch_counts_the_batches_that_it_has(classifier, images):
    optim = OptimOptions(name="sgd", lr=0.1, beta1=0.0, warmup_epochs=0)
    updates = {}
    for accumulate in (1, 4):  # one batch alone, of an epoch that has but one
        task = vit_cls.ClassificationTask(copy.deepcopy(classifier), optim)
        loader = DataLoader(images, batch_size=21)
        _fit(task, loader, max_epochs=1, accumulate_grad_batches=accumulate)
        updates[accumulate] = task.classifier.model.head.weight - classifier.model.head.weight
    assert torch.allclose(updates[4], updates[1], atol=1e-7)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_of_several_processes_are_weighed_by_their_images(accumulate, classifier):
    """DDP has made the mean over the processes; the other one had 3 images, and this one 5."""
    task = vit_cls.ClassificationTask(classifier)
    others = SimpleNamespace(reduce=lambda mine, reduce_op: mine + 3.0)
    task._trainer = SimpleNamespace(world_size=2, accumulate_grad_batches=accumulate, strategy=others)
    task._batch_weight, task._step_weight = 8.0, 5.0
    head = classifier.model.head
    head.weight.grad = torch.ones_like(head.weight)
    task.on_before_optimizer_step(torch.optim.SGD([head.weight, head.bias], lr=1.0))
    assert torch.allclose(head.weight.grad, torch.full_like(head.weight, 2 * accumulate * 8 / (5 + 3)))
    assert task._step_weight == 0.0


@pytest.mark.parametrize("which", ["raw", "ema"])
def test_a_checkpoint_of_anybodys_trainer_is_a_model_and_a_task(which, classifier, images, tmp_path):
    task = vit_cls.ClassificationTask(
        classifier, OptimOptions(lr=2e-3, ema_decay=0.5), mix=MixOptions(mixup_alpha=0.2), seed=4
    )
    loader = DataLoader(images, batch_size=4)
    trainer = _fit(task, loader, val=loader)
    task.kept = which  # as if the validation had found it better
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    again = vit_cls.ClassificationTask.load_from_checkpoint(tmp_path / "mine.ckpt")
    assert (again.optim, again.mix, again.seed, again.kept) == (task.optim, task.mix, 4, task.kept)
    assert same_weights(task.state_dict(), again.state_dict())
    assert again.classifier.class_names == ["a", "b", "c"]
    (tested,) = trainer.test(task, loader, verbose=False)
    assert not any("raw" in name or "ema" in name for name in tested)  # a test chooses nothing
    logits = {"raw": task, "ema": task.ema}[which](images.tensors[0])
    assert tested["test/loss"] == pytest.approx(F.cross_entropy(logits, images.tensors[1]).item(), rel=1e-5)
    kept = vit_cls.load(tmp_path / "mine.ckpt")
    pixels = images.tensors[0]
    task.eval()
    assert torch.equal(kept(pixels), task.kept_classifier(pixels))
    assert read_own_file(tmp_path / "mine.ckpt")[0]["kept"] == task.kept
    hyper = torch.load(tmp_path / "mine.ckpt", weights_only=True)["hyper_parameters"]
    assert (hyper["lr"], hyper["ema_decay"], hyper["mixup_alpha"], hyper["seed"]) == (2e-3, 0.5, 0.2, 4)


def test_own_loss_and_own_metric(classifier, images):
    calls = []

    def squared(logits, targets):
        calls.append(targets.shape)
        return (logits.softmax(dim=1) - F.one_hot(targets, 3)).square().sum(dim=1).mean()

    metrics = {"f1": MulticlassF1Score(3)}
    task = vit_cls.ClassificationTask(classifier, loss=squared, metrics=metrics)
    loader = DataLoader(images, batch_size=8)
    trainer = _fit(task, loader, val=loader)
    assert calls == [(8,), (8,), (5,)] * 2
    assert 0 <= trainer.callback_metrics["val/f1"] <= 1


def test_lightnings_search_for_a_learning_rate_finds_one(classifier, images, tmp_path):
    task = vit_cls.ClassificationTask(classifier)
    trainer = Trainer(**{**QUIET, "max_epochs": 20, "default_root_dir": tmp_path})
    loader = DataLoader(images, batch_size=4)
    found = Tuner(trainer).lr_find(task, loader, num_training=20)
    assert task.lr == found.suggestion() > 0
    trainer.fit(task, loader)
    assert trainer.lr_scheduler_configs[0].scheduler.base_lrs[0] == task.lr


@pytest.mark.parametrize(
    "batch", [torch.zeros(2, 3, 16, 16), {"image": 1}, (torch.zeros(2, 3, 16, 16), [0, 1])]
)
def test_other_batches_are_refused(batch, classifier):
    with pytest.raises(TypeError, match=r"a batch must be \(images, targets\)"):
        vit_cls.ClassificationTask(classifier).validation_step(batch, 0)


def test_a_model_without_a_head_is_refused():
    model = vit_cls.create_model("vit_pico_patch7_28", num_classes=0, **TINY)
    with pytest.raises(ConfigError, match="no head to train"):
        vit_cls.ClassificationTask(vit_cls.ImageClassifier(model))

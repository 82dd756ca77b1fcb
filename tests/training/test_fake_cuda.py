"""Counts and losses on a GPU that is not there: one device, one dtype, and no look from the host."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.fake_cuda import fake_cuda, moved
from vit_cls.data.dataset import Batch
from vit_cls.data.mixing import MixedTargets
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.presets import preset_config
from vit_cls.model.vit import VisionTransformer
from vit_cls.training.ema import Ema
from vit_cls.training.guards import LAG, StepGuard, clip_gradient
from vit_cls.training.losses import LOSSES, make_loss
from vit_cls.training.validation import Validation

CLASSES = 7


def _batch(device, dtype=torch.float32):
    return torch.empty(4, CLASSES, dtype=dtype, device=device), torch.zeros(
        4, dtype=torch.int64, device=device
    )


def test_a_validation_counts_where_the_logits_are_and_is_read_once(monkeypatch):
    validation = Validation(CLASSES, {})
    with fake_cuda(monkeypatch) as device:
        counts = moved(validation, device).counts
        for name in counts._defaults:  # states of torchmetrics are no buffers
            state = getattr(counts, name)
            setattr(counts, name, torch.empty(state.shape, dtype=state.dtype, device=device))
        for _ in range(2):
            validation.update(*_batch(device))
        values = counts.compute()
    assert values.keys() == {"loss", *counts.NAMES}
    assert {(value.device, value.dtype) for value in values.values()} == {(device, torch.float32)}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(LOSSES))
def test_every_loss_stays_on_its_device_with_mixed_targets_and_without(name, dtype, weighted, monkeypatch):
    loss = make_loss(name, label_smoothing=0.1, class_weights=torch.ones(CLASSES) if weighted else None)
    with fake_cuda(monkeypatch, "fp32" if dtype == torch.float32 else "bf16") as device:
        loss = moved(loss, device)
        logits, targets = _batch(device, dtype)
        mixed = MixedTargets(targets, targets, torch.empty(4, device=device))
        for wanted in (targets, mixed):
            value, weight = loss(logits, wanted), loss.weight(wanted)
            assert (value.shape, value.device) == ((), device)
            assert isinstance(weight, float) or weight.device == device


class _Event:
    """Of a stream that is not there; to wait for it would fail."""

    def record(self) -> None:
        """Nothing is before it."""


class _Fused(torch.optim.SGD):
    """Stands for the kernels, which know no tensors without memory."""

    _step_supports_amp_scaling = True

    def step(self, closure=None):
        """Has its flag."""
        assert self.found_inf.dtype == torch.float32


@pytest.mark.parametrize("takes_flag", [False, True])
def test_a_step_is_judged_skipped_and_averaged_where_it_is_computed(takes_flag, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    model = VisionTransformer(preset_config("vit_pico_patch7_28", num_classes=CLASSES, depth=1))
    classifier = ImageClassifier(model, Preprocess((28, 28)), [str(i) for i in range(CLASSES)])
    ema, guard = Ema(classifier), StepGuard(3)
    trainer = SimpleNamespace(precision_plugin=None, global_step=0, callbacks=[])
    task = SimpleNamespace(trainer=trainer, current_epoch=0)
    with fake_cuda(monkeypatch) as device:
        moved(classifier, device), moved(ema, device)
        optimizer = (_Fused if takes_flag else torch.optim.SGD)(model.parameters(), 0.1, momentum=0.9)
        for p in model.parameters():
            p.grad = torch.empty_like(p)
            optimizer.state[p] = {"momentum_buffer": torch.empty_like(p)}
        guard._with_state = len(list(model.parameters()))  # the step that made the state was read

        def update():
            guard.add(torch.empty((), device=device), Batch(None, None, torch.zeros(4, device=device), []), 0)
            guard.judge(optimizer, clip_gradient(optimizer, 1.0, None), free=False)
            assert takes_flag == hasattr(optimizer, "found_inf")
            optimizer.step()

        for _ in range(LAG):
            skipped = guard.step(update, task, optimizer)
            assert (skipped.device, skipped.dtype) == (device, torch.bool)
            ema.update(classifier, 0.9, skipped=skipped)
        assert not hasattr(optimizer, "found_inf")
    assert len(guard._waiting) == LAG  # none of them was looked at

"""Counts and losses on a GPU that is not there: one device, one dtype, and no look from the host."""

from __future__ import annotations

import pytest
import torch

from tests.fake_cuda import fake_cuda, moved
from vit_cls.data.mixing import MixedTargets
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

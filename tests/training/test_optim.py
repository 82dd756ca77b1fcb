"""Groups, learning rate and schedule."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from vit_cls import create_model
from vit_cls.errors import ConfigError
from vit_cls.training.optim import (
    lr_factor,
    make_optimizer,
    make_schedule,
    parameter_groups,
    peak_lr,
    warmup_steps,
)
from vit_cls.training.optimizers import OPTIMIZERS
from vit_cls.training.options import OptimOptions


def test_weight_decay_spares_what_timm_spares():
    theirs = timm.create_model("vit_tiny_patch16_224", reg_tokens=2, init_values=0.1, img_size=64)
    ours = create_model("vit_tiny_patch16_224", reg_tokens=2, init_values=0.1, img_size=64)
    names = {id(p): name for name, p in theirs.named_parameters()}
    groups = param_groups_weight_decay(theirs, 0.05, no_weight_decay_list=theirs.no_weight_decay())
    expected = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    names = {id(p): name for name, p in ours.named_parameters()}
    groups = parameter_groups(ours.named_parameters(), weight_decay=0.05)
    got = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert got == expected
    assert set(got.values()) == {0.0, 0.05}


def test_frozen_parameters_are_in_no_group():
    model = create_model("vit_pico_patch7_28", pos_embed="sincos2d")
    grouped = [
        p for group in parameter_groups(model.named_parameters(), weight_decay=0.1) for p in group["params"]
    ]
    assert all(p.requires_grad for p in grouped)
    assert len(grouped) == sum(1 for _ in model.parameters()) - 1


def test_schedule_rises_linearly_then_follows_a_half_cosine():
    factors = [lr_factor(s, warmup=10, total_steps=110, min_ratio=0.1) for s in range(111)]
    assert factors[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(factors[10:]))


def test_scheduler_sets_every_group_and_matches_torchs_cosine_without_warmup():
    options = OptimOptions(warmup_epochs=0, min_lr_ratio=0.0)
    model = nn.Linear(2, 2)
    ours = make_optimizer(model, options, lr=0.4, fused=False)
    schedule = make_schedule(ours, options, steps_per_epoch=5, total_steps=20)
    theirs = torch.optim.SGD(model.parameters(), lr=0.4)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=20)
    for _ in range(20):
        assert [g["lr"] for g in ours.param_groups] == pytest.approx([theirs.param_groups[0]["lr"]] * 2)
        ours.step()
        theirs.step()
        schedule.step()
        reference.step()


def test_default_warmup_is_a_tenth_of_the_run_and_five_epochs_at_most():
    options = OptimOptions()
    assert warmup_steps(options, steps_per_epoch=10, total_steps=200) == 20
    assert warmup_steps(options, steps_per_epoch=10, total_steps=3000) == 50
    assert warmup_steps(options, steps_per_epoch=1, total_steps=1) == 0
    assert warmup_steps(OptimOptions(warmup_epochs=2), steps_per_epoch=10, total_steps=200) == 20


def test_peak_learning_rate_scales_with_the_images_of_a_step_unless_given():
    assert peak_lr(OptimOptions(base_lr_per_256_images=1e-3), images_per_step=1024) == pytest.approx(4e-3)
    assert peak_lr(OptimOptions(base_lr_per_256_images=1e-3, lr=0.5), images_per_step=1024) == 0.5


def test_sgd_by_hand():
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    options = OptimOptions(name="sgd", beta1=0.5, weight_decay=0.1)
    optimizer = make_optimizer(layer, options, lr=0.2, fused=False)
    weight, momentum = 1.0, 0.0
    for gradient in (1.0, -2.0):
        layer.weight.grad = torch.tensor([[gradient]])
        optimizer.step()
        momentum = 0.5 * momentum + gradient + 0.1 * weight
        weight -= 0.2 * momentum
    assert layer.weight.item() == pytest.approx(weight)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fused_step_gives_the_reference_update(name, generator):
    start = torch.randn(6, 5, generator=generator)
    gradients = torch.randn(20, 6, 5, generator=generator)
    results = []
    for fused in (False, True):
        layer = nn.Linear(5, 6, bias=False)
        layer.weight.data.copy_(start)
        optimizer = make_optimizer(layer, OptimOptions(name=name), lr=0.01, fused=fused)
        for gradient in gradients:
            layer.weight.grad = gradient.clone()
            optimizer.step()
        results.append(layer.weight.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adam"}, "optim.name must be one of adamw, sgd; got 'adam'"),
        ({"lr": 0.0}, "optim.lr must be above 0; got 0.0"),
        ({"lr": math.nan}, "optim.lr must be above 0; got nan"),
        ({"base_lr_per_256_images": -1.0}, "optim.base_lr_per_256_images must be above 0"),
        ({"weight_decay": -0.1}, "optim.weight_decay must be at least 0; got -0.1"),
        ({"label_smoothing": 1.0}, r"optim.label_smoothing must be at least 0 and below 1; got 1.0"),
        ({"min_lr_ratio": 1.1}, r"optim.min_lr_ratio must be at least 0 and at most 1; got 1.1"),
        ({"beta2": 1.0}, r"optim.beta2 must be at least 0 and below 1"),
        ({"warmup_epochs": -1.0}, "optim.warmup_epochs must be at least 0"),
        ({"freeze": "encoder"}, "optim.freeze must be backbone or a number of blocks; got 'encoder'"),
        ({"freeze": -1}, "optim.freeze must be at least 0"),
        ({"freeze": "backbone", "head_first_epochs": 1}, "head_first_epochs has no effect with optim.freeze"),
        ({"layer_decay": "yes"}, "optim.layer_decay must be a number or auto; got 'yes'"),
        ({"layer_decay": 1.5}, "optim.layer_decay must be at most 1; got 1.5"),
        ({"layer_decay": 0.0}, "optim.layer_decay must be above 0"),
        ({"head_lr_ratio": 0.0}, "optim.head_lr_ratio must be above 0"),
        ({"head_first_epochs": -1}, "optim.head_first_epochs must be at least 0"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        OptimOptions(**settings)

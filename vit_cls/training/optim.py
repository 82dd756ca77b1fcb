"""Parameter groups, AdamW, and the warm-up and cosine schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from vit_cls.training.options import OptimOptions

NOT_DECAYED = ("cls_token", "reg_token", "pos_embed")
DEFAULT_WARMUP_EPOCHS = 5.0
DEFAULT_WARMUP_SHARE = 0.1


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float
) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: with weight decay and without.

    Args:
        named_parameters: Of the Vision Transformer.
        weight_decay: For the first group. Norms, biases, LayerScale (all one-dimensional), tokens and
            positions are in the second.

    Example:
        >>> from vit_cls.model.presets import create_model
        >>> groups = parameter_groups(create_model("vit_pico_patch7_28").named_parameters(), weight_decay=0.1)
        >>> [(group["weight_decay"], len(group["params"])) for group in groups]
        [(0.1, 18), (0.0, 38)]

    Source:
        timm's ``param_groups_weight_decay`` with ``no_weight_decay``.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in NOT_DECAYED
            (others if plain else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def peak_lr(options: OptimOptions, *, images_per_step: int) -> float:
    """The highest learning rate of the run.

    Args:
        options: Holds either the rate or its base for 256 images.
        images_per_step: Over all processes and accumulated batches.

    Example:
        >>> peak_lr(OptimOptions(base_lr_per_256_images=1e-3), images_per_step=128)
        0.0005
    """
    if options.lr is not None:
        return options.lr
    return options.base_lr_per_256_images * images_per_step / 256


def warmup_steps(options: OptimOptions, *, steps_per_epoch: int, total_steps: int) -> int:
    """Steps of linear warm-up, fewer than the steps of the run.

    Args:
        options: Holds ``warmup_epochs``, or None for a tenth of the run and 5 epochs at most.
        steps_per_epoch: Optimiser steps of one epoch.
        total_steps: Optimiser steps of the run.
    """
    if options.warmup_epochs is not None:
        wanted = options.warmup_epochs * steps_per_epoch
    else:
        wanted = min(DEFAULT_WARMUP_EPOCHS * steps_per_epoch, DEFAULT_WARMUP_SHARE * total_steps)
    return min(round(wanted), total_steps - 1)


def lr_factor(step: int, *, warmup: int, total_steps: int, min_ratio: float) -> float:
    """The learning rate over its peak, at one step.

    Args:
        step: Optimiser step, from 0.
        warmup: Steps that rise linearly to the peak.
        total_steps: Optimiser steps of the run.
        min_ratio: What the cosine ends at.

    Returns:
        A factor in [0, 1].

    Example:
        >>> [round(lr_factor(s, warmup=2, total_steps=5, min_ratio=0.0), 2) for s in range(5)]
        [0.5, 1.0, 1.0, 0.75, 0.25]
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, options: OptimOptions, *, lr: float, fused: bool) -> torch.optim.AdamW:
    """AdamW over the trainable parameters.

    Args:
        model: The Vision Transformer.
        options: Decay, betas and eps.
        lr: Peak learning rate.
        fused: Whether the update is one kernel.

    Source:
        https://arxiv.org/abs/1711.05101
    """
    groups = parameter_groups(model.named_parameters(), weight_decay=options.weight_decay)
    betas = (options.beta1, options.beta2)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=options.eps, fused=fused)


def make_schedule(
    optimizer: torch.optim.Optimizer, options: OptimOptions, *, steps_per_epoch: int, total_steps: int
) -> LambdaLR:
    """Warm-up and cosine, one call a step.

    Args:
        optimizer: Its groups hold the peak learning rate.
        options: Warm-up and last rate.
        steps_per_epoch: Optimiser steps of one epoch.
        total_steps: Optimiser steps of the run.

    Source:
        Cosine: SGDR, https://arxiv.org/abs/1608.03983, without restarts.
    """
    warmup = warmup_steps(options, steps_per_epoch=steps_per_epoch, total_steps=total_steps)

    def factor(step: int) -> float:
        return lr_factor(step, warmup=warmup, total_steps=total_steps, min_ratio=options.min_lr_ratio)

    return LambdaLR(optimizer, factor)

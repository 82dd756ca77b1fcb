"""What is trained and how fast: parameter groups, freezing, optimisers, the warm-up and cosine schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from vit_cls.errors import ConfigError
from vit_cls.model.token_model import TokenModel
from vit_cls.training.optimizers import OPTIMIZERS, Groups
from vit_cls.training.options import BACKBONE, OptimOptions

NOT_DECAYED = (
    "cls_token",
    "reg_token",
    "dist_token",
    "pos_embed",
    "latent",
    "query",
    "freqs",
    "relative_position_bias_table",
)
HEAD_MODULES = ("head", "head_dist", "attn_pool")
"""What reads the encoder's tokens: classifier, and a pooling with weights."""
_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
DEFAULT_WARMUP_EPOCHS = 5.0
DEFAULT_WARMUP_SHARE = 0.1


def is_head(name: str) -> bool:
    """Whether a parameter, by its name in ``named_parameters``, is of the head or a pooling with weights."""
    return name.split(".")[0] in HEAD_MODULES


def layer_of(name: str, depth: int) -> int:
    """The layer of a parameter, counted from the image: what layer decay and freezing go by.

    0 for patch embedding, tokens and positions; i + 1 for block i; ``depth + 1`` for what follows them.

    Example:
        >>> [layer_of(n, 12) for n in ("cls_token", "blocks.0.norm1.weight", "fc_norm.weight", "head.bias")]
        [0, 1, 13, 13]
    """
    if block := _BLOCK.search(name):
        return int(block[1]) + 1
    after = is_head(name) or name.split(".")[0] in ("norm", "fc_norm")
    return depth + 1 if after else 0


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    lr: float = 1.0,
    layer_decay: float = 1.0,
    head_lr_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """Trainable parameters in groups, last layer first, that share weight decay and learning rate.

    The learning rate of a layer is in its group's ``lr``, where every scheduler finds it; timm's
    ``lr_scale`` is honoured by timm's schedulers alone.

    Args:
        weight_decay: For weight matrices. Norms, biases, LayerScale (all one-dimensional), tokens, queries
            and positions are never decayed.
        lr: Peak learning rate of the last layer.
        layer_decay: Factor from each layer to the one below, in (0, 1].
        head_lr_ratio: Learning rate of head and pooling over that of the last layer.

    Source:
        timm's ``param_groups_weight_decay`` and ``param_groups_layer_decay`` with its ``group_matcher``.
        Layer decay: ELECTRA, https://arxiv.org/abs/2003.10555, BEiT, https://arxiv.org/abs/2106.08254.
    """
    members: dict[tuple[int, bool, bool], list[nn.Parameter]] = {}
    by_layer = layer_decay != 1.0
    named_parameters = list(named_parameters)
    depth = max(
        (int(block[1]) + 1 for name, _ in named_parameters if (block := _BLOCK.search(name))), default=0
    )
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in NOT_DECAYED
        layer = layer_of(name, depth) if by_layer else depth + 1
        head = is_head(name) and head_lr_ratio != 1.0
        members.setdefault((layer, head, plain), []).append(parameter)
    if not by_layer:  # both groups, one of them empty where everything else is frozen
        for plain in (False, True):
            members.setdefault((depth + 1, False, plain), [])
    groups = []
    for layer, head, plain in sorted(members, key=lambda key: (-key[0], key[1], key[2])):
        scale = layer_decay ** (depth + 1 - layer) * (head_lr_ratio if head else 1.0)
        place = "head " if head else f"{_layer_name(layer, depth)} " if by_layer else ""
        groups.append(
            {
                "params": members[layer, head, plain],
                "weight_decay": 0.0 if plain else weight_decay,
                "lr": lr * scale,
                "name": f"{place}{'not decayed' if plain else 'decayed'}",
            }
        )
    return groups


def _layer_name(layer: int, depth: int) -> str:
    return "embedding" if layer == 0 else "after blocks" if layer > depth else f"block {layer - 1}"


def lr_table(groups: Iterable[dict[str, Any]]) -> str:
    """The groups of `parameter_groups` for people: learning rate, weight decay, parameters."""
    rows = [group for group in groups if group["params"]]
    lines = [f"{'group':<26}{'peak lr':>12}{'decay':>8}{'parameters':>14}"]
    for group in rows:
        count = sum(p.numel() for p in group["params"])
        lines.append(f"{group['name']:<26}{group['lr']:>12.3g}{group['weight_decay']:>8g}{count:>14,}")
    return "\n".join(lines)


class Freezer:
    """Keeps part of a model frozen: ``backbone``, a number of blocks with the embedding below, or nothing.

    ConfigError if the model has fewer blocks, or nothing would be left to train.
    """

    def __init__(self, model: TokenModel, freeze: int | str | None) -> None:
        depth = model.config.depth
        if isinstance(freeze, int) and freeze > depth:
            raise ConfigError(
                f"optim.freeze is {freeze}, but the model has {depth} blocks. Use {BACKBONE} for all."
            )
        self.model = model
        self.base = freeze
        # Fixed positions are never trained, whatever is frozen.
        self._trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        if freeze == BACKBONE and not any(is_head(name) for name in self._trainable):
            raise ConfigError(
                "optim.freeze backbone leaves nothing to train: the model has no head. Set num_classes."
            )
        self.current = freeze
        self.set(freeze)

    def set(self, freeze: int | str | None) -> None:
        """Freeze that much, and thaw the rest."""
        self.current = freeze
        depth = self.model.config.depth
        trainable = set(self._trainable)
        for name, parameter in self.model.named_parameters():
            if name in trainable:
                parameter.requires_grad_(not _is_frozen(name, freeze, depth))
        self.model.train(self.model.training)
        self.set_eval()

    def set_eval(self) -> None:
        """Put the frozen parts in evaluation mode; after every call of ``train``."""
        freeze = self.current
        if freeze is None or not self.model.training:
            return
        for name, module in self.model.named_modules():
            if (
                name
                and not isinstance(module, nn.ModuleList)
                and _is_frozen(f"{name}.", freeze, self.model.config.depth)
            ):
                module.training = False


def _is_frozen(name: str, freeze: int | str | None, depth: int) -> bool:
    if freeze is None:
        return False
    if freeze == BACKBONE:
        return not is_head(name) and not name.startswith("head_drop")
    assert isinstance(freeze, int)
    return layer_of(name, depth) <= freeze and not name.startswith("head_drop")


def peak_lr(options: OptimOptions, *, images_per_step: int) -> float:
    """The highest learning rate of the run, by the images of a step over all processes and batches."""
    if options.lr is not None:
        return options.lr
    assert not isinstance(options.base_lr_per_256_images, str), "auto was not resolved"
    return options.base_lr_per_256_images * images_per_step / 256


def warmup_steps(options: OptimOptions, *, steps_per_epoch: int, total_steps: int) -> int:
    """Steps of linear warm-up, fewer than the run's; by default a tenth of it, and 5 epochs at most."""
    if options.warmup_epochs is not None:
        wanted = options.warmup_epochs * steps_per_epoch
    else:
        wanted = min(DEFAULT_WARMUP_EPOCHS * steps_per_epoch, DEFAULT_WARMUP_SHARE * total_steps)
    return min(round(wanted), total_steps - 1)


def lr_factor(step: int, *, warmup: int, total_steps: int, min_ratio: float) -> float:
    """The learning rate over its peak, at one step: a linear rise, then a cosine down to ``min_ratio``.

    Example:
        >>> [round(lr_factor(s, warmup=2, total_steps=5, min_ratio=0.0), 2) for s in range(5)]
        [0.5, 1.0, 1.0, 0.75, 0.25]
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(
    model: nn.Module, options: OptimOptions, *, lr: float, fused: bool
) -> torch.optim.Optimizer:
    """The optimiser that ``optim.name`` names, over the trainable parameters."""
    return OPTIMIZERS[options.name](
        optimizer_groups(model, options, lr=lr),
        lr=lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        fused=fused,
    )


def optimizer_groups(model: nn.Module, options: OptimOptions, *, lr: float) -> Groups:
    """The groups that `make_optimizer` optimises."""
    assert not isinstance(options.layer_decay, str), "auto was not resolved"
    return parameter_groups(
        model.named_parameters(),
        weight_decay=options.weight_decay,
        lr=lr,
        layer_decay=options.layer_decay,
        head_lr_ratio=options.head_lr_ratio,
    )


@dataclass(frozen=True)
class Schedule:
    """How long a run is, in optimiser steps, and its peak learning rate."""

    steps_per_epoch: int
    total_steps: int
    lr: float


def make_schedule(
    optimizer: torch.optim.Optimizer, options: OptimOptions, *, steps_per_epoch: int, total_steps: int
) -> LambdaLR:
    """Warm-up and cosine, one call a step; with ``head_first_epochs`` once for the head, then once for all.

    Source:
        Cosine: SGDR, https://arxiv.org/abs/1608.03983, without restarts.
    """
    first = options.head_first_epochs * steps_per_epoch
    warmup = warmup_steps(options, steps_per_epoch=steps_per_epoch, total_steps=total_steps - first)
    first_warmup = min(round(DEFAULT_WARMUP_SHARE * first), max(0, first - 1))

    def factor(step: int, peak: float) -> float:
        if step < first:
            own = lr_factor(step, warmup=first_warmup, total_steps=first, min_ratio=options.min_lr_ratio)
            return own * options.head_first_lr / peak
        rest = total_steps - first
        return lr_factor(step - first, warmup=warmup, total_steps=rest, min_ratio=options.min_lr_ratio)

    return LambdaLR(optimizer, [partial(factor, peak=group["lr"]) for group in optimizer.param_groups])

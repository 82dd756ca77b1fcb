"""Mixup, CutMix and random erasing of a whole batch on its device, after normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vit_cls.checks import check_range


class MixedTargets(NamedTuple):
    """Two classes an image, and how much of the first there is."""

    first: Tensor
    """int64, ``(batch,)``."""
    second: Tensor
    """int64, ``(batch,)``."""
    share: Tensor
    """Share of ``first``, float32 in [0, 1], ``(batch,)``; the rest is of ``second``."""


@dataclass(frozen=True)
class MixOptions:
    """How batches are mixed; all off by default.

    Args:
        mixup_alpha: Beta distribution of mixup's shares; 0 is off. 0.2 to 0.8 are usual.
        cutmix_alpha: Beta distribution of CutMix's areas; 0 is off. 1 is usual.
        mix_prob: Share of the images that are mixed at all, in [0, 1].
        erase_prob: Share of the images in which a rectangle is erased, in [0, 1].

    Raises:
        ConfigError: If a value is out of range.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    mix_prob: float = 1.0
    erase_prob: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            check_range(f"data.mix.{name}", getattr(self, name), at_least=0)
        for name in ("mix_prob", "erase_prob"):
            check_range(f"data.mix.{name}", getattr(self, name), at_least=0, at_most=1)

    @property
    def mixes(self) -> bool:
        """Whether any image gets a second class."""
        return self.mix_prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)


UNMIXED = MixOptions()
"""Batches stay as they are."""
ERASE_AREA = (0.02, 1 / 3)
"""Least and largest share of the image that is erased. Source: https://arxiv.org/abs/1708.04896, table 1."""
ERASE_RATIO = 3.3
"""Largest ratio of the sides of what is erased. Source: as above."""


def mix_batch(
    images: Tensor, targets: Tensor, options: MixOptions, *, key: int
) -> tuple[Tensor, MixedTargets]:
    """Mix each image with another of its batch, and erase rectangles, which become 0, the mean colour.

    Every image has draws of its own: its partner, mixup or CutMix, share or box. The draws are a function of
    ``key`` and the batch's size alone, made on the CPU, and cost no synchronisation. Any batch size will do;
    a batch of one is mixed with itself, which changes nothing.

    Args:
        images: Normalised floats, shape ``(batch, channels, height, width)``.
        targets: Classes, int64, shape ``(batch,)``.
        key: Seed of the draws, in [0, 2**63).

    Source:
        mixup, https://arxiv.org/abs/1710.09412; CutMix, https://arxiv.org/abs/1905.04899; erasing,
        https://arxiv.org/abs/1708.04896. timm draws once a batch and refuses odd batches.
    """
    generator = torch.Generator().manual_seed(key)
    size, (height, width) = len(images), images.shape[-2:]
    share = torch.ones(size)
    partner = torch.arange(size)
    if options.mixes:
        partner = torch.randperm(size, generator=generator)
        images, share = _mix(images, partner, options, generator)
    if options.erase_prob > 0:
        boxes = _erase_boxes(size, (height, width), options.erase_prob, generator)
        images = images.masked_fill(_inside(boxes, (height, width)).to(images.device, non_blocking=True), 0.0)
    second = targets[partner.to(targets.device, non_blocking=True)]
    return images, MixedTargets(targets, second, share.to(targets.device, non_blocking=True))


def _mix(
    images: Tensor, partner: Tensor, options: MixOptions, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    size, area = len(images), tuple(images.shape[-2:])
    both = options.mixup_alpha > 0 and options.cutmix_alpha > 0
    cut = torch.rand(size, generator=generator) < (0.5 if both else float(options.cutmix_alpha > 0))
    mixed = torch.rand(size, generator=generator) < options.mix_prob
    blend = torch.where(cut, 1.0, _beta(options.mixup_alpha, size, generator))
    boxes = _cut_boxes(1 - _beta(options.cutmix_alpha, size, generator), area, generator)
    boxes = torch.where((cut & mixed)[:, None], boxes, 0)
    blend = torch.where(mixed, blend, 1.0)
    cut_area = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]) / (area[0] * area[1])
    device = images.device
    others = images[partner.to(device, non_blocking=True)]
    if options.mixup_alpha > 0:
        weight = blend.to(device, images.dtype, non_blocking=True)[:, None, None, None]
        images = torch.lerp(others, images, weight)
    if options.cutmix_alpha > 0:
        images = torch.where(_inside(boxes, area).to(device, non_blocking=True), others, images)
    return images, torch.where(cut, 1 - cut_area, blend)


def _beta(alpha: float, size: int, generator: torch.Generator) -> Tensor:
    """Draws of Beta(alpha, alpha), by Jöhnk's method on logarithms; torch's own takes no generator."""
    if alpha <= 0:
        return torch.ones(size)
    draws = torch.zeros(size)
    todo = torch.ones(size, dtype=torch.bool)
    while todo.any():
        u, v = torch.rand(2, size, dtype=torch.float64, generator=generator).clamp_min(1e-300).log() / alpha
        total = torch.logaddexp(u, v)
        accepted = todo & (total <= 0)
        draws = torch.where(accepted, (u - total).exp().float(), draws)
        todo &= ~accepted
    return draws


def _cut_boxes(share: Tensor, area: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Boxes of about that share of the image around a random centre, cut off at its edge: (B, 4)."""
    height, width = area
    side = share.clamp(0, 1).sqrt()
    centre = torch.rand(2, len(share), generator=generator)
    edges = []
    for length, place in ((height, centre[0]), (width, centre[1])):
        half, middle = side * length / 2, place * length
        edges += [(middle - half).round().clamp(0, length), (middle + half).round().clamp(0, length)]
    return torch.stack(edges, dim=1)


def _erase_boxes(size: int, area: tuple[int, int], prob: float, generator: torch.Generator) -> Tensor:
    height, width = area
    share = torch.empty(size).uniform_(*ERASE_AREA, generator=generator)
    ratio = torch.empty(size).uniform_(-1, 1, generator=generator)
    ratio = torch.tensor(ERASE_RATIO).pow(ratio / 2)
    rows = (share.sqrt() * height * ratio).round().clamp(1, height)
    cols = (share.sqrt() * width / ratio).round().clamp(1, width)
    corner = torch.rand(2, size, generator=generator)
    top, left = (corner[0] * (height - rows)).round(), (corner[1] * (width - cols)).round()
    boxes = torch.stack([top, top + rows, left, left + cols], dim=1)
    erased = torch.rand(size, generator=generator) < prob
    return torch.where(erased[:, None], boxes, 0)


def _inside(boxes: Tensor, area: tuple[int, ...]) -> Tensor:
    """Which pixels lie in each box, shape ``(batch, 1, height, width)``."""
    rows, cols = torch.arange(area[0]), torch.arange(area[1])
    in_rows = (rows >= boxes[:, :1]) & (rows < boxes[:, 1:2])
    in_cols = (cols >= boxes[:, 2:3]) & (cols < boxes[:, 3:])
    return (in_rows[:, None, :, None]) & (in_cols[:, None, None, :])

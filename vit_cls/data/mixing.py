"""Mixup, CutMix and random erasing of a whole batch on its device, after normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
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
    ``key`` and the batch's size alone, made on the CPU and sent in one small tensor that nothing waits for.
    Any batch size will do; a batch of one is mixed with itself, which changes nothing.

    Args:
        images: Normalised floats, shape ``(batch, channels, height, width)``.
        targets: Classes, int64, shape ``(batch,)``.
        key: Seed of the draws, in [0, 2**63).

    Source:
        mixup, https://arxiv.org/abs/1710.09412; CutMix, https://arxiv.org/abs/1905.04899; erasing,
        https://arxiv.org/abs/1708.04896. timm draws once a batch and refuses odd batches.
    """
    draws = _draw(len(images), (images.shape[-2], images.shape[-1]), options, key)
    if images.is_cuda:
        draws = _pinned(draws)
    # One small copy: masks are B x H x W, and a copy from pageable memory waits for the device.
    draws = draws.to(images.device, non_blocking=True)
    partner, share, blend = draws[:, 0].long(), draws[:, 1], draws[:, 2]
    area = images.shape[-2:]
    if options.mixes:
        others = images[partner]
        if options.mixup_alpha > 0:
            images = torch.lerp(others, images, blend.to(images.dtype)[:, None, None, None])
        if options.cutmix_alpha > 0:
            images = torch.where(_inside(draws[:, 3:7], area), others, images)
    if options.erase_prob > 0:
        images = images.masked_fill(_inside(draws[:, 7:11], area), 0.0)
    return images, MixedTargets(targets, targets[partner], share)


def _pinned(draws: Tensor) -> Tensor:
    return draws.pin_memory() if torch.cuda.is_available() else draws  # a fake CUDA tensor needs no GPU


def _draw(size: int, area: tuple[int, int], options: MixOptions, key: int) -> Tensor:
    """All draws of a batch, float32, ``(batch, 11)``: partner, share, mixup's weight, and the edges (top,
    bottom, left, right) of what is cut and of what is erased, 0 for nothing.
    """
    generator, beta_generator = torch.Generator().manual_seed(key), np.random.default_rng(key)
    partner, share, blend = torch.arange(size), torch.ones(size), torch.ones(size)
    cut_boxes = erase_boxes = torch.zeros(size, 4)
    if options.mixes:
        partner = torch.randperm(size, generator=generator)
        both = options.mixup_alpha > 0 and options.cutmix_alpha > 0
        cut = torch.rand(size, generator=generator) < (0.5 if both else float(options.cutmix_alpha > 0))
        mixed = torch.rand(size, generator=generator) < options.mix_prob
        blend = torch.where(cut, 1.0, _beta(options.mixup_alpha, size, beta_generator))
        blend = torch.where(mixed, blend, 1.0)
        boxes = _cut_boxes(1 - _beta(options.cutmix_alpha, size, beta_generator), area, generator)
        cut_boxes = torch.where((cut & mixed)[:, None], boxes, 0)
        top, bottom, left, right = cut_boxes.unbind(1)
        share = torch.where(cut, 1 - (bottom - top) * (right - left) / (area[0] * area[1]), blend)
    if options.erase_prob > 0:
        erase_boxes = _erase_boxes(size, area, options.erase_prob, generator)
    # float32 holds whole numbers up to 2**24: no batch has more images, and no image a longer side
    return torch.cat([torch.stack([partner, share, blend], dim=1), cut_boxes, erase_boxes], dim=1)


def _beta(alpha: float, size: int, generator: np.random.Generator) -> Tensor:
    """Draws of Beta(alpha, alpha), by numpy: torch's take no generator."""
    if alpha <= 0:
        return torch.ones(size)
    return torch.from_numpy(generator.beta(alpha, alpha, size).astype(np.float32))


def _cut_boxes(share: Tensor, area: tuple[int, int], generator: torch.Generator) -> Tensor:
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
    """Which pixels lie in each box, shape ``(batch, 1, height, width)``, made on the device of the boxes."""
    rows, cols = (torch.arange(side, device=boxes.device) for side in area)
    in_rows = (rows >= boxes[:, :1]) & (rows < boxes[:, 1:2])
    in_cols = (cols >= boxes[:, 2:3]) & (cols < boxes[:, 3:])
    return (in_rows[:, None, :, None]) & (in_cols[:, None, None, :])

"""uint8 pixels to uint8 pixels of the model's size: random for training, fixed for evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from vit_cls.errors import ConfigError

Transform = Callable[[Tensor], Tensor]
Size = int | tuple[int, int]
CROP_MODES = ("center", "squash")
_GREY = [128, 128, 128]
"""What a turned or shifted image leaves empty."""


def eval_transform(
    size: Size,
    *,
    crop_pct: float = 0.9,
    crop_mode: str = "center",
    interpolation: str = "bicubic",
    exact: bool = False,
) -> Transform:
    """The fixed transform of validation, evaluation and prediction.

    Args:
        size: Side of the result in pixels, or its height and width.
        crop_pct: Side of the crop over the side of the resized image, in (0, 1].
        crop_mode: ``center`` resizes the shorter side and crops the centre; ``squash`` resizes both sides.
        interpolation: ``bicubic``, ``bilinear`` or ``nearest``; antialiased.
        exact: Whether the resize is Pillow's, pixel for pixel what timm's loader gives. The tensor resize is
            about twice as fast and differs by 2 grey levels at most.

    Returns:
        A function from uint8 ``(3, H, W)`` of any size to uint8 ``(3, size, size)``.

    Raises:
        ConfigError: If ``crop_mode`` is unknown.

    Example:
        >>> import torch
        >>> eval_transform(224)(torch.zeros(3, 300, 400, dtype=torch.uint8)).shape
        torch.Size([3, 224, 224])

    Source:
        timm's ``transforms_imagenet_eval``.
    """
    height, width = _pair(size)
    resized = (math.floor(height / crop_pct), math.floor(width / crop_pct))
    mode = InterpolationMode(interpolation)
    resize: Transform
    if crop_mode not in CROP_MODES:
        raise ConfigError(f"crop_mode must be one of {', '.join(CROP_MODES)}; got {crop_mode!r}.")
    if exact:
        return _PillowEval(resized, (height, width), crop_mode, mode)
    if crop_mode == "squash":
        resize = v2.Resize(resized, interpolation=mode, antialias=True)
    else:
        resize = _ResizeToCover(resized, mode)
    return v2.Compose([resize, v2.CenterCrop((height, width))])


class _PillowEval:
    """Resize and crop through Pillow. Source: timm's ``transforms_imagenet_eval``."""

    def __init__(
        self, resized: tuple[int, int], crop: tuple[int, int], crop_mode: str, mode: InterpolationMode
    ) -> None:
        square = resized[0] == resized[1] and crop_mode != "squash"
        self.target = [resized[0]] if square else list(resized)
        self.keep_aspect = crop_mode != "squash" and not square
        self.crop = crop
        self.mode = mode

    def __call__(self, image: Tensor) -> Tensor:
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        target = self.target
        if self.keep_aspect:  # to cover a rectangle
            scale = max(side / length for side, length in zip(target, image.shape[-2:], strict=True))
            target = [round(length * scale) for length in image.shape[-2:]]
        picture = F.center_crop(F.resize(picture, target, interpolation=self.mode), list(self.crop))
        return F.pil_to_tensor(picture)


class _ResizeToCover:
    """Resize with the aspect ratio kept, so that the image just covers ``size``; rounded as timm does."""

    MAX_LENGTH = 16
    """In sides of ``size``; what lies further out is cut off first. A line of pixels would need gigabytes."""

    def __init__(self, size: tuple[int, int], interpolation: InterpolationMode) -> None:
        self.size = size
        self.interpolation = interpolation

    def __call__(self, image: Tensor) -> Tensor:
        scale = max(side / length for side, length in zip(self.size, image.shape[-2:], strict=True))
        kept = []
        for side, length in zip(self.size, image.shape[-2:], strict=True):
            most = math.ceil(self.MAX_LENGTH * side / scale)
            kept.append(min(length, most + (length - most) % 2))  # an even number goes: the centre stays
        image = F.center_crop(image, kept)
        square = self.size[0] == self.size[1]
        target = [self.size[0]] if square else [round(length * scale) for length in kept]
        return F.resize(image, target, interpolation=self.interpolation, antialias=True)


def _crop_flip(size: tuple[int, int], interpolation: InterpolationMode) -> Transform:
    """Random resized crop and horizontal flip. Source: Inception, https://arxiv.org/abs/1409.4842."""
    crop = v2.RandomResizedCrop(size, interpolation=interpolation, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])


def _affine(size: tuple[int, int], interpolation: InterpolationMode) -> Transform:
    """Small turns, shifts and zooms, no flip: for digits, letters and signs that a flip would change."""
    resize = v2.Resize(size, interpolation=interpolation, antialias=True)
    affine = v2.RandomAffine(
        degrees=12,
        translate=(0.1, 0.1),
        scale=(0.85, 1.15),
        shear=8,
        interpolation=InterpolationMode.BILINEAR,
    )
    return v2.Compose([resize, affine])


def _randaugment(size: tuple[int, int], interpolation: InterpolationMode) -> Transform:
    """Crop, flip, and two random operations of strength 9. Source: https://arxiv.org/abs/1909.13719."""
    return v2.Compose([_crop_flip(size, interpolation), v2.RandAugment(num_ops=2, magnitude=9, fill=_GREY)])


def _trivialaugment(size: tuple[int, int], interpolation: InterpolationMode) -> Transform:
    """Crop, flip, and one random operation of random strength. Source: https://arxiv.org/abs/2103.10158."""
    return v2.Compose([_crop_flip(size, interpolation), v2.TrivialAugmentWide(fill=_GREY)])


def _none(size: tuple[int, int], interpolation: InterpolationMode) -> Transform:
    """No augmentation: both sides resized, nothing random."""
    return v2.Resize(size, interpolation=interpolation, antialias=True)


AUGMENTS: dict[str, Callable[[tuple[int, int], InterpolationMode], Transform]] = {
    "crop_flip": _crop_flip,
    "affine": _affine,
    "randaugment": _randaugment,
    "trivialaugment": _trivialaugment,
    "none": _none,
}


def train_transform(size: Size, *, augment: str = "crop_flip", interpolation: str = "bicubic") -> Transform:
    """The transform of training images; it draws from torch's global generator.

    Args:
        size: Side of the result in pixels, or its height and width.
        augment: A row of `AUGMENTS`: ``crop_flip``, ``affine``, ``randaugment``, ``trivialaugment`` or
            ``none``.
        interpolation: ``bicubic``, ``bilinear`` or ``nearest``; antialiased.

    Returns:
        A function from uint8 ``(3, H, W)`` of any size to uint8 ``(3, size, size)``.

    Raises:
        ConfigError: If ``augment`` is unknown.

    Example:
        >>> import torch
        >>> train_transform(96)(torch.zeros(3, 300, 400, dtype=torch.uint8)).shape
        torch.Size([3, 96, 96])
    """
    if augment not in AUGMENTS:
        raise ConfigError(f"data.augment must be one of {', '.join(AUGMENTS)}; got {augment!r}.")
    return AUGMENTS[augment](_pair(size), InterpolationMode(interpolation))


def keyed(transform: Transform, image: Tensor, key: int) -> Tensor:
    """Apply a random transform whose draws are a function of ``key`` alone.

    torch's CPU generator is set for the call and put back after it, so neither the worker nor the order
    of the images matters, and dropout's draws are not disturbed.

    Args:
        transform: A function that draws from torch's global generator.
        image: Its input.
        key: Seed of the draws, in [0, 2**63).

    Returns:
        What ``transform`` returns.
    """
    # torch.manual_seed would reset the generators of CUDA devices too.
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(key)
    try:
        return transform(image)
    finally:
        generator.set_state(state)


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])

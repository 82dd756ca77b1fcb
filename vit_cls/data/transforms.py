"""Files and pixels to uint8 pixels of the model's size: random for training, fixed for evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from vit_cls.checks import check_choice
from vit_cls.data.decode import BACKGROUND, decode_image
from vit_cls.errors import ConfigError
from vit_cls.own_code import HINT

Transform = Callable[[Tensor], Tensor]
Size = int | tuple[int, int]
CROP_MODES = ("center", "squash")
CHANNELS = (1, 3)
"""Grey and RGB: what images can be read as."""
MAX_LENGTH = 100
"""In sides of the target: what lies further out is cut off before an image is resized to cover the target. A
line of pixels would need gigabytes; and a photo is never that long, so that timm's rounding is kept."""
_GREY = 128
"""What a turned or shifted image leaves empty, in each channel."""


Resize = Callable[[Tensor, list[int], InterpolationMode], Tensor]


def _resize(image: Tensor, size: list[int], interpolation: InterpolationMode) -> Tensor:
    if image.stride(0) == 1:  # as it was decoded: rows of RGB, which torch resizes faster than three planes
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return F.resize(image, size, interpolation=interpolation, antialias=True)


def _resize_as_pillow(image: Tensor, size: list[int], interpolation: InterpolationMode) -> Tensor:
    picture = _picture(image)
    return F.pil_to_tensor(F.resize(picture, size, interpolation=interpolation))


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())


def _to_grey(image: Tensor) -> Tensor:
    """RGB, or grey already, to grey, ``(1, height, width)``: ITU-R 601 luma, to the bit Pillow's ``L``."""
    return image if len(image) == 1 else F.pil_to_tensor(_picture(image).convert("L"))


# The two transforms that every image goes through call functions: a chain of torchvision's transform objects
# does the same in 5 % more time, decoding included.
@dataclass(frozen=True)
class _Eval:
    """Resize and centre crop."""

    resize: Resize
    interpolation: InterpolationMode
    resized: tuple[int, int]
    crop: tuple[int, int]
    squash: bool

    def __call__(self, image: Tensor) -> Tensor:
        target = list(self.resized)
        if not self.squash:
            image, target = _to_cover(image, self.resized)
        return F.center_crop(self.resize(image, target, self.interpolation), list(self.crop))


def _to_cover(image: Tensor, size: tuple[int, int]) -> tuple[Tensor, list[int]]:
    """The image without its far ends, and what a resize must be told for it to just cover ``size``."""
    scale = max(side / length for side, length in zip(size, image.shape[-2:], strict=True))
    kept = []
    for side, length in zip(size, image.shape[-2:], strict=True):
        most = math.ceil(MAX_LENGTH * side / scale)
        kept.append(min(length, most + (length - most) % 2))  # an even number goes: the centre stays
    # Given the shorter side alone, torchvision rounds the longer one down, and so does timm for a square.
    target = [size[0]] if size[0] == size[1] else [round(length * scale) for length in kept]
    return F.center_crop(image, kept), target


class _CropFlip:
    """Random resized crop and horizontal flip. Source: Inception, https://arxiv.org/abs/1409.4842."""

    def __init__(self, size: tuple[int, int], interpolation: InterpolationMode) -> None:
        self.size = list(size)
        self.interpolation = interpolation
        self.draw = v2.RandomResizedCrop(size).make_params

    def __call__(self, image: Tensor) -> Tensor:
        box = self.draw([image])
        top, left = box["top"], box["left"]
        crop = image[:, top : top + box["height"], left : left + box["width"]]
        crop = _resize(crop, self.size, self.interpolation)
        return crop.flip(-1) if torch.rand(1) < 0.5 else crop


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
    return v2.Compose([_CropFlip(size, interpolation), v2.RandAugment(num_ops=2, magnitude=9, fill=_GREY)])


def _trivialaugment(size: tuple[int, int], interpolation: InterpolationMode) -> Transform:
    """Crop, flip, and one random operation of random strength. Source: https://arxiv.org/abs/2103.10158."""
    return v2.Compose([_CropFlip(size, interpolation), v2.TrivialAugmentWide(fill=_GREY)])


def _none(size: tuple[int, int], interpolation: InterpolationMode) -> Transform:
    """No augmentation: both sides resized, nothing random."""
    return v2.Resize(size, interpolation=interpolation, antialias=True)


Augmentation = Callable[[tuple[int, int], InterpolationMode], Transform]
"""From height and width in pixels, and the filter of resizes, to a training transform."""
AUGMENTS: dict[str, Augmentation] = {
    "crop_flip": _CropFlip,
    "affine": _affine,
    "randaugment": _randaugment,
    "trivialaugment": _trivialaugment,
    "none": _none,
}


def keyed(transform: Transform, image: Tensor, key: int) -> Tensor:
    """Apply a random transform whose draws are a function of ``key``, in [0, 2**63), alone.

    torch's CPU generator is set for the call and put back after it, so neither the worker nor the order of
    the images matters, and dropout's draws are not disturbed.
    """
    # torch.manual_seed would reset the generators of CUDA devices too.
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(key)
    try:
        return transform(image)
    finally:
        generator.set_state(state)


@dataclass(frozen=True)
class Reader:
    """One call from an image to uint8 pixels of the model's size.

    Args:
        size: Height and width of the result, in pixels.
        background: Colour under transparent pixels.
        description: All settings; readers that give the same pixels have the same.
        in_chans: Channels of the result: 3 is RGB, and 1 grey, which an image becomes before it is resized.
    """

    transform: Transform
    size: tuple[int, int]
    background: tuple[int, int, int]
    description: str
    in_chans: int = 3

    def __call__(self, data: bytes | Tensor, key: int | None = None) -> Tensor:
        """Decode and transform a file, or transform pixels, uint8 ``(3, height, width)``; ImageError if it is
        none.

        Args:
            key: Seed of the random draws, as for `keyed`; None draws from torch's global generator.
        """
        image = data if isinstance(data, Tensor) else decode_image(data, self.background)
        if self.in_chans == 1:
            image = _to_grey(image)
        return self.transform(image) if key is None else keyed(self.transform, image, key)


def eval_reader(
    size: Size,
    *,
    crop_pct: float = 0.9,
    crop_mode: str = "center",
    interpolation: str = "bicubic",
    exact: bool = False,
    background: tuple[int, int, int] = BACKGROUND,
    in_chans: int = 3,
) -> Reader:
    """The fixed pixels of validation, evaluation and prediction.

    Args:
        size: Side of the result in pixels, or its height and width.
        crop_pct: Side of the crop over the side of the resized image, in (0, 1].
        crop_mode: ``center`` resizes the shorter side and crops the centre; ``squash`` resizes both sides.
        interpolation: ``bicubic``, ``bilinear`` or ``nearest``; antialiased.
        exact: Whether the resize is Pillow's, pixel for pixel what timm's loader gives. The tensor resize is
            about three times as fast and differs by 2 grey levels at most.
        background: Colour under transparent pixels.
        in_chans: Channels of the result: 3 is RGB; 1 is grey, ITU-R 601 luma as Pillow's ``L``.

    Raises:
        ConfigError: If ``crop_mode`` is unknown, or there are other channels than 1 or 3.

    Example:
        >>> eval_reader(224)(torch.zeros(3, 300, 400, dtype=torch.uint8)).shape
        torch.Size([3, 224, 224])

    Source:
        timm's ``transforms_imagenet_eval``.
    """
    check_choice("crop_mode", crop_mode, CROP_MODES)
    height, width = _pair(size)
    resized = (math.floor(height / crop_pct), math.floor(width / crop_pct))
    resize = _resize_as_pillow if exact else _resize
    squash = crop_mode == "squash"
    transform = _Eval(resize, InterpolationMode(interpolation), resized, (height, width), squash)
    settings = {"crop_pct": crop_pct, "crop_mode": crop_mode, "interpolation": interpolation}
    words = ((height, width), sorted(settings.items()), background, *(["exact"] if exact else []))
    return _reader(transform, (height, width), background, words, in_chans)


def train_reader(
    size: Size,
    *,
    augment: str | Augmentation = "crop_flip",
    interpolation: str = "bicubic",
    background: tuple[int, int, int] = BACKGROUND,
    in_chans: int = 3,
) -> Reader:
    """The pixels of training, by a row of `AUGMENTS` or another; the rest are arguments of `eval_reader`.

    Raises:
        ConfigError: If ``augment`` is unknown, or there are other channels than 1 or 3.

    Example:
        >>> train_reader(96)(torch.zeros(3, 300, 400, dtype=torch.uint8), key=1).shape
        torch.Size([3, 96, 96])
    """
    if isinstance(augment, str):
        check_choice("data.augment", augment, AUGMENTS, hint=HINT)
    row = AUGMENTS[augment] if isinstance(augment, str) else augment
    transform = row(_pair(size), InterpolationMode(interpolation))
    words = (_pair(size), augment, interpolation, background)
    return _reader(transform, _pair(size), background, words, in_chans)


def _reader(
    transform: Transform,
    size: tuple[int, int],
    background: tuple[int, int, int],
    words: tuple[object, ...],
    in_chans: int,
) -> Reader:
    if in_chans not in CHANNELS:
        raise ConfigError(
            f"model.in_chans must be 3 (images are RGB) or 1 (they are made grey); got {in_chans}. For other "
            "models no images are read: call them with tensors of your own."
        )
    grey = () if in_chans == 3 else ("grey",)
    return Reader(transform, size, background, repr((*words, *grey)), in_chans)


def eval_transform(
    size: Size,
    *,
    crop_pct: float = 0.9,
    crop_mode: str = "center",
    interpolation: str = "bicubic",
    exact: bool = False,
) -> Transform:
    """What `eval_reader` does after decoding: uint8 ``(3, H, W)`` to uint8 ``(3, size, size)``."""
    return eval_reader(
        size, crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation, exact=exact
    ).transform


def train_transform(size: Size, *, augment: str = "crop_flip", interpolation: str = "bicubic") -> Transform:
    """What `train_reader` does after decoding; it draws from torch's global generator (see `keyed`)."""
    return train_reader(size, augment=augment, interpolation=interpolation).transform


class Preprocessing(Protocol):
    """The pixels that a model wants, in the words of `eval_reader`; its ``Preprocess`` is one."""

    @property
    def img_size(self) -> tuple[int, int]: ...  # height and width, in pixels
    @property
    def crop_pct(self) -> float: ...
    @property
    def crop_mode(self) -> str: ...
    @property
    def interpolation(self) -> str: ...
    @property
    def background(self) -> tuple[int, int, int]: ...
    @property
    def in_chans(self) -> int: ...  # 1 is grey, 3 RGB


def model_reader(
    preprocess: Preprocessing, *, exact: bool = False, augment: str | Augmentation | None = None
) -> Reader:
    """How images become the input of a model; whoever makes pixels for one asks here.

    A model of one channel gets grey: ITU-R 601 luma of the decoded RGB, to the bit Pillow's mode ``L``.

    Args:
        exact: As for `eval_reader`.
        augment: As for `train_reader`; None reads as for evaluation, with no random draws.

    Raises:
        ConfigError: If ``augment`` is unknown, or the model takes other channels than 1 or 3.
    """
    size, background, interpolation = preprocess.img_size, preprocess.background, preprocess.interpolation
    in_chans = preprocess.in_chans
    if augment is not None:
        return train_reader(
            size, augment=augment, interpolation=interpolation, background=background, in_chans=in_chans
        )
    return eval_reader(
        size,
        crop_pct=preprocess.crop_pct,
        crop_mode=preprocess.crop_mode,
        interpolation=interpolation,
        exact=exact,
        background=background,
        in_chans=in_chans,
    )


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])

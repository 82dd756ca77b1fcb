"""Augmentations of the user's own: any transform of uint8 images, known by name beside ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from vit_cls.data.transforms import AUGMENTS, Augmentation, Transform, eval_transform, keyed
from vit_cls.errors import ConfigError
from vit_cls.own_code import import_modules, imported, register


def register_augmentation(name: str, transform: Callable[..., Any]) -> None:
    """Make an augmentation of your own known by name, as ``data.augment``.

    Args:
        name: What will be written: small letters, digits and hyphens.
        transform: From a decoded image, uint8 ``(3, H, W)``, to one: a transform of torchvision's v2 or any
            function of one argument. Draws are to come from torch's global generator, which is set for each
            image. What comes out at another size than the model's input is resized to cover it, and cut at
            the centre. Or a function of two arguments, ``(height, width)`` of that input and the filter of
            resizes, that makes such a transform.

    Raises:
        ConfigError: If the name cannot be written, or is taken by another, or ``transform`` cannot be called
            with one or two arguments.

    Example:
        >>> from torchvision.transforms import v2
        >>> from vit_cls.data.transforms import train_reader
        >>> register_augmentation("upside-down", v2.RandomVerticalFlip())
        >>> train_reader(96, augment="upside-down")(torch.zeros(3, 300, 400, dtype=torch.uint8)).shape
        torch.Size([3, 96, 96])
        >>> _ = AUGMENTS.pop("upside-down")
    """
    register(AUGMENTS, "augmentation", name, augmentation_of(name, transform), transform)


def augmentation_of(name: str, transform: Callable[..., Any]) -> Augmentation:
    """A row for `AUGMENTS`, of a transform or of what makes one; see `register_augmentation`.

    Raises:
        ConfigError: If ``transform`` cannot be called with one or two arguments.
    """
    arguments = 1 if isinstance(transform, nn.Module) else _required(transform)
    if arguments not in (1, 2):
        raise ConfigError(
            f"the augmentation {name} must be a transform of an image, or a function of size and "
            f"interpolation that makes one; got {transform!r}."
        )
    make = transform if arguments == 2 else lambda size, interpolation: transform
    return partial(_Own, name, make)


def name_of(transform: Callable[..., Any]) -> str:
    """What a transform without a name is called in records: its settings, or where its code stands."""
    if isinstance(transform, nn.Module):
        return " ".join(repr(transform).split())
    module, name = (getattr(transform, key, None) for key in ("__module__", "__qualname__"))
    return f"{module}.{name}" if name else type(transform).__qualname__


def _required(function: object) -> int:
    """How many arguments a function needs; -1 for what cannot be called, and for a class of transforms."""
    if not callable(function) or (isinstance(function, type) and issubclass(function, nn.Module)):
        return -1
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a builtin that does not tell
        return 1
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = sum(p.default is p.empty for p in places)
    return needed or min(1, len(list(parameters)))


class _Own:
    """An augmentation of the user's, which is sent to a loading process by its name."""

    def __init__(
        self,
        name: str,
        make: Callable[[tuple[int, int], InterpolationMode], Transform],
        size: tuple[int, int],
        interpolation: InterpolationMode,
    ) -> None:
        self.name = name
        self.size = size
        self.interpolation = interpolation
        self.transform = make(size, interpolation)
        self.fit = eval_transform(size, crop_pct=1.0, interpolation=interpolation.value)
        self._try()

    def _try(self) -> None:
        """On grey pixels: a mistake is told before the first epoch, and not by a loading process."""
        height, width = (max(1024, 2 * side) for side in self.size)  # no crop is too large for it
        image = torch.full((3, height, width), 128, dtype=torch.uint8)
        try:
            pixels = keyed(self.transform, image, 0)
        except Exception as error:  # code of the user's may raise anything
            raise ConfigError(
                f"data.augment {self.name} fails on an image of {tuple(image.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(pixels, Tensor) or pixels.dtype != torch.uint8 or pixels.shape[:-2] != (3,):
            got = (
                f"{pixels.dtype} {tuple(pixels.shape)}"
                if isinstance(pixels, Tensor)
                else type(pixels).__name__
            )
            raise ConfigError(
                f"data.augment {self.name} must give a uint8 tensor of shape (3, height, width); got {got}. "
                "The classifier normalises pixels itself."
            )

    def __call__(self, image: Tensor) -> Tensor:
        image = self.transform(image)
        return image if tuple(image.shape[-2:]) == self.size else self.fit(image)

    def __reduce__(self) -> Any:
        """By name where a module of ``--import`` has it: what stands there need not be picklable."""
        if not imported() or self.name not in AUGMENTS:
            return super().__reduce__()
        return _made_again, (list(imported()), self.name, self.size, self.interpolation)


def _made_again(
    modules: list[str], name: str, size: tuple[int, int], interpolation: InterpolationMode
) -> Transform:
    import_modules(modules)
    return AUGMENTS[name](size, interpolation)

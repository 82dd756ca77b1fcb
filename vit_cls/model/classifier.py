"""uint8 images to logits: normalisation, the Vision Transformer and the class names in one object."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vit_cls.checks import check_choice, check_finite, check_range
from vit_cls.errors import ConfigError
from vit_cls.model.config import ViTConfig
from vit_cls.model.pooling import own_poolings
from vit_cls.model.token_model import TokenModel
from vit_cls.model.vit import VisionTransformer

CROP_MODES = ("center", "squash")
INTERPOLATIONS = ("bicubic", "bilinear", "nearest")


@dataclass(frozen=True)
class Preprocess:
    """What happens to an image between the file and the patch embedding; ConfigError if that is impossible.

    Args:
        img_size: Height and width that the model takes, in pixels.
        mean: Mean of each channel, for pixels scaled to [0, 1].
        std: Standard deviation of each channel, likewise.
        crop_pct: Side of the evaluation crop over the side of the resized image, in (0, 1].
        crop_mode: ``center`` keeps the aspect ratio and crops; ``squash`` resizes both sides.
        interpolation: Filter of the resize: ``bicubic``, ``bilinear`` or ``nearest``.
        background: Red, green and blue, from 0 to 255, of what shows through transparent pixels.

    Source:
        Fields and defaults (mean and std 0.5, crop 0.9, bicubic): timm's configurations of plain ViTs.
    """

    img_size: tuple[int, int]
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    crop_pct: float = 0.9
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    background: tuple[int, int, int] = (255, 255, 255)

    def __post_init__(self) -> None:
        for name in ("img_size", "mean", "std", "background"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_finite("", self)
        check_range("crop_pct", self.crop_pct, above=0, at_most=1)
        check_choice("crop_mode", self.crop_mode, CROP_MODES)
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        if len(self.background) != 3 or not all(0 <= value <= 255 for value in self.background):
            raise ConfigError(f"background must be three numbers from 0 to 255; got {self.background}.")
        finite = all(map(math.isfinite, (*self.mean, *self.std)))
        if len(self.mean) != len(self.std) or any(s <= 0 for s in self.std) or not finite:
            raise ConfigError(
                f"mean and std must have one value a channel, std above 0; got {self.mean} and {self.std}."
            )

    @property
    def in_chans(self) -> int:
        """Channels that the model takes."""
        return len(self.mean)

    @property
    def colour(self) -> str:
        """What the channels are, in words."""
        return "grey (ITU-R 601 luma of the decoded RGB)" if self.in_chans == 1 else "RGB"

    @classmethod
    def for_size(cls, img_size: tuple[int, int]) -> Preprocess:
        """The usual one for training from scratch; up to 64 pixels, and from 384, nothing is cropped."""
        whole = max(img_size) <= 64 or max(img_size) >= 384
        return cls(img_size, crop_pct=1.0 if whole else 0.9)

    def resized(self, img_size: tuple[int, int], in_chans: int) -> Preprocess:
        """The same for another size and number of channels: mean and std averaged for one, else repeated."""
        mean, std = self.mean, self.std
        if in_chans == 1:
            mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
        elif in_chans != len(mean):
            mean, std = (tuple(values[i % len(values)] for i in range(in_chans)) for values in (mean, std))
        return dataclasses.replace(self, img_size=img_size, mean=mean, std=std)


class ImageClassifier(nn.Module):
    """A Vision Transformer that owns its preprocessing and knows its classes by name.

    Args:
        model: Takes normalised floats; its head has one output a class.
        preprocess: How images become the model's input; None takes that of the model's weights, which
            `vit_cls.create_model` knows, or else the usual one for its size.
        class_names: One unique name for each output, in the order of the outputs; None names them
            ``output_0``, ``output_1``...
        temperature: What logits are divided by before they become probabilities; not 1 where it was fitted
            on validation images.

    Raises:
        ConfigError: If names, head and preprocessing do not fit together, or the temperature is not positive.

    Example:
        >>> import torch
        >>> from vit_cls.model.presets import preset_config
        >>> model = VisionTransformer(preset_config("vit_pico_patch7_28", num_classes=2))
        >>> classifier = ImageClassifier(model, Preprocess((28, 28)), ["cat", "dog"])
        >>> classifier(torch.zeros(4, 3, 28, 28, dtype=torch.uint8)).shape
        torch.Size([4, 2])
    """

    mean: Tensor
    std: Tensor
    weights_licence: str | None
    """Licence of the weights, or of those they were fine-tuned from."""
    weights_source: str | None
    """What the weights were fine-tuned from; None for fresh ones."""

    def __init__(
        self,
        model: TokenModel,
        preprocess: Preprocess | None = None,
        class_names: Sequence[str] | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        config = model.config
        if preprocess is None:
            preprocess = model.preprocess or Preprocess.for_size(config.image_hw)
            preprocess = preprocess.resized(config.image_hw, config.in_chans)
        if class_names is None:
            class_names = [f"output_{i}" for i in range(config.num_classes)]
        if len(set(class_names)) != len(class_names):
            repeated = sorted({name for name in class_names if list(class_names).count(name) > 1})
            raise ConfigError(f"class names must be unique; repeated: {', '.join(repeated)}.")
        if len(class_names) != config.num_classes:
            raise ConfigError(
                f"the head has {config.num_classes} outputs, but there are {len(class_names)} class names."
            )
        if preprocess.img_size != config.image_hw or preprocess.in_chans != config.in_chans:
            raise ConfigError(
                f"preprocessing makes {preprocess.in_chans} channels of {preprocess.img_size} pixels, but "
                f"the model takes {config.in_chans} of {config.image_hw}."
            )
        check_range("temperature", temperature, above=0, below=math.inf)
        self.model = model
        self.preprocess = preprocess
        self.class_names = list(class_names)
        self.temperature = float(temperature)
        self.weights_licence: str | None = model.weights_licence
        self.weights_source: str | None = model.weights_source
        # Not in the state dict: the metadata holds them exactly.
        shape = (1, config.in_chans, 1, 1)
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(shape), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """Pixels, uint8, shape ``(batch, channels, height, width)``, to the model's input.

        They are RGB, or grey where the model takes one channel.

        Returns:
            Floats in the model's dtype: pixels over 255, less the mean, over the standard deviation; to
            the bit what torchvision's ``ToTensor`` and ``Normalize`` give in float32.

        Raises:
            TypeError: If the images are not uint8: what they hold then is a guess, and a wrong guess is
                the field's commonest silent error.
        """
        if images.dtype != torch.uint8:
            raise TypeError(
                f"images must be uint8 in [0, 255]; got {images.dtype}. The classifier normalises them "
                "itself; call classifier.model for images that are normalised already."
            )
        return images.to(self.mean.dtype).div_(255).sub_(self.mean).div_(self.std)

    def forward(self, images: Tensor) -> Tensor:
        """Pixels as for `normalise` to logits, ``(batch, classes)``.

        Raises:
            TypeError: If the images are not uint8.
            ValueError: If their shape is not the model's.
        """
        return self.model(self.normalise(images))

    @property
    def calibrated(self) -> bool:
        """Whether a temperature was fitted on validation images."""
        return self.temperature != 1.0

    def probs(self, logits: Tensor) -> Tensor:
        """Logits (minus infinity rules a class out) to probabilities, by the temperature, in float64.

        Source:
            Temperature scaling: https://arxiv.org/abs/1706.04599.
        """
        return (logits.double() / self.temperature).softmax(dim=-1)

    def to_metadata(self) -> dict[str, Any]:
        """Everything but the weights, as plain data that JSON can hold."""
        own = own_poolings(self.model.config.pool)
        return {
            "architecture": self.model.config.to_dict(),
            "preprocess": dataclasses.asdict(self.preprocess),
            "class_names": self.class_names,
            "temperature": self.temperature,
            "weights_licence": self.weights_licence,
            "weights_source": self.weights_source,
            **({"own_poolings": own} if own else {}),
        }

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Any], build: Callable[[Mapping[str, Any]], TokenModel] | None = None
    ) -> ImageClassifier:
        """Rebuild a classifier, with fresh weights, from `to_metadata`.

        Args:
            build: Makes the model of an architecture; None makes native ones alone.

        Raises:
            ConfigError: If the data do not describe a classifier.
        """
        try:
            build = build or (lambda values: VisionTransformer(ViTConfig.from_dict(values)))
            model = build(metadata["architecture"])
            temperature = metadata.get("temperature", 1.0)
            classifier = cls(
                model, Preprocess(**metadata["preprocess"]), metadata["class_names"], temperature
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(f"the metadata do not describe a classifier: {error}.") from error
        classifier.weights_licence = metadata.get("weights_licence")
        classifier.weights_source = metadata.get("weights_source")
        return classifier

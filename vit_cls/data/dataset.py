"""(epoch, index) to a uint8 image and its target, and samples to batches; a file that fails is a row, too."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vit_cls.data.cache import PixelCache
from vit_cls.data.decode import BACKGROUND, read_image
from vit_cls.data.index import ImageIndex
from vit_cls.data.sampler import SampleKey, sample_seed
from vit_cls.data.transforms import Transform, keyed
from vit_cls.errors import ImageError


class Sample(NamedTuple):
    """One image, or the reason why there is none."""

    position: int
    """Index in the dataset."""
    image: Tensor | None
    """uint8, ``(3, H, W)``; None where the file could not be read."""
    target: int
    error: str | None


class Batch(NamedTuple):
    """The images of some samples, and the samples that have none."""

    images: Tensor
    """uint8, ``(batch, 3, H, W)``."""
    targets: Tensor
    """int64, ``(batch,)``."""
    indices: Tensor
    """Index of each image in its dataset, int64, ``(batch,)``."""
    failures: list[tuple[int, str]]
    """Index and reason of each sample whose file could not be read."""


def collate(samples: list[Sample]) -> Batch:
    """Stack the samples that have an image, and list those that have not.

    Args:
        samples: Samples of one size.
    """
    good = [sample for sample in samples if sample.image is not None]
    images = [sample.image for sample in good if sample.image is not None]
    return Batch(
        _stack(images) if images else torch.empty(0, dtype=torch.uint8),
        torch.tensor([sample.target for sample in good], dtype=torch.int64),
        torch.tensor([sample.position for sample in good], dtype=torch.int64),
        [(sample.position, sample.error or "") for sample in samples if sample.image is None],
    )


def _stack(images: list[Tensor]) -> Tensor:
    """One batch; images that are rows of RGB stay so, which spares turning each into three planes."""
    if any(image.stride(0) != 1 for image in images):
        return torch.stack(images)
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


class ImageSource(Protocol):
    """Where the pixels of an indexed image come from."""

    index: ImageIndex

    def read(self, index: int) -> Tensor:
        """Pixels of image ``index``, uint8 ``(3, H, W)``; ImageError or OSError where it cannot be read."""


class FolderSource:
    """Images that are files.

    Args:
        index: The files.
        background: Colour under transparent pixels.
    """

    def __init__(self, index: ImageIndex, background: tuple[int, int, int] = BACKGROUND) -> None:
        self.index = index
        self.background = background

    def read(self, index: int) -> Tensor:
        """See `ImageSource.read`."""
        return read_image(self.index.path(index), self.background)


class ArraySource:
    """Images that are in memory.

    Args:
        index: Names and labels.
        images: uint8, shape ``(images, 3, height, width)``, in the order of the index.
    """

    def __init__(self, index: ImageIndex, images: Tensor) -> None:
        self.index = index
        self.images = images

    def read(self, index: int) -> Tensor:
        """See `ImageSource.read`."""
        return self.images[index]


class ImageDataset(Dataset[Sample]):
    """Samples by (epoch, index).

    Args:
        source: The images.
        transform: From uint8 ``(3, H, W)`` of any size to the model's size.
        seed: Seed of the random transforms; None where ``transform`` draws nothing.
        cache: Keeps the pixels after a transform that draws nothing.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Transform,
        *,
        seed: int | None = None,
        cache: PixelCache | None = None,
    ) -> None:
        assert seed is None or cache is None, "random pixels are not to be kept"
        self.source = source
        self.transform = transform
        self.seed = seed
        self.cache = cache

    def __len__(self) -> int:
        return len(self.source.index)

    def __getitem__(self, key: SampleKey) -> Sample:
        epoch, index, *copy = key
        target = int(self.source.index.labels[index])
        kept = None if self.cache is None else self.cache.get(index)
        if kept is not None:
            return Sample(index, kept, target, None)
        try:
            image = self.source.read(index)
        except (ImageError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            return Sample(index, None, target, reason)
        if self.seed is None:
            image = self.transform(image)
            if self.cache is not None:
                self.cache.put(index, image)
            return Sample(index, image, target, None)
        draws = sample_seed(self.seed, epoch, index, *copy)
        return Sample(index, keyed(self.transform, image, draws), target, None)

"""Sources of images, samples of them, and samples to batches; a file that fails is a row, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vit_cls.data.cache import PixelCache
from vit_cls.data.decode import read_file
from vit_cls.data.index import ImageIndex
from vit_cls.data.sampler import SampleKey, sample_seed
from vit_cls.data.transforms import Reader
from vit_cls.errors import ImageError


class Sample(NamedTuple):
    """One image, or the reason why there is none."""

    position: int
    """Index in the dataset."""
    image: Tensor | None
    """uint8, ``(3, H, W)``, grey ``(1, H, W)``; None where the file could not be read."""
    target: int
    error: str | None


class Batch(NamedTuple):
    """The images of some samples, and the samples that have none."""

    images: Tensor
    """uint8, ``(batch, 3, H, W)``, grey ``(batch, 1, H, W)``."""
    targets: Tensor
    """int64, ``(batch,)``."""
    indices: Tensor
    """Index of each image in its dataset, int64, ``(batch,)``."""
    failures: list[tuple[int, str]]
    """Index and reason of each sample whose file could not be read."""


def collate(samples: list[Sample]) -> Batch:
    """Stack the samples that have an image, all of one size, and list those that have not."""
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


@runtime_checkable
class ImageSource(Protocol):
    """Where the images of an index come from; how a model wants them is not its matter."""

    index: ImageIndex

    def read(self, index: int) -> bytes | Tensor:
        """A file, or pixels, uint8 ``(3, H, W)``; ImageError or OSError where there are none."""


class FolderSource:
    """Images that are files."""

    def __init__(self, index: ImageIndex) -> None:
        self.index = index

    def read(self, index: int) -> bytes:
        """See `ImageSource.read`."""
        return read_file(self.index.path(index))


class ArraySource:
    """Images that are in memory, uint8, shape ``(images, 3, height, width)``, in the order of the index."""

    def __init__(self, index: ImageIndex, images: Tensor) -> None:
        self.index = index
        self.images = images

    def read(self, index: int) -> Tensor:
        """See `ImageSource.read`."""
        return self.images[index]


class ImageDataset(Dataset[Sample]):
    """Samples by (epoch, index); a seed is for a random reader, a cache for one that draws nothing."""

    def __init__(
        self,
        source: ImageSource,
        reader: Reader,
        *,
        seed: int | None = None,
        cache: PixelCache | None = None,
    ) -> None:
        assert seed is None or cache is None, "random pixels are not to be kept"
        self.source = source
        self.reader = reader
        self.seed = seed
        self.cache = cache

    def __len__(self) -> int:
        return len(self.source.index)

    def __getitem__(self, key: SampleKey) -> Sample:
        epoch, index, *copy = key
        target = int(self.source.index.labels[index])
        image = None if self.cache is None else self.cache.get(index)
        if image is not None:
            return Sample(index, image, target, None)
        draws = None if self.seed is None else sample_seed(self.seed, epoch, index, *copy)
        image, error = _read(lambda: self.reader(self.source.read(index), draws))
        if image is not None and self.cache is not None:
            self.cache.put(index, image)
        return Sample(index, image, target, error)

    def name_of(self, key: SampleKey) -> str:
        """The image of a key, as messages have it."""
        return str(self.source.index.path(key[1]))


class ItemDataset(Dataset[Sample]):
    """Samples by (place in the batch, item), a path or a position; it holds neither, so it is small.

    Args:
        name: Of an item, as messages have it.
    """

    def __init__(
        self,
        read: Callable[[Any], bytes | Tensor],
        reader: Reader,
        name: Callable[[Any], str | Path] = str,
    ) -> None:
        self.read = read
        self.reader = reader
        self.name = name

    def __getitem__(self, key: tuple[int, Any]) -> Sample:
        place, item = key
        image, error = _read(lambda: self.reader(self.read(item)))
        return Sample(place, image, 0, error)

    def name_of(self, key: tuple[int, Any]) -> str:
        """The image of a key, as messages have it."""
        return str(self.name(key[1]))


def read_path(path: str) -> bytes:
    """`read_file` for `ItemDataset`."""
    return read_file(Path(path))


def _read(image: Callable[[], Tensor]) -> tuple[Tensor | None, str | None]:
    """The pixels, or why there are none."""
    try:
        return image(), None
    except (ImageError, OSError) as error:
        return None, error.strerror if isinstance(error, OSError) and error.strerror else str(error)

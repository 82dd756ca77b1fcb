"""The order of samples as a function of (seed, epoch), and its batches: the same for any workers."""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from vit_cls.checks import check_range
from vit_cls.errors import ConfigError

SampleKey = tuple[int, int] | tuple[int, int, int]
"""(epoch, index), and the copy, from 0, where an image comes more than once in an epoch."""


def sample_seed(seed: int, epoch: int, index: int, copy: int = 0) -> int:
    """A well-mixed seed in [0, 2**63) for one sample in one epoch.

    Args:
        epoch: From 0; -1 for what belongs to no epoch.
        index: From 0; -1 for what belongs to the whole epoch.
    """
    words = (seed, epoch, index, copy) if copy else (seed, epoch, index)
    digest = hashlib.blake2b(struct.pack(f"<{len(words)}q", *words), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class EpochSampler(Sampler[SampleKey]):
    """Keys of one epoch's samples, for this process.

    Shuffled: a new permutation each epoch, the same for all processes, dealt out like cards; what does not go
    round evenly is left for another epoch, so that every process makes the same number of steps. Not
    shuffled: every sample exactly once over all processes, none twice.

    Args:
        order: The samples where they are not shuffled; None is their own order.
        weights: How often each sample is drawn, relative to the others; with replacement.
        repeats: Copies of an image that come together, each augmented on its own and, with several processes,
            in another one (https://arxiv.org/abs/1901.09335); an epoch then sees fewer images.

    Raises:
        ConfigError: If weights and repeats are both given, or repeats is below 1.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
        order: np.ndarray | None = None,
        weights: np.ndarray | None = None,
        repeats: int = 1,
    ) -> None:
        check_range("data.repeats", repeats, at_least=1)
        if weights is not None and repeats > 1:
            raise ConfigError("data.repeats cannot be combined with data.weights; leave one of them out.")
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.order = np.arange(num_samples) if order is None else order
        self.weights = None if weights is None else np.cumsum(weights, dtype=np.float64)
        self.repeats = repeats
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration is about; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self.shuffle:
            return self.num_samples // self.world_size
        return len(range(self.rank, self.num_samples, self.world_size))

    def _order(self) -> np.ndarray:
        """Indices of the whole epoch, for all processes."""
        if not self.shuffle:
            return self.order
        generator = np.random.default_rng(sample_seed(self.seed, self.epoch, -1))
        if self.weights is not None:
            draws = generator.random(self.num_samples) * self.weights[-1]
            return np.minimum(np.searchsorted(self.weights, draws, side="right"), self.num_samples - 1)
        order = generator.permutation(self.num_samples)
        return order if self.repeats == 1 else np.repeat(order, self.repeats)[: self.num_samples]

    def __iter__(self) -> Iterator[SampleKey]:
        epoch, order = self.epoch, self._order()
        mine = slice(self.rank, self.world_size * len(self), self.world_size)
        if self.weights is None and self.repeats == 1:
            for index in order[mine].tolist():
                yield epoch, index
            return
        for index, copy in zip(order[mine].tolist(), _copies(order)[mine].tolist(), strict=True):
            yield epoch, index, copy


GOLDEN_RATIO = (5**0.5 - 1) / 2
"""Its multiples, whole parts cut off, lie evenly in [0, 1) however many there are."""


def spread_order(labels: np.ndarray) -> np.ndarray:
    """Positions of all samples in an order whose first part, of any length, is a fair sample of the classes.

    Of a class of n samples a first part that is a share s of all holds n s, give or take one; which ones is
    spread over the class as evenly, and so is which classes, where there is not one sample for each.

    Args:
        labels: Class of each sample, from 0.
    """
    counts = np.bincount(labels)
    place = np.empty(len(counts), dtype=np.int64)
    place[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    starts = np.r_[0, np.cumsum(counts)[:-1]]
    by_class = np.argsort(labels, kind="stable")
    number = np.arange(len(labels)) - np.repeat(starts, counts)  # of each sample in its class
    spread = by_class[np.lexsort((number * GOLDEN_RATIO % 1, labels[by_class]))]
    turns = (number + np.repeat(place * GOLDEN_RATIO % 1, counts)) / np.repeat(counts, counts)
    return spread[np.argsort(turns, kind="stable")]


class EvenBatches(Sampler[list[SampleKey]]):
    """A sampler's keys, in its order, in as few batches as their largest size allows.

    The sizes differ by one at most, the larger ones first: no step is made of the few images that are left
    over, and a compiled model meets two shapes. One of several processes that has no image to validate has
    one empty batch, since it must validate with the others.

    Args:
        batch_size: Of the largest batch that there may be.
        begins: The epoch of the first iteration, and how many of its batches are done. Lightning tells the
            epoch too late for that one: loading processes have asked for batches by then.
    """

    def __init__(self, sampler: EpochSampler, batch_size: int, begins: tuple[int, int] = (0, 0)) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.begins = begins
        sampler.set_epoch(begins[0])

    def __len__(self) -> int:
        least = int(self.sampler.world_size > 1 and not self.sampler.shuffle)
        return max(least, math.ceil(len(self.sampler) / self.batch_size))

    def sizes(self) -> list[int]:
        """Keys of each batch."""
        keys, batches = len(self.sampler), len(self)
        return [keys // batches + (i < keys % batches) for i in range(batches)]

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, done = self.begins
        first = done if self.sampler.epoch == epoch else 0
        keys = iter(self.sampler)
        for number, size in enumerate(self.sizes()):
            batch = list(itertools.islice(keys, size))
            if number >= first:
                yield batch


LIMITS = {"val": "trainer.limit_val_batches", "test": "trainer.limit_test_batches"}
"""Lightning's options to score but some of the batches."""


def scored_images(
    images: int, batch_size: int, limit: float | None, world_size: int, stage: str = "val"
) -> int:
    """Images that are scored where Lightning takes but some of the batches; see `ImageDataModule`.

    Args:
        limit: A number of batches, or a share of them; None is all.
        stage: A key of `LIMITS`.

    Raises:
        ConfigError: If ``limit`` is a share that is less than one batch.
    """
    scored = 0
    for rank in range(world_size):
        sampler = EpochSampler(images, seed=0, shuffle=False, rank=rank, world_size=world_size)
        sizes = EvenBatches(sampler, batch_size).sizes()
        if limit is None or (isinstance(limit, float) and limit >= 1):
            taken = len(sizes)
        else:
            taken = limit if isinstance(limit, int) else int(len(sizes) * limit)
        if sizes and not taken and isinstance(limit, float) and limit > 0:
            raise ConfigError(
                f"{LIMITS[stage]} {limit:g} is less than one of the {len(sizes)} batches. "
                f"Give at least {1 / len(sizes):.2g}, a whole number of batches, or a smaller "
                "data.batch_size."
            )
        scored += sum(sizes[:taken])
    return scored


def _copies(order: np.ndarray) -> np.ndarray:
    """How often each element came before."""
    by_value = np.argsort(order, kind="stable")
    ordered = order[by_value]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    copies = np.empty(len(order), dtype=np.int64)
    copies[by_value] = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    return copies

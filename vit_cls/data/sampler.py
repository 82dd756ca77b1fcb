"""The order of samples as a function of (seed, epoch): the same for any number of workers."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

SampleKey = tuple[int, int]
"""(epoch, index): all a dataset needs, with its seed, to make a sample."""


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """A well-mixed seed for one sample in one epoch.

    Args:
        seed: Seed of the run.
        epoch: Epoch, from 0; -1 for what belongs to no epoch.
        index: Index of the sample, from 0; -1 for what belongs to the whole epoch.

    Returns:
        A number in [0, 2**63).

    Example:
        >>> sample_seed(0, 0, 0) == sample_seed(0, 0, 0) != sample_seed(0, 1, 0)
        True
    """
    digest = hashlib.blake2b(struct.pack("<qqq", seed, epoch, index), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class EpochSampler(Sampler[SampleKey]):
    """Keys of one epoch's samples, for this process.

    Shuffled: a new permutation each epoch, the same for all processes, dealt out like cards; what does not
    go round evenly is left for another epoch, so that every process makes the same number of steps.
    Not shuffled: every sample exactly once over all processes, none twice.

    Args:
        num_samples: Samples of the dataset.
        seed: Seed of the run.
        shuffle: Whether this is training.
        rank: This process, from 0.
        world_size: Processes.

    Example:
        >>> list(EpochSampler(3, seed=0, shuffle=False))
        [(0, 0), (0, 1), (0, 2)]
    """

    def __init__(
        self, num_samples: int, *, seed: int, shuffle: bool, rank: int = 0, world_size: int = 1
    ) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration is about; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self.shuffle:
            return self.num_samples // self.world_size
        return len(range(self.rank, self.num_samples, self.world_size))

    def __iter__(self) -> Iterator[SampleKey]:
        epoch = self.epoch
        order = np.arange(self.num_samples)
        if self.shuffle:
            order = np.random.default_rng(sample_seed(self.seed, epoch, -1)).permutation(self.num_samples)
        for index in order[self.rank :: self.world_size][: len(self)].tolist():
            yield epoch, index

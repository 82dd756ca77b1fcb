"""A DataLoader whose batches depend on its sampler alone, not on how many workers fill them."""

from __future__ import annotations

import os
import signal

import torch
from torch.utils.data import DataLoader

from vit_cls.data.dataset import Batch, ImageDataset, collate
from vit_cls.data.sampler import EpochSampler
from vit_cls.errors import ConfigError


def make_loader(
    dataset: ImageDataset,
    sampler: EpochSampler,
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Load the sampler's keys in its order; the last batch may be smaller.

    Args:
        dataset: Makes a sample from a key.
        sampler: Which keys, in which order.
        batch_size: Samples a batch.
        num_workers: Processes that make samples; 0 makes them in this one.
        pin_memory: Whether batches land in page-locked memory, for a faster copy to a GPU.

    Raises:
        ConfigError: If a number is out of range.
    """
    if batch_size < 1:
        raise ConfigError(f"data.batch_size must be at least 1; got {batch_size}.")
    if num_workers < 0:
        raise ConfigError(f"data.num_workers must not be negative; got {num_workers}.")
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # keys are (epoch, index)
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=_leave_interrupts_to_the_main_process,
        # The loader draws a base seed for each iterator. From the global generator that would move
        # dropout's draws, and differently for 0 workers and for many.
        generator=torch.Generator(),
    )


def default_num_workers() -> int:
    """Worker processes where the user gave no number: one a usable core, at most 8."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _leave_interrupts_to_the_main_process(worker_id: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

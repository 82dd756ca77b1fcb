"""Batches whose content depends on what is asked for alone, not on how many workers load it."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from vit_cls.checks import check_range
from vit_cls.data.dataset import (
    ArraySource,
    Batch,
    ImageDataset,
    ImageSource,
    ItemDataset,
    collate,
    read_path,
)
from vit_cls.data.sampler import EpochSampler, EvenBatches
from vit_cls.data.transforms import Reader
from vit_cls.environment import cpu_count
from vit_cls.errors import RunError
from vit_cls.signals import leave_signals_to_parent

Images = ImageSource | Iterable[str | os.PathLike[str]]
"""What can be loaded once, in order: the images of an index, or any number of paths."""


def make_loader(
    dataset: ImageDataset,
    sampler: EpochSampler,
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Load the sampler's keys in its order, epoch after epoch, in batches of almost one size (`EvenBatches`).

    Args:
        batch_size: Of the largest batch; ``loader.batch_sampler.batch_size`` keeps it.

    Raises:
        ConfigError: If a number is out of range.
    """
    check_range("data.batch_size", batch_size, at_least=1)
    check_range("data.num_workers", num_workers, at_least=0)
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # keys are (epoch, index)
        batch_sampler=EvenBatches(sampler, batch_size),
        persistent_workers=num_workers > 0,
        **_settings(num_workers, pin_memory),
    )


def load_once(
    images: Images,
    reader: Reader,
    *,
    batch_size: int,
    num_workers: int | None = None,
    pin_memory: bool = False,
) -> Iterator[tuple[list[Any], Batch]]:
    """Load images once, in their order, in constant memory.

    Args:
        images: An index's, or paths; an endless source of them will do. It is read a few batches ahead.
        num_workers: None means one a core, at most 8, and none for images in memory or for no more than one
            batch.

    Yields:
        What was asked for, positions or paths, and the batch, whose ``indices`` are places in that list.

    Raises:
        RunError: If a loading process dies.
    """
    items: Iterator[Any]
    if isinstance(images, ImageSource):
        items, dataset = iter(range(len(images.index))), ItemDataset(images.read, reader)
        num_workers = 0 if num_workers is None and isinstance(images, ArraySource) else num_workers
    else:
        items, dataset = (os.fspath(path) for path in images), ItemDataset(read_path, reader)
    if num_workers is None:
        first = list(itertools.islice(items, batch_size + 1))
        num_workers = default_num_workers() if len(first) > batch_size else 0  # they take longer to start
        items = itertools.chain(first, items)
    pending: deque[list[Any]] = deque()

    def keys() -> Iterator[list[tuple[int, Any]]]:
        while part := list(itertools.islice(items, batch_size)):
            pending.append(part)
            yield list(enumerate(part))

    loader: DataLoader[Batch] = DataLoader(
        dataset,  # type: ignore[arg-type]  # keys are (place, item)
        batch_sampler=keys(),
        **_settings(num_workers, pin_memory),
    )
    for batch in _named_crashes(loader):
        yield pending.popleft(), batch


def _settings(num_workers: int, pin_memory: bool) -> dict[str, Any]:
    return {
        "num_workers": num_workers,
        "pin_memory": pin_memory,
        "collate_fn": collate,
        "worker_init_fn": leave_signals_to_parent,
        # The loader draws a base seed for each iterator. From the global generator that would move
        # dropout's draws, and differently for 0 workers and for many.
        "generator": torch.Generator(),
    }


def _named_crashes(loader: Iterable[Batch]) -> Iterator[Batch]:
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RunError(
                f"a loading process died ({str(error).splitlines()[0]}), of a fault in a decoder or for want "
                "of memory. Use fewer --num_workers, or 0."
            ) from error
        yield batch


def default_num_workers() -> int:
    """Worker processes where the user gave no number: one a usable core, at most 8."""
    return min(8, cpu_count())

"""Batches whose content depends on what is asked for alone, not on how many workers load it."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import multiprocessing.queues
import os
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch

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
from vit_cls.data.watch import NOT_HANDED_OVER, WatchedLoader
from vit_cls.environment import cpu_count, free_shared_memory, shared_memory
from vit_cls.signals import leave_signals_to_parent

log = logging.getLogger("vit_cls")

Images = ImageSource | Iterable[str | os.PathLike[str]]
"""What can be loaded once, in order: the images of an index, or any number of paths."""

ROOM_FROM = 4
"""Cores from which on one is kept free of loading."""
TIMEOUT_SECONDS = 300.0
"""How long no loading process may give a batch before a run ends."""
PREFETCH = 2
"""Batches that each loading process has under way, where the shared memory holds them."""
IN_USE = 2
"""Batches of a loader that are with the main process: the one in use, and the one before on its way out."""
PAGE = 4096


def make_loader(
    dataset: ImageDataset,
    sampler: EpochSampler,
    *,
    batch_size: int,
    num_workers: int | None,
    pin_memory: bool = False,
    even: bool = True,
    timeout_seconds: float = TIMEOUT_SECONDS,
    loaders: int = 1,
    local_processes: int = 1,
    begins: tuple[int, int] = (0, 0),
) -> WatchedLoader:
    """Load the sampler's keys in its order, epoch after epoch, in batches of almost one size (`EvenBatches`).

    Args:
        batch_size: Of the largest batch; ``loader.batch_sampler.batch_size`` keeps it.
        num_workers: None means `default_num_workers`, no more than batches, and none for images in memory.
        even: False makes torch's own batches, the last one smaller: Lightning's ``predict`` takes no others.
        timeout_seconds: How long no loading process may give a batch; 0 is for ever.
        loaders: Of this size that each process of the run has at the same time.
        local_processes: Processes of the run on this machine.
        begins: See `EvenBatches`.

    Raises:
        ConfigError: If a number is out of range.
    """
    check_range("data.batch_size", batch_size, at_least=1)
    check_range("data.num_workers", num_workers, at_least=0)
    check_range("data.timeout_seconds", timeout_seconds, at_least=0)
    batches: dict[str, Any] = {"batch_sampler": EvenBatches(sampler, batch_size, begins)}
    if not even:
        batches = {"sampler": sampler, "batch_size": batch_size}
    if num_workers is None:
        in_memory, most = isinstance(dataset.source, ArraySource), math.ceil(len(sampler) / batch_size)
        num_workers = 0 if in_memory else min(most, default_num_workers(local_processes))
    sharing = loaders * local_processes
    settings = _settings(
        dataset.reader, batch_size, num_workers, pin_memory, timeout_seconds, sharing, "data."
    )
    return WatchedLoader(
        dataset,
        **batches,
        persistent_workers=settings["num_workers"] > 0,
        **settings,
    )


def load_once(
    images: Images,
    reader: Reader,
    *,
    batch_size: int,
    num_workers: int | None = None,
    pin_memory: bool = False,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Iterator[tuple[list[Any], Batch]]:
    """Load images once, in their order, in constant memory.

    Args:
        images: An index's, or paths; an endless source of them will do. It is read a few batches ahead.
        num_workers: None means `default_num_workers`, no more than there are batches, and none for images in
            memory or for no more than one batch.
        timeout_seconds: As for `make_loader`.

    Yields:
        What was asked for, positions or paths, and the batch, whose ``indices`` are places in that list.

    Raises:
        RunError: If a loading process dies, or none gives a batch for so long.
    """
    items: Iterator[Any]
    if isinstance(images, ImageSource):
        items = iter(range(len(images.index)))
        dataset = ItemDataset(images.read, reader, images.index.path)
        num_workers = 0 if num_workers is None and isinstance(images, ArraySource) else num_workers
    else:
        items, dataset = (os.fspath(path) for path in images), ItemDataset(read_path, reader)
    if num_workers is None:
        num_workers = default_num_workers()
        first = list(itertools.islice(items, batch_size * num_workers + 1))
        # No more than batches, and none for a single one: they take longer to start.
        num_workers = min(num_workers, math.ceil(len(first) / batch_size)) if len(first) > batch_size else 0
        items = itertools.chain(first, items)
    pending: deque[list[Any]] = deque()

    def keys() -> Iterator[list[tuple[int, Any]]]:
        while part := list(itertools.islice(items, batch_size)):
            pending.append(part)
            yield list(enumerate(part))

    loader = WatchedLoader(
        dataset,
        batch_sampler=keys(),
        **_settings(reader, batch_size, num_workers, pin_memory, timeout_seconds, 1, "--"),
    )
    loader.prefix = "--"
    for batch in loader:
        yield pending.popleft(), batch


def _settings(
    reader: Reader,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    timeout_seconds: float,
    sharing: int,
    prefix: str,
) -> dict[str, Any]:
    batch_bytes = batch_size * reader.in_chans * math.prod(reader.size)
    num_workers, prefetch = _that_fit(num_workers, batch_bytes, sharing, f"{prefix}num_workers")
    return {
        "num_workers": num_workers,
        "prefetch_factor": prefetch if num_workers else None,
        "timeout": timeout_seconds if num_workers else 0,
        "pin_memory": pin_memory,
        "collate_fn": collate,
        "worker_init_fn": _begin_worker,
        # The loader draws a base seed for each iterator. From the global generator that would move
        # dropout's draws, and differently for 0 workers and for many.
        "generator": torch.Generator(),
    }


def _that_fit(num_workers: int, batch_bytes: int, sharing: int, option: str) -> tuple[int, int]:
    """Loading processes, and batches ahead for each, as far as the free shared memory holds them; says so.

    A batch too many would be waited for in vain. Fewer processes change no batch.
    """
    free = free_shared_memory()
    size = batch_bytes + 4 * PAGE  # its pixels, its classes and places, and the locks of a process

    def needed(workers: int, prefetch: int) -> int:
        return sharing * (workers * prefetch + IN_USE) * size

    if free is None or not num_workers or needed(num_workers, PREFETCH) <= free:
        return num_workers, PREFETCH
    workers = next((n for n in range(num_workers, 0, -1) if needed(n, 1) <= free), 0)
    _say_once(
        f"{option} {num_workers} takes {needed(num_workers, PREFETCH) / 2**20:,.1f} MB of shared memory, "
        f"{PREFETCH} batches of {size / 2**20:,.1f} MB ahead each, and {shared_memory()}: "
        + (f"{workers} load 1 batch ahead each" if workers else "the main process loads")
        + "; a container gets more by --shm-size 1g"
    )
    return workers, 1


@functools.lru_cache(maxsize=8)
def _say_once(text: str) -> None:
    """The loaders of a run say the same."""
    log.info(text)


def _begin_worker(worker_id: int) -> None:
    """In each loading process: a batch that cannot be handed over, for want of shared memory, ends it.

    Python would print a traceback and drop the batch, for which the main process then waits for ever.
    """
    leave_signals_to_parent()
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(  # type: ignore[attr-defined]
        lambda error, batch: os._exit(NOT_HANDED_OVER)
    )


def default_num_workers(local_processes: int | None = None) -> int:
    """Loading processes where the user gave no number: this process's share of the usable cores.

    From `ROOM_FROM` cores on, one is left to the process itself, which feeds the device.

    Args:
        local_processes: Processes of the run on this machine; None means what ``torchrun`` says, or one.
    """
    cores = cpu_count() // _sharing(local_processes)
    return max(1, cores - 1 if cores >= ROOM_FROM else cores)


def loading_advice(num_workers: int, batches: int, local_processes: int = 1) -> str:
    """What makes loading faster, with the numbers of this machine.

    Args:
        num_workers: Loading processes of the run.
        batches: Of an epoch, for each process: more loading processes would have nothing to do.
        local_processes: As for `default_num_workers`.
    """
    usable, machine, sharing = cpu_count(), os.cpu_count() or 1, _sharing(local_processes)
    cores = f"{usable} core{'s' if usable > 1 else ''}"
    where = f"this process may use {cores}" if sharing == 1 else f"{sharing} processes share {cores}"
    if num_workers < min(default_num_workers(local_processes), batches):
        return f"raise data.num_workers (now {num_workers}; {where})"
    more = f", or let it use more of the machine's {machine} cores" if machine > usable else ""
    return (
        f"data.num_workers is {num_workers} and {where}, so more will hardly help: make the images smaller "
        f"once (their shorter side near the model's input){more}"
    )


def _sharing(local_processes: int | None) -> int:
    """How many processes of a run share the cores that this one may use."""
    if local_processes is None:
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # Slurm gives each of its tasks cores of its own, where it was told how many.
    own_cores = os.environ.get("SLURM_CPUS_PER_TASK") == str(cpu_count())
    return 1 if own_cores else max(1, local_processes)

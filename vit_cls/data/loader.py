"""Batches whose content depends on what is asked for alone, not on how many workers load it."""

from __future__ import annotations

import itertools
import math
import multiprocessing.queues
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
from vit_cls.environment import cpu_count, shared_memory
from vit_cls.errors import RunError
from vit_cls.signals import leave_signals_to_parent

Images = ImageSource | Iterable[str | os.PathLike[str]]
"""What can be loaded once, in order: the images of an index, or any number of paths."""

ROOM_FROM = 4
"""Cores from which on one is kept free of loading."""


def make_loader(
    dataset: ImageDataset,
    sampler: EpochSampler,
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool = False,
    even: bool = True,
) -> DataLoader[Batch]:
    """Load the sampler's keys in its order, epoch after epoch, in batches of almost one size (`EvenBatches`).

    Args:
        batch_size: Of the largest batch; ``loader.batch_sampler.batch_size`` keeps it.
        even: False makes torch's own batches, the last one smaller: Lightning's ``predict`` takes no others.

    Raises:
        ConfigError: If a number is out of range.
    """
    check_range("data.batch_size", batch_size, at_least=1)
    check_range("data.num_workers", num_workers, at_least=0)
    batches: dict[str, Any] = {"batch_sampler": EvenBatches(sampler, batch_size)}
    if not even:
        batches = {"sampler": sampler, "batch_size": batch_size}
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # keys are (epoch, index)
        **batches,
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
        num_workers: None means `default_num_workers`, no more than there are batches, and none for images in
            memory or for no more than one batch.

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
        "worker_init_fn": _begin_worker,
        # The loader draws a base seed for each iterator. From the global generator that would move
        # dropout's draws, and differently for 0 workers and for many.
        "generator": torch.Generator(),
    }


def _begin_worker(worker_id: int) -> None:
    """In each loading process: a batch that cannot be handed over, for want of shared memory, ends it.

    Python would print a traceback and drop the batch, for which the main process then waits for ever.
    """
    leave_signals_to_parent(worker_id)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(  # type: ignore[attr-defined]
        lambda error, batch: os._exit(1)
    )


def died(error: BaseException, option: str) -> str | None:
    """Why a loading process ended, and what to do; None where the error is about something else.

    Args:
        error: What torch raised.
        option: The user's word for the number of processes.
    """
    words = ("DataLoader worker", "shared memory", "torch_shm", "No space left on device")
    if not any(word in str(error) for word in words):
        return None
    said = next((line for line in str(error).splitlines() if line.strip()), "")
    room = shared_memory()
    hint = f" ({room}; a container gets more by --shm-size 1g)" if room else ""
    return (
        f"a loading process died ({said}), of a fault in a decoder or for want of memory{hint}. Use fewer "
        f"{option}, or 0."
    )


def _named_crashes(loader: Iterable[Batch]) -> Iterator[Batch]:
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError) as error:
            if reason := died(error, "--num_workers"):
                raise RunError(reason) from error
            raise
        yield batch


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

"""The processes in which a study trains: how many, and on which device each."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from vit_cls.environment import cpu_count
from vit_cls.inference import AUTO_DEVICE, choose_device


def default_jobs(data: str) -> int:
    """Processes where the user gave no number: one a GPU; on a CPU one a core for tiny images, else one.

    Args:
        data: ``digits``, or a folder.
    """
    device = choose_device("auto")
    if device.type == "cpu" and data == "digits":
        return min(8, cpu_count())
    return len(devices_of_jobs())


def devices_of_jobs() -> list[torch.device]:
    """The devices that jobs are dealt out to: every GPU of the machine, or the one device that is meant."""
    device = choose_device("auto")
    if device.type != "cuda" or device.index is not None:
        return [device]
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def begin_job(count: Any, devices: Sequence[torch.device], *, threads: int) -> None:
    """In each process: it is job i, by the shared ``count`` of those that have begun, on device i."""
    with count.get_lock():
        job, count.value = count.value, count.value + 1
    device = devices[job % len(devices)]
    AUTO_DEVICE.set(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(threads)


def beginning_of_jobs(jobs: int) -> Callable[[], None]:
    """What each of these processes does first: it takes its device, and its share of the cores."""
    count = multiprocessing.get_context("spawn").Value("i", 0)
    return partial(begin_job, count, devices_of_jobs(), threads=max(1, cpu_count() // jobs))

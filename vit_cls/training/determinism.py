"""What the last bits of a run's numbers depend on beside its settings, its versions and its processor."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from vit_cls.training.launch import is_first_process

log = logging.getLogger("vit_cls")


def numerics(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """For the record: threads of an operation on the CPU, and the Trainer's ``deterministic``."""
    return {"threads": torch.get_num_threads(), "deterministic": arguments.get("deterministic") or False}


def warn_of_threads(before: Mapping[str, Any]) -> None:
    """Say where a run goes on with another number of threads than its record has.

    Args:
        before: The record; those of old runs do not say.
    """
    then, now = before.get("threads"), torch.get_num_threads()
    if then not in (None, now) and is_first_process():
        log.warning(
            f"the run began with {then} thread(s) and goes on with {now}, so it adds its numbers up in "
            "another order: their last bits are not those of a run that was never stopped. "
            f"OMP_NUM_THREADS={then} gives the same."
        )


@contextmanager
def deterministic_attention(wanted: object) -> Iterator[None]:
    """Keep cuDNN's attention, which has no deterministic gradient, out of the block where that is wanted.

    Lightning does the rest of ``deterministic``: torch's deterministic algorithms, which its other attentions
    have, and the workspace of cuBLAS.

    Source:
        Which attentions are deterministic: https://github.com/pytorch/pytorch/pull/182551.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before and not wanted)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)

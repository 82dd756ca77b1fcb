"""Draws from torch's global generator that are a function of a seed and leave the generator as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let torch's CPU generator start from ``seed`` inside a ``with`` block, and go on as before after it.

    Layers draw their first weights from the global generator and take no other.

    Example:
        >>> with seeded(7):
        ...     first = torch.rand(1)
        >>> with seeded(7):
        ...     assert torch.equal(first, torch.rand(1))
    """
    # torch.manual_seed would reset the generators of CUDA devices too.
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)

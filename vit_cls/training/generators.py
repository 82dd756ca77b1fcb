"""The states of all generators of random numbers that code of a run may draw from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def generator_states(device: torch.device) -> dict[str, Any]:
    """Of torch on the CPU and, if it computes there, a CUDA device, of numpy, and of Python; plain data."""
    # numpy's global one: ours draws nothing from it, but a user's callback or transform may
    name, keys, place, has_normal, normal = np.random.get_state(legacy=True)  # noqa: NPY002
    version, words, second = random.getstate()
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), place, has_normal, normal],
        "python": [version, torch.tensor(words), second],
    }


def set_generator_states(states: dict[str, Any], device: torch.device) -> None:
    """Put them back; those that an older checkpoint lacks stay as they are."""
    torch.set_rng_state(states["cpu"])
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    if "numpy" in states:
        name, keys, *rest = states["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    if "python" in states:
        version, words, second = states["python"]
        random.setstate((version, tuple(words.tolist()), second))

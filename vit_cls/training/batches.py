"""Batches of anybody's loader."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def images_and_targets(batch: Any) -> tuple[Tensor, Tensor]:
    """The two of a batch of ours, or of anybody's pair; TypeError where it is neither."""
    if isinstance(batch, tuple | list) and len(batch) >= 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    raise TypeError(
        "a batch must be (images, targets): uint8 pixels and int64 classes; got "
        f"{type(batch).__name__}. Let the loader's collate_fn make that."
    )


def batch_size_of(loader: Any) -> int | None:
    """The images that a loader puts in a batch, as far as it says."""
    size = getattr(loader, "batch_size", None) or getattr(
        getattr(loader, "batch_sampler", None), "batch_size", None
    )
    return size if isinstance(size, int) else None

"""The mean training loss of an epoch, whose sums a checkpoint holds, as Lightning's are held by none."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor


class EpochLoss:
    """Mean over the images of an epoch until now, added up on the device; nothing waits for it."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin another epoch."""
        self.sum: Tensor | float = 0.0
        self.images = 0
        self.lost: Tensor | int = 0
        self._mean: Tensor | None = None

    def add(self, loss: Tensor, images: int) -> None:
        """Add the mean loss of a batch; one that is not finite counts as no images, as its step as none."""
        loss = loss.detach()
        finite = loss.isfinite()
        self.sum = self.sum + torch.where(finite, loss, 0) * images
        self.lost = self.lost + ~finite * images
        self.images += images

    def mean(self, trainer: Trainer) -> Tensor | None:
        """Over all processes, each of which must ask; None where there was no image. It ends the epoch."""
        if self._mean is None and self.images:
            device = trainer.strategy.root_device
            total = torch.as_tensor(self.sum, device=device)
            images = self.images - torch.as_tensor(self.lost, device=device).to(total.dtype)
            total, images = (trainer.strategy.reduce(value, reduce_op="sum") for value in (total, images))
            self._mean = total / images
        return self._mean

    def state_dict(self) -> dict[str, Any]:
        """The sums, on the CPU."""
        return {
            "sum": torch.as_tensor(self.sum).cpu(),
            "images": self.images,
            "lost": torch.as_tensor(self.lost).cpu(),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from them."""
        self.begin()
        self.sum, self.lost = state["sum"].to(device), state["lost"].to(device)
        self.images = state["images"]

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
        self._goes_on = False

    def add(self, loss: Tensor, images: int) -> None:
        """Add the mean loss of a batch; one that is not finite counts as no images, as its step as none."""
        loss = loss.detach()
        finite = loss.isfinite()
        self.sum = self.sum + torch.where(finite, loss, 0) * images
        self.lost = self.lost + ~finite * images
        self.images += images

    def mean(self, trainer: Trainer) -> Tensor | None:
        """Over all processes, each of which must ask; None where there was no image. It ends the epoch."""
        if self._mean is None and (self.images or self._goes_on):
            device = trainer.strategy.root_device
            total = torch.as_tensor(self.sum, device=device)
            images = self.images - torch.as_tensor(self.lost, device=device).to(total.dtype)
            total, images = (trainer.strategy.reduce(value, reduce_op="sum") for value in (total, images))
            self._mean = total / images
        return self._mean

    def state_dict(self, trainer: Trainer) -> dict[str, Any]:
        """The sums of each process, ``(processes,)``, on the CPU; each process must ask."""
        own = torch.tensor(
            [float(value) for value in (self.sum, self.images, self.lost)], dtype=torch.float64
        )
        if trainer.world_size > 1:
            own = trainer.strategy.all_gather(own.to(trainer.strategy.root_device)).cpu()
        total, images, lost = own.reshape(-1, 3).T.contiguous()
        return {
            "sum": total.to(torch.as_tensor(self.sum).dtype),
            "images": images.long(),
            "lost": lost.long(),
        }

    def load_state_dict(self, state: dict[str, Any], trainer: Trainer) -> None:
        """Go on from them: each process from its own, or where there were others, the first one from all."""
        self.begin()
        of_all = {name: torch.as_tensor(values).reshape(-1) for name, values in state.items()}
        self._goes_on = bool(of_all["images"].any())
        if len(of_all["sum"]) != trainer.world_size:
            of_all = {name: values.sum().expand(1) for name, values in of_all.items()}
        if trainer.global_rank < len(of_all["sum"]):
            own = {name: values[trainer.global_rank] for name, values in of_all.items()}
            self.sum, self.lost = (own[name].to(trainer.strategy.root_device) for name in ("sum", "lost"))
            self.images = int(own["images"])

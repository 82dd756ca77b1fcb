"""The progress bar of a run, which does not make the device wait."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

SECONDS_BETWEEN_READS = 1.0


class RunProgressBar(RichProgressBar):
    """Lightning's bar on stderr, which reads loss and metrics once a second and after a validation.

    To read a value is to wait for the device; Lightning's own bar does it in every step.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=10, console_kwargs={"stderr": True})
        self._metrics: dict[str, Any] = {}
        self._next_read = 0.0

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands beside the bar: what was read last, for as long as it is young."""
        if time.monotonic() >= self._next_read:
            self._metrics = super().get_metrics(trainer, pl_module)
            self._metrics.pop("v_num", None)  # of the logger: always the same here
            self._next_read = time.monotonic() + SECONDS_BETWEEN_READS
        return self._metrics

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the metrics of this validation at once."""
        self._next_read = 0.0
        super().on_validation_end(trainer, pl_module)

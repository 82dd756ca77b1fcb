"""What happens at the end of an epoch: the metrics row, the checkpoints, the model file; and signals."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from vit_cls.environment import environment
from vit_cls.errors import RunError
from vit_cls.training.runs import RunFolder
from vit_cls.training.task import ClassificationTask
from vit_cls.weights.bundle import save_classifier

log = logging.getLogger("vit_cls")

COLUMNS = ("train/loss", "val/loss", "val/acc1", "val/acc5", "val/correct", "val/images")


class EpochLog(Callback):
    """Write one row an epoch to ``metrics.csv``.

    Lightning's own CSV logger deletes an existing file, and so the first half of a resumed run.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.rows: list[dict[str, float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the rows of the epochs that a resumed run does not repeat."""
        self.rows = [row for row in self.folder.read_history() if row["epoch"] < trainer.current_epoch]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the epoch."""
        self.started = time.perf_counter()
        self.images = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count images; reads shapes only, so nothing waits for the device."""
        self.images += len(batch.targets) * trainer.world_size

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of training."""
        self.train_seconds = time.perf_counter() - self.started

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the row; on the first process alone."""
        metrics = trainer.callback_metrics
        row = {"epoch": float(trainer.current_epoch), "step": float(trainer.global_step)}
        row |= {"lr": trainer.optimizers[0].param_groups[0]["lr"]}
        row |= {name: float(metrics[name]) for name in COLUMNS if name in metrics}
        row["seconds"] = time.perf_counter() - self.started
        row["train_images_per_second"] = self.images / max(
            getattr(self, "train_seconds", row["seconds"]), 1e-9
        )
        self.rows.append(row)
        if trainer.is_global_zero:
            self.folder.write_history(self.rows)
            if trainer.progress_bar_callback is None:
                self._say(row, trainer.max_epochs)

    def _say(self, row: dict[str, float], epochs: int | None) -> None:
        """One line, where there is no bar to look at: in a job's log."""
        parts = [f"epoch {row['epoch']:.0f}{f' of {epochs}' if epochs and epochs > 0 else ''}"]
        parts += [f"{name} {row[name]:.4f}" for name in ("train/loss", "val/loss", "val/acc1") if name in row]
        log.info(
            "  ".join([*parts, f"{row['train_images_per_second']:.0f} images/s", f"{row['seconds']:.1f} s"])
        )


class RunCheckpoint(ModelCheckpoint):
    """Keep ``last.ckpt`` and ``best.ckpt``, and the best classifier as ``model.safetensors``.

    Args:
        folder: The run folder.
        epoch_log: Holds the metrics that go into the model file.
    """

    def __init__(self, folder: RunFolder, epoch_log: EpochLog) -> None:
        super().__init__(
            dirpath=folder.checkpoint_dir,
            filename="best",
            monitor="val/acc1",
            mode="max",
            enable_version_counter=False,
            save_on_train_epoch_end=True,
        )
        self.folder = folder
        self.epoch_log = epoch_log

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether this epoch is the best so far. Of equals the later is: its learning rate is lower.

        On a small validation set many epochs are equal, and the first of them is the worst choice.
        """
        best = self.best_model_score
        tie = current is not None and best is not None and bool(current == best)
        return tie or super().check_monitor_top_k(trainer, current)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state, and the model where it is the best so far."""
        before = self.best_model_score
        super().on_train_epoch_end(trainer, pl_module)
        # Lightning's save_last writes only when the best is written too: hours could be lost.
        trainer.save_checkpoint(self.folder.last_checkpoint)
        now = trainer.callback_metrics.get("val/acc1")
        if now is not None and (before is None or bool(now >= before)) and trainer.is_global_zero:
            assert isinstance(pl_module, ClassificationTask)
            extra = {
                "metrics": self.epoch_log.rows[-1],
                "versions": environment()["versions"],
                "weights_licence": "trained from scratch: the licence is yours to choose",
            }
            save_classifier(pl_module.classifier, self.folder.model_file, extra=extra)


class Interrupted(RunError):
    """A signal ended the run between two steps.

    Args:
        signum: The signal's number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class StopOnSignal(Callback):
    """On SIGINT or SIGTERM finish the step and stop; on a second signal stop at once."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over both signals; Python allows that in the main thread alone."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if a signal came."""
        if self.signum is not None:
            raise Interrupted(self.signum)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop if a signal came."""
        if self.signum is not None:
            raise Interrupted(self.signum)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._give_back()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back, before Lightning gives back its own."""
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

"""What happens at the end of an epoch: the metrics row, the checkpoints, the model file; and signals."""

from __future__ import annotations

import logging
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from vit_cls import formatting as fmt
from vit_cls.data.loader import default_num_workers
from vit_cls.environment import environment
from vit_cls.signals import StopSignals
from vit_cls.training.runs import RunFolder
from vit_cls.training.task import ClassificationTask
from vit_cls.weights.bundle import save_classifier

log = logging.getLogger("vit_cls")

COLUMNS = ("train/loss", "val/loss", "val/acc1", "val/acc5", "val/balanced_acc1", "val/correct", "val/images")
SLOW_LOADER = 0.2
"""Share of an epoch spent waiting for images from which on the loader is said to be the bottleneck."""


class EpochLog(Callback):
    """Write one row an epoch to ``metrics.csv``.

    Lightning's own CSV logger deletes an existing file, and so the first half of a resumed run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.rows: list[dict[str, float]] = []
        self.advised = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the rows of the epochs that a resumed run does not repeat."""
        self.rows = [row for row in self.folder.read_history() if row["epoch"] < trainer.current_epoch]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the epoch."""
        self.started = self.waiting_since = time.perf_counter()
        self.images = 0
        self.waited = 0.0
        self.validated = False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The images are there: add up how long that took."""
        self.waited += time.perf_counter() - self.waiting_since

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count images; reads shapes only, so nothing waits for the device."""
        self.images += len(batch.targets) * trainer.world_size
        self.waiting_since = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of training."""
        self.train_seconds = time.perf_counter() - self.started

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember that this epoch has validation metrics of its own: Lightning keeps showing old ones."""
        self.validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the row; on the first process alone."""
        metrics = trainer.callback_metrics
        row = {"epoch": float(trainer.current_epoch), "step": float(trainer.global_step)}
        row |= {"lr": trainer.optimizers[0].param_groups[0]["lr"]}
        names = [
            name for name in COLUMNS if name in metrics and (self.validated or name.startswith("train/"))
        ]
        row |= {name: float(metrics[name]) for name in names}
        row["seconds"] = time.perf_counter() - self.started
        train_seconds = max(getattr(self, "train_seconds", row["seconds"]), 1e-9)
        row["train_images_per_second"] = self.images / train_seconds
        row["data_wait"] = min(1.0, self.waited / train_seconds)
        self.rows.append(row)
        if trainer.is_global_zero:
            self.folder.write_history(self.rows)
            if trainer.progress_bar_callback is None:
                self._say(row, trainer.max_epochs)
            self._advise(trainer, row)

    def _advise(self, trainer: Trainer, row: dict[str, float]) -> None:
        """Once a run, and not for its first epoch, in which the workers start."""
        if self.advised or row["data_wait"] < SLOW_LOADER or len(self.rows) < 2:
            return
        self.advised = True
        loader: Any = trainer.train_dataloader
        workers, cores = getattr(loader, "num_workers", 0), default_num_workers()
        if workers < cores:
            advice = f"raise data.num_workers (now {workers}; this machine has {cores} cores or more)"
        else:
            advice = (
                "make the images smaller once (their shorter side near the model's input), or use more cores"
            )
        share = fmt.percent(row["data_wait"], 0)
        log.info(f"{share} of the training time goes into waiting for images: {advice}")

    def _say(self, row: dict[str, float], epochs: int | None) -> None:
        """One line, where there is no bar to look at: in a job's log."""
        parts = [f"epoch {row['epoch']:.0f}{f' of {epochs}' if epochs and epochs > 0 else ''}"]
        parts += [f"{name} {row[name]:.4f}" for name in ("train/loss", "val/loss", "val/acc1") if name in row]
        parts += [f"{row['train_images_per_second']:.0f} images/s", fmt.duration(row["seconds"])]
        log.info("  ".join(parts))


class RunCheckpoint(Checkpoint):
    """Keep ``last.ckpt`` and ``best.ckpt``, and the best classifier as ``model.safetensors``.

    The best epoch is that of the highest ``val/acc1``; of equals the later, since its learning rate is
    lower: on a small validation set many epochs are equal, and the first of them is the worst choice.
    Lightning's ModelCheckpoint keeps the first, writes ``last`` only together with ``best``, and forgets
    the best score when the folder was moved.
    """

    def __init__(self, folder: RunFolder, epoch_log: EpochLog) -> None:
        super().__init__()
        self.folder = folder
        self.epoch_log = epoch_log
        self.best: float | None = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the model where it is the best so far, then the state: a resume repeats what a crash cut."""
        row = self.epoch_log.rows[-1]
        score = row.get("val/acc1")  # absent where this epoch was not validated
        if score is not None and (self.best is None or score >= self.best):
            self.best = score
            if trainer.is_global_zero:
                self._save_model(pl_module, row)
            trainer.save_checkpoint(self.folder.best_checkpoint)
        trainer.save_checkpoint(self.folder.last_checkpoint)

    def _save_model(self, task: LightningModule, row: dict[str, float]) -> None:
        assert isinstance(task, ClassificationTask)
        extra = {
            "metrics": row,
            "versions": environment()["versions"],
        }
        save_classifier(task.classifier, self.folder.model_file, extra=extra)

    def state_dict(self) -> dict[str, Any]:
        """The best score, for a resumed run."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best score of the run so far."""
        self.best = state_dict["best"]


class StopBetweenSteps(Callback):
    """Let a signal wait for the end of the step, and then stop."""

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on signals wait for the end of the step; Lightning put its own handler in between."""
        self.signals.waits = True
        self.signals.listen()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if a signal came."""
        self.signals.check()

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
        self.signals.check()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """No step is left to wait for."""
        self.signals.waits = False

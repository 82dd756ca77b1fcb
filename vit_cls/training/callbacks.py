"""What happens at the end of an epoch: the metrics row, the checkpoints, the model file; and signals."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from vit_cls import formatting as fmt
from vit_cls.data.loader import loading_advice
from vit_cls.environment import environment
from vit_cls.errors import ModelFileError, RunError
from vit_cls.files import replacing
from vit_cls.model.classifier import ImageClassifier
from vit_cls.signals import StopSignals
from vit_cls.training.batches import images_and_targets
from vit_cls.training.checkpoint_io import BEST, LAST, PREVIOUS, read_checkpoint
from vit_cls.training.company import company_of
from vit_cls.training.diagnosis import is_finite
from vit_cls.training.runs import RunFolder
from vit_cls.training.task import ClassificationTask
from vit_cls.weights.bundle import KEPT, load_classifier, read_own_file, save_classifier

log = logging.getLogger("vit_cls")

COLUMNS = ("loss", "acc1", "acc5", "balanced_acc1", "correct", "images")
"""Of a validation, in the order of ``metrics.csv``; others follow."""
SLOW_LOADER = 0.2
"""Share of an epoch spent waiting for images from which on the loader is said to be the bottleneck."""


def _where(trainer: Trainer) -> dict[str, float]:
    """Epoch, step and learning rate, as a row begins."""
    lr = trainer.optimizers[0].param_groups[0]["lr"]
    return {"epoch": float(trainer.current_epoch), "step": float(trainer.global_step), "lr": lr}


def _is_within_epoch(trainer: Trainer) -> bool:
    """Whether training goes on in this epoch after a validation."""
    ends = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch or trainer.should_stop
    return not trainer.sanity_checking and not ends


def _is_last_step(trainer: Trainer) -> bool:
    """Whether steps or epochs are up, by the Trainer's limits."""
    if 0 < trainer.max_steps <= trainer.global_step:
        return True
    last_batch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    return last_batch and trainer.current_epoch + 1 == trainer.max_epochs


class EpochLog(Callback):
    """Write one row an epoch to ``metrics.csv``, and one for each validation within an epoch.

    It must come before all other callbacks: one that swaps weights for validation swaps them back in the hook
    in which the model file is written here. Lightning's own CSV logger deletes an existing file, and so the
    first half of a resumed run.
    """

    def __init__(self, folder: RunFolder, checkpoint: RunCheckpoint) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self.rows: list[dict[str, float]] | None = None
        self.advised = False
        self.validation: dict[str, float] = {}
        """The row of a validation that is not yet in a row of `rows`."""
        self._start_clocks()

    def _start_clocks(self, seconds: float = 0.0) -> None:
        self.waiting_since = time.perf_counter()
        self.started = self.waiting_since - seconds
        self.images = 0
        self.waited = self.validated_for = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The rows until now, and what the epoch under way has taken."""
        return {
            "rows": [dict(row) for row in self.rows or []],
            "validation": dict(self.validation),
            "seconds": time.perf_counter() - self.started,
            "images": self.images,
            "waited": self.waited,
            "validated_for": self.validated_for,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them: what stands in ``metrics.csv`` of later steps is of steps that are made again."""
        self.rows, self.validation = list(state_dict["rows"]), state_dict["validation"]
        self._start_clocks(state_dict["seconds"])
        self.images, self.waited = state_dict["images"], state_dict["waited"]
        self.validated_for = state_dict["validated_for"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the rows of what a resumed run does not repeat."""
        if self.rows is None:  # a new run, or one whose checkpoint holds no rows yet
            self.rows = [row for row in self.folder.read_history() if row["epoch"] < trainer.current_epoch]
        # An epoch that was cut short, as by max_steps, and is gone on with: what was validated stays.
        cut = [row for row in self.rows if row["epoch"] == trainer.current_epoch and "seconds" in row]
        for row in cut:
            kept = {k: v for k, v in row.items() if k in ("epoch", "step", "lr") or k.startswith("val/")}
            self.rows[self.rows.index(row)] = kept
        self.waiting_since = time.perf_counter()
        if self.rows and trainer.is_global_zero:
            self.folder.write_history(self.rows)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks of the epoch."""
        self._start_clocks()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The images are there: add up how long that took."""
        self.waited += time.perf_counter() - self.waiting_since

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count images; reads shapes only, so nothing waits for the device."""
        self.images += len(images_and_targets(batch)[1]) * trainer.world_size
        if _is_last_step(trainer):
            trainer.should_stop = True  # Lightning would end here too, but may leave the weights unvalidated
        self.waiting_since = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clocks of training."""
        self.validating_since = time.perf_counter()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take what was found, and keep the model, while the weights are those that were validated."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        assert isinstance(pl_module, ClassificationTask)
        found = pl_module.validated()
        names = [*COLUMNS, *(name for name in found if name not in COLUMNS)]
        self._take_validation()
        self.validation = {**_where(trainer), **{f"val/{name}": float(found[name]) for name in names}}
        self.checkpoint.keep_if_best(trainer, pl_module, self.validation)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks again, and show what was found before the epoch is at its end."""
        now = time.perf_counter()
        self.validated_for += now - self.validating_since
        self.waiting_since = now
        if self.validation and trainer.is_global_zero:
            self.folder.write_history([*(self.rows or []), self.validation])

    def _take_validation(self, step: float | None = None) -> dict[str, float]:
        """The validation that is in no row yet, if it was at that step; at another it is a row of its own."""
        found, self.validation = self.validation, {}
        if not found or found["step"] == step:
            return found
        self._add(found)
        return {}

    def _add(self, row: dict[str, float]) -> None:
        self.rows = [*(self.rows or []), row]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the row; on the first process alone."""
        row = _where(trainer)
        assert isinstance(pl_module, ClassificationTask)
        if (loss := pl_module.epoch_loss.mean(trainer)) is not None:
            row["train/loss"] = float(loss)
        if skipped := pl_module.guard.skipped_in_epoch(pl_module):
            row["train/skipped_steps"] = float(skipped)
        row |= self._take_validation(row["step"])
        row["seconds"] = time.perf_counter() - self.started
        train_seconds = max(row["seconds"] - self.validated_for, 1e-9)
        row["train_images_per_second"] = self.images / train_seconds
        row["data_wait"] = min(1.0, self.waited / train_seconds)
        self._add(row)
        if trainer.is_global_zero:
            self.folder.write_history(self.rows or [])
            if trainer.progress_bar_callback is None:
                self._say(row, trainer.max_epochs)
            self._advise(trainer, row)

    def _advise(self, trainer: Trainer, row: dict[str, float]) -> None:
        """Once a run, and not for its first epoch, in which the workers start."""
        if self.advised or row["data_wait"] < SLOW_LOADER or len(self.rows or []) < 2:
            return
        self.advised = True
        loader: Any = trainer.train_dataloader
        advice = loading_advice(getattr(loader, "num_workers", 0), len(loader), trainer.num_devices)
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

    The best validation is that of the highest ``val/acc1``; of equals the later, since its learning rate is
    lower: on a small validation set many epochs are equal, and the first of them is the worst choice.
    Lightning's ModelCheckpoint keeps the first, writes ``last`` only together with ``best``, and forgets
    the best score when the folder was moved.
    """

    def __init__(self, folder: RunFolder) -> None:
        super().__init__()
        self.folder = folder
        self.best: float | None = None
        self.row: dict[str, float] = {}
        """Of the validation that was the best."""
        self.improved = False
        """Whether ``best.ckpt`` is older than the best model."""

    def keep_if_best(self, trainer: Trainer, task: ClassificationTask, row: Mapping[str, float]) -> None:
        """Save the model as it is now, where the validation was the best so far.

        Args:
            row: Of this validation.
        """
        score = row["val/acc1"]
        if self.best is not None and not score >= self.best:
            return
        if not (math.isfinite(row["val/loss"]) and is_finite(task.kept_classifier)):
            return
        self.best, self.row, self.improved = score, dict(row), True
        if trainer.is_global_zero:
            self._save_model(task.kept_classifier, task.kept)

    def _save_model(self, classifier: ImageClassifier, kept: str) -> None:
        extra = {"metrics": self.row, KEPT: kept, "versions": environment()["versions"]}
        save_classifier(classifier, self.folder.model_file, extra=extra)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write best model and ``best.ckpt`` of a resumed run anew, where they are damaged or gone."""
        if not self.row or not trainer.is_global_zero:
            return
        best, step = self.folder.best_checkpoint, self.row["step"]
        found = self._steps_until(step)
        whole = next((path for path in found if found[path] == step), None)
        if found.get(best, -1) < step:  # a later one is of steps that are made again
            if whole is not None:
                with replacing(best) as temporary:
                    shutil.copyfile(whole, temporary)
            become = "there is no other of that step" if whole is None else f"{whole.name} is copied to it"
            log.warning(f"{best} is damaged or gone: {become}")
        try:
            read_own_file(self.folder.model_file)
        except ModelFileError as error:
            if whole is None:
                raise RunError(
                    f"{self.folder.model_file} is damaged or gone, and so is the checkpoint of the step of "
                    f"that best model, {self.row['step']:.0f}. Restore one of them from a copy, or begin the "
                    "run again in another folder."
                ) from error
            self._save_model(load_classifier(whole), read_own_file(whole, weights=False)[0][KEPT])
            log.warning(f"{error} It was written anew from the checkpoint of that step.")

    def _steps_until(self, step: float) -> dict[Path, float]:
        """Of the checkpoints that are whole, ``best.ckpt`` first, until one is of that step."""
        steps: dict[Path, float] = {}
        for path in (self.folder.checkpoint_dir / name for name in (BEST, LAST, PREVIOUS)):
            with contextlib.suppress(ModelFileError):
                steps[path] = read_checkpoint(path)["global_step"]
                if steps[path] == step:
                    break
        return steps

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state of the best within an epoch; that of its end has a place of its own."""
        if _is_within_epoch(trainer):
            self._save_best(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the states; the model comes first, so that a resume repeats what a crash cut."""
        self._save_best(trainer)
        self.save_last(trainer)

    def save_last(self, trainer: Trainer) -> None:
        """Save the state as it is now, at the end of a step, in a validation, or at the end of an epoch.

        Loggers write first what they hold back: points of earlier steps are not logged again.
        """
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.save()
        trainer.save_checkpoint(self.folder.last_checkpoint)

    def _save_best(self, trainer: Trainer) -> None:
        if self.improved:
            self.improved = False
            trainer.save_checkpoint(self.folder.best_checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """The best score, for a resumed run."""
        return {"best": self.best, "row": self.row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best score of the run so far."""
        self.best, self.row = state_dict["best"], state_dict.get("row", {})


class StopBetweenSteps(Callback):
    """Let a signal wait for the end of the step, save the state there, and stop."""

    def __init__(self, signals: StopSignals, checkpoint: RunCheckpoint) -> None:
        self.signals = signals
        self.checkpoint = checkpoint

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on signals wait for the end of the step, and after the last one for that of the run."""
        self.signals.waits = True
        self.signals.listen()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if a signal came, at the end of a step; several processes at the same one."""
        if trainer.fit_loop._should_accumulate():
            return
        company, signum = company_of(trainer), self.signals.signum
        if company is not None:
            signum = company.stop_at(signum, trainer.global_step)
        if signum is not None:
            self.signals.signum = signum
            trainer._logger_connector.update_train_step_metrics()  # Lightning's place for it comes after this
            self._stop(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop if a signal came, and validate anew later; several processes wait for the next step."""
        if self.signals.signum is not None and not trainer.sanity_checking and company_of(trainer) is None:
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        self.checkpoint.save_last(trainer)
        self.signals.check()

"""Where in a run a checkpoint was taken, and how Lightning's loops go on from there: after any step.

Lightning's own resume counts an epoch as over once its last batch was trained on, takes a validation that was
due as done, and with ``max_steps`` begins an epoch without its hooks. So its counters are set here, in one
place, to what was done and what is left.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import TensorBoardLogger

from vit_cls.data.datamodule import ImageDataModule
from vit_cls.errors import RunError
from vit_cls.training.checkpoint_io import RECORD_KEY
from vit_cls.weights.digest import RUN_KEY as POSITION_KEY

log = logging.getLogger("vit_cls")

LIMITS = ("max_epochs", "max_steps", "max_time", "min_epochs", "min_steps")
"""Arguments of the Trainer that say when a run is over."""


@dataclass(frozen=True)
class Position:
    """What was done of a run when a checkpoint was taken, and what its loops do next."""

    epoch: int
    """That is under way, or about to begin."""
    batches: int
    """Of that epoch, in each process, that were trained on; 0 before it begins."""
    validate: bool = False
    """Whether a validation comes next."""
    ends: bool = False
    """Whether the epoch's end comes next (after that)."""
    stop: bool = False
    """Whether the run was to stop there: of steps or time, or since nothing had improved."""
    over: bool = False
    """Whether the run was at its end."""
    limits: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What decided that: a run that is over goes on once they are others."""


def position_of(trainer: Trainer, *, validate: bool, limits: Mapping[str, Any]) -> Position:
    """Where a run is, at the end of a step, of a validation or of an epoch.

    Args:
        validate: Whether a validation is due, or was begun.
        limits: See `Position`.
    """
    loop, batch_progress = trainer.fit_loop, trainer.fit_loop.epoch_loop.batch_progress
    epochs: Any = loop.epoch_progress.current  # Lightning's annotation is of a class without what is read
    batches: int = batch_progress.current.processed  # type: ignore[attr-defined]
    whole = batches >= trainer.num_training_batches or batch_progress.is_last_batch
    stop = (trainer.should_stop and loop._can_stop_early) or steps_are_up(trainer)
    if epochs.processed == epochs.started:  # at the end of an epoch, which may have been cut short
        over = stop or epochs.processed == trainer.max_epochs
        epoch, done = (epochs.processed, 0) if whole else (epochs.processed - 1, batches)
        return Position(epoch, done, stop=stop, over=over, limits=limits)
    return Position(
        epochs.processed, batches, validate=validate, ends=whole or stop, stop=stop, limits=limits
    )


def steps_are_up(trainer: Trainer) -> bool:
    """Whether the Trainer's ``max_steps`` were made."""
    return 0 < trainer.max_steps <= trainer.global_step


def _old_position(checkpoint: Mapping[str, Any]) -> Position:
    """Of a checkpoint without one: such were taken at the end of an epoch, or of a validation within it."""
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    done: int = epochs["processed"]
    if done == epochs["started"]:
        return Position(done, 0)
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    return Position(done, batches["processed"])


def _set_counters(checkpoint: dict[str, Any], position: Position) -> None:
    """Let Lightning's loops find in a checkpoint the counters of its own plain cases."""
    loops = checkpoint["loops"]["fit_loop"]
    begun, done = position.epoch + (position.batches > 0), position.epoch
    batches, ends = position.batches, position.ends
    _count(loops["epoch_progress"], begun, done, done)
    # A batch that is processed but not completed is one after which Lightning goes on with the next.
    _count(
        loops["epoch_loop.batch_progress"], batches, batches, batches if ends or not batches else batches - 1
    )
    loops["epoch_loop.batch_progress"]["is_last_batch"] = ends
    validation = loops["epoch_loop.val_loop.batch_progress"]
    _count(validation, 0, 0, 0)
    validation["is_last_batch"] = False
    steps = checkpoint["global_step"]  # Lightning counts the last one when it goes on
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - (batches > 0)


def _count(progress: dict[str, Any], begun: int, processed: int, completed: int) -> None:
    """Set the counters of this epoch, and those of the whole run, which must differ from each other alike."""
    total = max(progress["total"]["processed"], processed)
    for name, shift in (("current", 0), ("total", total - processed)):
        progress[name] = {
            "ready": begun + shift,
            "started": begun + shift,
            "processed": processed + shift,
            "completed": completed + shift,
        }


class TakeUp(Callback):
    """Put the position into every checkpoint, and go on from that of the one that is resumed.

    It must come after `EpochLog`, which counts what is validated here, and before what saves checkpoints.

    Args:
        limits: When the run is over: those of `LIMITS`, the patience of early stopping, the user's callbacks.
        run_id: Of the run, which its checkpoints have too.
    """

    def __init__(self, limits: Mapping[str, Any], run_id: str) -> None:
        self.run_id = run_id
        self.segment: dict[str, Any] = {"epoch": 0, "batches": 0, "step": 0, "changes": {}}
        """Where this part of the run begins, and what was changed there."""
        self.record: Mapping[str, Any] = {}
        """Of the run, which its checkpoints have too."""
        self.limits = {name: None if value is None else str(value) for name, value in limits.items()}
        self.resumed: Position | None = None
        self.is_over = False
        """Whether the resumed run was at its end, so that nothing is trained."""
        self._validation_due = False
        self._steps_added = 0

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say where the run is."""
        position = position_of(trainer, validate=self._validation_due, limits=self.limits)
        checkpoint[POSITION_KEY] = dataclasses.asdict(position)
        checkpoint[ID_KEY] = self.run_id
        checkpoint[RECORD_KEY] = json.dumps(self.record)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Set the loops and the data to where the run was; Lightning reads their counters after this."""
        _check_own(checkpoint, self.run_id)
        given = checkpoint.get(POSITION_KEY)
        position = _old_position(checkpoint) if given is None else Position(**given)
        if position.over and position.limits == self.limits:
            self.is_over = trainer.should_stop = True
        self.resumed = position
        place = {"epoch": position.epoch, "batches": position.batches, "step": steps_of(checkpoint)}
        self.segment |= place
        _set_counters(checkpoint, position)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, ImageDataModule):
            data.begins = position.epoch, position.batches
        if position.ends and steps_of(checkpoint) >= trainer.max_steps > 0:
            # Lightning would see no step to make, and leave out the validation and the end that are due.
            self._steps_added = steps_of(checkpoint) + 1 - trainer.max_steps
            trainer.fit_loop.epoch_loop.max_steps += self._steps_added

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate if that comes next; then let the loops begin an epoch, go on in one, or end it."""
        position = self.resumed
        if position is None:
            return
        loop = trainer.fit_loop.epoch_loop
        _purge_loggers(trainer)
        _follow_schedule(trainer)
        if position.batches == 0:  # with max_steps Lightning takes any resume for one within an epoch
            trainer.fit_loop._restarting = loop.restarting = False
            trainer.fit_loop.reset_restart_stage()
            loop.reset_restart_stage()
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulationScheduler):
                callback.on_train_epoch_start(trainer, pl_module)
        if position.validate:
            self._validation_due = True
            trainer.validating = True
            loop.val_loop.run()
            trainer.training = True
        if position.ends:
            loop.val_loop._has_run = True  # done, or not due
            loop._batches_that_stepped += 1
            self._stops = position.stop or trainer.should_stop
            trainer.should_stop = False  # not before the epoch's end

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note whether a validation comes next."""
        fit_loop = trainer.fit_loop
        assert fit_loop._data_fetcher is not None
        self._validation_due = fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """It is done."""
        self._validation_due = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give back what was borrowed to get here."""
        position, self.resumed = self.resumed, None
        if position is None or not position.ends:
            return
        loop = trainer.fit_loop.epoch_loop
        loop.restarting = False
        loop.reset_restart_stage()
        loop.max_steps -= self._steps_added
        loop.batch_progress.is_last_batch = position.batches >= trainer.num_training_batches
        trainer.should_stop = self._stops


ID_KEY = "vit_cls_run_id"


def _check_own(checkpoint: Mapping[str, Any], run_id: str) -> None:
    """Refuse (RunError) the state of another run, and one that cannot be trained on."""
    if checkpoint.get(ID_KEY, run_id) != run_id:
        raise RunError(
            "the checkpoint is of another run than run.json beside it. Put the run's own back, or begin a "
            "new run in another folder."
        )
    for name, tensor in checkpoint["state_dict"].items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RunError(
                f"the checkpoint holds weights that are not finite ({name}): nothing can be trained from "
                "there. Take an older one of the run, or begin a new run in another folder."
            )


def _follow_schedule(trainer: Trainer) -> None:
    """Where the run was made longer, or its rates changed: begin with the rate of now, and say so."""
    if not trainer.lr_scheduler_configs:
        return
    schedule: Any = trainer.lr_scheduler_configs[0].scheduler
    groups = schedule.optimizer.param_groups
    step = schedule.last_epoch
    rates = [b * rate(step) for b, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    told, now = groups[0]["lr"], rates[0]
    if abs(told - now) <= 1e-6 * max(told, now):
        return
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    if trainer.is_global_zero:
        log.warning(
            f"the learning rate goes from {told:.3g} to {now:.3g} here: the schedule is not that of before"
        )


def steps_of(checkpoint: Mapping[str, Any]) -> int:
    """Optimiser steps that were made when a checkpoint was taken."""
    steps: int = checkpoint["global_step"]
    return steps


def _purge_loggers(trainer: Trainer) -> None:
    """Let TensorBoard drop the points of steps that were made after the checkpoint, and are made again.

    Source: what ``SummaryWriter(purge_step=...)`` writes when it is made.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            from tensorboard.compat.proto.event_pb2 import (  # type: ignore[import-untyped]
                Event,
                SessionLog,
            )

            writer = logger.experiment._get_file_writer()
            writer.add_event(Event(file_version="brain.Event:2"), trainer.global_step)
            writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), trainer.global_step)

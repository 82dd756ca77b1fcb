"""How long a run is, in optimiser steps, and with which learning rate: what its schedule is made for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from vit_cls.checks import check_range
from vit_cls.errors import ConfigError
from vit_cls.training.batches import batch_size_of
from vit_cls.training.optim import Schedule, peak_lr
from vit_cls.training.options import OptimOptions


@dataclass(frozen=True)
class Length:
    """How long a run is meant to be.

    Args:
        batches: Of an epoch, in each process.
        accumulate: Batches of an optimiser step, by the epoch from which on it is so; has epoch 0.
        max_epochs: -1 is no limit.
        max_steps: -1 is no limit.

    Example:
        >>> length = Length(5, {0: 2, 2: 1}, max_epochs=4, max_steps=-1)
        >>> [length.steps(epoch) for epoch in range(4)], length.total_steps
        ([3, 3, 5, 5], 16)
    """

    batches: int
    accumulate: Mapping[int, int]
    max_epochs: int
    max_steps: int

    def steps(self, epoch: int) -> int:
        """Optimiser steps of an epoch: its last one may be of fewer batches."""
        since = max(start for start in self.accumulate if start <= epoch)
        return math.ceil(self.batches / self.accumulate[since])

    @property
    def total_steps(self) -> int:
        """Of the whole run; at least one of the limits is set."""
        limits = [self.max_steps] if self.max_steps > 0 else []
        if self.max_epochs > 0:
            limits.append(sum(self.steps(epoch) for epoch in range(self.max_epochs)))
        return min(limits)


def limited(batches: int, limit: int | float | None) -> int:
    """Batches of an epoch that are trained on, as Lightning counts them: a number of them, or a share.

    Raises:
        ConfigError: If that is none.
    """
    if limit is None:
        return batches
    left = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if left < 1:
        raise ConfigError(
            f"trainer.limit_train_batches {limit} of {batches} batches an epoch leaves none to train on. "
            f"Give at least {1 / batches:.2g}, or a number of batches."
        )
    return left


def run_length(images: int, batch_size: int, trainer: Trainer, arguments: Mapping[str, Any]) -> Length:
    """What Lightning's Trainer will do, as far as epochs and steps go.

    Args:
        images: Training images of an epoch, in each process.
        arguments: Those of the Trainer: a ``fast_dev_run`` has its own limits, and the schedule of the run
            that it tries out.

    Raises:
        ConfigError: If there is no end, or no validation.
    """
    check_range("data.batch_size", batch_size, at_least=1)
    plan: Mapping[str, Any] = arguments if arguments.get("fast_dev_run") else _limits(trainer)
    epochs, steps = plan.get("max_epochs"), plan.get("max_steps") or -1
    if (epochs is None or epochs < 1) and steps < 1:
        raise ConfigError(
            f"trainer.max_epochs must be at least 1 (the learning rate ends there); got {epochs}."
        )
    batches = limited(math.ceil(images / batch_size), plan.get("limit_train_batches"))
    accumulate = _accumulation(trainer.callbacks, trainer.accumulate_grad_batches)  # type: ignore[attr-defined]
    length = Length(batches, accumulate, -1 if epochs is None else epochs, steps)
    if plan is not arguments:
        _check_validation(length, trainer)
    return length


def _limits(trainer: Trainer) -> dict[str, Any]:
    return {name: getattr(trainer, name) for name in ("max_epochs", "max_steps", "limit_train_batches")}


def _accumulation(callbacks: Sequence[Callback], always: int) -> dict[int, int]:
    for callback in callbacks:
        if isinstance(callback, GradientAccumulationScheduler):
            if always != 1:
                raise ConfigError(
                    f"trainer.accumulate_grad_batches is {always}, and the callback "
                    "GradientAccumulationScheduler sets it too. Leave one of them out."
                )
            return dict(callback.scheduling)
    return {0: always}


def _check_validation(length: Length, trainer: Trainer) -> None:
    """Refuse a run in which nothing would ever be validated."""
    interval = getattr(trainer, "val_check_interval", None)  # not there where it is a time
    every = trainer.check_val_every_n_epoch
    if isinstance(interval, int) and every is not None and interval > length.batches:
        raise ConfigError(
            f"trainer.val_check_interval {interval} is more than the {length.batches} batches of an epoch. "
            "To count on over epochs, set --trainer.check_val_every_n_epoch null."
        )
    if every is not None and 0 < length.max_epochs < every:
        raise ConfigError(
            f"trainer.check_val_every_n_epoch {every} is more than the run's {length.max_epochs} epochs, in "
            "which nothing would be validated, and there is no best epoch. Use a smaller number."
        )


def schedule_of(trainer: Trainer, options: OptimOptions) -> Schedule:
    """The schedule that a trainer's loader, epochs and accumulation make; ConfigError without an end."""
    total = trainer.estimated_stepping_batches
    if math.isinf(total):
        raise ConfigError(
            "the learning rate needs an end: give the Trainer max_epochs or max_steps, or the task a "
            "Schedule."
        )
    per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    size = batch_size_of(trainer.train_dataloader)
    if size is None and options.lr is None:
        raise ConfigError(
            "the learning rate goes by the images of a step, and the loader does not say its batch_size. "
            "Give OptimOptions(lr=...)."
        )
    images = (size or 1) * trainer.accumulate_grad_batches * trainer.world_size
    return Schedule(max(1, per_epoch), int(total), peak_lr(options, images_per_step=images))


def make_schedule_of(length: Length, options: OptimOptions, *, images_per_batch: int) -> Schedule:
    """Steps and peak learning rate; an epoch's are those of the first, for whose step the rate is scaled.

    Args:
        images_per_batch: Over all processes.

    Raises:
        ConfigError: If the run is shorter than its warm-up, or than the epochs of the head alone.
    """
    steps_per_epoch, total_steps, first = length.steps(0), length.total_steps, options.head_first_epochs
    if first and len(length.accumulate) > 1:
        raise ConfigError(
            "optim.head_first_epochs cannot be combined with the callback GradientAccumulationScheduler, "
            "since the steps of an epoch change. Leave one of them out."
        )
    if first * steps_per_epoch >= total_steps:
        raise ConfigError(
            f"optim.head_first_epochs must be fewer than the run's; got {first} of "
            f"{total_steps / steps_per_epoch:g}. To train the head alone use optim.freeze backbone."
        )
    warmup = options.warmup_epochs
    if warmup is not None and warmup * steps_per_epoch >= total_steps - first * steps_per_epoch:
        raise ConfigError(
            f"optim.warmup_epochs must be shorter than the run; got {warmup:g} of "
            f"{total_steps / steps_per_epoch:g} epochs. Leave it out for a tenth of the run."
        )
    images_per_step = images_per_batch * length.accumulate[0]
    return Schedule(steps_per_epoch, total_steps, peak_lr(options, images_per_step=images_per_step))

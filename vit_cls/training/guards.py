"""Steps whose loss or gradient is not finite: skipped, counted, and after too many in a row an end."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.tuner.lr_finder import _LRCallback
from torch import Tensor
from torch.optim import Optimizer

from vit_cls.errors import DivergedError
from vit_cls.training.diagnosis import (
    Part,
    Task,
    diagnose,
    diagnose_validation,
    first_not_finite,
    from_all,
    named,
)

log = logging.getLogger("vit_cls")

LAG = 8
"""Steps after which a GPU's flag is read: it is there by then, so that nothing waits. A fixed number, since
all processes must end at the same step."""
SCALE_FLOOR = 1.0
"""Of fp16's scale of the loss: what overflows at it overflows without a scale too."""
REMEMBERED = 20
"""Skipped steps that are named in the log and in the record; the others are counted."""
ADVICE = (
    "Use a lower learning rate (optim.lr, optim.base_lr_per_256_images), a longer optim.warmup_epochs or "
    "trainer.gradient_clip_val 1, or look at the images."
)
SHOWN = 3
"""Images that a sentence names."""
COUNTS = ("in_a_row", "skipped", "epoch_steps", "epoch_skipped")


class SkippedStep(Exception):
    """Ends an optimiser's step when its gradient is complete and nothing is changed yet."""


class _Step(NamedTuple):
    """A step that is over."""

    number: int
    epoch: int
    parts: list[Part]
    skipped: bool | Tensor
    """A tensor is on the host, and written when `ready` has come."""
    ready: torch.cuda.Event | None


class StepGuard:
    """Skip steps whose loss or gradient is not finite as if they had not been; end after too many.

    Where it costs nothing to read the flag (a CPU; fp16's scaler, which waits for the GPU anyway) the
    optimiser is not called. Elsewhere nothing waits: torch's fused optimisers take the flag as ``found_inf``,
    and what a skipped step of others changed is put back on the device. A step in which an optimiser makes
    its state is read too, for what was not there cannot be put back.

    All processes decide alike: they see the same reduced gradient, and a loss that is not finite in one of
    them makes it NaN in all (`ClassificationTask.on_before_optimizer_step`).

    Args:
        limit: Skipped steps in a row after which training ends.

    Source:
        ``found_inf``: torch's ``GradScaler.step``.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row = self.skipped = self.epoch_steps = self.epoch_skipped = 0
        self.named: list[dict[str, Any]] = []
        """Epoch, step and images of the first skipped steps."""
        self.fault: dict[str, Any] | None = None
        """What was found at the end of a run that ended by them."""
        self.doubt: float | Tensor = 0.0
        """0, or NaN where a loss of this step is not finite."""
        self._parts: list[Part] = []
        self._waiting: deque[_Step] = deque()
        self._flag: Tensor | None = None
        """Whether the step is to be skipped, where that was not read."""
        self._with_state = -1
        self._always_reads = False
        self._settings = ""
        self._before: dict[tuple[Tensor, str], Tensor] = {}
        self._last: list[Part] = []

    def add(self, loss: Tensor, batch: Any, batch_index: int) -> None:
        """Take note of a batch of the step; nothing waits."""
        self.doubt = self.doubt + loss.detach() * 0
        indices = getattr(batch, "indices", None)
        self._parts.append(Part(batch_index, indices, batch if indices is None else None))

    def judge(self, optimizer: Optimizer, norm: Tensor, *, free: bool) -> None:
        """Decide on the step, now that its gradient is complete.

        Args:
            norm: Of the gradient before it was clipped.
            free: Whether to read the flag costs nothing.

        Raises:
            SkippedStep: If it was read, and the optimiser must not be called.
        """
        flag = (norm + self.doubt).isfinite().logical_not()
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if free or self._always_reads or self._with_state != len(params):
            if flag:
                raise SkippedStep
            self._with_state = len(params)
            self._settings = "" if free else _settings(optimizer)
            return
        self._flag = flag
        if _takes_flag(optimizer):
            optimizer.found_inf, optimizer.grad_scale = flag.float(), None  # type: ignore[attr-defined]
        else:
            self._before = {place: value.detach().clone() for place, value in _changing(optimizer, params)}

    def step(self, update: Callable[[], Any], task: Task, optimizer: Optimizer) -> bool | Tensor:
        """Make the step, unless it is skipped; gives whether it was, if that was not read on the device.

        Args:
            update: Forward and backward, `judge`, and the optimiser's own step.

        Raises:
            DivergedError: If too many steps in a row were skipped.
        """
        scaler = getattr(task.trainer.precision_plugin, "scaler", None)
        skipped, counts = False, True
        try:
            update()
        except SkippedStep:
            skipped = True
            if scaler is not None:
                counts = scaler.get_scale() <= SCALE_FLOOR
                scaler.update()
        flag, self._flag = self._flag, None
        if flag is not None:
            self._put_back(flag, optimizer)
        elif self._settings and not (skipped or self._always_reads or _takes_flag(optimizer)):
            self._always_reads = not _can_be_put_back(optimizer, self._settings)
        self._note(task, flag if flag is not None else skipped and counts)
        return skipped if flag is None else flag

    @torch.no_grad()
    def _put_back(self, flag: Tensor, optimizer: Optimizer) -> None:
        if _takes_flag(optimizer):
            del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self._before:
            now = dict(_changing(optimizer, params))
            values = [now[place] for place in self._before]
            before = [torch.where(flag, old, now[place]) for place, old in self._before.items()]
            torch._foreach_copy_(values, before)
        self._before = {}

    def _note(self, task: Task, skipped: bool | Tensor) -> None:
        ready = None
        if isinstance(skipped, Tensor) and skipped.device.type == "cuda":
            on_device, skipped = skipped, torch.empty((), dtype=torch.bool, pin_memory=True)
            skipped.copy_(on_device, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
            self._parts = [part._replace(batch=None) for part in self._parts]  # they would fill its memory
        parts, self._parts, self.doubt = self._parts, [], 0.0
        self._waiting.append(_Step(task.trainer.global_step + 1, task.current_epoch, parts, skipped, ready))
        self.settle(task, LAG if isinstance(skipped, Tensor) else 0)

    def settle(self, task: Task, lag: int = 0) -> None:
        """Count the steps but for the last ``lag``; before what is said or saved of them, all.

        Raises:
            DivergedError: If too many in a row were skipped.
        """
        while len(self._waiting) > lag:
            step = self._waiting.popleft()
            if step.ready is not None:
                step.ready.synchronize()
            if _tries_rates(task.trainer):  # and is meant to find one that is too high
                continue
            self.epoch_steps += 1
            if not step.skipped:
                self.in_a_row = 0
            else:
                self._count(step, task)

    def _count(self, step: _Step, task: Task) -> None:
        self._last = step.parts
        self.in_a_row += 1
        self.skipped += 1
        self.epoch_skipped += 1
        if self.skipped <= REMEMBERED:
            images = from_all(task.trainer, named(step.parts, task.trainer))
            self.named.append({"epoch": step.epoch, "step": step.number, "images": images})
            if task.trainer.is_global_zero:
                log.warning(
                    f"step {step.number} of epoch {step.epoch} is skipped: its loss or gradient is not finite"
                    f"{_shown(images)}"
                )
        if self.in_a_row >= self.limit:
            reason = (
                f"{self.in_a_row} steps in a row had a loss or a gradient that is not finite "
                f"(optim.max_skipped_steps {self.limit}), up to step {step.number} of epoch {step.epoch}"
            )
            raise self._end(reason, task)

    def skipped_in_epoch(self, task: Task) -> int:
        """The skipped steps of the epoch until now."""
        self.settle(task)
        return self.epoch_skipped

    def end_epoch(self, task: Task) -> int:
        """The skipped steps of an epoch that is over; DivergedError if there are no others."""
        self.settle(task)
        steps, skipped, self.epoch_steps, self.epoch_skipped = self.epoch_steps, self.epoch_skipped, 0, 0
        if steps and steps == skipped:
            reason = f"no step of epoch {task.current_epoch} had a loss and a gradient that are finite"
            raise self._end(reason, task)
        return skipped

    def _end(self, reason: str, task: Task) -> DivergedError:
        fault = diagnose(task, self._last)
        images = fault.images or from_all(task.trainer, named(self._last, task.trainer))
        self.fault = {"what": fault.what, "images": images}
        found = f"First not finite: {fault.what}" if fault.what else "The last of them was of"
        return DivergedError(
            f"training ended: {reason}. {found}{_shown(images)}. Skipped steps changed no weight. {ADVICE}"
        )

    def record(self) -> dict[str, Any]:
        """What ``run.json`` says."""
        return {"count": self.skipped, "steps": self.named, "fault": self.fault}

    def state_dict(self) -> dict[str, Any]:
        """The counts, for a resumed run."""
        return {name: getattr(self, name) for name in COUNTS} | {"named": list(self.named)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from these counts, or from none."""
        self._waiting.clear()
        self._parts, self.doubt = [], 0.0
        self.named = list(state.get("named", []))
        for name in COUNTS:
            setattr(self, name, state.get(name, 0))


@contextmanager
def recorded_skips(task: Task, record: dict[str, Any]) -> Iterator[None]:
    """Put the skipped steps into a run's record, however the block ends."""
    try:
        yield
    finally:
        if task.guard.skipped:
            record["skipped_steps"] = task.guard.record()


def check_finite_state(task: Task, optimizer_states: Iterable[Mapping[str, Any]]) -> None:
    """Refuse (DivergedError) to save weights, their averages, or optimisers' states that are not finite."""
    states = (
        (f"the optimiser's {key}", value)
        for optimizer in optimizer_states
        for state in optimizer["state"].values()
        for key, value in state.items()
        if isinstance(value, Tensor)
    )
    bad = first_not_finite((*task.named_parameters(), *states))
    if bad is not None:
        raise DivergedError(
            f"training ended: {bad} holds numbers that are not finite. Such a state is not saved; what was "
            f"saved before is kept. {ADVICE}"
        )


def check_validation(task: Task) -> None:
    """End training (DivergedError) by a validation whose loss is not finite; any other is as it is."""
    trainer = task.trainer
    if trainer.state.fn == "fit" and not math.isfinite(loss := float(task.validated()["loss"])):
        fault = diagnose_validation(task)
        found = f" First not finite: {fault.what}{_shown(fault.images)}." if fault.what else ""
        raise DivergedError(
            f"training ended: the validation of epoch {task.current_epoch} has the loss {loss}.{found} Its "
            f"model is not kept; the best before it, if there was one, is. {ADVICE}"
        )


def clip_gradient(optimizer: Optimizer, clip_val: float | None, algorithm: str | None) -> Tensor:
    """Clip what the optimiser steps by, as Lightning's arguments say; gives the norm before that."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if clip_val and algorithm != "value":
        return torch.nn.utils.clip_grad_norm_(params, clip_val)
    norm = torch.nn.utils.get_total_norm(p.grad for p in params if p.grad is not None)
    if clip_val:
        torch.nn.utils.clip_grad_value_(params, clip_val)
    return norm


def reads_for_free(task: Task) -> bool:
    """Whether the host waits for each step anyway, or no device is ahead of it that could be waited for."""
    scaler = getattr(task.trainer.precision_plugin, "scaler", None)
    return scaler is not None or task.device.type != "cuda"


def _shown(images: list[str]) -> str:
    more = f" and {len(images) - SHOWN:,} more" if len(images) > SHOWN else ""
    return f": {', '.join(images[:SHOWN])}{more}" if images else ""


def _tries_rates(trainer: Trainer) -> bool:
    return any(isinstance(callback, _LRCallback) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def _takes_flag(optimizer: Optimizer) -> bool:
    """Whether it leaves all as it is where its ``found_inf`` is 1."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _changing(optimizer: Optimizer, params: Iterable[Tensor]) -> Iterator[tuple[tuple[Tensor, str], Tensor]]:
    for p in params:
        yield (p, ""), p
        yield from (((p, key), value) for key, value in optimizer.state.get(p, {}).items())


def _settings(optimizer: Optimizer) -> str:
    """What is in the groups beside the parameters."""
    return str([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])


def _can_be_put_back(optimizer: Optimizer, settings: str) -> bool:
    """Whether a step changes nothing but tensors that are where the parameters are."""
    return settings == _settings(optimizer) and all(
        isinstance(value, Tensor) and value.device == p.device
        for p, state in optimizer.state.items()
        for value in state.values()
    )

"""Why a training ended for want of memory, and with which settings it may go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vit_cls.environment import is_out_of_memory, start_of
from vit_cls.errors import RunError, VitClsError


@contextmanager
def named_failures(*, batch_size: int, accumulate: int, img_size: tuple[int, int]) -> Iterator[None]:
    """Say in one paragraph what ended for want of memory, with numbers that may do.

    Args:
        batch_size: Images of a batch.
        accumulate: Batches of an optimiser step.
        img_size: Of the model's input, pixels.

    Raises:
        RunError: In place of what torch raises.
    """
    try:
        yield
    except (RuntimeError, OSError, MemoryError) as error:
        if isinstance(error, VitClsError):
            raise
        if is_out_of_memory(error):
            raise RunError(_out_of_memory(error, batch_size, accumulate, img_size)) from error
        raise


def _out_of_memory(error: BaseException, batch_size: int, accumulate: int, img_size: tuple[int, int]) -> str:
    pixels = "x".join(map(str, img_size))
    said = f" ({start_of(error)})" if str(error) else ""
    told = f"the memory is not enough for data.batch_size {batch_size} at {pixels} pixels{said}. "
    factor = next((i for i in range(2, batch_size + 1) if batch_size % i == 0), None)
    if factor is not None:
        told += (
            f"Try data.batch_size {batch_size // factor} with trainer.accumulate_grad_batches "
            f"{accumulate * factor} (now {batch_size} and {accumulate}): as many images a step, so the same "
            "learning rate suits. "
        )
    return (
        f"{told}model.grad_checkpointing true keeps less of each image, for a slower step; smaller images "
        "(model.img_size) or a smaller model (model.name) need less too."
    )

"""Which number of a training step is the first that is not finite, and for which images."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed
from lightning.pytorch import Trainer
from torch import Tensor, nn

from vit_cls.data.datamodule import ImageDataModule
from vit_cls.data.dataset import ImageSource, collate
from vit_cls.model.classifier import ImageClassifier
from vit_cls.training.batches import images_and_targets

log = logging.getLogger("vit_cls")

Task = Any
"""A `ClassificationTask`, whose file imports this one."""


class Part(NamedTuple):
    """A batch of a step."""

    number: int
    """In its epoch."""
    indices: Tensor | None
    """Of its images, where the loader is ours; they are where the images were."""
    batch: Any
    """Of anybody's loader, as long as it is kept."""


class Fault(NamedTuple):
    """What is not finite, and the images for which it is so, as far as that can be told."""

    what: str
    images: list[str]


def diagnose(task: Task, parts: list[Part]) -> Fault:
    """Compute the batches of a step again, in each process its own; gives the first fault of all of them.

    Where a batch is of our own loader its images are read again, as they were in this epoch.
    """
    fault = _fault_of_weights(task.classifier)
    try:
        for part in parts:
            if not fault.what and (batch := _again(part, task)) is not None:
                fault = _fault_of_step(task, batch, part)
    except Exception as error:  # the other processes wait, and the reason of the end is another
        log.debug(f"the last step could not be computed again: {error}")
    faults = [Fault(*found) for found in from_all(task.trainer, [fault])]
    return next((found for found in faults if found.what), fault)


def diagnose_validation(task: Task) -> Fault:
    """Compute validation images again, as far as our own data has them, up to the first fault."""
    classifier, data = task.kept_classifier, task.trainer.datamodule
    fault = _fault_of_weights(classifier)
    images = len(data.val_set) if isinstance(data, ImageDataModule) and not fault.what else 0
    for start in range(0, images, data.batch_size if images else 1):
        batch = collate([data.val_set[0, i] for i in range(start, min(start + data.batch_size, images))])
        if not len(batch.targets):  # none could be read
            continue
        with torch.no_grad(), _outputs(task, classifier) as bad_outputs:
            logits = classifier(batch.images.to(task.device))
        fault = _fault_of_outputs(logits, bad_outputs, _paths(data.val_source, batch.indices))
        if fault.what:
            break
    return fault


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first that holds NaN or an infinite number; one look at each device."""
    places: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            places.setdefault(tensor.device, []).append((name, tensor.detach()))
    for pairs in places.values():
        norms = torch._foreach_norm([tensor for _, tensor in pairs], float("inf"))
        finite = torch.stack([norm.float() for norm in norms]).isfinite()
        if not finite.all():
            return pairs[int(finite.logical_not().nonzero()[0])][0]
    return None


def is_finite(module: nn.Module) -> bool:
    """Whether all weights of a model are; one look at its device."""
    return first_not_finite(module.named_parameters()) is None


def named(parts: Iterable[Part], trainer: Trainer) -> list[str]:
    """Paths of the images, or the number of the batch, where the loader is not ours."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    names: list[str] = []
    for part in parts:
        if part.indices is None or not isinstance(data, ImageDataModule):
            names.append(f"batch {part.number}")
        else:
            names += _paths(data.train_source, part.indices)
    return names


def _paths(source: ImageSource, indices: Tensor) -> list[str]:
    return [str(source.index.path(i)) for i in indices.tolist()]


def from_all(trainer: Trainer, values: list[Any]) -> list[Any]:
    """Those of all processes, in order; each must call this."""
    if trainer.world_size == 1:
        return values
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, values)
    return [value for of_process in gathered for value in of_process]


def _again(part: Part, task: Task) -> tuple[Tensor, Tensor] | None:
    data = task.trainer.datamodule
    if part.batch is not None:
        return images_and_targets(part.batch)
    if part.indices is None or not isinstance(data, ImageDataModule):
        return None
    batch = collate([data.train_set[task.current_epoch, i] for i in part.indices.tolist()])
    return batch.images.to(task.device), batch.targets.to(task.device)


def _fault_of_weights(classifier: ImageClassifier) -> Fault:
    bad = first_not_finite(classifier.model.named_parameters())
    return Fault("" if bad is None else f"the weight {bad}", [])


def _fault_of_step(task: Task, batch: tuple[Tensor, Tensor], part: Part) -> Fault:
    model, names = task.classifier.model, named([part], task.trainer)
    with torch.enable_grad(), _outputs(task, task.classifier) as bad_outputs:
        logits, targets = task._logits(*batch, part.number)
        loss = task.loss(logits, targets)
    fault = _fault_of_outputs(logits, bad_outputs, names)
    if fault.what:
        return fault
    if not loss.isfinite():
        return Fault("the loss (the logits are finite)", names)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in trained], allow_unused=True)
    # A gradient comes from behind: the last parameter is the first that it reaches.
    pairs = [(name, g) for (name, _), g in zip(trained, gradients, strict=True) if g is not None]
    bad = first_not_finite(reversed(pairs))
    return Fault("" if bad is None else f"the gradient of {bad}", names)


@contextmanager
def _outputs(task: Task, classifier: ImageClassifier) -> Iterator[list[str]]:
    """The modules whose output is not finite in the block, in the order in which they end."""
    bad: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(task.trainer.precision_plugin.forward_context())
        for name, module in classifier.model.named_modules():

            def look(_: Any, inputs: Any, output: Any, name: str = name) -> None:
                if isinstance(output, Tensor) and not _is_usable(output).all():
                    bad.append(name)

            stack.callback(module.register_forward_hook(look).remove)
        yield bad


def _fault_of_outputs(logits: Tensor, bad_outputs: list[str], names: list[str]) -> Fault:
    usable = _is_usable(logits).all(dim=1)
    if not bad_outputs and usable.all():
        return Fault("", [])
    where = f"the output of {bad_outputs[0]}" if bad_outputs and bad_outputs[0] else "the logits"
    rows = usable.logical_not().nonzero().flatten().tolist()
    return Fault(where, [names[i] for i in rows] if rows and len(names) == len(logits) else names)


def _is_usable(values: Tensor) -> Tensor:
    """Minus infinity masks."""
    return values < float("inf")

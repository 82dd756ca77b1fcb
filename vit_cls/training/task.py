"""The LightningModule: one training step and its loss, one validation step, and the optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassStatScores

from vit_cls.data.dataset import Batch
from vit_cls.data.mixing import UNMIXED, MixedTargets, MixOptions, mix_batch
from vit_cls.data.sampler import sample_seed
from vit_cls.errors import DataError
from vit_cls.model.classifier import ImageClassifier
from vit_cls.training.optim import Freezer, make_optimizer, make_schedule
from vit_cls.training.options import BACKBONE, OptimOptions
from vit_cls.weights.bundle import CHECKPOINT_KEY, FORMAT_VERSION

RNG_KEY = "vit_cls_rng"


@dataclass(frozen=True)
class Schedule:
    """How long a run is, in optimiser steps, and its peak learning rate."""

    steps_per_epoch: int
    total_steps: int
    lr: float


class ClassificationTask(LightningModule):
    """Train an image classifier with cross entropy, and count what it gets right.

    Nothing in the training step waits for the device: the loss is logged as a tensor and read when a
    logger or the progress bar asks for it.

    Args:
        classifier: What is trained; takes uint8 images.
        optim: Settings of loss and optimiser.
        schedule: Steps and peak learning rate.
        mix: What is done to whole batches after normalisation.
        class_weights: Weight of each class in the loss; None weighs all alike.
        seed: Seed of the batches' mixing.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        classifier: ImageClassifier,
        optim: OptimOptions,
        schedule: Schedule,
        *,
        mix: MixOptions = UNMIXED,
        class_weights: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.optim = optim
        self.freezer = Freezer(classifier.model, optim.freeze)
        self.mix = mix
        self.seed = seed
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.schedule = schedule
        classes = len(classifier.class_names)
        # validate_args would copy every batch's targets to the host to look at them
        self.val_counts = MulticlassStatScores(classes, average=None, validate_args=False)
        self.val_acc5 = MulticlassAccuracy(
            classes, top_k=min(5, classes), average="micro", validate_args=False
        )

    def train(self, mode: bool = True) -> ClassificationTask:
        """Training mode for what is trained; what is frozen stays in evaluation mode."""
        super().train(mode)
        if hasattr(self, "freezer"):  # Lightning calls this while the object is being made
            self.freezer.set_eval()
        return self

    def on_train_epoch_start(self) -> None:
        """Begin with the head alone where that was asked for, then train all."""
        wanted = BACKBONE if self.current_epoch < self.optim.head_first_epochs else self.optim.freeze
        if self.freezer.current != wanted:
            self.freezer.set(wanted)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor | None:
        """Mean cross entropy of a batch of uint8 images and targets; None where no image could be read.

        Raises:
            DataError: If that happens to one of several processes, which would wait for it in vain.
        """
        size = len(batch.targets)
        if size == 0:
            if self.trainer.world_size > 1:
                raise DataError(
                    "no image of a batch could be read; with several processes that ends the run."
                )
            return None
        loss = self._loss(batch, batch_index)
        self.log("train/loss_step", loss.detach(), prog_bar=True, batch_size=size)
        self.log("train/loss", loss.detach(), on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        return loss

    def _loss(self, batch: Batch, batch_index: int) -> Tensor:
        smoothing, weights = self.optim.label_smoothing, self.class_weights
        if self.mix == UNMIXED:
            logits = self.classifier(batch.images)
            return F.cross_entropy(logits, batch.targets, weight=weights, label_smoothing=smoothing)
        images = self.classifier.normalise(batch.images)
        key = sample_seed(self.seed, self.current_epoch, batch_index, 1 + self.trainer.global_rank)
        images, targets = mix_batch(images, batch.targets, self.mix, key=key)
        logits = self.classifier.model(images)
        return mixed_cross_entropy(logits, targets, label_smoothing=smoothing, class_weights=weights)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Count one batch."""
        if not len(batch.targets):  # none could be read
            return
        logits = self.classifier(batch.images).float()
        self.val_counts.update(logits, batch.targets)
        self.val_acc5.update(logits, batch.targets)
        loss = F.cross_entropy(logits, batch.targets)
        size = len(batch.targets)
        self.log("val/loss", loss, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Log the counts and the accuracies that follow from them."""
        counts = self.val_counts.compute()
        right, support = counts[:, 0].float(), counts[:, 4].float()
        correct, images = right.sum(), support.sum()
        self.log("val/correct", correct)
        self.log("val/images", images)
        self.log("val/acc1", correct / images, prog_bar=True)
        present = support > 0
        self.log("val/balanced_acc1", (right / support.clamp_min(1)).sum() / present.sum())
        self.log("val/acc5", self.val_acc5.compute())
        self.val_counts.reset()
        self.val_acc5.reset()

    def configure_optimizers(self) -> Any:
        """The optimiser, and a learning rate that changes with every step."""
        # fp16's loss scaler would unscale inside a fused step, after our clipping
        fused = self.device.type in ("cpu", "cuda") and self.trainer.precision != "16-mixed"
        schedule = self.schedule
        optimizer = make_optimizer(self.classifier.model, self.optim, lr=schedule.lr, fused=fused)
        scheduler = make_schedule(
            optimizer, self.optim, steps_per_epoch=schedule.steps_per_epoch, total_steps=schedule.total_steps
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer's ``gradient_clip_val`` and ``gradient_clip_algorithm`` say.

        Lightning's own refuses fused optimisers under bf16, where nothing needs unscaling.
        """
        if not gradient_clip_val:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        else:
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the model, and the generators that dropout and drop path draw from."""
        checkpoint[CHECKPOINT_KEY] = {"format_version": FORMAT_VERSION, **self.classifier.to_metadata()}
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        checkpoint[RNG_KEY] = {"cpu": torch.get_rng_state(), "cuda": cuda}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the generators back where they were."""
        rng = checkpoint[RNG_KEY]
        self._rng = rng

    def on_train_start(self) -> None:
        """After a resume, continue the random draws; set last, since loading draws too."""
        rng = getattr(self, "_rng", None)
        if rng is not None:
            torch.set_rng_state(rng["cpu"])
            if rng["cuda"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(rng["cuda"], self.device)


def mixed_cross_entropy(
    logits: Tensor,
    targets: MixedTargets,
    *,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Mean cross entropy, weighted by class, each image counted for its two classes by their shares.

    With a share of 1 it is what `torch.nn.functional.cross_entropy` gives for ``first``.

    Example:
        >>> import torch
        >>> logits, first = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
        >>> mixed = MixedTargets(first, 1 - first, torch.tensor([0.5]))
        >>> round(mixed_cross_entropy(logits, mixed).item(), 4)
        1.1269
    """
    total = logits.new_zeros(())
    weight = logits.new_zeros(())
    for classes, share in ((targets.first, targets.share), (targets.second, 1 - targets.share)):
        loss = F.cross_entropy(
            logits, classes, weight=class_weights, label_smoothing=label_smoothing, reduction="none"
        )
        total = total + (share * loss).sum()
        weight = weight + (share if class_weights is None else share * class_weights[classes]).sum()
    return total / weight

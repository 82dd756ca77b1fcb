"""The LightningModule: one training step and its loss, validation, and the optimiser."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric

from vit_cls.data.mixing import UNMIXED, MixOptions, mix_batch
from vit_cls.data.sampler import sample_seed
from vit_cls.errors import ConfigError, DataError
from vit_cls.model.classifier import ImageClassifier
from vit_cls.training import guards
from vit_cls.training.batches import batch_size_of, images_and_targets
from vit_cls.training.ema import Ema, auto_decay, warm_decay
from vit_cls.training.epoch_loss import EpochLoss
from vit_cls.training.generators import generator_states, set_generator_states
from vit_cls.training.length import schedule_of
from vit_cls.training.losses import GivenLoss, OwnLoss, Targets, make_loss
from vit_cls.training.optim import Freezer, Schedule, make_optimizer, make_schedule
from vit_cls.training.options import AUTO, BACKBONE, OptimOptions
from vit_cls.training.validation import Validation, better_of
from vit_cls.weights.bundle import CHECKPOINT_KEY, EMA, FORMAT_VERSION, KEPT, RAW, load_classifier
from vit_cls.weights.families import recipe_of

log = logging.getLogger("vit_cls")

RNG_KEY = "vit_cls_rng"
GUARD_KEY = "vit_cls_guard"
LOSS_KEY = "vit_cls_epoch_loss"


class ClassificationTask(LightningModule):
    """Train an image classifier, and count what it gets right, in anybody's ``Trainer``.

    A batch is ``(images, targets)``, uint8 ``(batch, channels, height, width)`` and int64 ``(batch,)``, or
    the record that `vit_cls.data.datamodule.ImageDataModule` makes. Nothing in the training step waits for
    the device: the loss is logged as a tensor and read when a logger or the progress bar asks for it. With
    ``accumulate_grad_batches`` or several processes the gradient of a step is the mean over all its images.
    A step whose loss or gradient is not finite is skipped, `guard` counts it, and ``optim.max_skipped_steps``
    of them in a row, or a validation that is not finite, end training with a DivergedError.

    Logged: ``train/loss``; ``val/loss``, ``val/acc1``, ``val/acc5``, ``val/balanced_acc1``, ``val/correct``,
    ``val/images`` and ``val/NAME`` of each metric; likewise ``test/``. With ``optim.ema_decay`` ``val/`` is
    of the weights that did better, raw or averaged, and ``test/`` of those; ``val/raw_acc1``,
    ``val/raw_loss``, ``val/ema_acc1`` and ``val/ema_loss`` are of each, ``val/kept_ema`` says which.

    Args:
        classifier: What is trained; takes uint8 images.
        optim: Settings of loss and optimiser; None is the defaults.
        schedule: Steps and peak learning rate; None counts them from the trainer when training begins.
        mix: What is done to whole batches after normalisation.
        loss: Your own, instead of ``optim.loss``: from logits and classes (shares of the classes where
            batches are mixed) to the mean over the images.
        metrics: More of validation and test, by name: torchmetrics that take logits and classes and compute
            one number.
        class_weights: Weight of each class in the loss; None weighs all alike.
        seed: Seed of the batches' mixing.

    Raises:
        ConfigError: If the classifier has no head, or the settings cannot take effect.

    Example:
        >>> from vit_cls.model.classifier import Preprocess
        >>> from vit_cls.model.presets import preset_config
        >>> from vit_cls.model.vit import VisionTransformer
        >>> model = VisionTransformer(preset_config("vit_pico_patch7_28", num_classes=2))
        >>> task = ClassificationTask(ImageClassifier(model, Preprocess((28, 28)), ["cat", "dog"]))
        >>> task(torch.zeros(4, 3, 28, 28, dtype=torch.uint8)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        classifier: ImageClassifier,
        optim: OptimOptions | None = None,
        schedule: Schedule | None = None,
        *,
        mix: MixOptions = UNMIXED,
        loss: OwnLoss | None = None,
        metrics: Mapping[str, Metric] | None = None,
        class_weights: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        optim = (optim or OptimOptions()).resolved(recipe_of(classifier.weights_source))
        if not classifier.class_names:
            raise ConfigError(
                "the classifier has no head to train. Make one with num_classes and class_names."
            )
        self.classifier = classifier
        self.optim = optim
        self.freezer = Freezer(classifier.model, optim.freeze)
        self.mix = mix
        self.seed = seed
        if loss is None:
            self.loss = make_loss(
                optim.loss, label_smoothing=optim.label_smoothing, class_weights=class_weights
            )
        else:
            self.loss = GivenLoss(loss)
        self.schedule = schedule
        self.lr = None if schedule is None else schedule.lr
        """Peak learning rate; what Lightning's ``LearningRateFinder`` sets."""
        self.guard = guards.StepGuard(optim.max_skipped_steps)
        self.ema = None if optim.ema_decay is None else Ema(classifier)
        classes = len(classifier.class_names)
        self.validation = Validation(classes, metrics or {})
        self.ema_validation = None if self.ema is None else Validation(classes, metrics or {})
        self.kept = RAW
        """The weights that the last validation found better: ``raw`` or ``ema``."""
        self.epoch_loss = EpochLoss()
        self._resumed: dict[str, Any] | None = None
        self._validated: dict[str, Tensor] | None = None
        self._batch_weight = 1.0
        self._step_weight: float | Tensor = 0.0
        self._counted: Schedule | None = None
        self._configured_lr: float | None = None
        self.save_hyperparameters({**dataclasses.asdict(optim), **dataclasses.asdict(mix), "seed": seed})

    @property
    def kept_classifier(self) -> ImageClassifier:
        """The one that the last validation found better; the raw one before any."""
        return self.ema.classifier if self.kept == EMA and self.ema is not None else self.classifier

    def forward(self, images: Tensor) -> Tensor:
        """Images, uint8, ``(batch, channels, height, width)``, to logits, ``(batch, classes)``."""
        return self.classifier(images)

    def train(self, mode: bool = True) -> ClassificationTask:
        """Training mode for what is trained; what is frozen stays in evaluation mode."""
        super().train(mode)
        if hasattr(self, "freezer"):  # Lightning calls this while the object is being made
            self.freezer.set_eval()
        return self

    def on_fit_start(self) -> None:
        """Begin with the ``lr`` that Lightning's LearningRateFinder has set, by layer and schedule.

        Averaged and frozen parts are in evaluation mode on purpose: Lightning would warn of them.
        """
        if self.lr is not None and self.lr != self._configured_lr:
            self.trainer.strategy.setup_optimizers(self.trainer)
        if self.ema is not None or self.freezer.current is not None:
            warnings.filterwarnings("ignore", message=".*module.s. in eval mode at the start of training.*")

    def on_train_start(self) -> None:
        """After a resume, continue the random draws; set last, since loading draws too."""
        self._choose_trained()  # a run that goes on within an epoch has no start of one
        if self._resumed is not None:
            set_generator_states(self._resumed[RNG_KEY], self.device)
            if LOSS_KEY in self._resumed:
                self.epoch_loss.load_state_dict(self._resumed[LOSS_KEY], self.trainer)
            self._resumed = None
        size = torch.tensor(float(batch_size_of(self.trainer.train_dataloader) or 1), device=self.device)
        self._batch_weight = float(self.trainer.strategy.reduce(size, reduce_op="max"))
        steps = self.trainer.estimated_stepping_batches
        if self.schedule is not None and steps > self.schedule.total_steps:
            log.warning(
                f"the learning rate ends after {self.schedule.total_steps} steps, as the Schedule says, and "
                f"the Trainer makes {steps}: the rest runs at the last rate. Without a Schedule the task "
                "counts by itself."
            )

    def on_train_epoch_start(self) -> None:
        """Begin with the head alone where that was asked for, then train all."""
        self.epoch_loss.begin()
        self._choose_trained()

    def _choose_trained(self) -> None:
        wanted = BACKBONE if self.current_epoch < self.optim.head_first_epochs else self.optim.freeze
        if self.freezer.current != wanted:
            self.freezer.set(wanted)

    def on_train_epoch_end(self) -> None:
        """Log the mean loss, to loggers at once, so that they have it before the epoch's checkpoint; and the
        skipped steps, if there were any.
        """
        if skipped := self.guard.end_epoch(self):
            self.log("train/skipped_steps", float(skipped))
        loss = self.epoch_loss.mean(self.trainer)
        if loss is None:
            return
        self.log("train/loss", loss, on_step=False, on_epoch=True, logger=False)
        told = {"train/loss": float(loss), "epoch": self.current_epoch}
        for logger in self.trainer.loggers:
            logger.log_metrics(told, step=self.trainer.fit_loop.epoch_loop._batches_that_stepped - 1)

    def training_step(self, batch: Any, batch_index: int) -> Tensor | None:
        """The loss of a batch, to be averaged over the images of the step; None where it holds no image.

        Raises:
            DataError: If that happens to one of several processes, which would wait for it in vain.
        """
        images, targets = images_and_targets(batch)
        size = len(targets)
        if size == 0:
            if self.trainer.world_size > 1:
                raise DataError(
                    "no image of a batch could be read; with several processes that ends the run."
                )
            return None
        if rank := self.trainer.global_rank:  # its own dropout; process 0 draws like a run of one process
            torch.manual_seed(sample_seed(self.seed, -2 - self.current_epoch, batch_index, rank))
        logits, mixed = self._logits(images, targets, batch_index)
        loss = self.loss(logits, mixed)
        self.guard.add(loss, batch, batch_index)
        self.log("train/loss_step", loss.detach(), prog_bar=True, batch_size=size)
        self.epoch_loss.add(loss, size)
        if not self._step_is_several_batches():
            return loss
        weight = self.loss.weight(mixed)
        self._step_weight = self._step_weight + weight
        return loss * (weight / self._batch_weight)

    def _logits(self, images: Tensor, targets: Tensor, batch_index: int) -> tuple[Tensor, Targets]:
        if self.mix == UNMIXED:
            return self.classifier(images), targets
        key = sample_seed(self.seed, self.current_epoch, batch_index, 1 + self.trainer.global_rank)
        pixels, mixed = mix_batch(self.classifier.normalise(images), targets, self.mix, key=key)
        return self.classifier.model(pixels), mixed

    def _step_is_several_batches(self) -> bool:
        return self.trainer.accumulate_grad_batches > 1 or self.trainer.world_size > 1

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the sum of the batches' gradients, each by what its images weigh, the mean over all images.

        Lightning divides by the number of batches and DDP by that of the processes, however large each batch
        is, and an epoch's last step by batches that it does not have.
        """
        if not self._step_is_several_batches():
            return
        trainer = self.trainer
        batches = trainer.accumulate_grad_batches * trainer.world_size
        weight: float | Tensor = self._step_weight
        if trainer.world_size > 1:
            weight = weight if isinstance(weight, Tensor) else torch.full((), weight, device=self.device)
            # NaN in all processes where the loss of one is not finite
            weight = trainer.strategy.reduce(weight + self.guard.doubt, reduce_op="sum")
        factor = batches * self._batch_weight / weight
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if grads:
            torch._foreach_mul_(grads, factor)
        self._step_weight = 0.0

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, unless loss or gradient is not finite, and let the average of the weights follow."""
        update = partial(super().optimizer_step, *args, **kwargs)
        skipped = self.guard.step(update, self, self.trainer.optimizers[0])
        if self.ema is not None:
            step = self.trainer.global_step + 1  # it is counted after this hook
            self.ema.update(self.classifier, warm_decay(self._ema_decay(), step), skipped=skipped)

    def _ema_decay(self) -> float:
        decay = self.optim.ema_decay
        if decay != AUTO:
            assert isinstance(decay, float | int)
            return decay
        schedule = self.schedule or self._counted
        assert schedule is not None  # since the optimizers were configured
        return auto_decay(schedule.total_steps)

    def on_validation_epoch_start(self) -> None:
        """Begin to count."""
        self._validated = None

    def validation_step(self, batch: Any, batch_index: int) -> None:
        """Count one batch."""
        images, targets = images_and_targets(batch)
        if not len(targets):  # none could be read
            return
        self.validation.update(self.classifier(images).float(), targets)
        if self.ema is not None and self.ema_validation is not None:
            self.ema_validation.update(self.ema(images).float(), targets)

    def test_step(self, batch: Any, batch_index: int) -> None:
        """Count one batch, by the weights that the last validation kept: a test chooses nothing."""
        images, targets = images_and_targets(batch)
        if len(targets):
            self.validation.update(self.kept_classifier(images).float(), targets)

    def predict_step(self, batch: Any, batch_index: int = 0) -> Tensor:
        """Logits, float32, ``(batch, classes)``, of a batch, or of images alone."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self.kept_classifier(images).float()

    def validated(self) -> dict[str, Tensor]:
        """What the validation found that has just gone through its batches, over all processes.

        The names are those of the log, without ``val/``.
        """
        if self._validated is None:
            found = self.validation.compute()
            if self.ema_validation is not None:
                self.kept, found = better_of(found, self.ema_validation.compute())
            self._validated = found
        return self._validated

    def on_validation_epoch_end(self) -> None:
        """Log what was found."""
        for name, value in self.validated().items():
            self.log(f"val/{name}", value, prog_bar=name == "acc1")
        guards.check_validation(self)

    def on_test_epoch_end(self) -> None:
        """Log what was found."""
        self.log_dict({f"test/{name}": value for name, value in self.validation.compute().items()})

    def configure_optimizers(self) -> Any:
        """The optimiser, and a learning rate that changes with every step."""
        # fp16's loss scaler would unscale inside a fused step, after our clipping
        fused = self.device.type in ("cpu", "cuda") and self.trainer.precision != "16-mixed"
        schedule = self.schedule
        if schedule is None:
            schedule = self._counted = schedule_of(self.trainer, self.optim)
        lr = self._configured_lr = schedule.lr if self.lr is None else self.lr
        optimizer = make_optimizer(self.classifier.model, self.optim, lr=lr, fused=fused)
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
        """Clip as the trainer's ``gradient_clip_val`` and ``gradient_clip_algorithm`` say; judge the step.

        Lightning's own refuses fused optimisers under bf16, where nothing needs unscaling.
        """
        norm = guards.clip_gradient(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.guard.judge(optimizer, norm, free=guards.reads_for_free(self))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the model, and the generators that dropout and drop path draw from.

        DivergedError if the state is not finite.
        """
        self.guard.settle(self)
        guards.check_finite_state(self, checkpoint.get("optimizer_states", []))
        metadata = self.classifier.to_metadata()
        checkpoint[CHECKPOINT_KEY] = {"format_version": FORMAT_VERSION, **metadata, KEPT: self.kept}
        checkpoint[RNG_KEY] = generator_states(self.device)
        checkpoint[LOSS_KEY] = self.epoch_loss.state_dict(self.trainer)
        checkpoint[GUARD_KEY] = self.guard.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the generators back where they were, what was kept, and the skipped steps."""
        self.guard.load_state_dict(checkpoint.get(GUARD_KEY, {}))
        self._resumed = {key: checkpoint[key] for key in (RNG_KEY, LOSS_KEY) if key in checkpoint}
        self.kept = checkpoint.get(CHECKPOINT_KEY, {}).get(KEPT, RAW)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's asks for what the file holds
        cls, checkpoint_path: str | Path, **arguments: Any
    ) -> ClassificationTask:
        """The task of a checkpoint, its classifier rebuilt from the file alone, on the CPU.

        Args:
            checkpoint_path: A ``.ckpt`` of any run of this task.
            arguments: Of the constructor, where they are not the defaults: loss, metrics, class weights.

        Raises:
            ModelFileError: If the file is missing, damaged, or not of this task.
        """
        classifier = load_classifier(checkpoint_path, which=RAW)
        checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)  # checked just before
        given = checkpoint.get("hyper_parameters", {})
        optim = {f.name: given[f.name] for f in dataclasses.fields(OptimOptions) if f.name in given}
        mix = {f.name: given[f.name] for f in dataclasses.fields(MixOptions) if f.name in given}
        settings = {"optim": OptimOptions(**optim), "mix": MixOptions(**mix), "seed": given.get("seed", 0)}
        task = cls(classifier, **{**settings, **arguments})
        task.load_state_dict(checkpoint["state_dict"])
        task.kept = checkpoint[CHECKPOINT_KEY].get(KEPT, RAW)
        return task

"""What a user sets for one training run; the command line and YAML become these dataclasses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from vit_cls.checks import check_choice, check_finite, check_range
from vit_cls.data.transforms import CHANNELS
from vit_cls.errors import ConfigError
from vit_cls.model.classifier import ImageClassifier
from vit_cls.own_code import HINT
from vit_cls.training.losses import LOSSES
from vit_cls.training.optimizers import OPTIMIZERS
from vit_cls.training.validation import VAL_METRICS
from vit_cls.weights.factory import architecture_of, create_classifier
from vit_cls.weights.families import Recipe, recipe_of
from vit_cls.weights.loading import MAX_FRESH

BACKBONE = "backbone"
AUTO = "auto"
"""What suits the family of the weights (`vit_cls.weights.families`)."""


@dataclass(frozen=True)
class ModelOptions:
    """The architecture, its weights, what its head reads, and changes; null keeps what the name stands for.

    Args:
        name: An architecture of ``vit-cls models``, or ``architecture.tag``; ``auto`` takes that of the
            weights, where they say it themselves (a run, a model of transformers, an export for timm).
        pretrained: Weights to start from: true (those of the tag, from the hub's cache or the hub), a tag, a
            file or a folder; null starts from fresh ones.
        pool: What the head reads: ``cls``, ``gap``, ``max``, ``token:K`` (patch K in raster order),
            ``cls+gap``, ``map``, ``avgmax``, ``gem``, ``lse``, ``seqpool``, ``abmil``, ``simpool``, ``ep:Q``,
            ``cait:K``, ``last:N``, ``multicls:K``, ``classtok``... (docs/poolings.md); null is the
            architecture's own.
        keep_head: Whether the head of the weights is kept where it has these classes, by name.
        head_init: A new head's weights: ``normal`` or ``zero``.
        max_fresh: Largest share of the encoder that the weights may lack, in [0, 1].
        img_size: Side of the input in pixels; divisible by the patch size.
        in_chans: Channels of the input: 3 is RGB; 1 is grey, ITU-R 601 luma of the decoded RGB.
        patch_size: Side of a patch in pixels.
        embed_dim: Width of a token; divisible by the number of heads.
        depth: Encoder blocks.
        num_heads: Attention heads in each block.
        mlp_ratio: Hidden width of the MLP over the width of a token.
        qk_norm: Whether queries and keys are normalised for each head.
        init_values: First value of LayerScale; null means no LayerScale.
        class_token: Whether a class token is prepended.
        reg_tokens: Register tokens.
        no_embed_class: Whether class and register tokens go without a position embedding.
        causal: Whether each token attends to itself and to what comes before it alone.
        class_position: Where class tokens stand for a causal model: ``first``, ``middle`` or ``last``.
        pos_embed: Positions: ``learn``, ``sincos2d`` (fixed) or ``none``.
        fc_norm: Whether the final norm stands after the pooling; null follows timm.
        drop_rate: Dropout before the head.
        pos_drop_rate: Dropout after the positions.
        proj_drop_rate: Dropout after the projections of attention and MLP.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0; ``auto`` suits the weights.
        grad_checkpointing: Whether training keeps of each block its input alone, and computes the block
            again for its gradient: less memory, more time (docs/speed.md).
        crop_pct: Side of the evaluation crop over the side of the resized image.
        crop_mode: Evaluation crop: ``center`` or ``squash``.
    """

    name: str = "vit_tiny_patch16_224"
    pretrained: bool | str | None = None
    pool: str | None = None
    keep_head: bool = True
    head_init: str = "normal"
    max_fresh: float = MAX_FRESH
    img_size: int | None = None
    in_chans: int | None = None
    patch_size: int | None = None
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_ratio: float | None = None
    qk_norm: bool | None = None
    init_values: float | None = None
    class_token: bool | None = None
    reg_tokens: int | None = None
    no_embed_class: bool | None = None
    causal: bool | None = None
    class_position: str | None = None
    pos_embed: str | None = None
    fc_norm: bool | None = None
    drop_rate: float | None = None
    pos_drop_rate: float | None = None
    proj_drop_rate: float | None = None
    attn_drop_rate: float | None = None
    drop_path_rate: float | str | None = None
    grad_checkpointing: bool = False
    crop_pct: float | None = None
    crop_mode: str | None = None

    def __post_init__(self) -> None:
        check_finite("model.", self)
        _check_auto("model.drop_path_rate", self.drop_path_rate)
        if self.in_chans not in (None, *CHANNELS):
            raise ConfigError(
                f"model.in_chans must be 3 (images are RGB) or 1 (they are made grey); got {self.in_chans}."
            )

    @property
    def pool_name(self) -> str:
        """What the head reads: the setting, or else the architecture's own."""
        return self.pool or architecture_of(self.name, self.pretrained).pool

    @property
    def recipe(self) -> Recipe:
        """How weights of this family are usually fine-tuned."""
        if not self.pretrained:
            return recipe_of(None)
        tag = "" if self.pretrained is True or Path(self.pretrained).exists() else f".{self.pretrained}"
        named = self.name != AUTO
        return recipe_of(f"{self.name}{tag}" if named else Path(str(self.pretrained)).name)

    def build(self, class_names: list[str], *, load_weights: bool = True) -> ImageClassifier:
        """A classifier, fresh weights drawn from torch's global generator.

        Args:
            load_weights: Whether pretrained weights are read; a resumed run has its own.

        Raises:
            ConfigError: If the settings do not make a model.
            ModelFileError: If the weights cannot be had, or do not fit.
        """
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None and k != "name"}
        if given.get("drop_path_rate") == AUTO:
            given["drop_path_rate"] = self.recipe.drop_path_rate
        checkpointing = given.pop("grad_checkpointing")
        classifier = create_classifier(self.name, class_names, load_weights=load_weights, **given)
        classifier.model.grad_checkpointing = checkpointing
        return classifier


def _check_auto(name: str, value: object) -> None:
    if isinstance(value, str) and value != AUTO:
        raise ConfigError(f"{name} must be a number or {AUTO}; got {value!r}.")


@dataclass(frozen=True)
class OptimOptions:
    """The optimiser with warm-up and cosine decay, and which part of the model it trains.

    Args:
        name: ``adamw``, or ``sgd``, whose momentum is ``beta1`` and whose decay is added to the gradient.
        base_lr_per_256_images: Peak learning rate for 256 images a step; scaled by the images of a step
            over all processes and accumulated batches; ``auto`` suits the weights.
        lr: Peak learning rate as it is, instead of the scaled one.
        min_lr_ratio: Last learning rate over the peak, in [0, 1].
        warmup_epochs: Linear warm-up; null means a tenth of the run, 5 epochs at most.
        weight_decay: Decoupled weight decay; never on norms, biases, tokens and positions.
        layer_decay: Factor of the learning rate from each layer to the one below, in (0, 1]; ``auto`` suits
            the weights.
        head_lr_ratio: Learning rate of head and pooling over that of the last layer.
        freeze: ``backbone`` trains head and pooling alone; a number freezes the embedding and that many
            blocks; null trains everything. What is frozen has no dropout and no drop path either.
        head_first_epochs: Epochs in which head and pooling are trained alone, before all the rest is.
        head_first_lr: Peak learning rate of those epochs.
        beta1: Decay of the gradient's average.
        beta2: Decay of the squared gradient's average.
        eps: Added to the denominator.
        loss: ``cross_entropy``; ``bce``, each class for itself; or a registered one of your own.
        label_smoothing: Probability mass spread over all classes, in [0, 1); an own loss does its own.
        class_weights: ``balanced`` weighs a class in the loss by the inverse of its training images; null
            weighs all alike.
        ema_decay: Decay of a running average of the weights, in [0, 1); it is validated beside the raw
            weights, and the better ones are kept. ``auto`` averages over a twentieth of the run; null is off.
        max_skipped_steps: Steps in a row whose loss or gradient is not finite, and that are skipped for it,
            at which training ends.

    Raises:
        ConfigError: If a value is out of range.
    """

    name: str = "adamw"
    base_lr_per_256_images: float | str = 5e-4
    lr: float | None = None
    min_lr_ratio: float = 0.01
    warmup_epochs: float | None = None
    weight_decay: float = 0.05
    layer_decay: float | str = 1.0
    head_lr_ratio: float = 1.0
    freeze: int | str | None = None
    head_first_epochs: int = 0
    head_first_lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    loss: str = "cross_entropy"
    label_smoothing: float = 0.1
    class_weights: str | None = None
    ema_decay: float | str | None = None
    max_skipped_steps: int = 10

    def __post_init__(self) -> None:
        check_choice("optim.name", self.name, OPTIMIZERS)
        check_choice("optim.loss", self.loss, LOSSES, hint=HINT)
        _check_auto("optim.ema_decay", self.ema_decay)
        if not isinstance(self.ema_decay, str):
            check_range("optim.ema_decay", self.ema_decay, at_least=0, below=1)
        _check_auto("optim.base_lr_per_256_images", self.base_lr_per_256_images)
        _check_auto("optim.layer_decay", self.layer_decay)
        for name in ("base_lr_per_256_images", "lr", "eps", "layer_decay", "head_lr_ratio", "head_first_lr"):
            value = getattr(self, name)
            check_range(f"optim.{name}", None if value == AUTO else value, above=0)
        for name in ("weight_decay", "warmup_epochs", "head_first_epochs"):
            check_range(f"optim.{name}", getattr(self, name), at_least=0)
        for name in ("label_smoothing", "beta1", "beta2"):
            check_range(f"optim.{name}", getattr(self, name), at_least=0, below=1)
        check_range("optim.max_skipped_steps", self.max_skipped_steps, at_least=1)
        check_range("optim.min_lr_ratio", self.min_lr_ratio, at_least=0, at_most=1)
        if not isinstance(self.layer_decay, str):
            check_range("optim.layer_decay", self.layer_decay, at_most=1)
        if self.class_weights not in (None, "balanced"):
            raise ConfigError(f"optim.class_weights must be balanced or null; got {self.class_weights!r}.")
        self._check_freeze()
        check_finite("optim.", self)

    def _check_freeze(self) -> None:
        if isinstance(self.freeze, str) and self.freeze != BACKBONE:
            raise ConfigError(f"optim.freeze must be {BACKBONE} or a number of blocks; got {self.freeze!r}.")
        if isinstance(self.freeze, int):
            check_range("optim.freeze", self.freeze, at_least=0)
        if self.freeze == BACKBONE and self.head_first_epochs:
            raise ConfigError(
                "optim.head_first_epochs has no effect with optim.freeze backbone: the head is trained "
                "alone in every epoch. Leave one of them out."
            )

    def resolved(self, recipe: Recipe) -> OptimOptions:
        """The same with the numbers of a recipe in place of ``auto``."""
        names = ("base_lr_per_256_images", "layer_decay")
        values = {name: getattr(recipe, name) for name in names if getattr(self, name) == AUTO}
        return dataclasses.replace(self, **values)


@dataclass(frozen=True)
class FitOptions:
    """Everything of a run that is neither the data nor Lightning's trainer.

    Args:
        model: The architecture.
        optim: The optimiser.
        seed: Seed of weights, split, order and augmentation.
        run_dir: The run folder; null means ``runs/NAME_POOL_N`` with the first free N.
        resume: ``auto`` continues ``run_dir`` if it was begun; a run folder continues that one.
        resume_changes: Keys that a resumed run changes on purpose, separated by commas, such as
            ``optim.weight_decay,data.augment``; its record then says so.
        early_stopping_patience: Stop when ``val/acc1`` has not improved for this many epochs; null never.
        compile: Whether the encoder's blocks are compiled.
        metrics: More of each validation: ``f1`` and ``auroc``, means over the classes, or
            registered ones of your own; columns ``val/NAME`` of ``metrics.csv``.
        logger: Where losses, metrics and hyperparameters go: ``tensorboard``, ``csv``, ``wandb``, ``mlflow``,
            several separated by commas; null is ``tensorboard``.

    Raises:
        ConfigError: If a value is out of range.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    seed: int = 0
    run_dir: str | None = None
    resume: str | None = None
    resume_changes: list[str] | str | None = None
    early_stopping_patience: int | None = None
    compile: bool = False
    metrics: list[str] | None = None
    logger: list[str] | str | None = None

    def __post_init__(self) -> None:
        if self.model.grad_checkpointing and self.optim.freeze == BACKBONE:
            raise ConfigError(
                "model.grad_checkpointing has no effect with optim.freeze backbone: no block has a gradient. "
                "Leave one of them out."
            )
        for name in self.metrics or []:
            check_choice("metrics", name, VAL_METRICS, hint=HINT)
        check_range("seed", self.seed, at_least=0, at_most=2**32 - 1)
        check_range("early_stopping_patience", self.early_stopping_patience, at_least=1)

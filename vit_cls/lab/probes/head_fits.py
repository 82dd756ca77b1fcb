"""Train a pooling and a linear classifier on frozen tokens; learning rate and epoch chosen on validation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_cls.checks import check_range
from vit_cls.errors import ConfigError, DivergedError
from vit_cls.lab.features import FrozenTokens
from vit_cls.lab.seeding import seeded
from vit_cls.model.classifier import ImageClassifier
from vit_cls.model.pooling import make_pooling, num_class_tokens
from vit_cls.model.pooling_base import Pooling, PoolingContext
from vit_cls.model.token_reader import TokenReader
from vit_cls.model.tokens import TokenLayout

LEARNING_RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
WEIGHT_DECAY = 0.01
"""Of the linear classifier; queries and the pooling's other weights have none."""
WARMUP = 0.05
"""Share of the steps over which the learning rate rises; then half a cosine down to zero."""
_EVAL_BATCH = 1024
QUERIES = (1, 2, 4, 8, 16, 32)
HEADS = ("cls", "gap", *(f"ep:{count}" for count in QUERIES))
IN_MEMORY = 1 << 28
"""Up to so many numbers (1 GB), normed tokens are kept; else they are normed batch by batch."""


class Tokens(Protocol):
    """Frozen tokens of some images, and their classes."""

    labels: np.ndarray
    """int64, shape ``(images,)``."""

    def rows(self, rows: np.ndarray | slice) -> Tensor:
        """Tokens of those images, float32, shape ``(rows, tokens, dim)``."""


class NormedTokens:
    """Frozen tokens of one layer after the final norm, by rows."""

    def __init__(self, frozen: FrozenTokens, layer: int) -> None:
        self.labels = frozen.labels
        self._frozen = frozen
        self._layer = layer
        size = len(frozen) * frozen.layout.num_tokens * frozen.embed_dim
        self._kept = torch.from_numpy(frozen.normed(layer)) if size <= IN_MEMORY else None

    def rows(self, rows: np.ndarray | slice) -> Tensor:
        """Tokens of those images, float32, shape ``(rows, tokens, dim)``."""
        if self._kept is not None:
            return self._kept[rows]
        return torch.from_numpy(self._frozen.normed(self._layer, rows))


@dataclass(frozen=True)
class HeadRecipe:
    """How every head is trained, the linear probe of the class token among them.

    Args:
        epochs: Passes over the training tokens, at least 1; the best one on validation is kept.
        batch_size: Images a step, at least 2.
        learning_rates: Peaks to choose from on validation.
        device: Where the heads are trained, such as ``cpu`` or ``cuda``; None means where the model runs.

    Raises:
        ConfigError: If a value is out of range.
    """

    epochs: int = 40
    batch_size: int = 128
    learning_rates: Sequence[float] = LEARNING_RATES
    device: str | None = None

    def __post_init__(self) -> None:
        check_range("--recipe.epochs", self.epochs, at_least=1)
        check_range("--recipe.batch_size", self.batch_size, at_least=2, hint="Batch statistics need two.")
        if not self.learning_rates:
            raise ConfigError("--recipe.learning_rates must be one or more numbers above 0; got none.")
        for rate in self.learning_rates:
            check_range("--recipe.learning_rates", rate, above=0)

    @property
    def where(self) -> str:
        """The device, and the CPU where none was named."""
        return self.device or "cpu"


@dataclass(frozen=True)
class HeadFit:
    """A head with the learning rate and the epoch that validation chose, and its answers.

    Args:
        val_accuracy: With what was chosen, in [0, 1]; chosen as the highest, so it flatters.
        params: Weights of the pooling and of the linear classifier.
        macs: Multiply-adds of both for one image, beyond the encoder's.
        tried: Best validation accuracy of every learning rate; 0 of one at which training diverged at once.
    """

    head: str
    learning_rate: float
    epoch: int
    val_accuracy: float
    preds: np.ndarray
    params: int
    macs: int
    tried: dict[float, float] = field(default_factory=dict)


class ProbeHead(nn.Module):
    """Standardise tokens, pool them, standardise the vector, classify it.

    Args:
        pooling: Reads its share of the tokens.
        mean: Of each token's channels over training images, shape ``(tokens, dim)``.
        std: Likewise, positive.

    Source:
        The norm without weights before the classifier: MAE's linear probe,
        https://arxiv.org/abs/2111.06377, appendix A.1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, pooling: Pooling, num_classes: int, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.pooling = pooling
        self.register_buffer("mean", mean[pooling.read])
        self.register_buffer("std", std[pooling.read])
        self.norm = nn.BatchNorm1d(pooling.out_dim, affine=False)
        self.classifier = nn.Linear(pooling.out_dim, num_classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """All tokens, ``(batch, tokens, dim)``, to logits, ``(batch, classes)``."""
        read = (tokens[:, self.pooling.read] - self.mean) / self.std
        return self.classifier(self.norm(self.pooling(read)))

    @property
    def params(self) -> int:
        """Weights of the pooling and the classifier."""
        return sum(p.numel() for p in self.parameters())

    @property
    def macs(self) -> int:
        """Multiply-adds for one image; sums, norms and the softmax are not counted."""
        return self.pooling.macs + self.classifier.weight.numel()


def token_statistics(tokens: Tokens, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over training images, patches pooled over their places.

    Only each kind of token (class token, a register, the patches) is standardised, so that patches still
    differ by where they stand.

    Returns:
        Two tensors of shape ``(tokens, dim)``; the second is 1 where a channel does not vary.
    """
    count = len(tokens.labels)
    total = square = torch.zeros(0)
    for start in range(0, count, _EVAL_BATCH):
        chunk = tokens.rows(slice(start, min(start + _EVAL_BATCH, count))).double()
        total = chunk.sum(0) + (total if start else 0)
        square = chunk.square().sum(0) + (square if start else 0)
    mean, square = total / count, square / count
    patches = slice(layout.num_prefix_tokens, None)
    for moment in (mean, square):
        moment[patches] = moment[patches].mean(dim=0)
    variance = (square - mean.square()).clamp(min=0)
    std = torch.where(variance > 1e-10 * square.clamp(min=1e-20), variance, 1.0).sqrt()
    return mean.float(), std.float()


def fit_head(
    head: str,
    context: PoolingContext,
    parts: tuple[Tokens, Tokens, Tokens],
    *,
    num_classes: int,
    recipe: HeadRecipe,
    seed: int,
) -> HeadFit:
    """Train one head with every learning rate, and let validation choose.

    Args:
        head: As in ``model.pool``.
        parts: Tokens to fit on, to choose on and to test on; the last are read once, by what was chosen.
        seed: Of first weights and of the order of images, the same for every learning rate and head.

    Raises:
        ConfigError: If the pooling is unknown, or reads what is not there.
        DivergedError: If training diverges at every learning rate.
    """
    train, val, test = parts
    statistics = token_statistics(train, context.layout)
    best: tuple[tuple[float, float], float, int, ProbeHead, dict[str, Tensor]] | None = None
    tried = {}
    for rate in recipe.learning_rates:
        with seeded(seed):
            model = ProbeHead(make_pooling(head, context), num_classes, *statistics).to(recipe.where)
        found = _train(model, train, val, rate, recipe, seed)
        tried[rate] = 0.0 if found is None else found[0][0]
        if found is None:
            continue
        score, epoch, state = found
        if best is None or score > best[0]:
            best = (score, rate, epoch, model, state)
    if best is None:
        raise DivergedError(
            f"the head {head} comes to numbers that are not finite at every learning rate tried "
            f"({', '.join(f'{rate:g}' for rate in recipe.learning_rates)}): look at the model's tokens."
        )
    score, rate, epoch, model, state = best
    model.load_state_dict(state)
    preds = _logits(model, test, recipe.where).argmax(dim=1).numpy()
    return HeadFit(head, rate, epoch, score[0], preds, model.params, model.macs, tried)


def heads_that_fit(heads: Sequence[str] | None, classifier: ImageClassifier) -> tuple[list[str], list[str]]:
    """The heads to train, the baseline first, and sentences about those that were left out.

    Args:
        heads: As the user wrote them; None means `HEADS`.

    Raises:
        ConfigError: If there are no heads, or one of them does not fit the model.
    """
    model, notes = classifier.model, []
    baseline = "cls" if model.layout.class_token else "gap"
    if heads is None:
        dim = model.config.embed_dim
        odd = [count for count in QUERIES if dim % count]
        heads = [head for head in HEADS if head not in {f"ep:{count}" for count in odd}]
        if odd:
            left_out = ", ".join(f"ep:{count}" for count in odd)
            notes.append(f"Left out: {left_out}, for the number of queries must divide the width, {dim}.")
        if baseline == "gap":
            heads = [head for head in heads if head != "cls"]
            notes.append("Left out: cls, for the model has no class token; gap is compared with instead.")
    if not heads:
        raise ConfigError(f"--heads must name at least one head, such as {', '.join(HEADS[:3])}; got none.")
    wanted = list(dict.fromkeys([baseline, *heads]))
    context = TokenReader(model, "--heads").context
    with seeded(0):  # building draws weights
        for head in wanted:
            check_pooling(head, make_pooling(head, context))
    return wanted, notes


def check_pooling(head: str, pooling: Pooling) -> None:
    """Refuse a pooling that needs more than the last layer's tokens, or another classifier.

    Raises:
        ConfigError: If it is one of those.
    """
    why = ""
    if pooling.per_class:
        why = "has a token for each class"
    elif pooling.num_layers > 1:
        why = "reads several blocks"
    elif num_class_tokens(head, 1) > 1:
        why = "reads several class tokens"
    if why:
        raise ConfigError(
            f"--heads {head} {why}, so it cannot be trained on the frozen tokens of one layer. Leave it "
            f"out, or train a model with --model.pool {head}."
        )


def _train(
    model: ProbeHead, train: Tokens, val: Tokens, rate: float, recipe: HeadRecipe, seed: int
) -> tuple[tuple[float, float], int, dict[str, Tensor]] | None:
    """The best (validation accuracy, minus loss), its epoch counted from 1, and the weights of it.

    Once logits are not finite training ends: NaN would answer class 0. None where that is so at once.
    """
    labels = torch.from_numpy(np.asarray(train.labels, dtype=np.int64))
    targets = torch.from_numpy(np.asarray(val.labels, dtype=np.int64))
    groups = [
        {"params": [*model.pooling.parameters(), model.classifier.bias], "weight_decay": 0.0},
        {"params": [model.classifier.weight], "weight_decay": WEIGHT_DECAY},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    steps_an_epoch = _batches(len(labels), recipe.batch_size)
    total = recipe.epochs * steps_an_epoch
    warmup = max(1, round(WARMUP * total))
    order = np.random.default_rng(seed)
    best: tuple[tuple[float, float], int, dict[str, Tensor]] | None = None
    step = 0
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        for rows in np.array_split(order.permutation(len(labels)), steps_an_epoch):
            step += 1
            share = step / warmup if step <= warmup else _cosine((step - warmup) / (total - warmup))
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            logits = model(train.rows(rows).to(recipe.where))
            loss = F.cross_entropy(logits, labels[rows].to(recipe.where))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        logits = _logits(model, val, recipe.where)
        if not logits.isfinite().all():
            break
        right = float((logits.argmax(dim=1) == targets).double().mean())
        score = (right, -float(F.cross_entropy(logits, targets)))
        if best is None or score > best[0]:
            best = (score, epoch, {name: value.clone() for name, value in model.state_dict().items()})
    return best


def _batches(images: int, batch_size: int) -> int:
    """Steps an epoch; batches differ by one image at most, so none is too small for batch statistics."""
    return (
        max(1, math.ceil(images / batch_size)) if images >= 2 * batch_size else max(1, images // batch_size)
    )


def _cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


@torch.inference_mode()
def _logits(model: ProbeHead, tokens: Tokens, device: str) -> Tensor:
    model.eval()
    count = len(tokens.labels)
    starts = range(0, count, _EVAL_BATCH)
    chunks = (tokens.rows(slice(s, min(s + _EVAL_BATCH, count))).to(device) for s in starts)
    return torch.cat([model(chunk).float().cpu() for chunk in chunks])

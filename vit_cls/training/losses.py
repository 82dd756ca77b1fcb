"""What training minimises, by the name of ``optim.loss``; and own losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_cls.data.mixing import MixedTargets
from vit_cls.errors import ConfigError
from vit_cls.own_code import register

Targets = Tensor | MixedTargets
"""Classes, int64, ``(batch,)``; or what mixup and CutMix made of them."""


class ClassificationLoss(nn.Module):
    """A mean over images that knows what they weigh.

    Args:
        label_smoothing: Probability mass spread over all classes, in [0, 1).
        class_weights: Weight of the images of each class, ``(classes,)``; None weighs all alike.
    """

    class_weights: Tensor | None

    def __init__(self, label_smoothing: float = 0.0, class_weights: Tensor | None = None) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", class_weights, persistent=False)

    def weight(self, targets: Targets) -> float | Tensor:
        """What `forward` divides by: the number of images, or the sum of their classes' weights."""
        if self.class_weights is None:
            return float(len(targets if isinstance(targets, Tensor) else targets.first))
        return _image_weights(targets, self.class_weights).sum()

    def forward(self, logits: Tensor, targets: Targets) -> Tensor:
        """Logits, ``(batch, classes)``, and targets to the mean loss of the images."""
        raise NotImplementedError(f"{type(self).__name__} must define forward")


class CrossEntropy(ClassificationLoss):
    """Softmax cross entropy; a mixed image counts for its two classes by their shares."""

    def forward(self, logits: Tensor, targets: Targets) -> Tensor:
        """The mean, in nats."""
        if isinstance(targets, MixedTargets):
            return mixed_cross_entropy(
                logits, targets, label_smoothing=self.label_smoothing, class_weights=self.class_weights
            )
        return F.cross_entropy(
            logits, targets, weight=self.class_weights, label_smoothing=self.label_smoothing
        )


class BinaryCrossEntropy(ClassificationLoss):
    """Each class for itself, yes or no; the mean over classes and images.

    Source:
        https://arxiv.org/abs/2110.00476, section 2.1; smoothing as in timm's ``BinaryCrossEntropy``.
    """

    def forward(self, logits: Tensor, targets: Targets) -> Tensor:
        """The mean, in nats a class."""
        classes = logits.shape[1]
        shares = class_shares(targets, classes).to(logits.dtype)
        shares = shares * (1 - self.label_smoothing) + self.label_smoothing / classes
        loss = F.binary_cross_entropy_with_logits(logits, shares, reduction="none").mean(dim=1)
        if self.class_weights is None:
            return loss.mean()
        weights = _image_weights(targets, self.class_weights)
        return (weights * loss).sum() / weights.sum()


OwnLoss = Callable[[Tensor, Tensor], Tensor]
"""From logits, ``(batch, classes)``, and classes, int64, ``(batch,)``, or, where batches are mixed, shares of
the classes, ``(batch, classes)``, to the mean over the images: as `torch.nn.functional.cross_entropy`."""


class GivenLoss(ClassificationLoss):
    """Somebody's own function, as a loss of ours; ``name`` is for messages."""

    def __init__(self, function: OwnLoss, name: str = "the loss") -> None:
        super().__init__()
        self.function = function
        self.name = name

    def forward(self, logits: Tensor, targets: Targets) -> Tensor:
        """What the function says; ConfigError where it fails, or says no single number."""
        kind = "shares of the classes" if isinstance(targets, MixedTargets) else "classes"
        own = class_shares(targets, logits.shape[1]) if isinstance(targets, MixedTargets) else targets
        try:
            loss = self.function(logits, own)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # somebody's own code may raise anything
            raise ConfigError(
                f"{self.name} fails on logits {tuple(logits.shape)} and "
                f"{kind} {tuple(own.shape)}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(loss, Tensor) or loss.ndim:
            said = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ConfigError(
                f"{self.name} must give the mean over the images, a tensor with no dimension; got {said}."
            )
        return loss


LOSSES: dict[str, type[ClassificationLoss] | OwnLoss] = {
    "cross_entropy": CrossEntropy,
    "bce": BinaryCrossEntropy,
}
"""Classes that are called with ``label_smoothing`` and ``class_weights``, and own functions."""


def register_loss(name: str, function: OwnLoss) -> None:
    """Let ``optim.loss`` name a loss of your own.

    Args:
        name: What will be written: small letters, digits and hyphens; not that of another loss.
        function: From logits and targets to the mean over the images; see `OwnLoss`. It does its own
            smoothing. An object of a torch module will do, or a class of this package's `ClassificationLoss`.

    Raises:
        ConfigError: If the name is taken or cannot be written, or the function is another class.

    Example:
        >>> register_loss("margin", F.multi_margin_loss)
    """
    another = isinstance(function, type) and not issubclass(function, ClassificationLoss)
    if another or not callable(function):
        raise ConfigError(
            f"the loss {name} must be a function of logits and targets, or an object that is called with "
            f"them; got {function!r}.{f' Give {function.__name__}().' if another else ''}"
        )
    register(LOSSES, "loss", name, function)


def is_smoothed(name: str) -> bool:
    """Whether a loss heeds ``optim.label_smoothing``; an own function does not get it."""
    loss = LOSSES[name]
    return isinstance(loss, type) and issubclass(loss, ClassificationLoss)


def make_loss(
    name: str, *, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> ClassificationLoss:
    """The loss that ``optim.loss`` names; ConfigError where an own one would have to weigh classes."""
    loss: Any = LOSSES[name]
    if is_smoothed(name):
        return loss(label_smoothing, class_weights)
    if class_weights is not None:
        raise ConfigError(
            f"optim.class_weights has no effect on the loss {name}, which is your own. Weigh the classes in "
            "it, or draw them equally often with data.weights balanced."
        )
    return GivenLoss(loss, f"optim.loss {name}")


def class_shares(targets: Targets, classes: int) -> Tensor:
    """How much of each class an image is, float32, ``(batch, classes)``; rows add up to 1."""
    if isinstance(targets, Tensor):
        return F.one_hot(targets, classes).float()
    shares = targets.share.new_zeros(len(targets.first), classes)
    shares.scatter_add_(1, targets.first[:, None], targets.share[:, None])
    return shares.scatter_add_(1, targets.second[:, None], 1 - targets.share[:, None])


def _image_weights(targets: Targets, class_weights: Tensor) -> Tensor:
    if isinstance(targets, Tensor):
        return class_weights[targets]
    share = targets.share
    return share * class_weights[targets.first] + (1 - share) * class_weights[targets.second]


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

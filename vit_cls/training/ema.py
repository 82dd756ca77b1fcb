"""The running average of the weights, which is validated beside them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from vit_cls.model.classifier import ImageClassifier

AUTO_SHARE = 0.05
"""Share of the run that ``optim.ema_decay auto`` averages over.

Source:
    That the length of an average goes with the length of the run: EDM2, https://arxiv.org/abs/2312.02696,
    section 3. DeiT's 0.99996 over 375,000 steps, https://arxiv.org/abs/2012.12877, is a share of 0.067.
"""


def auto_decay(total_steps: int) -> float:
    """The decay whose average reaches back over `AUTO_SHARE` of a run, in [0, 1).

    Example:
        >>> [round(auto_decay(steps), 5) for steps in (10, 2_000, 375_000)]
        [0.0, 0.99, 0.99995]
    """
    return max(0.0, 1 - 1 / max(1.0, AUTO_SHARE * total_steps))


def warm_decay(decay: float, step: int) -> float:
    """The decay of one step, counted from 1: small at first, when there is nothing to average.

    Source:
        ``(1 + step) / (10 + step)``: TensorFlow's ExponentialMovingAverage, and timm's ``ModelEmaV3``.
    """
    return min(decay, (1 + step) / (10 + step))


class Ema(nn.Module):
    """A classifier whose weights are an exponential moving average of another's.

    Args:
        classifier: What is trained; its copy here takes no gradient.
    """

    def __init__(self, classifier: ImageClassifier) -> None:
        super().__init__()
        self.classifier = copy.deepcopy(classifier).requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Ema:
        """Always in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def update(self, classifier: ImageClassifier, decay: float, *, skipped: bool | Tensor = False) -> None:
        """One step towards the classifier, unless it is skipped; nothing waits for the device.

        Args:
            skipped: A tensor is a flag, bool, on the device.
        """
        theirs = [p.detach() for p in classifier.model.parameters()]
        mine: list[Tensor] = list(self.classifier.model.parameters())
        if isinstance(skipped, Tensor):
            theirs = [torch.where(skipped, own, other) for own, other in zip(mine, theirs, strict=True)]
        elif skipped:
            return
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        for own, other in zip(self.classifier.model.buffers(), classifier.model.buffers(), strict=True):
            own.copy_(other)

    def forward(self, images: Tensor) -> Tensor:
        """As the classifier's: uint8 images to logits."""
        return self.classifier(images)

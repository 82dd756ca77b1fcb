"""Cross entropy for images of two classes, with label smoothing and class weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vit_cls.data.mixing import MixedTargets


def mixed_cross_entropy(
    logits: Tensor,
    targets: MixedTargets,
    *,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Mean cross entropy, each image counted for its two classes by their shares.

    Args:
        logits: Shape ``(batch, classes)``.
        targets: Two classes an image.
        label_smoothing: Probability mass spread over all classes, in [0, 1).
        class_weights: Weight of each class, shape ``(classes,)``; None weighs all alike. The mean is
            weighted.

    Returns:
        A scalar. With a share of 1 it is what `torch.nn.functional.cross_entropy` gives for ``first``.

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

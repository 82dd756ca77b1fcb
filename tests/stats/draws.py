"""Images whose classes are drawn from known probabilities."""

from __future__ import annotations

import numpy as np

from vit_cls.evaluation.calibration import tempered


def draw(
    images: int = 1500, classes: int = 6, scale: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are true, then made overconfident by ``scale``; and the classes drawn from them."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=(images, classes))
    true = tempered(logits, 1.0)
    targets = (true.cumsum(axis=1) > rng.random((images, 1))).argmax(axis=1)
    return tempered(scale * logits, 1.0), targets

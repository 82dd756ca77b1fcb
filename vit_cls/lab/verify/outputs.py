"""Identities of the whole classifier: one image at a time, twice, from uint8, and along a path of images."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from vit_cls.lab.verify.subject import (
    RELATIVE,
    Check,
    NotApplicableError,
    Subject,
    exact,
    largest,
)

STEPS = (8, 32)
"""Midpoints of the path; four times as many leave a sixteenth of the error."""
RATIO_TOLERANCE = 0.25
"""The error is ``c / steps ** 2`` plus higher powers, which 8 steps still notice."""
FADE = 0.1
"""Share of the way from the image to the mean image: on all of it, random weights can be too steep."""
MAX_PATH_MACS = 2e10
"""Multiply-adds of the path, about; some seconds on two cores."""


def batch_independence(subject: Subject) -> Check:
    """The logits of an image do not depend on the images that it shares a batch with."""
    return subject.relative(torch.cat([alone.logits for alone in subject.alone]), subject.logits)


def evaluation_is_deterministic(subject: Subject) -> Check:
    """The same images give the same logits again, to the last bit."""
    return exact(largest(subject.model(subject.inputs) - subject.logits))


def normalisation(subject: Subject) -> Check:
    """The classifier of uint8 pixels x is the model of ``(x / 255 - mean) / std``."""
    return subject.relative(subject.classifier(subject.images), subject.logits)


def integrated_gradients_completeness(subject: Subject) -> Check:
    """Integrated gradients add up to the change of the logits: 4 times the steps, a 16th of the error.

    The residual is how far that factor is from 16, relative to it. The path leads from the image a part of
    the way to the mean image; always in float64.

    Source:
        Completeness: https://arxiv.org/abs/1703.01365; the midpoint rule has an error of second order.
    """
    config = subject.config
    if config.pool.partition(":")[0] in ("max", "avgmax", "gem"):
        raise NotApplicableError(f"the logits are not smooth in the pixels (pool {config.pool})")
    if subject.device.type == "mps":
        raise NotApplicableError("the device has no float64")
    weights = sum(p.numel() for p in subject.model.parameters())
    # Forward and backward: three times the multiply-adds of one.
    if 3 * weights * subject.layout.num_tokens * sum(STEPS) * len(subject.inputs) > MAX_PATH_MACS:
        raise NotApplicableError("the model is large: gradients at 40 points of the path would take too long")
    model = copy.deepcopy(subject.model).double()
    images = subject.inputs.double()
    step = -FADE * images  # the mean image is zero
    gaps = []
    for steps in STEPS:
        total = torch.zeros(len(images), dtype=torch.float64, device=images.device)
        for i in range(steps):
            gradient = _gradient(subject, model, images + (i + 0.5) / steps * step)
            total += (gradient * step).flatten(1).sum(dim=1) / steps
        change = _score(subject, model(images + step)) - _score(subject, model(images))
        gaps.append(float((total - change).norm()))
    rounding = 1e-13 * float(_score(subject, model(images)).norm())
    if gaps[0] <= 1000 * rounding:
        raise NotApplicableError("the logits are as good as linear on the path: no error is left to fall")
    return Check(abs(16 * gaps[1] / gaps[0] - 1), RELATIVE, RATIO_TOLERANCE)


def _score(subject: Subject, logits: Tensor) -> Tensor:
    """A random mixture of the logits, one number an image."""
    flat = logits.flatten(1)
    return flat @ subject.random("mixture", flat.shape[1]).double()


def _gradient(subject: Subject, model: torch.nn.Module, images: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    with torch.enable_grad():
        score = _score(subject, model(images)).sum()
    (gradient,) = torch.autograd.grad(score, images)
    return gradient

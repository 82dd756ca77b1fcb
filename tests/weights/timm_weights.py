"""timm's models as the source of weights, tiny ones, and what must come out of them."""

from __future__ import annotations

import timm
import torch
from torch import nn

from tests.models import perturbed

NAME = "vit_tiny_patch16_224"
SIZES = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}
SMALL = {**SIZES, "num_classes": 10}


def reference_timm(name: str = NAME, seed: int = 0, **arguments) -> nn.Module:
    """timm's model, off its first values."""
    return perturbed(timm.create_model(name, **{**SMALL, **arguments}), torch.Generator().manual_seed(seed))


def random_images(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_same_logits(ours, theirs, size: int = 32, atol: float = 1e-5) -> None:
    with torch.inference_mode():
        expected = theirs(random_images(size))
        torch.testing.assert_close(ours.eval()(random_images(size)), expected, rtol=0, atol=atol)
    assert expected.std() > 0.01  # logits of zero would agree with anything

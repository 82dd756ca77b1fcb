"""Models for tests: tiny, off their first values, with every pooling; and what holds of what was loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vit_cls.model.config import ViTConfig
from vit_cls.model.pooling import pool_names
from vit_cls.model.vit import VisionTransformer

POOLS = [*(name.replace(":K", ":2") for name in pool_names()), "cls+gap", "gem+last:2+token:1"]
"""Every pooling as it may be written, and two that are joined."""


def perturbed(model: nn.Module, generator: torch.Generator | None = None, scale: float = 0.1) -> Any:
    """Every parameter off its first value: norms of 1 and tokens of 0 would hide mistakes."""
    generator = generator or torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(scale * noise)
    return model.eval()


def make_vit(settings: Mapping[str, Any], *, seed: int = 0, **changes: Any) -> VisionTransformer:
    """Fresh, of five classes unless the settings say otherwise."""
    torch.manual_seed(seed)
    return VisionTransformer(ViTConfig.from_dict({**settings, "num_classes": 5, **changes}))


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, over the largest value."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def assert_every_key_has_one_fate(model: Any, file_keys: Collection[str]) -> None:
    """Of the model's keys and of those that were dropped, which were the file's."""
    report = model.load_report
    keys = [row.key for row in report.keys]
    assert len(keys) == len(set(keys)) == sum(report.counts().values())
    assert set(keys) - set(report.of("dropped")) == set(model.state_dict())
    assert set(report.of("dropped")) <= set(file_keys)

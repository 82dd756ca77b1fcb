"""The optimisers, by the name of ``optim.name``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Groups = list[dict[str, Any]]


def _adamw(groups: Groups, *, lr: float, betas: tuple[float, float], eps: float, fused: bool) -> Any:
    """Source: https://arxiv.org/abs/1711.05101."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)


def _sgd(groups: Groups, *, lr: float, betas: tuple[float, float], eps: float, fused: bool) -> Any:
    """Momentum is ``beta1``; the decay is added to the gradient. Source: ViT, appendix B.1.1."""
    return _SGD(groups, lr=lr, momentum=betas[0], fused=fused)


class _SGD(torch.optim.SGD):
    """torch's, whose fused step fails where some parameters have their first gradient after others."""

    def _init_group(self, group: Any, params: Any, grads: Any, momentum_buffer_list: Any) -> bool:
        is_sparse = super()._init_group(group, params, grads, momentum_buffer_list)
        if any(buffer is not None for buffer in momentum_buffer_list):
            momentum_buffer_list[:] = [
                torch.zeros_like(p) if buffer is None else buffer
                for p, buffer in zip(params, momentum_buffer_list, strict=True)
            ]
        return is_sparse


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": _adamw, "sgd": _sgd}
"""Called with parameter groups, each with its weight decay, and the keywords of `_adamw`."""

"""Poolings over the patches, channel by channel: mean, max, and what lies between them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vit_cls.model.pooling_base import Pooling, PoolingContext, need_count

GEM_EPS = 1e-6


def masked_mean(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the valid tokens: (B, N, D) and a mask, (B, N), to (B, D)."""
    if mask is None:
        return tokens.mean(dim=1)
    return tokens.masked_fill(~mask[:, :, None], 0).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def masked_max(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Largest value of each channel over the valid tokens: (B, N, D) and a mask, (B, N), to (B, D)."""
    if mask is not None:
        tokens = tokens.masked_fill(~mask[:, :, None], -torch.inf)
    return tokens.amax(dim=1)


def generalised_mean(
    tokens: Tensor, p: float | Tensor, mask: Tensor | None = None, *, eps: float = GEM_EPS
) -> Tensor:
    """``(mean x ** p) ** (1 / p)`` of each channel: the mean for p = 1, the maximum for p towards infinity.

    From (B, N, D), and a mask of valid tokens, (B, N). What is below ``eps`` counts as ``eps``: what is
    negative is lost.

    Source:
        GeM, https://arxiv.org/abs/1711.02512, equation 3.
    """
    tokens = tokens.clamp_min(eps)
    # In units of the largest: no power under- or overflows. The unit cancels, and its gradient with it.
    unit = masked_max(tokens, mask).detach()
    return unit * masked_mean((tokens / unit[:, None]) ** p, mask) ** (1 / p)


def log_mean_exp(tokens: Tensor, r: float | Tensor, mask: Tensor | None = None) -> Tensor:
    """``log(mean exp(r x)) / r`` of each channel: the mean for r towards 0, the maximum towards infinity.

    Source:
        LSE pooling, https://arxiv.org/abs/1411.6228, equation 6.
    """
    scaled = r * tokens
    if mask is None:
        return (scaled.logsumexp(dim=1) - math.log(tokens.shape[1])) / r
    total = scaled.masked_fill(~mask[:, :, None], -torch.inf).logsumexp(dim=1)
    return (total - mask.sum(dim=1, keepdim=True).double().log().to(total)) / r


class MeanPool(Pooling):
    """Global average over the patches, prefix tokens excluded. Source: ViT, appendix D.3."""

    norm_after = True

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Pooling.forward`."""
        return masked_mean(tokens, mask)


class MaxPool(Pooling):
    """The largest value of each channel over the patches, prefix tokens excluded. Source: timm's ``max``."""

    norm_after = True

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Pooling.forward`."""
        return masked_max(tokens, mask)


class MeanMaxPool(Pooling):
    """``avgmax``: half the mean and half the maximum over the patches. Source: timm's ``avgmax``."""

    norm_after = True

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Pooling.forward`."""
        return 0.5 * (masked_mean(tokens, mask) + masked_max(tokens, mask))


class GeneralisedMeanPool(Pooling):
    """`generalised_mean` over the patches: ``gem`` learns the exponent, from 3 on; ``gem:P`` has it fixed.

    Source:
        GeM, https://arxiv.org/abs/1711.02512; its features follow a ReLU. Here what is negative before the
        pooling is lost, and the encoder learns to do without; `LogMeanExpPool` keeps it.
    """

    norm_after = True
    takes_index = True
    index_optional = True

    def __init__(self, context: PoolingContext, index: int | None = None) -> None:
        super().__init__(context)
        self.fixed = None if index is None else float(need_count(context, "gem", index))
        if self.fixed is None:
            self.p = nn.Parameter(torch.empty(1))
            self.reset_parameters()

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Pooling.forward`; a learned exponent does not fall below 1, the mean."""
        return generalised_mean(tokens, self.fixed or self.p.clamp_min(1.0), mask)

    def reset_parameters(self) -> None:
        """See `Pooling.reset_parameters`."""
        if self.fixed is None:
            nn.init.constant_(self.p, 3.0)


class LogMeanExpPool(Pooling):
    """``lse``: `log_mean_exp` over the patches with a sharpness that is learned, from 1 on, not fixed."""

    norm_after = True

    def __init__(self, context: PoolingContext, index: int | None = None) -> None:
        super().__init__(context)
        self.r = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Pooling.forward`; the sharpness does not fall below 0.01, all but the mean."""
        return log_mean_exp(tokens, self.r.clamp_min(0.01), mask)

    def reset_parameters(self) -> None:
        """See `Pooling.reset_parameters`."""
        nn.init.ones_(self.r)

"""The linear layer of the encoder, by the faster of two libraries on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

MIN_ROWS = 64
"""Fewer tokens than this go through `F.linear`: the other way does not pay for its set-up."""


def _mkl_is_generic() -> bool:
    """Whether this is an x86 CPU that MKL, PyTorch's library for fp32 products, does not tune for.

    Measured on an AMD EPYC with AVX-512: MKL about 205 GFLOP/s, oneDNN 440 to 490, same shapes.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        cpu = Path("/proc/cpuinfo").read_text()[:2000]
    except OSError:
        return False
    return "AuthenticAMD" in cpu


USE_ONEDNN = _mkl_is_generic()


def linear(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``tokens @ weight.T + bias``: what `F.linear` gives, up to the order of additions.

    On a CPU that MKL is slow on, fp32 tokens go through oneDNN instead, as the 1x1 convolution that a
    linear layer is; PyTorch has no other public way to it that keeps full precision.
    """
    if not USE_ONEDNN or not tokens.is_cpu or torch.compiler.is_compiling():
        return F.linear(tokens, weight, bias)
    rows, full = tokens.shape[0] * tokens.shape[1], tokens.dtype == weight.dtype == torch.float32
    if not full or rows < MIN_ROWS or tokens.shape[1] == 1 or torch.is_autocast_enabled("cpu"):
        return F.linear(tokens, weight, bias)
    # (B, d, N, 1) in channels-last layout: a view, no copy
    out = F.conv2d(rearrange(tokens, "b n d -> b d n 1"), rearrange(weight, "o i -> o i 1 1"), bias)
    return rearrange(out, "b o n 1 -> b n o")


class Linear(nn.Linear):
    """`nn.Linear` for token sequences, computed by `linear`; same parameters, same initialisation."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform ``tokens``, shape ``(batch, tokens, in)``, to ``(batch, tokens, out)``."""
        return linear(tokens, self.weight, self.bias)

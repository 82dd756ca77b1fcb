"""Multi-head self-attention that answers only for the tokens somebody reads."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention with fused softmax, and queries for a part of the tokens if asked.

    Args:
        dim: Width of a token; divisible by ``num_heads``.
        num_heads: Heads.
        qkv_bias: Whether query, key and value have a bias.
        qk_norm: Whether queries and keys are normalised for each head.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout after the projection.
        norm_eps: Epsilon of the query and key norms.

    Source:
        Attention is all you need, https://arxiv.org/abs/1706.03762; weight layout: timm's ``Attention``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, tokens: Tensor, read: slice | None = None) -> Tensor:
        """Attend from the tokens in ``read`` to all tokens.

        Args:
            tokens: Normalised tokens, shape ``(batch, tokens, dim)``.
            read: The tokens whose result is wanted; None means all. Keys and values are always of all.

        Returns:
            Shape ``(batch, read tokens, dim)``.
        """
        q, k, v = self._project(tokens, read)
        out = F.scaled_dot_product_attention(
            self.q_norm(q), self.k_norm(k), v, dropout_p=self.attn_drop.p if self.training else 0.0
        )
        return self.proj_drop(self.proj(rearrange(out, "b h n d -> b n (h d)")))

    def _project(self, tokens: Tensor, read: slice | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the read tokens, keys and values of all, each ``(batch, heads, tokens, head_dim)``."""
        heads = self.num_heads
        if read is None:
            q, k, v = rearrange(self.qkv(tokens), "b n (three h d) -> three b h n d", three=3, h=heads)
            return q, k, v
        dim = tokens.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        q_bias, kv_bias = (None, None) if bias is None else (bias[:dim], bias[dim:])
        q = rearrange(F.linear(tokens[:, read], weight[:dim], q_bias), "b n (h d) -> b h n d", h=heads)
        kv = F.linear(tokens, weight[dim:], kv_bias)
        k, v = rearrange(kv, "b n (two h d) -> two b h n d", two=2, h=heads)
        return q, k, v

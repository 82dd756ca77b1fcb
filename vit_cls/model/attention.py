"""Multi-head self-attention that answers only for the tokens somebody reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vit_cls.model.linear import Linear, linear


class Attention(nn.Module):
    """Self-attention with fused softmax, and queries for a part of the tokens if asked.

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
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, tokens: Tensor, read: slice | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend from the tokens in ``read`` (None: all) to all tokens, (B, N, D) to (B, read, D).

        Args:
            mask: True where a token may attend to another, bool, shape ``(read tokens, tokens)`` with any
                axes before; None means everywhere. Each read token may attend to one token at least.
        """
        dropout = self.attn_drop.p if self.training else 0.0
        plain = dropout == 0.0 and isinstance(self.k_norm, nn.Identity)
        if read is not None and read.stop - read.start == 1 and plain:
            out = self._attend_from_one(tokens, tokens[:, read.start], mask)
        else:
            q, k, v = self._project(tokens, read)
            out = F.scaled_dot_product_attention(
                self.q_norm(q), self.k_norm(k), v, attn_mask=mask, dropout_p=dropout
            )
            out = rearrange(out, "b h n d -> b n (h d)")
        return self.proj_drop(self.proj(out))

    def _project(self, tokens: Tensor, read: slice | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the read tokens, keys and values of all, each ``(batch, heads, tokens, head_dim)``."""
        heads = self.num_heads
        if read is None:
            qkv = rearrange(self.qkv(tokens), "b n (three h d) -> b n three h d", three=3, h=heads)
            q, k, v = (rearrange(part, "b n h d -> b h n d") for part in qkv.unbind(2))
            return q, k, v
        dim = tokens.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        q_bias, kv_bias = (None, None) if bias is None else (bias[:dim], bias[dim:])
        q = rearrange(linear(tokens[:, read], weight[:dim], q_bias), "b n (h d) -> b h n d", h=heads)
        kv = rearrange(linear(tokens, weight[dim:], kv_bias), "b n (two h d) -> b n two h d", two=2, h=heads)
        k, v = (rearrange(part, "b n h d -> b h n d") for part in kv.unbind(2))
        return q, k, v

    def _attend_from_one(self, tokens: Tensor, reader: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of a single query, (B, D) to (B, 1, D), without projecting any key or value.

        ``q . (W_k x) = (W_k^T q) . x``, and ``sum a (W_v x) = W_v (sum a x)``: the projections move from all
        tokens to the query and to the weighted sum. The key bias adds the same to every score and cancels.
        """
        w_q, w_k, w_v = self.qkv.weight.chunk(3)
        bias_q, _, bias_v = (None, None, None) if self.qkv.bias is None else self.qkv.bias.chunk(3)
        q = rearrange(F.linear(reader, w_q, bias_q), "b (h d) -> b h d", h=self.num_heads)
        q = self.q_norm(q) * q.shape[-1] ** -0.5
        query = torch.einsum("bhd,hdc->bhc", q, rearrange(w_k, "(h d) c -> h d c", h=self.num_heads))
        scores = query @ tokens.transpose(1, 2)  # (B, h, N)
        if mask is not None:
            scores = scores.masked_fill(~mask[..., 0, :], -torch.inf)
        attn = scores.softmax(dim=-1)
        mixed = torch.einsum(
            "bhc,hdc->bhd", attn @ tokens, rearrange(w_v, "(h d) c -> h d c", h=self.num_heads)
        )
        out = rearrange(mixed, "b h d -> b 1 (h d)")
        return out if bias_v is None else out + bias_v

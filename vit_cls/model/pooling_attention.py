"""Poolings by attention over the patches; all are computed without a key or value for each token.

A learned query's product with the keys' projection is one small vector, so scores are products with the
tokens themselves: ``q . (W_k x) = (W_k^T q) . x``. And values are linear: ``sum a (W_v x) = W_v (sum a x)``.
Both are exact; `vit_cls.model.attention` reads a single class token likewise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vit_cls.errors import ConfigError
from vit_cls.model.attention import Attention
from vit_cls.model.block import Block, Mlp
from vit_cls.model.pooling_base import Pooling, PoolingContext, attend, need_count, weighted_sum
from vit_cls.model.pooling_mean import masked_mean

CAIT_LAYER_SCALE = 0.1
"""CaiT's first value of LayerScale for networks of up to 18 blocks; 1e-5 would keep the output constant for
several epochs."""


class ScoredPool(Pooling):
    """Base of poolings that weigh the patches by a softmax over their scores: ``sum a_n x_n``."""

    def scores(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """One score a token and query before the softmax, shape ``(batch, read tokens, queries)``."""
        raise NotImplementedError(f"{type(self).__name__} must define scores")

    def attention(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """As `AttentionPool.attention`; a head is a query."""
        return attend(self.scores(tokens, mask), mask).transpose(1, 2)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Pooling.forward`."""
        return weighted_sum(self.scores(tokens, mask), tokens, mask)[:, 0]


class SequencePool(ScoredPool):
    """``seqpool``: ``sum a_n x_n``, ``a = softmax(w . x)``; starts at zero, the mean of the patches.

    Source:
        SeqPool of CCT, https://arxiv.org/abs/2104.05704, section 3.2. Its bias cancels in the softmax and is
        left out. ``dim`` weights.
    """

    def __init__(self, context: PoolingContext, index: int | None = None) -> None:
        super().__init__(context)
        self.query = nn.Parameter(torch.empty(1, context.embed_dim))
        self.macs = 2 * context.embed_dim * context.num_read
        self.reset_parameters()

    def scores(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `ScoredPool.scores`."""
        return F.linear(tokens, self.query)

    def reset_parameters(self) -> None:
        """See `Pooling.reset_parameters`."""
        nn.init.zeros_(self.query)


class GatedAttentionPool(ScoredPool):
    """``abmil``: ``a = softmax(w . (tanh(V x) * sigmoid(U x)))`` of width ``dim / 4``; starts as the mean.

    Source:
        Attention-based multiple instance learning, https://arxiv.org/abs/1802.04712, equation 9. The gate is
        not linear, so this one is computed for every token.
    """

    def __init__(self, context: PoolingContext, index: int | None = None) -> None:
        super().__init__(context)
        dim = context.embed_dim
        hidden = max(1, dim // 4)
        self.value = nn.Linear(dim, hidden)
        self.gate = nn.Linear(dim, hidden)
        self.query = nn.Parameter(torch.empty(1, hidden))
        self.macs = context.num_read * (2 * dim * hidden + hidden + dim)
        self.reset_parameters()

    def scores(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `ScoredPool.scores`."""
        return F.linear(self.value(tokens).tanh() * self.gate(tokens).sigmoid(), self.query)

    def reset_parameters(self) -> None:
        """See `Pooling.reset_parameters`."""
        nn.init.zeros_(self.query)


class SimPool(ScoredPool):
    """``simpool``: the mean of the patches asks which patches matter; ``y = sum a_n LN(x_n)``.

    ``q = W_q mean(x)`` and ``a = softmax(q . W_k LN(x) / sqrt(dim))``. ``W_q`` starts at zero: the mean of
    the normalised patches. Each image is pooled on its own; batch mates have no influence.

    Source:
        SimPool, https://arxiv.org/abs/2309.06891, without its optional exponent gamma.
    """

    def __init__(self, context: PoolingContext, index: int | None = None) -> None:
        super().__init__(context)
        dim = context.embed_dim
        self.norm = nn.LayerNorm(dim, eps=context.norm_eps)
        self.q = nn.Parameter(torch.empty(dim, dim))
        self.k = nn.Linear(dim, dim, bias=False)
        self.macs = 2 * dim * dim + 2 * dim * context.num_read
        self.reset_parameters()

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Pooling.forward`; the sum is of normalised tokens."""
        normed = self.norm(tokens)
        return weighted_sum(self._scores(tokens, normed, mask), normed, mask)[:, 0]

    def scores(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `ScoredPool.scores`."""
        return self._scores(tokens, self.norm(tokens), mask)

    def _scores(self, tokens: Tensor, normed: Tensor, mask: Tensor | None) -> Tensor:
        query = F.linear(masked_mean(tokens, mask), self.q) @ self.k.weight  # W_k^T q, (B, D)
        return normed @ (query * normed.shape[-1] ** -0.5)[:, :, None]

    def reset_parameters(self) -> None:
        """See `Pooling.reset_parameters`."""
        nn.init.zeros_(self.q)


class EfficientProbePool(ScoredPool):
    """``ep:Q``: Q learned queries, each with its slice of the values: ``y_j = W_vj sum a_jn x_n``, joined.

    Queries start at zero and the values at the identity: the mean of the patches. Weights ``dim ** 2 + Q *
    dim``.

    Source:
        Efficient probing, https://arxiv.org/abs/2506.10178, whose queries start from N(0, 0.02).
    """

    takes_index = True

    def __init__(self, context: PoolingContext, index: int | None = None) -> None:
        super().__init__(context)
        dim = context.embed_dim
        count = need_count(context, "ep", index)
        if dim % count:
            raise ConfigError(
                f"{context.setting} ep:Q needs a Q that divides model.embed_dim; got {count} and {dim}."
            )
        self.query = nn.Parameter(torch.empty(count, dim))
        self.value = nn.Parameter(torch.empty(dim, dim))
        self.macs = 2 * count * dim * context.num_read + dim * dim
        self.reset_parameters()

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Pooling.forward`."""
        mixed = weighted_sum(self.scores(tokens), tokens, mask)
        value = rearrange(self.value, "(q e) d -> q e d", q=len(self.query))
        return rearrange(torch.einsum("bqd,qed->bqe", mixed, value), "b q e -> b (q e)")

    def scores(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `ScoredPool.scores`."""
        return F.linear(tokens, self.query * tokens.shape[-1] ** -0.5)

    def reset_parameters(self) -> None:
        """See `Pooling.reset_parameters`."""
        nn.init.zeros_(self.query)
        nn.init.eye_(self.value)


class AttentionPool(Pooling):
    """``map``: one learned query attends to the patches; then an MLP with a residual connection.

    Source:
        Multihead attention pooling, https://arxiv.org/abs/2106.04560; parameter names, initialisation and
        numbers: timm's ``AttentionPoolLatent``.
    """

    def __init__(self, context: PoolingContext, index: int | None = None) -> None:
        super().__init__(context)
        dim = context.embed_dim
        self.num_heads = context.num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=context.norm_eps)
        self.mlp = Mlp(dim, context.mlp_dim, act=context.act)
        # query, keys, values and projection are matrices on one vector; the tokens are read once a head,
        # twice
        self.macs = 4 * dim * dim + 2 * dim * context.mlp_dim + 2 * self.num_heads * dim * context.num_read
        self.reset_parameters()

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Pooling.forward`."""
        heads = self.num_heads
        w_k, w_v = (rearrange(w, "(h d) c -> h d c", h=heads) for w in self.kv.weight.chunk(2))
        q = rearrange(self.q(self.latent[0]), "1 (h d) -> h d", h=heads)
        query = torch.einsum("hd,hdc->hc", q * q.shape[-1] ** -0.5, w_k)
        # The bias of the keys adds the same to every score and cancels.
        mixed = weighted_sum(F.linear(tokens, query), tokens, mask)  # (B, h, D)
        pooled = rearrange(torch.einsum("bhc,hdc->bhd", mixed, w_v), "b h d -> b 1 (h d)")
        pooled = self.proj(pooled + self.kv.bias.chunk(2)[1])
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]

    def reset_parameters(self) -> None:
        """Draw the query anew, from torch's global generator."""
        nn.init.trunc_normal_(self.latent, std=self.latent.shape[2] ** -0.5)

    def attention(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Weight of each token in each head, ``(batch, heads, read tokens)``; they sum to 1."""
        q = rearrange(self.q(self.latent), "b 1 (h d) -> b h 1 d", h=self.num_heads)
        k = rearrange(self.kv(tokens)[..., : tokens.shape[-1]], "b n (h d) -> b h n d", h=self.num_heads)
        scores = rearrange(q * q.shape[-1] ** -0.5 @ k.mT, "b h 1 n -> b n h")
        return attend(scores, mask).transpose(1, 2)


class ClassAttentionPool(Pooling):
    """``cait:K``: a class token of its own goes through K blocks in which it alone attends, also to itself.

    Source:
        Class attention, CaiT, https://arxiv.org/abs/2103.17239, section 3. The final norm follows, as there;
        each block's keys and values stay unformed (`Attention` with one reader).
    """

    takes_index = True
    norm_after = True

    def __init__(self, context: PoolingContext, index: int | None = None) -> None:
        super().__init__(context)
        dim, mlp_dim = context.embed_dim, context.mlp_dim
        count = need_count(context, "cait", index)
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.layers = nn.ModuleList(
            Block(
                dim,
                Attention(dim, context.num_heads, norm_eps=context.norm_eps),
                Mlp(dim, mlp_dim, act=context.act),
                init_values=CAIT_LAYER_SCALE,
                norm_eps=context.norm_eps,
            )
            for _ in range(count)
        )
        attention_macs = 4 * dim * dim + 2 * context.num_heads * dim * (context.num_read + 1)
        self.macs = count * (attention_macs + 2 * dim * mlp_dim)
        self.reset_parameters()

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Pooling.forward`."""
        latent = self.latent.expand(len(tokens), -1, -1)
        allowed = None
        if mask is not None:
            allowed = F.pad(mask, (1, 0), value=True)[:, None, None, :]  # (B, h, queries, N + 1)
        for block in self.layers:
            latent = block(torch.cat([latent, tokens], dim=1), slice(0, 1), allowed)
        return latent[:, 0]

    def reset_parameters(self) -> None:
        """See `Pooling.reset_parameters`."""
        nn.init.trunc_normal_(self.latent, std=0.02)

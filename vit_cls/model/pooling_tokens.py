"""Poolings that read tokens made to be read: one class token, several, a fixed patch, or several blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from vit_cls.errors import ConfigError
from vit_cls.model.pooling_base import Pooling, PoolingContext, need_count


class ClassTokenPool(Pooling):
    """The class token. Source: ViT, https://arxiv.org/abs/2010.11929, equation 4."""

    needs_class_token = True

    def __init__(self, context: PoolingContext, index: int | None = None) -> None:
        super().__init__(context)
        self.read = slice(0, 1)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Pooling.forward`."""
        return tokens[:, 0]


class PatchTokenPool(Pooling):
    """One patch token, ``token:K``, counted from 0 in raster order. Source: big_vision's ``pool_type``."""

    takes_index = True

    def __init__(self, context: PoolingContext, index: int | None = None) -> None:
        super().__init__(context)
        layout = context.layout
        if index is None or not 0 <= index < layout.num_patches:
            raise ConfigError(
                f"{context.setting} token:K needs a patch K from 0 to {layout.num_patches - 1} for a "
                f"{layout.grid_size[0]}x{layout.grid_size[1]} grid; got {'none' if index is None else index}."
            )
        first = layout.num_prefix_tokens + index
        self.read = slice(first, first + 1)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Pooling.forward`; the patch itself must be valid."""
        return tokens[:, 0]


class ConcatenatedPool(Pooling):
    """``cls+gap``: the vectors of several poolings side by side; of one a class there is none (ConfigError).

    Source:
        DINOv2's linear evaluation, https://arxiv.org/abs/2304.07193, appendix B.3.
    """

    def __init__(self, context: PoolingContext, poolings: Sequence[Pooling]) -> None:
        super().__init__(context)
        if any(pooling.per_class for pooling in poolings):
            raise ConfigError(
                f"{context.setting} cannot join a pooling with a vector for each class to others by +."
            )
        self.poolings = nn.ModuleList(poolings)
        self.read = slice(min(p.read.start for p in poolings), max(p.read.stop for p in poolings))
        self.num_layers = max(p.num_layers for p in poolings)
        self.macs = sum(p.macs for p in poolings)
        self.out_dim = sum(p.out_dim for p in poolings)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Pooling.forward`."""
        by_layer = tokens.unflatten(1, (self.num_layers, -1))  # (B, L, N, D)
        vectors = []
        for pooling in cast(Iterable[Pooling], self.poolings):
            own = slice(pooling.read.start - self.read.start, pooling.read.stop - self.read.start)
            read = by_layer[:, self.num_layers - pooling.num_layers :, own].flatten(1, 2)
            vectors.append(pooling(read, None if mask is None else mask[:, own]))
        return torch.cat(vectors, dim=1)


class LastBlocksPool(Pooling):
    """``last:N``: the class token after each of the last N blocks, normed and concatenated; N times as wide.

    Source:
        DINOv2's linear evaluation (``n_last_blocks``), https://arxiv.org/abs/2304.07193, appendix B.3.
    """

    takes_index = True
    needs_class_token = True

    def __init__(self, context: PoolingContext, index: int | None = None) -> None:
        super().__init__(context, index)
        self.num_layers = need_count(
            context, "last", index, at_most=context.depth, of="the blocks of the encoder"
        )
        self.read = slice(0, 1)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Pooling.forward`."""
        return tokens.flatten(1)

    @classmethod
    def parts(cls, index: int | None = None) -> tuple[str, ...]:
        """See `Pooling.parts`; the last block's is what ``cls`` reads."""
        return *(f"cls {n} blocks earlier" for n in range((index or 1) - 1, 0, -1)), "cls"


class MultiClassTokenPool(Pooling):
    """``multicls:K``: the mean of K class tokens, which start from different values.

    Equal tokens would stay equal for ever: nothing in the encoder tells them apart but their values and
    positions. Trained with one loss on their mean they still end up nearly parallel (DeiT reports a cosine
    of 0.999); `DiversePool` is what was proposed against it.

    Source:
        Multi-CLS BERT, https://arxiv.org/abs/2210.05043; two class tokens: DeiT,
        https://arxiv.org/abs/2012.12877, section 5.3.
    """

    takes_index = True
    needs_class_token = True

    def __init__(self, context: PoolingContext, index: int | None = None) -> None:
        super().__init__(context, index)
        self.count = need_count(context, "multicls", index)
        self.read = slice(0, self.count)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Pooling.forward`."""
        return tokens.mean(dim=1)


class ConcatenatedClassTokensPool(MultiClassTokenPool):
    """``multicls-concat:K``: K class tokens side by side. Source: as `MultiClassTokenPool`."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Pooling.forward`."""
        return tokens.flatten(1)

    @classmethod
    def parts(cls, index: int | None = None) -> tuple[str, ...]:
        """See `Pooling.parts`; the first one is what ``cls`` reads."""
        return "cls", *(f"class token {k}" for k in range(1, index or 1))


class DiversePool(MultiClassTokenPool):
    """``multicls-diverse:K``: ``sum_k (W_k - mean W) z_k``, in which equal tokens cancel.

    With one token nothing would be left, so K is at least 2. Each ``W_k`` starts from Xavier's uniform
    distribution. Costs ``K * dim ** 2`` weights and as many multiply-adds.

    Source:
        Multi-CLS BERT, https://arxiv.org/abs/2210.05043, section 2.2.
    """

    def __init__(self, context: PoolingContext, index: int | None = None) -> None:
        super().__init__(context, index)
        if self.count < 2:
            raise ConfigError(
                f"{context.setting} multicls-diverse:K needs a K of at least 2: one token would cancel."
            )
        dim = context.embed_dim
        self.macs = self.count * dim * dim
        self.weight = nn.Parameter(torch.empty(self.count, dim, dim))
        self.reset_parameters()

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Pooling.forward`."""
        return torch.einsum("bkd,ked->be", tokens, self.weight - self.weight.mean(dim=0))

    def reset_parameters(self) -> None:
        """See `Pooling.reset_parameters`."""
        for matrix in self.weight:
            nn.init.xavier_uniform_(matrix)


class TokenPerClassPool(Pooling):
    """``classtok``: one class token for each class; all are scored by the same weights, ``w . z_c + b``.

    For few classes: each adds a token to the sequence, and the last block computes all of them.

    Source:
        MCTformer, https://arxiv.org/abs/2203.02891, where a class's score is the mean of its token's values;
        here that mean has learned weights.
    """

    per_class = True
    needs_class_token = True

    def __init__(self, context: PoolingContext, index: int | None = None) -> None:
        super().__init__(context)
        if not context.num_classes:
            raise ConfigError(
                f"{context.setting} classtok has a token for each class, but the model has none "
                "(num_classes is 0)."
            )
        self.read = slice(0, context.num_classes)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Pooling.forward`; the shape is ``(batch, classes, dim)``."""
        return tokens

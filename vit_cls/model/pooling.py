"""Tokens to one vector, (B, N, D) -> (B, D); each pooling says which tokens it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vit_cls.errors import ConfigError, did_you_mean
from vit_cls.model.block import Mlp
from vit_cls.model.linear import Linear
from vit_cls.model.tokens import TokenLayout


@dataclass(frozen=True)
class PoolingContext:
    """What a pooling may need to know of the model around it.

    Args:
        layout: Where class token, registers and patches stand.
        embed_dim: Width of a token.
        num_heads: Heads of a pooling by attention.
        mlp_dim: Hidden width of a pooling with an MLP.
        norm_eps: Epsilon of a pooling's own norm.
        act: Activation of a pooling's MLP.
        include_prefix: Whether poolings over the patches read class token and registers too.
    """

    layout: TokenLayout
    embed_dim: int = 0
    num_heads: int = 1
    mlp_dim: int = 0
    norm_eps: float = 1e-6
    act: str = "gelu"
    include_prefix: bool = False

    @property
    def patches(self) -> slice:
        """The tokens that poolings over the patches read."""
        first = 0 if self.include_prefix else self.layout.num_prefix_tokens
        return slice(first, self.layout.num_tokens)


class Pooling(nn.Module):
    """Base of all poolings: which tokens are read, and how they become one vector.

    Args:
        context: The tokens, and the model around them.
        index: The K of ``name:K``, or None.

    Raises:
        ConfigError: If the layout lacks what this pooling reads, or ``index`` does not fit.
    """

    norm_after: ClassVar[bool] = False
    """Whether timm's constructor puts the final norm after this pooling instead of before."""
    takes_index: ClassVar[bool] = False
    """Whether the pooling is written ``name:K``."""
    parts: ClassVar[tuple[str, ...]] = ()
    """The poolings that this one concatenates, in order; empty where it is not a concatenation."""

    read: slice
    """The tokens this pooling reads, as a slice of the sequence."""

    def __init__(self, context: PoolingContext, index: int | None = None) -> None:
        super().__init__()
        self.out_dim = context.embed_dim * max(1, len(self.parts))

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool the tokens that ``read`` selected.

        Args:
            tokens: Those tokens only, shape ``(batch, read tokens, dim)``.

        Returns:
            One vector an image, shape ``(batch, out_dim)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward")


def _need_class_token(layout: TokenLayout, name: str) -> None:
    if not layout.class_token:
        raise ConfigError(
            f"model.pool {name} reads the class token, but model.class_token is false. "
            "Use model.pool gap, or set model.class_token to true."
        )


class ClassTokenPool(Pooling):
    """The class token. Source: ViT, https://arxiv.org/abs/2010.11929, equation 4."""

    def __init__(self, context: PoolingContext, index: int | None = None) -> None:
        super().__init__(context)
        _need_class_token(context.layout, "cls")
        self.read = slice(0, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """See `Pooling.forward`."""
        return tokens[:, 0]


class MeanPool(Pooling):
    """Global average over the patches, prefix tokens excluded. Source: ViT, appendix D.3."""

    norm_after = True

    def __init__(self, context: PoolingContext, index: int | None = None) -> None:
        super().__init__(context)
        self.read = context.patches

    def forward(self, tokens: Tensor) -> Tensor:
        """See `Pooling.forward`."""
        return tokens.mean(dim=1)


class MaxPool(Pooling):
    """The largest value of each channel over the patches, prefix tokens excluded. Source: timm's ``max``."""

    norm_after = True

    def __init__(self, context: PoolingContext, index: int | None = None) -> None:
        super().__init__(context)
        self.read = context.patches

    def forward(self, tokens: Tensor) -> Tensor:
        """See `Pooling.forward`."""
        return tokens.amax(dim=1)


class PatchTokenPool(Pooling):
    """One patch token, ``token:K``, counted from 0 in raster order. Source: big_vision's ``pool_type``."""

    takes_index = True

    def __init__(self, context: PoolingContext, index: int | None = None) -> None:
        super().__init__(context)
        layout = context.layout
        if index is None or not 0 <= index < layout.num_patches:
            raise ConfigError(
                f"model.pool token:K needs a patch K from 0 to {layout.num_patches - 1} for a "
                f"{layout.grid_size[0]}x{layout.grid_size[1]} grid; got {'none' if index is None else index}."
            )
        first = layout.num_prefix_tokens + index
        self.read = slice(first, first + 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """See `Pooling.forward`."""
        return tokens[:, 0]


class ClassTokenMeanPool(Pooling):
    """Class token and mean of the patches, concatenated; twice as wide.

    Source: DINOv2's linear evaluation, https://arxiv.org/abs/2304.07193, appendix B.3.
    """

    parts = ("cls", "gap")

    def __init__(self, context: PoolingContext, index: int | None = None) -> None:
        super().__init__(context)
        _need_class_token(context.layout, "cls+gap")
        self.read = slice(0, context.layout.num_tokens)
        self.patches = context.patches

    def forward(self, tokens: Tensor) -> Tensor:
        """See `Pooling.forward`."""
        return torch.cat([tokens[:, 0], tokens[:, self.patches].mean(dim=1)], dim=1)


class AttentionPool(Pooling):
    """``map``: one learned query attends to the patches; then an MLP with a residual connection.

    The query is the same for every image, so its product with the keys' projection is one small matrix:
    keys are never formed, and values only of the weighted sum (`Attention._attend_from_one` likewise).

    Source:
        Multihead attention pooling, https://arxiv.org/abs/2106.04560; parameter names, initialisation and
        numbers: timm's ``AttentionPoolLatent``.
    """

    def __init__(self, context: PoolingContext, index: int | None = None) -> None:
        super().__init__(context)
        dim = context.embed_dim
        self.num_heads = context.num_heads
        self.read = context.patches
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=context.norm_eps)
        self.mlp = Mlp(dim, context.mlp_dim, act=context.act)
        self.reset_parameters()
        for module in self.modules():
            if isinstance(module, (nn.Linear, Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """See `Pooling.forward`."""
        heads = self.num_heads
        w_k, w_v = (rearrange(w, "(h d) c -> h d c", h=heads) for w in self.kv.weight.chunk(2))
        q = rearrange(self.q(self.latent[0]), "1 (h d) -> h d", h=heads)
        query = torch.einsum("hd,hdc->hc", q * q.shape[-1] ** -0.5, w_k)
        # The bias of the keys adds the same to every score and cancels.
        attn = F.linear(tokens, query).softmax(dim=1)  # (B, N, h)
        mixed = torch.einsum("bnh,bnc->bhc", attn, tokens)
        pooled = rearrange(torch.einsum("bhc,hdc->bhd", mixed, w_v), "b h d -> b 1 (h d)")
        pooled = self.proj(pooled + self.kv.bias.chunk(2)[1])
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]

    def reset_parameters(self) -> None:
        """Draw the query anew, from torch's global generator."""
        nn.init.trunc_normal_(self.latent, std=self.latent.shape[2] ** -0.5)

    def attention(self, tokens: Tensor) -> Tensor:
        """How much each token weighs in each head.

        Args:
            tokens: As for `Pooling.forward`.

        Returns:
            Weights that sum to 1 over the tokens, shape ``(batch, heads, read tokens)``.
        """
        q = rearrange(self.q(self.latent), "b 1 (h d) -> b h 1 d", h=self.num_heads)
        k = rearrange(self.kv(tokens)[..., : tokens.shape[-1]], "b n (h d) -> b h n d", h=self.num_heads)
        return rearrange((q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1), "b h 1 n -> b h n")


POOLINGS: dict[str, type[Pooling]] = {
    "cls": ClassTokenPool,
    "gap": MeanPool,
    "max": MaxPool,
    "token": PatchTokenPool,
    "cls+gap": ClassTokenMeanPool,
    "map": AttentionPool,
}


def make_pooling(spec: str, context: PoolingContext) -> Pooling:
    """Build the pooling that ``model.pool`` names.

    Args:
        spec: ``cls``, ``gap``, ``max``, ``token:K``, ``cls+gap`` or ``map``.
        context: The tokens, and the model around them.

    Raises:
        ConfigError: If the name is unknown, the index is missing, needless or out of range, or the layout
            lacks what the pooling reads.

    Example:
        >>> make_pooling("token:5", PoolingContext(TokenLayout(True, 4, (14, 14)))).read
        slice(10, 11, None)
    """
    name, colon, number = spec.partition(":")
    if name not in POOLINGS:
        known = [f"{n}:K" if p.takes_index else n for n, p in POOLINGS.items()]
        raise ConfigError(
            f"model.pool must be one of {', '.join(known)}; got {spec!r}.{did_you_mean(spec, known)}"
        )
    pooling = POOLINGS[name]
    if colon and not pooling.takes_index:
        raise ConfigError(f"model.pool {name} takes no index; got {spec!r}. Write {name}.")
    if colon and not number.isdecimal():
        raise ConfigError(f"model.pool {name}:K needs a whole number K; got {spec!r}.")
    return pooling(context, int(number) if colon else None)


def pool_parts(spec: str) -> tuple[str, ...]:
    """The poolings whose vectors the head reads, in order.

    Args:
        spec: As for `make_pooling`.

    Example:
        >>> pool_parts("cls+gap"), pool_parts("token:5")
        (('cls', 'gap'), ('token:5',))
    """
    pooling = POOLINGS.get(spec.partition(":")[0])
    return pooling.parts if pooling is not None and pooling.parts else (spec,)

"""Tokens to one vector, (B, N, D) -> (B, D); each pooling says which tokens it reads."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from vit_cls.errors import ConfigError, did_you_mean
from vit_cls.model.tokens import TokenLayout


class Pooling(nn.Module):
    """Base of all poolings: which tokens are read, and how they become one vector.

    Args:
        layout: Where class token, registers and patches stand.
        index: The K of ``name:K``, or None.

    Raises:
        ConfigError: If the layout lacks what this pooling reads, or ``index`` does not fit.
    """

    norm_after: ClassVar[bool] = False
    """Whether timm's constructor puts the final norm after this pooling instead of before."""
    takes_index: ClassVar[bool] = False
    """Whether the pooling is written ``name:K``."""

    read: slice
    """The tokens this pooling reads, as a slice of the sequence."""

    def __init__(self, layout: TokenLayout, index: int | None = None) -> None:
        super().__init__()

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool the tokens that ``read`` selected.

        Args:
            tokens: Those tokens only, shape ``(batch, read tokens, dim)``.

        Returns:
            One vector an image, shape ``(batch, dim)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward")


class ClassTokenPool(Pooling):
    """The class token. Source: ViT, https://arxiv.org/abs/2010.11929, equation 4."""

    def __init__(self, layout: TokenLayout, index: int | None = None) -> None:
        super().__init__(layout)
        if not layout.class_token:
            raise ConfigError(
                "model.pool cls reads the class token, but model.class_token is false. "
                "Use model.pool gap, or keep the class token."
            )
        self.read = slice(0, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """See `Pooling.forward`."""
        return tokens[:, 0]


class MeanPool(Pooling):
    """Global average over the patches, prefix tokens excluded. Source: ViT, appendix D.3."""

    norm_after = True

    def __init__(self, layout: TokenLayout, index: int | None = None) -> None:
        super().__init__(layout)
        self.read = slice(layout.num_prefix_tokens, layout.num_tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        """See `Pooling.forward`."""
        return tokens.mean(dim=1)


class MaxPool(Pooling):
    """The largest value of each channel over the patches, prefix tokens excluded. Source: timm's ``max``."""

    norm_after = True

    def __init__(self, layout: TokenLayout, index: int | None = None) -> None:
        super().__init__(layout)
        self.read = slice(layout.num_prefix_tokens, layout.num_tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        """See `Pooling.forward`."""
        return tokens.amax(dim=1)


class PatchTokenPool(Pooling):
    """One patch token, ``token:K``, counted from 0 in raster order. Source: big_vision's ``pool_type``."""

    takes_index = True

    def __init__(self, layout: TokenLayout, index: int | None = None) -> None:
        super().__init__(layout)
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


POOLINGS: dict[str, type[Pooling]] = {
    "cls": ClassTokenPool,
    "gap": MeanPool,
    "max": MaxPool,
    "token": PatchTokenPool,
}


def make_pooling(spec: str, layout: TokenLayout) -> Pooling:
    """Build the pooling that ``model.pool`` names.

    Args:
        spec: ``cls``, ``gap``, ``max`` or ``token:K``.
        layout: Where class token, registers and patches stand.

    Raises:
        ConfigError: If the name is unknown, the index is missing, needless or out of range, or the layout
            lacks what the pooling reads.

    Example:
        >>> make_pooling("token:5", TokenLayout(True, 4, (14, 14))).read
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
    return pooling(layout, int(number) if colon else None)

"""What every pooling is: which tokens it reads, how they become one vector, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vit_cls.errors import ConfigError
from vit_cls.model.tokens import TokenLayout


@dataclass(frozen=True)
class PoolingContext:
    """What a pooling may need to know of the model around it.

    Args:
        layout: Where class tokens, registers and patches stand.
        num_heads: Of a pooling by attention; so ``mlp_dim``, ``norm_eps`` and ``act`` are of a pooling's own.
        include_prefix: Whether poolings over the patches read class token and registers too.
        depth: Encoder blocks, for a pooling that reads several of them.
        num_classes: Of the head, for a pooling with a vector for each.
        setting: What the user called the setting that names the pooling, for error messages.
    """

    layout: TokenLayout
    embed_dim: int = 0
    num_heads: int = 1
    mlp_dim: int = 0
    norm_eps: float = 1e-6
    act: str = "gelu"
    include_prefix: bool = False
    depth: int = 1
    num_classes: int = 0
    setting: str = "model.pool"

    @property
    def patches(self) -> slice:
        """The tokens that poolings over the patches read."""
        first = 0 if self.include_prefix else self.layout.num_prefix_tokens
        return slice(first, self.layout.num_tokens)

    @property
    def num_read(self) -> int:
        """How many tokens those are."""
        return self.patches.stop - self.patches.start


class Pooling(nn.Module):
    """Base of all poolings: which tokens are read (the patches, if a subclass says nothing), and how they
    become one vector.

    Args:
        context: The tokens, and the model around them.
        index: The K of ``name:K``, or None.

    Raises:
        ConfigError: If the layout lacks what this pooling reads, or ``index`` does not fit.
    """

    norm_after: ClassVar[bool] = False
    """Whether the final norm stands after this pooling instead of before; for rows of timm's, as there."""
    takes_index: ClassVar[bool] = False
    """Whether the pooling is written ``name:K``."""
    index_optional: ClassVar[bool] = False
    """Whether ``name`` alone is a pooling too, where there is a K."""
    needs_class_token: ClassVar[bool] = False
    """Whether it reads the model's class token."""
    per_class: ClassVar[bool] = False
    """Whether it gives a vector a class, ``(batch, classes, dim)``, each scored by the same weights."""

    read: slice
    """The tokens this pooling reads, as a slice of the sequence."""
    num_layers: int = 1
    """How many of the last blocks it reads them from."""
    macs: int = 0
    """Multiply-adds for one image, beyond the encoder's; sums and the softmax are not counted."""

    def __init__(self, context: PoolingContext, index: int | None = None) -> None:
        super().__init__()
        self.read = context.patches
        self.out_dim = context.embed_dim * max(1, len(self.parts(index)))

    @classmethod
    def parts(cls, index: int | None = None) -> tuple[str, ...]:
        """What this pooling concatenates, in order; empty where it is not a concatenation."""
        return ()

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool the tokens that ``read`` selected.

        Args:
            tokens: Those tokens only, shape ``(batch, read tokens, dim)``; of several blocks one after the
                other along the tokens, the last block's last.
            mask: True where a token is valid, bool, shape ``(batch, read tokens)``, at least one in each row;
                what is not valid has no influence. None means all are. Class tokens are always valid.

        Returns:
            One vector an image, shape ``(batch, out_dim)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def reset_parameters(self) -> None:
        """Draw the pooling's own weights anew, from torch's global generator, linear layers excepted."""


MAX_COUNT = 1_000
"""Largest K of what a pooling makes K of; a larger one is a mistake, and would take memory without end."""


def need_count(
    context: PoolingContext, name: str, index: int | None, *, at_most: int | None = None, of: str = ""
) -> int:
    """The K of ``name:K``, or ConfigError if there is none or too many; ``of`` says what the limit is."""
    if index is not None and index > MAX_COUNT:
        raise ConfigError(f"{context.setting} {name}:K needs a K of at most {MAX_COUNT}; got {index}.")
    if index is None or index < 1 or (at_most is not None and index > at_most):
        limit = "" if at_most is None else f", at most {at_most} ({of})"
        raise ConfigError(
            f"{context.setting} {name}:K needs a whole number K of at least 1{limit}; got "
            f"{'none' if index is None else index}."
        )
    return index


def weighted_sum(scores: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The sums of tokens, (B, N, D), that `attend` weighs, shape ``(batch, queries, dim)``."""
    return attend(scores, mask).transpose(1, 2) @ tokens


def attend(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax of the scores, shape ``(batch, tokens, queries)``, over the valid tokens."""
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    return scores.softmax(dim=1)

"""Tokens to one vector, (B, N, D) -> (B, D): the table of poolings; each says which tokens it reads."""

from __future__ import annotations

import re

from torch import nn

from vit_cls.errors import ConfigError, did_you_mean
from vit_cls.model.pooling_attention import (
    AttentionPool,
    ClassAttentionPool,
    EfficientProbePool,
    GatedAttentionPool,
    SequencePool,
    SimPool,
)
from vit_cls.model.pooling_base import Pooling, PoolingContext
from vit_cls.model.pooling_mean import (
    GeneralisedMeanPool,
    LogMeanExpPool,
    MaxPool,
    MeanMaxPool,
    MeanPool,
)
from vit_cls.model.pooling_tokens import (
    ClassTokenMeanPool,
    ClassTokenPool,
    ConcatenatedClassTokensPool,
    DiversePool,
    LastBlocksPool,
    MultiClassTokenPool,
    PatchTokenPool,
    TokenPerClassPool,
)

POOLINGS: dict[str, type[Pooling]] = {
    "cls": ClassTokenPool,
    "gap": MeanPool,
    "max": MaxPool,
    "avgmax": MeanMaxPool,
    "token": PatchTokenPool,
    "cls+gap": ClassTokenMeanPool,
    "last": LastBlocksPool,
    "gem": GeneralisedMeanPool,
    "lse": LogMeanExpPool,
    "seqpool": SequencePool,
    "abmil": GatedAttentionPool,
    "simpool": SimPool,
    "ep": EfficientProbePool,
    "map": AttentionPool,
    "cait": ClassAttentionPool,
    "multicls": MultiClassTokenPool,
    "multicls-concat": ConcatenatedClassTokensPool,
    "multicls-diverse": DiversePool,
    "classtok": TokenPerClassPool,
}


def pool_names() -> list[str]:
    """Every pooling as it is written, ``name`` or ``name:K``.

    Example:
        >>> pool_names()[:5]
        ['cls', 'gap', 'max', 'avgmax', 'token:K']
    """
    return [f"{name}:K" if pooling.takes_index else name for name, pooling in POOLINGS.items()]


def make_pooling(spec: str, context: PoolingContext) -> Pooling:
    """Build the pooling that ``model.pool`` names.

    Args:
        spec: One of `pool_names` with a number for K; the colon may be left out (``ep8``).
        context: The tokens, and the model around them.

    Raises:
        ConfigError: If the name is unknown, the index is missing, needless or out of range, or the layout
            lacks what the pooling reads.

    Example:
        >>> from vit_cls.model.tokens import TokenLayout
        >>> make_pooling("token:5", PoolingContext(TokenLayout(True, 4, (14, 14)))).read
        slice(10, 11, None)
    """
    name, index = _split(spec)
    if POOLINGS[name].needs_class_token and not context.layout.class_token:
        raise ConfigError(
            f"model.pool {name} reads the class token, but model.class_token is false. "
            "Use model.pool gap, or set model.class_token to true."
        )
    pooling = POOLINGS[name](context, index)
    for module in pooling.modules():
        if isinstance(module, nn.Linear):  # as all linear layers of the models here, native or adapted
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return pooling


def needs_class_token(spec: str) -> bool:
    """Whether a pooling, written as for `make_pooling`, reads the model's class token.

    Raises:
        ConfigError: If the name is unknown, or the index is missing or needless.

    Example:
        >>> needs_class_token("last:4"), needs_class_token("cait:2")
        (True, False)
    """
    return POOLINGS[_split(spec)[0]].needs_class_token


def num_class_tokens(spec: str, num_classes: int) -> int:
    """How many class tokens a pooling needs, where there are any.

    Args:
        spec: As for `make_pooling`.
        num_classes: Of the head.

    Raises:
        ConfigError: If the name is unknown, or the index is missing or needless.

    Example:
        >>> num_class_tokens("cls", 10), num_class_tokens("multicls:4", 10), num_class_tokens("classtok", 10)
        (1, 4, 10)
    """
    name, index = _split(spec)
    pooling = POOLINGS[name]
    if pooling.per_class:
        return max(1, num_classes)
    return max(1, index or 1) if issubclass(pooling, MultiClassTokenPool) else 1


def pool_parts(spec: str) -> tuple[str, ...]:
    """The poolings whose vectors the head reads, in order; a name that is not in the table is its own part.

    Example:
        >>> pool_parts("cls+gap"), pool_parts("token:5"), pool_parts("last2")
        (('cls', 'gap'), ('token:5',), ('cls 1 blocks earlier', 'cls'))
    """
    if spec.partition(":")[0].rstrip("0123456789") not in POOLINGS:
        return (spec,)
    name, index = _split(spec)
    return POOLINGS[name].parts(index) or (name if index is None else f"{name}:{index}",)


def _split(spec: str) -> tuple[str, int | None]:
    """Name and index of what was written."""
    name, colon, number = spec.partition(":")
    if not colon and (match := re.fullmatch(r"(.+?)(\d+)", spec)) and match[1] in POOLINGS:
        name, colon, number = match[1], ":", match[2]
    if name not in POOLINGS:
        known = pool_names()
        raise ConfigError(
            f"model.pool must be one of {', '.join(known)}; got {spec!r}.{did_you_mean(spec, known)}"
        )
    if colon and not POOLINGS[name].takes_index:
        raise ConfigError(f"model.pool {name} takes no index; got {spec!r}. Write {name}.")
    if colon and not number.isdecimal():
        raise ConfigError(f"model.pool {name}:K needs a whole number K; got {spec!r}.")
    return name, int(number) if colon else None

"""Tokens to one vector, (B, N, D) -> (B, D): the table of poolings, and the one grammar that names them.

``name`` or ``name:K``, several joined by ``+``: the same in ``model.pool``, probes, studies and features.
"""

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
    ClassTokenPool,
    ConcatenatedClassTokensPool,
    ConcatenatedPool,
    DiversePool,
    LastBlocksPool,
    MultiClassTokenPool,
    PatchTokenPool,
    TokenPerClassPool,
)
from vit_cls.own_code import HINT, origin, register

POOLINGS: dict[str, type[Pooling]] = {
    "cls": ClassTokenPool,
    "gap": MeanPool,
    "max": MaxPool,
    "avgmax": MeanMaxPool,
    "token": PatchTokenPool,
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


def register_pooling(name: str, pooling: type[Pooling]) -> None:
    """Make a pooling of your own known by name, wherever poolings are named.

    Args:
        name: What will be written: letters, digits and inner hyphens, the last one no digit.
        pooling: Its class; called with a `PoolingContext` and the K of ``name:K`` or None.

    Raises:
        ConfigError: If the name cannot be written in a pooling's place, or is taken by another class.
    """
    register(POOLINGS, "pooling", name, pooling, pattern=r"[a-z][a-z0-9-]*[a-z]")


def pool_names() -> list[str]:
    """Every pooling as it is written, ``name`` or ``name:K``."""
    names: list[str] = []
    for name, pooling in POOLINGS.items():
        names += [name] if pooling.index_optional or not pooling.takes_index else []
        names += [f"{name}:K"] if pooling.takes_index else []
    return names


def parse_pool(spec: str, setting: str = "model.pool") -> list[tuple[str, int | None]]:
    """Names and indices of the poolings that are joined by ``+``.

    Args:
        spec: As in `pool_names`, with a number for K; the colon may be left out (``ep8``).
        setting: What the user called the setting, for error messages.

    Raises:
        ConfigError: If a name is unknown, or an index needless or no number.

    Example:
        >>> parse_pool("cls+last4")
        [('cls', None), ('last', 4)]
    """
    return [_parse_part(part, spec, setting) for part in spec.split("+")]


def make_pooling(spec: str, context: PoolingContext) -> Pooling:
    """Build the pooling that ``model.pool`` names.

    Args:
        spec: As for `parse_pool`.

    Raises:
        ConfigError: If the name is unknown, the index is missing, needless or out of range, or the layout
            lacks what the pooling reads.

    Example:
        >>> from vit_cls.model.tokens import TokenLayout
        >>> make_pooling("token:5", PoolingContext(TokenLayout(True, 4, (14, 14)))).read
        slice(10, 11, None)
    """
    poolings = []
    for name, index in parse_pool(spec, context.setting):
        if POOLINGS[name].needs_class_token and not context.layout.class_token:
            why, more = "the model has none", ""
            if context.setting == "model.pool":
                why, more = "model.class_token is false", ", or set model.class_token to true"
            setting = context.setting
            raise ConfigError(f"{setting} {spec} reads the class token, but {why}. Use {setting} gap{more}.")
        poolings.append(POOLINGS[name](context, index))
    pooling = poolings[0] if len(poolings) == 1 else ConcatenatedPool(context, poolings)
    for module in pooling.modules():
        if isinstance(module, nn.Linear):  # as all linear layers of the models here, native or adapted
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return pooling


def needs_class_token(spec: str) -> bool:
    """Whether a pooling, written as for `parse_pool`, reads the model's class token.

    Example:
        >>> needs_class_token("gap+last:4"), needs_class_token("cait:2")
        (True, False)
    """
    return any(POOLINGS[name].needs_class_token for name, _ in parse_pool(spec))


def num_class_tokens(spec: str, num_classes: int) -> int:
    """How many class tokens a pooling, written as for `parse_pool`, needs, where there are any.

    Args:
        num_classes: Of the head.

    Example:
        >>> num_class_tokens("cls", 10), num_class_tokens("multicls:4", 10), num_class_tokens("classtok", 10)
        (1, 4, 10)
    """
    counts = [1]
    for name, index in parse_pool(spec):
        if POOLINGS[name].per_class:
            counts.append(num_classes)
        elif issubclass(POOLINGS[name], MultiClassTokenPool):
            counts.append(index or 1)
    return max(counts)


def pool_parts(spec: str) -> tuple[str, ...]:
    """The poolings whose vectors the head reads, in order; a name that is not in the table is its own part.

    Example:
        >>> pool_parts("cls+gap"), pool_parts("token:5"), pool_parts("last2")
        (('cls', 'gap'), ('token:5',), ('cls 1 blocks earlier', 'cls'))
    """
    if spec.partition(":")[0].partition("+")[0].rstrip("0123456789") not in POOLINGS:
        return (spec,)
    parts: list[str] = []
    for name, index in parse_pool(spec):
        parts += POOLINGS[name].parts(index) or (name if index is None else f"{name}:{index}",)
    return tuple(parts)


def own_poolings(spec: str) -> dict[str, str]:
    """The poolings of a spec that are not ours, and the module that registered each."""
    parts = [part.partition(":")[0] for part in spec.split("+")]
    names = [part if part in POOLINGS else part.rstrip("0123456789") for part in parts]
    modules = {
        name: origin("pooling", name) or POOLINGS[name].__module__ for name in names if name in POOLINGS
    }
    return {name: module for name, module in modules.items() if not module.startswith("vit_cls.")}


def _parse_part(part: str, spec: str, setting: str) -> tuple[str, int | None]:
    name, colon, number = part.partition(":")
    if not colon and (match := re.fullmatch(r"(.+?)(\d+)", part)) and match[1] in POOLINGS:
        name, colon, number = match[1], ":", match[2]
    if name not in POOLINGS:
        known = pool_names()
        raise ConfigError(
            f"{setting} must be one of {', '.join(known)}, or several joined by +; got {spec!r}."
            f"{did_you_mean(part, known)} {HINT}"
        )
    if colon and not POOLINGS[name].takes_index:
        raise ConfigError(f"{setting} {name} takes no index; got {spec!r}. Write {name}.")
    if colon and not (number.isdecimal() and len(number) < 10):
        raise ConfigError(f"{setting} {name}:K needs a whole number K; got {spec!r}.")
    return name, int(number) if colon else None

"""Pools of frozen tokens: from every token of an image to the one vector that a probe reads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vit_cls.errors import ConfigError, did_you_mean
from vit_cls.model.pooling_mean import generalised_mean
from vit_cls.model.token_model import TokenModel
from vit_cls.model.tokens import TokenLayout

READS: dict[str, tuple[str, Callable[[Tensor], Tensor] | None]] = {
    "cls": ("the class token, the first where there are several", None),
    "gap": ("the mean of the patch tokens", lambda patches: patches.mean(dim=1)),
    "max": ("the largest value of each channel over the patch tokens", lambda patches: patches.amax(dim=1)),
    "gem": ("the generalised mean of the patch tokens, p = 3", partial(generalised_mean, p=3.0)),
    "gem4": ("the generalised mean of the patch tokens, p = 4", partial(generalised_mean, p=4.0)),
    "last": ("last:N: the class tokens after each of the last N blocks, concatenated", None),
    "token": ("token:K: patch token K, counted from 0 in raster order", None),
}
"""What may be read: a description, and a function of the patch tokens where it is one. Pools joined by ``+``
are concatenated. Source of ``last:N``: DINOv2's linear evaluation, https://arxiv.org/abs/2304.07193, B.3."""

POOLS = ("cls", "gap", "max", "gem", "gem4", "cls+gap", "cls+gem4")
"""The pools of the last layer, of those that are compared if nothing else is asked for."""
LAST = 4
"""Blocks whose class tokens the usual ``last:N`` joins, as far as there are so many."""


@dataclass(frozen=True)
class Part:
    """One of the parts that a pool concatenates.

    Args:
        name: A key of `READS`.
        number: The N of ``last:N``, the K of ``token:K``.
    """

    name: str
    number: int | None = None


def parse_pool(pool: str, layout: TokenLayout, depth: int, *, name: str = "--pools") -> list[Part]:
    """Check a pool against a model.

    Args:
        pool: Such as ``cls``, ``token:5`` or ``last:4+gap``.
        layout: The model's tokens.
        depth: The model's blocks.
        name: What the user called the setting, for error messages.

    Raises:
        ConfigError: If it is unknown, or reads what the model does not have.

    Example:
        >>> parse_pool("last:4+gap", TokenLayout(True, 0, (2, 2)), 12)
        [Part(name='last', number=4), Part(name='gap', number=None)]
    """
    parts = []
    for text in pool.split("+"):
        kind, colon, number = text.partition(":")
        if kind not in READS:
            known = [{"last": "last:N", "token": "token:K"}.get(key, key) for key in READS]
            raise ConfigError(
                f"{name} must be one of {', '.join(known)}, or several joined by +; got {pool!r}."
                f"{did_you_mean(text, known)}"
            )
        if bool(colon) != (kind in ("last", "token")) or (colon and not number.isdecimal()):
            wanted = {"last": "a number of blocks, as in last:4", "token": "a patch, as in token:5"}
            raise ConfigError(f"{name} {kind} takes {wanted.get(kind, 'no number')}; got {pool!r}.")
        if kind in ("cls", "last") and not layout.class_token:
            raise ConfigError(
                f"{name} {pool} reads the class token, but the model has none. Read gap or max."
            )
        value = int(number) if colon else None
        limits = {"last": (1, depth), "token": (0, layout.num_patches - 1)}.get(kind)
        if limits and value is not None and not limits[0] <= value <= limits[1]:
            raise ConfigError(
                f"{name} {kind}:{number}: the number must be from {limits[0]} to {limits[1]} for a model "
                f"with {depth} blocks and {layout.num_patches} patches."
            )
        parts.append(Part(kind, value))
    return parts


def usual_pools(depth: int) -> list[str]:
    """The pools that are compared if nothing else is asked for.

    Args:
        depth: The model's blocks; of a single one, ``last:1`` would be ``cls``.

    Example:
        >>> usual_pools(2)[-2:], usual_pools(1)[-1]
        (['cls+gem4', 'last:2'], 'cls+gem4')
    """
    return [*POOLS, *([f"last:{min(LAST, depth)}"] if depth > 1 else [])]


def possible_pools(pools: Sequence[str], layout: TokenLayout) -> tuple[list[str], list[str]]:
    """The default pools that a model can be read by, and a sentence for those that it cannot.

    Args:
        pools: Well-formed ones that the user did not ask for by name.
        layout: The model's tokens.

    Returns:
        The pools that remain, and notes; without a class token those that read it are left out.

    Example:
        >>> possible_pools(["cls", "gap"], TokenLayout(False, 0, (2, 2)))
        (['gap'], ['Not read: cls, for the model has no class token.'])
    """
    without = [
        pool for pool in pools if {"cls", "last"} & {part.partition(":")[0] for part in pool.split("+")}
    ]
    if layout.class_token or not without:
        return list(pools), []
    note = f"Not read: {', '.join(without)}, for the model has no class token."
    return [pool for pool in pools if pool not in without], [note]


def layers_of(parts: Sequence[Part], layer: int) -> list[int]:
    """The layers whose tokens a pool needs.

    Args:
        parts: From `parse_pool`.
        layer: Where it reads; 0 is before the first block.

    Raises:
        ConfigError: If there are fewer blocks up to that layer than ``last:N`` reads.

    Example:
        >>> layers_of([Part("last", 3), Part("gap")], 12)
        [10, 11, 12]
    """
    most = max((part.number or 0 for part in parts if part.name == "last"), default=1)
    if most > max(layer, 1):
        raise ConfigError(f"--pools last:{most} needs {most} blocks, but layer {layer} comes after {layer}.")
    return list(range(layer - most + 1, layer + 1))


class Reader:
    """What reading needs of a model: where tokens stand, and the final norm on its side of the pooling.

    A read is what the model's own head would get with that pooling: norm, pooling, norm, one of the norms
    being the identity. Each part of a concatenation is normed on its own.

    Args:
        model: Its norms are copied, to the CPU and to float32.
    """

    def __init__(self, model: TokenModel) -> None:
        self.layout = model.layout
        self.depth = len(model.blocks)
        self.norm = copy.deepcopy(model.norm).cpu().float().eval()
        self.fc_norm = copy.deepcopy(model.fc_norm).cpu().float().eval()
        self._own_pool = model.config.pool
        self._prefix_too = bool(getattr(model.config, "pool_include_prefix", False))

    def parse(self, pool: str) -> list[Part]:
        """See `parse_pool`."""
        return parse_pool(pool, self.layout, self.depth)

    def patches(self, pool: str) -> slice:
        """The tokens that a read of the patches takes.

        Args:
            pool: Prefix tokens are left out, unless it is the model's own pooling, which reads them.
        """
        own = self._prefix_too and pool == self._own_pool
        return slice(0 if own else self.layout.num_prefix_tokens, self.layout.num_tokens)

    @torch.inference_mode()
    def normed(self, tokens: Tensor) -> Tensor:
        """Tokens after the final norm, token by token.

        Args:
            tokens: Float32, on the CPU, shape ``(..., dim)``, as a block left them.
        """
        return self.fc_norm(self.norm(tokens))

    @torch.inference_mode()
    def read(self, pool: str, tokens: Mapping[int, Tensor], layer: int) -> Tensor:
        """One vector an image.

        Args:
            pool: As for `parse_pool`.
            tokens: The tokens of each layer that `layers_of` names, float32, on the CPU, shape
                ``(batch, tokens, dim)``, as the blocks left them.
            layer: Where it reads.

        Returns:
            Shape ``(batch, dim)``, a multiple of the width for a concatenation.

        Raises:
            ConfigError: As for `parse_pool` and `layers_of`.
        """
        parts, vectors = self.parse(pool), []
        layers_of(parts, layer)
        for part in parts:
            if part.name == "last":
                assert part.number is not None
                blocks = range(layer - part.number + 1, layer + 1)
                vectors += [self.normed(tokens[block][:, 0]) for block in blocks]
                continue
            pooling = READS[part.name][1]
            if pooling is not None:
                vectors.append(self.fc_norm(pooling(self.norm(tokens[layer][:, self.patches(pool)]))))
                continue
            place = 0 if part.name == "cls" else self.layout.num_prefix_tokens + (part.number or 0)
            vectors.append(self.normed(tokens[layer][:, place]))
        return torch.cat(vectors, dim=1)

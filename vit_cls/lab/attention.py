"""Attention weights of any block, native or timm's, and what is read off them: rollout, entropy, distance."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vit_cls.errors import ConfigError

KNOWN = ("Attention", "AttentionRope", "EvaAttention")
"""Class names of attentions that are one softmax over scaled products: ours, and three of timm's."""


@dataclass(frozen=True)
class AttentionParts:
    """What one attention computed from one input.

    Args:
        weights: Shape ``(batch, heads, read tokens, tokens)``.
        queries: Not yet scaled, shape ``(batch, heads, read tokens, head_dim)``.
        values: Shape ``(batch, heads, tokens, head_dim)``.
    """

    weights: Tensor
    queries: Tensor
    values: Tensor


def attention_module(block: nn.Module) -> Any:
    """The attention inside a block.

    Raises:
        ConfigError: If the block's attention is not a single softmax over scaled products.
    """
    attn = getattr(block, "attn", None)
    if attn is None or type(attn).__name__ not in KNOWN:
        found = type(block).__name__ if attn is None else f"{type(block).__name__} with {type(attn).__name__}"
        raise ConfigError(
            f"attention weights are known for blocks with one softmax attention ({', '.join(KNOWN)}); got "
            f"{found}. Use an architecture with ordinary blocks, or a method without attention weights."
        )
    return attn


def attention_parts(attn: Any, *args: Any, **kwargs: Any) -> AttentionParts:
    """Weights, queries and values of one attention, from what it was called with.

    Args:
        args: Of its ``forward``: the normalised tokens first, shape ``(batch, tokens, dim)``.

    Source:
        Attention is all you need, https://arxiv.org/abs/1706.03762, equation 1; variants: timm's
        ``Attention``, ``AttentionRope``, ``EvaAttention`` and BEiT's ``Attention``.
    """
    given = inspect.signature(attn.forward).bind(*args, **kwargs).arguments
    tokens: Tensor = next(iter(given.values()))
    q, k, v = _project(attn, tokens)
    q, k = getattr(attn, "q_norm", nn.Identity())(q), getattr(attn, "k_norm", nn.Identity())(k)
    if (rope := given.get("rope")) is not None:
        first, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)
        q, k = (
            torch.cat([part[:, :, :first], _rotate(part[:, :, first:], rope, half=half)], dim=2).type_as(v)
            for part in (q, k)
        )
    if (groups := getattr(attn, "num_kv_groups", 1)) > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if (read := given.get("read")) is not None:
        q = q[:, :, read]
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    for bias in _biases(attn, given):
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
    return AttentionParts(scores.softmax(dim=-1), q, v)


def _project(attn: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each ``(batch, heads, tokens, head_dim)``."""
    if attn.qkv is None:
        heads = attn.num_heads, getattr(attn, "num_kv_heads", attn.num_heads)
        q = rearrange(attn.q_proj(tokens), "b n (h d) -> b h n d", h=heads[0])
        k, v = (rearrange(p(tokens), "b n (h d) -> b h n d", h=heads[1]) for p in (attn.k_proj, attn.v_proj))
        return q, k, v
    qkv = attn.qkv(tokens)
    if getattr(attn, "q_bias", None) is not None:
        qkv = qkv + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=attn.num_heads)
    return q, k, v


def _rotate(part: Tensor, rope: Tensor, *, half: bool) -> Tensor:
    """Rotary positions, given as sines and cosines one after the other, as timm applies them."""
    sin, cos = rope.chunk(2, dim=-1)
    if half:
        first, second = part.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-part[..., 1::2], part[..., ::2]], dim=-1).flatten(-2)
    return part * cos + turned * sin


def _biases(attn: Any, given: dict[str, Any]) -> Iterator[Tensor]:
    """Everything that is added to the scores, or where they are let through, as bool."""
    names = ("mask", "attn_mask", "shared_rel_pos_bias")
    yield from (given[name] for name in names if given.get(name) is not None)
    if getattr(attn, "relative_position_bias_table", None) is not None:
        yield attn._get_rel_pos_bias()
    if given.get("is_causal"):
        count = next(iter(given.values())).shape[1]
        yield torch.ones(count, count, dtype=torch.bool, device=attn.proj.weight.device).tril()


@contextlib.contextmanager
def capture_attention(
    blocks: Iterable[nn.Module], keep: Callable[[Tensor], Tensor] = lambda weights: weights
) -> Iterator[list[Tensor]]:
    """Collect the attention weights of every block that runs inside the ``with``, in the order of the calls.

    Args:
        keep: What is kept of the weights of a block, shape ``(batch, heads, read tokens, tokens)``.

    Raises:
        ConfigError: If the attention of a block is not a single softmax over scaled products.
    """
    found: list[Tensor] = []

    def note(attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(keep(attention_parts(attn, *args, **kwargs).weights))

    with contextlib.ExitStack() as stack:
        for block in blocks:
            handle = attention_module(block).register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(handle.remove)
        yield found


def rollout(layers: Sequence[Tensor], *, alpha: float = 0.5) -> Tensor:
    """Attention through all layers, if each layer passed on a share of its attention and the rest unchanged.

    Args:
        layers: Weights of consecutive blocks, averaged over heads, each ``(batch, tokens, tokens)``, which is
            also the shape of the result.
        alpha: Share of the attention branch, in [0, 1]; the rest is the residual connection.

    Raises:
        ConfigError: If there is no layer or ``alpha`` is out of range.

    Source:
        Attention rollout, https://arxiv.org/abs/2005.00928, equation 1 with ``alpha`` 0.5.
    """
    if not layers or not 0.0 <= alpha <= 1.0:
        raise ConfigError(f"rollout needs layers and an alpha in [0, 1]; got {len(layers)} and {alpha}.")
    rolled: Tensor | None = None
    for weights in layers:
        mixed = alpha * weights + (1 - alpha) * torch.eye(weights.shape[-1]).to(weights)
        rolled = mixed if rolled is None else mixed @ rolled
    assert rolled is not None
    return rolled


def attention_entropy(weights: Tensor) -> Tensor:
    """Entropy of each row, ``(..., tokens)`` to ``(...)``, as a share of the entropy of uniform attention."""
    return torch.special.entr(weights).sum(dim=-1) / math.log(max(2, weights.shape[-1]))


def attention_distance(weights: Tensor, grid_size: tuple[int, int], patch_size: int) -> Tensor:
    """Mean distance in pixels between a patch and the patches that it attends to.

    Weights are from patches to patches, ``(..., patches, patches)``; rows are brought to a sum of 1 here. The
    mean over the patches is of shape ``(...)``.

    Source:
        ViT, https://arxiv.org/abs/2010.11929, figure 7 right and appendix D.7.
    """
    rows, cols = grid_size
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    places = torch.stack([row.flatten(), col.flatten()], dim=1).double()
    distance = (
        torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist").to(weights) * patch_size
    )
    share = weights / weights.sum(dim=-1, keepdim=True)
    return (share * distance).sum(dim=-1).mean(dim=-1)

"""Identities of pooling heads, checked in float64 on the model's own tokens."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vit_cls.lab.probes.knn import votes
from vit_cls.lab.seeding import seeded
from vit_cls.lab.verify.subject import RELATIVE, Check, Subject, exact, relative_residual
from vit_cls.model.pooling_attention import AttentionPool, EfficientProbePool
from vit_cls.model.pooling_base import Pooling, PoolingContext
from vit_cls.model.pooling_mean import GEM_EPS, generalised_mean, log_mean_exp

TOLERANCE = 1e-10
"""Everything here is computed in float64."""
SMALL_R, LARGE_R = 1e-3, 1e3
LARGE_P = 1e3
NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07
"""Of the weights of nearest neighbours, as in DINO and DINOv2."""


def _close(found: Tensor, expected: Tensor) -> Check:
    return Check(relative_residual(found, expected), RELATIVE, TOLERANCE)


def _draw(subject: Subject, name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=subject.generator(name), dtype=torch.float64)


def _context(subject: Subject) -> PoolingContext:
    dim = subject.config.embed_dim
    heads = math.gcd(dim, subject.config.num_heads)
    return PoolingContext(subject.layout, embed_dim=dim, num_heads=heads, mlp_dim=2 * dim)


def _filled(subject: Subject, pool: Pooling) -> Any:
    """The same pooling in float64 with random weights, none of them zero."""
    pool = pool.double().requires_grad_(False)
    for name, parameter in pool.named_parameters():
        parameter.copy_(_draw(subject, name, *parameter.shape) * parameter.shape[-1] ** -0.5)
    return pool


def one_query_attention_equals_ep(subject: Subject) -> Check:
    """Attention of one learned query with h heads is h queries in the space of the tokens.

    Source:
        Efficient probing, https://arxiv.org/abs/2506.10178, and ``q . (W_k x) = (W_k^T q) . x``.
    """
    tokens, context = subject.patches, _context(subject)
    dim, heads = context.embed_dim, context.num_heads
    query = _draw(subject, "query", dim)
    w_k, w_v = (_draw(subject, name, dim, dim) * dim**-0.5 for name in ("keys", "values"))
    k, v = tokens @ w_k.T + _draw(subject, "key bias", dim), tokens @ w_v.T
    q, k, v = (
        rearrange(part, "b n (h d) -> b h n d", h=heads) for part in (query.expand(len(tokens), 1, dim), k, v)
    )
    plain = rearrange(F.scaled_dot_product_attention(q, k, v), "b h 1 d -> b (h d)")
    pool = EfficientProbePool(context, heads).double().requires_grad_(False)
    effective = torch.einsum("hd,hdc->hc", query.view(heads, -1), rearrange(w_k, "(h d) c -> h d c", h=heads))
    # One scales by the width of a head, the other by that of a token.
    pool.query.copy_(effective * heads**0.5)
    pool.value.copy_(w_v)
    return _close(pool(tokens), plain)


def zero_query_equals_gap(subject: Subject) -> Check:
    """Attention pooling with zero queries is the mean of the patches, times the values' matrix."""
    tokens, context = subject.patches, _context(subject)
    pool = EfficientProbePool(context, context.num_heads)
    _filled(subject, pool).query.zero_()
    return _close(pool(tokens), tokens.mean(dim=1) @ pool.value.T)


def absorbed_map_equals_plain(subject: Subject) -> Check:
    """``map`` without a key or value of any token gives what it gives with all of them.

    Args:
        subject: The model; its own pooling where that is ``map``, else random weights of its width.
    """
    tokens, own = subject.patches, subject.model.pool
    pool: Any
    if isinstance(own, AttentionPool):
        pool = copy.deepcopy(own).cpu().double()
    else:
        with seeded(subject.seed):  # its constructor draws from the global generator
            pool = AttentionPool(_context(subject))
        _filled(subject, pool)
    q, k, v = (
        rearrange(part, "b n (h d) -> b h n d", h=pool.num_heads)
        for part in (pool.q(pool.latent).expand(len(tokens), -1, -1), *pool.kv(tokens).chunk(2, dim=-1))
    )
    out = pool.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))
    return _close(pool(tokens), (out + pool.mlp(pool.norm(out)))[:, 0])


def gem_p1_is_mean(subject: Subject) -> Check:
    """Generalised mean pooling with exponent 1 is the mean of the positive part.

    Source:
        GeM, https://arxiv.org/abs/1711.02512.
    """
    positive = subject.patches.clamp_min(GEM_EPS)
    return _close(generalised_mean(subject.patches, 1.0), positive.mean(dim=1))


def gem_large_p_is_max(subject: Subject) -> Check:
    """Generalised mean pooling with a large exponent is the maximum, within a known bound.

    Of N positive values it falls short of the maximum by no more than ``max * (1 - N ** (-1 / p))``: the sum
    of their powers is at least that of the largest.

    Source:
        GeM, https://arxiv.org/abs/1711.02512.
    """
    high = subject.patches.clamp_min(GEM_EPS).amax(dim=1)
    below = high - generalised_mean(subject.patches, LARGE_P)
    most = high * (1 - subject.patches.shape[1] ** (-1 / LARGE_P))
    outside = max(0.0, float((-below).amax()), float((below - most).amax()))
    return Check(outside / float(high.amax()), RELATIVE, TOLERANCE)


def lse_limits(subject: Subject) -> Check:
    """``log(mean exp(r x)) / r`` is the mean for small r and the maximum for large r, within known bounds.

    It exceeds the mean by no more than ``r (max - min) ** 2 / 8`` (Hoeffding's lemma) and falls short of the
    maximum by no more than ``log(N) / r``.
    """
    tokens = subject.patches
    mean, high, low = tokens.mean(dim=1), tokens.amax(dim=1), tokens.amin(dim=1)
    above_mean = log_mean_exp(tokens, SMALL_R) - mean
    below_max = high - log_mean_exp(tokens, LARGE_R)
    outside = (
        (-above_mean).amax(),
        (above_mean - SMALL_R * (high - low) ** 2 / 8).amax(),
        (-below_max).amax(),
        (below_max - math.log(tokens.shape[1]) / LARGE_R).amax(),
    )
    scale = float(tokens.abs().amax())
    return Check(max(0.0, *(float(one) for one in outside)) / scale, RELATIVE, TOLERANCE)


def knn_weights_argmax(subject: Subject) -> Check:
    """DINO's and DINOv2's weights of nearest neighbours choose the same class; residual: how often not.

    DINO's are the votes of the probe ``knn``, so that a mistake in it is seen here.

    Args:
        subject: The model; its patch tokens with random labels, those of the first image as queries.

    Source:
        ``exp(s / T)``: https://github.com/facebookresearch/dino/blob/main/eval_knn.py;
        ``softmax(s / T)``: https://github.com/facebookresearch/dinov2/blob/main/dinov2/eval/knn.py.
    """
    tokens = F.normalize(subject.patches, dim=-1)
    queries, bank = tokens[0], tokens[1:].flatten(0, 1)
    labels = torch.randint(10, (len(bank),), generator=subject.generator("labels"))
    scores = queries @ bank.T
    exceptions = 0
    for k in {min(k, len(bank)) for k in NEIGHBOURS}:
        best, index = scores.topk(k, dim=1)
        dino = votes(best, labels[index], TEMPERATURE, 10)
        one_hot = F.one_hot(labels[index], 10).double()
        dinov2 = torch.einsum("qk,qkc->qc", dinov2_weights(best), one_hot)
        chosen, other = (said.argmax(dim=1, keepdim=True) for said in (dino, dinov2))
        # A tie, up to rounding, is no exception.
        apart = dino.gather(1, chosen) - dino.gather(1, other) > 1e-9 * dino.amax(dim=1, keepdim=True)
        exceptions += int(apart.sum())
    return exact(float(exceptions))


def dinov2_weights(scores: Tensor) -> Tensor:
    """How much each neighbour's vote counts in DINOv2's evaluation.

    Args:
        scores: Cosines with the neighbours, shape ``(queries, neighbours)``.
    """
    return (scores / TEMPERATURE).softmax(dim=1)

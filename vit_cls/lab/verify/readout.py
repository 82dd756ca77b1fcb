"""Identities about attention weights, and about what the last block and the head read."""

from __future__ import annotations

import copy
from typing import Any

import torch
from einops import rearrange
from torch import nn

from vit_cls.lab.attention import (
    attention_parts,
)
from vit_cls.lab.verify.subject import (
    RELATIVE,
    Check,
    NotApplicableError,
    Subject,
    exact,
    greater,
    largest,
    need_native,
    relative_residual,
)


def last_block_class_token_only(subject: Subject) -> Check:
    """The last block, computed for the read tokens alone, gives what the whole block gives for them."""
    need_native(subject, "compute every token")
    model, pool = subject.model, subject.model.pool
    full = subject.layers[-1]
    residual = relative_residual(subject.read_tokens, full[:, pool.read])
    first = slice(0, 1)
    if pool.read != first:
        residual = max(residual, relative_residual(model.run_blocks(subject.tokens, first), full[:, first]))
    return Check(residual, RELATIVE, subject.tolerance)


def gradient_at_last_patches(subject: Subject) -> Check:
    """Behind the last block only the tokens that the head reads have a gradient.

    With a class token as the only one read, that of the patches is exactly zero: gradient methods must look
    at the input of the last block. With a mean over the patches it is not zero.
    """
    model, pool, first = subject.model, subject.model.pool, subject.layout.num_prefix_tokens
    if getattr(pool, "num_layers", 1) > 1:
        raise NotApplicableError(f"the head reads several blocks (pool {subject.config.pool})")
    tokens = subject.layers[-1].clone().requires_grad_()
    with torch.enable_grad():
        features = model.fc_norm(pool(model.norm(tokens[:, pool.read])))
        score = (features * subject.random("cotangent", *features.shape[1:])).sum()
    (gradient,) = torch.autograd.grad(score, tokens)
    name, _, index = subject.config.pool.partition(":")
    if name == "token":
        unread = [i for i in range(subject.layout.num_patches) if i != int(index)]
        return exact(largest(gradient[:, [first + i for i in unread]]) if unread else 0.0)
    if name == "cls" or pool.read.stop <= first:
        return exact(largest(gradient[:, first:]))
    return greater(largest(gradient[:, first:]))


def attention_rows_sum_to_one(subject: Subject) -> Check:
    """Attention is a mean: its rows sum to 1, and values that are all 1 come out as 1."""
    sums = torch.stack([weights.sum(dim=-1) for weights in subject.attention])
    residual = largest(sums - 1)
    for end in (0, -1):
        call = subject.call(end)
        # What the block itself does, where the weights above are computed beside it.
        found = _with_constant_values(call.attn)(*call.args, **call.kwargs)
        residual = max(residual, largest(found - 1))
    return Check(residual, RELATIVE, subject.tolerance)


def _with_constant_values(attn: Any) -> Any:
    """A copy whose values are all 1, and which returns the heads as they are."""
    probe = _copy(attn)
    if probe.qkv is None:
        probe.v_proj = _biased(probe.v_proj, probe.v_proj.out_features)
    else:
        probe.qkv = _biased(probe.qkv, probe.qkv.out_features // 3)
        if getattr(probe, "v_bias", None) is not None:
            nn.init.ones_(probe.v_bias)
            nn.init.zeros_(probe.qkv.bias)
    probe.proj = probe.norm = nn.Identity()
    probe.gate = None
    return probe


def _copy(attn: Any) -> Any:
    """A copy without the hooks of the original."""
    copied = copy.deepcopy(attn)
    copied._forward_hooks.clear()
    copied._forward_pre_hooks.clear()
    return copied.requires_grad_(False)


def _biased(layer: nn.Linear, last: int) -> nn.Linear:
    """The same layer, but for the last outputs, which are 1."""
    at = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    made = nn.utils.skip_init(type(layer), layer.in_features, layer.out_features, **at).requires_grad_(False)
    made.weight.copy_(layer.weight)
    made.bias.copy_(torch.zeros_like(made.bias) if layer.bias is None else layer.bias)
    made.weight[-last:] = 0
    made.bias[-last:] = 1
    return made


def value_contributions(subject: Subject) -> Check:
    """What a token sends to another, summed over the tokens, plus the bias is the attention's output.

    Source:
        Value-weighted attention: https://arxiv.org/abs/2004.10102, equation 6.
    """
    call = subject.call(-1)
    attn: Any = call.attn
    if not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity) or getattr(attn, "gate", None):
        raise NotApplicableError("the attention has a norm or a gate behind the weighted sum")
    parts = attention_parts(attn, *call.args, **call.kwargs)
    rows = sorted({0, call.output.shape[1] // 2, call.output.shape[1] - 1})
    heads = torch.einsum("bhij,bhjd->bijhd", parts.weights[:, :, rows], parts.values)
    sent = rearrange(heads, "b i j h d -> b i j (h d)") @ attn.proj.weight.T  # (B, rows, N, D)
    bias = 0 if attn.proj.bias is None else attn.proj.bias
    return subject.relative(sent.sum(dim=2) + bias, call.output[:, rows])


def lens_equals_logits(subject: Subject) -> Check:
    """The head, applied to the tokens after the last block, gives the model's logits.

    Source:
        Class lens: https://arxiv.org/abs/2310.18969.
    """
    model, layout, pool = subject.model, subject.layout, subject.config.pool
    tokens = model.norm(subject.layers[-1])
    includes = getattr(subject.config, "pool_include_prefix", False)
    patches = tokens[:, 0 if includes else layout.num_prefix_tokens :]
    name, _, index = pool.partition(":")
    if name == "cls":
        features = tokens[:, 0]
    elif name == "gap":
        features = patches.mean(dim=1)
    elif name == "max":
        features = patches.amax(dim=1)
    elif name == "token":
        features = tokens[:, layout.num_prefix_tokens + int(index)]
    elif name == "cls+gap":
        features = torch.cat([tokens[:, 0], patches.mean(dim=1)], dim=1)
    else:
        raise NotApplicableError(f"the pooling has weights or several readers (pool {pool})")
    return subject.relative(model.head(model.fc_norm(features)), subject.logits)

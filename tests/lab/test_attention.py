"""Attention weights of native and timm's blocks, and what is read off them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

from vit_cls.errors import ConfigError
from vit_cls.lab.attention import (
    attention_distance,
    attention_entropy,
    attention_parts,
    capture_attention,
    rollout,
)
from vit_cls.model.attention import Attention
from vit_cls.model.block import Block, Mlp


def _native(generator, **options):
    block = Block(16, Attention(16, 2, **options), Mlp(16, 32)).double().eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return block


def _weights(block, tokens, **context):
    with capture_attention([block]) as found:
        block(tokens, **context)
    (weights,) = found
    return weights


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"qkv_bias": False}], ids=str)
@pytest.mark.parametrize("read", [None, slice(1, 2), slice(1, 4)], ids=str)
def test_weights_times_values_are_what_a_native_block_computes(options, read, generator):
    attn = _native(generator, **options).attn
    tokens = torch.randn(3, 5, 16, generator=generator, dtype=torch.float64)
    parts = attention_parts(attn, tokens, read)
    found = attn.proj((parts.weights @ parts.values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, attn(tokens, read))
    assert parts.weights.shape == (3, 2, 5 if read is None else read.stop - read.start, 5)


def test_a_mask_is_part_of_the_weights(generator):
    attn = _native(generator).attn
    tokens = torch.randn(2, 4, 16, generator=generator, dtype=torch.float64)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    parts = attention_parts(attn, tokens, mask=mask)
    assert torch.equal(parts.weights > 0, mask.expand(2, 2, -1, -1))
    found = attn.proj((parts.weights @ parts.values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, attn(tokens, mask=mask))


def test_weights_of_one_head_by_hand():
    block = Block(2, Attention(2, 1), Mlp(2, 4)).double()
    block.norm1 = nn.Identity()
    with torch.no_grad():
        block.attn.qkv.weight.copy_(torch.cat([torch.eye(2)] * 3))
        block.attn.qkv.bias.zero_()
    tokens = torch.tensor([[[0.0, 0.0], [math.sqrt(2) * math.log(3), 1.0]]], dtype=torch.float64)
    tokens[0, 1, 1] = 0.0
    weights = _weights(block, tokens)[0, 0]
    score = math.sqrt(2) * math.log(3) ** 2
    assert weights[0].tolist() == [0.5, 0.5]
    assert weights[1, 1].item() == pytest.approx(1 / (1 + math.exp(-score)))


@pytest.mark.parametrize("half", [False, True])
def test_rotary_positions_turn_queries_and_keys_as_timm_turns_them(half, generator):
    block = EvaBlock(16, 2, rotate_half=half, swiglu_mlp=False).double().eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    tokens, rope = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((2, 5, 16), (4, 16)))
    parts = attention_parts(block.attn, block.norm1(tokens), rope=rope)
    mixed = (parts.weights @ parts.values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(
        block.attn.proj(block.attn.norm(mixed)), block.attn(block.norm1(tokens), rope=rope)
    )
    assert torch.equal(_weights(block, tokens, rope=rope), parts.weights)
    assert not torch.allclose(_weights(block, tokens), parts.weights)


def test_timms_ordinary_block_is_known_and_a_parallel_one_is_refused(generator):
    tokens = torch.randn(2, 5, 16, generator=generator)
    weights = _weights(TimmBlock(16, 2, qkv_bias=True).eval(), tokens)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 5))
    with pytest.raises(ConfigError, match=r"one softmax attention .*got ParallelScalingBlock"):
        _weights(ParallelScalingBlock(16, 2), tokens)


def test_hooks_are_gone_after_the_capture(generator):
    block = _native(generator)
    tokens = torch.randn(1, 3, 16, generator=generator, dtype=torch.float64)
    with capture_attention([block], lambda weights: weights.mean(dim=1)) as found:
        block(tokens)
        block(tokens)
    block(tokens)
    assert [one.shape for one in found] == [(1, 3, 3), (1, 3, 3)]
    assert not block.attn._forward_pre_hooks


def test_rollout_multiplies_later_layers_from_the_left():
    first = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], dtype=torch.float64)
    second = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)
    assert torch.equal(rollout([first, second], alpha=1.0), second @ first)
    assert torch.equal(rollout([first, second], alpha=0.0), torch.eye(2, dtype=torch.float64)[None])
    by_hand = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]], dtype=torch.float64)
    assert torch.equal(rollout([first, second]), by_hand)
    layers = list(torch.rand(3, 2, 5, 5, generator=torch.Generator().manual_seed(0)).double().softmax(dim=-1))
    torch.testing.assert_close(rollout(layers).sum(dim=-1), torch.ones(2, 5).double())
    assert torch.equal(rollout(layers[:1], alpha=1.0), layers[0])


@pytest.mark.parametrize(("layers", "alpha"), [([], 0.5), ([torch.eye(2)[None]], 1.5)])
def test_rollout_of_nothing_or_of_more_than_all_is_refused(layers, alpha):
    with pytest.raises(ConfigError, match="needs layers and an alpha"):
        rollout(layers, alpha=alpha)


def test_uniform_attention_has_the_entropy_and_the_distance_that_the_grid_gives():
    uniform = torch.full((196, 196), 1 / 196, dtype=torch.float64)
    assert attention_entropy(uniform)[0].item() == pytest.approx(1.0, abs=1e-12)
    assert math.log(196) == pytest.approx(5.2781, abs=5e-5)
    assert attention_distance(uniform, (14, 14), 16).item() == pytest.approx(116.492, abs=5e-4)
    oblong = attention_distance(torch.ones(6, 6, dtype=torch.float64), (2, 3), 4)
    places = list(itertools.product(range(2), range(3)))
    assert oblong.item() == pytest.approx(4 * np.mean([math.dist(a, b) for a in places for b in places]))


def test_distance_of_attention_to_the_right_hand_neighbour_is_one_patch():
    weights = torch.eye(3, dtype=torch.float64).roll(1, dims=1)
    # 0 -> 1, 1 -> 2, 2 -> 0: one, one and two patches of 10 pixels
    assert attention_distance(weights, (1, 3), 10).item() == pytest.approx(40 / 3)

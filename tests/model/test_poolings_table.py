"""What holds for every row of the table of poolings, and what each of them costs."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models import POOLS, make_vit, perturbed
from vit_cls.errors import ConfigError
from vit_cls.model.pooling import (
    PoolingContext,
    make_pooling,
    needs_class_token,
    num_class_tokens,
    pool_parts,
)
from vit_cls.model.tokens import TokenLayout

BY_ATTENTION = ["seqpool", "abmil", "simpool", "ep:2", "map"]
OVER_PATCHES = ["gap", "max", "avgmax", "gem", "gem:2", "lse", *BY_ATTENTION, "cait:2"]
PREFIX = 1 + 3


def _context(spec, **settings):
    layout = TokenLayout(True, 3, (3, 3), num_class_tokens(spec, 4))
    return PoolingContext(layout, embed_dim=24, num_heads=3, mlp_dim=60, depth=2, num_classes=4, **settings)


def _pooling(spec, generator, *, moved=True, **settings):
    """In float64, every parameter off its first value."""
    pooling = make_pooling(spec, _context(spec, **settings)).double().eval()
    return perturbed(pooling, generator, 0.3) if moved else pooling


def _read_tokens(pooling, generator, batch=3):
    count = (pooling.read.stop - pooling.read.start) * pooling.num_layers
    return torch.randn(batch, count, 24, generator=generator, dtype=torch.float64)


def _same(first, second):
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-11)


def _last_three_invalid(tokens):
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
    mask[:, -3:] = False
    return mask


def test_the_poolings_over_the_patches_are_those_that_read_all_of_them(generator):
    found = [s for s in POOLS if _pooling(s, generator).read == slice(PREFIX, PREFIX + 9)]
    assert found == OVER_PATCHES


@pytest.mark.parametrize("spec", POOLS)
def test_a_gradient_that_is_not_zero_reaches_every_parameter_even_from_one_image(spec, tiny, generator):
    # off their first values: what starts at zero may block the way to others
    model = perturbed(make_vit(tiny, pool=spec, reg_tokens=1), generator).train()
    logits = model(torch.randn(1, 3, 16, 16, generator=generator))
    assert logits.shape == (1, 5)
    logits.square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("spec", OVER_PATCHES)
def test_class_token_and_registers_have_no_influence_but_where_that_is_asked_for(spec, generator):
    tokens = torch.randn(2, PREFIX + 9, 24, generator=generator, dtype=torch.float64)
    huge = tokens.clone()
    huge[:, :PREFIX] = 1e6
    pooling = _pooling(spec, generator)
    assert torch.equal(pooling(huge[:, pooling.read]), pooling(tokens[:, pooling.read]))
    pooling = _pooling(spec, generator, include_prefix=True)
    assert not torch.allclose(pooling(huge[:, pooling.read]), pooling(tokens[:, pooling.read]))


@pytest.mark.parametrize("spec", [spec for spec in POOLS if needs_class_token(spec)])
def test_without_a_class_token_a_pooling_that_reads_it_is_refused_by_its_own_name(spec):
    context = PoolingContext(TokenLayout(False, 0, (3, 3)), embed_dim=24, depth=2, num_classes=4)
    with pytest.raises(
        ConfigError,
        match=rf"^model\.pool {re.escape(spec)} reads the class token, but model.class_token is false"
        r".*Use model\.pool gap",
    ):
        make_pooling(spec, context)


def test_the_mean_beside_the_class_token_is_of_the_patches_alone(generator):
    pooling = _pooling("cls+gap", generator)
    tokens = torch.randn(2, PREFIX + 9, 24, generator=generator, dtype=torch.float64)
    _same(pooling(tokens), torch.cat([tokens[:, 0], tokens[:, PREFIX:].mean(1)], dim=1))
    mask = _last_three_invalid(tokens)
    _same(pooling(tokens, mask), torch.cat([tokens[:, 0], tokens[:, PREFIX:-3].mean(1)], dim=1))


@pytest.mark.parametrize("spec", [*OVER_PATCHES, "cls+gap"])
def test_invalid_tokens_count_as_if_they_were_not_there(spec, generator):
    pooling = _pooling(spec, generator)
    tokens = _read_tokens(pooling, generator)
    mask = _last_three_invalid(tokens)
    padded = tokens.clone()
    padded[:, -3:] = 1e3
    _same(pooling(padded, mask), pooling(tokens[:, :-3]))
    assert not torch.allclose(pooling(padded, mask), pooling(tokens))


@pytest.mark.parametrize("spec", POOLS)
def test_a_result_does_not_depend_on_batch_mates_with_a_mask_or_without(spec, generator):
    pooling = _pooling(spec, generator)
    tokens = _read_tokens(pooling, generator, batch=4)
    tokens[1] *= 50.0  # a loud one
    mask = torch.rand(tokens.shape[:2], generator=generator) < 0.6
    mask[:, 0] = True
    _same(pooling(tokens, torch.ones_like(mask)), pooling(tokens))  # all are valid: as without a mask
    for given in (None, mask):
        pooled = pooling(tokens, given)
        assert pooled.shape[0] == 4
        for i in range(4):
            alone = pooling(tokens[i : i + 1], None if given is None else given[i : i + 1])
            _same(alone[0], pooled[i])


@pytest.mark.parametrize("spec", OVER_PATCHES)
def test_the_order_of_the_patches_makes_no_difference(spec, generator):
    pooling = _pooling(spec, generator)
    tokens = _read_tokens(pooling, generator)
    order = torch.randperm(9, generator=generator)
    _same(pooling(tokens[:, order]), pooling(tokens))


@pytest.mark.parametrize("spec", ["seqpool", "abmil", "ep:2", "ep:24", "simpool"])
def test_these_start_as_the_mean_of_the_patches(spec, generator):
    pooling = _pooling(spec, generator, moved=False)
    tokens = _read_tokens(pooling, generator)
    mask = _last_three_invalid(tokens)
    values = torch.nn.functional.layer_norm(tokens, (24,), eps=1e-6) if spec == "simpool" else tokens
    _same(pooling(tokens), values.mean(1))
    _same(pooling(tokens, mask), values[:, :-3].mean(1))
    expected = torch.full((3, 9), 1 / 9, dtype=torch.float64)
    for head in pooling.attention(tokens).unbind(1):
        _same(head, expected)


@pytest.mark.parametrize("spec", BY_ATTENTION)
def test_attention_sums_to_one_over_the_valid_tokens_and_is_what_weighs_them(spec, generator):
    pooling = _pooling(spec, generator)
    tokens = _read_tokens(pooling, generator)
    mask = _last_three_invalid(tokens)
    weights = pooling.attention(tokens, mask)
    assert weights.shape == (3, {"ep:2": 2, "map": 3}.get(spec, 1), 9)
    assert (weights[..., -3:] == 0).all()
    _same(weights.sum(-1), torch.ones(weights.shape[:2], dtype=torch.float64))
    assert weights.std(-1).max() > 1e-3
    if spec in ("seqpool", "abmil"):
        _same(pooling(tokens, mask), (weights @ tokens)[:, 0])


@pytest.mark.parametrize("spec", POOLS)
def test_macs_are_half_of_the_flops_that_torch_counts(spec):
    """The counter sees matrix products alone, which is what ``macs`` promises; means have none."""
    context = dataclasses.replace(
        _context(spec), layout=TokenLayout(True, 3, (14, 14)), embed_dim=96, mlp_dim=384
    )
    pooling = make_pooling(spec, context).eval().requires_grad_(False)
    tokens = torch.randn(1, (pooling.read.stop - pooling.read.start) * pooling.num_layers, 96)
    with FlopCounterMode(display=False) as counter:
        pooling(tokens)
    assert pooling.macs == pytest.approx(counter.get_total_flops() / 2, rel=0.02)
    assert (pooling.macs > 0) == (spec in [*BY_ATTENTION, "cait:2", "multicls-diverse:2"])


@pytest.mark.parametrize(("spec", "times"), [("map", 22.2), ("ep:32", 11.8), ("simpool", 78.0)])
def test_without_keys_and_values_attention_over_patches_costs_a_fraction(spec, times):
    """ViT-B's width and patches; as published, keys and values are projected for each of the 196 tokens."""
    dim, count, mlp_dim = 768, 196, 3072
    context = PoolingContext(TokenLayout(True, 0, (14, 14)), embed_dim=dim, num_heads=12, mlp_dim=mlp_dim)
    published = {
        "map": (2 * count + 2) * dim**2 + 2 * count * dim + 2 * dim * mlp_dim,
        "ep:32": count * dim**2 + 32 * dim * count + dim * count,
        "simpool": (count + 1) * dim**2 + 2 * dim * count,
    }[spec]
    with torch.device("meta"):
        macs = make_pooling(spec, context).macs
    assert published / macs == pytest.approx(times, rel=0.02)


@pytest.mark.parametrize("spec", POOLS)
def test_the_width_is_what_is_promised_and_that_of_its_parts(spec, generator):
    pooling = _pooling(spec, generator)
    pooled = pooling(_read_tokens(pooling, generator))
    assert pooled.shape[-1] == pooling.out_dim == 24 * len(pool_parts(spec))
    assert pooled.shape[:-1] == ((3, 4) if pooling.per_class else (3,))


@pytest.mark.parametrize("spec", ["ep:8", "token:5", "cait:2", "multicls-concat:2"])
def test_the_colon_may_be_left_out(spec, generator):
    short = spec.replace(":", "")
    assert pool_parts(short) == pool_parts(spec)
    assert num_class_tokens(short, 4) == num_class_tokens(spec, 4)
    assert make_pooling(short, _context(short)).read == make_pooling(spec, _context(spec)).read


@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        ("ep:7", {}, r"ep:Q needs a Q that divides model.embed_dim; got 7 and 24"),
        ("ep", {}, r"model.pool ep:K needs a whole number K of at least 1; got none"),
        ("last:3", {}, r"last:K .* at most 2 \(the blocks of the encoder\); got 3"),
        ("last:0", {}, r"last:K .* of at least 1, at most 2 .*; got 0"),
        ("multicls:0", {}, r"multicls:K needs a whole number K of at least 1; got 0"),
        ("multicls-diverse:1", {}, r"multicls-diverse:K needs a K of at least 2: one token would cancel"),
        ("classtok", {"num_classes": 0}, r"classtok has a token for each class, but the model has none"),
        ("classtok:3", {}, r"model.pool classtok takes no index; got 'classtok:3'"),
        ("gem:0", {}, r"model.pool gem:K needs a whole number K of at least 1; got 0"),
        ("cls+classtok", {}, r"cannot join a pooling with a vector for each class to others"),
        ("cls+", {}, r"model.pool must be one of .*, or several joined by \+; got 'cls\+'"),
    ],
)
def test_a_pooling_that_cannot_be_says_what_is_required(spec, settings, message):
    context = dataclasses.replace(_context("cls"), **settings)
    with pytest.raises(ConfigError, match=message):
        make_pooling(spec, context)

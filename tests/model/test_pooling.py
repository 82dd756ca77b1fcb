"""Poolings with weights or several parts: numbers against timm's and by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from timm.models.cait import LayerScaleBlockClassAttn

from tests.models import make_vit, perturbed
from vit_cls.errors import ConfigError
from vit_cls.model.pooling import AttentionPool, PoolingContext, make_pooling
from vit_cls.model.pooling_mean import generalised_mean, log_mean_exp
from vit_cls.model.tokens import TokenLayout

CONTEXT = PoolingContext(TokenLayout(True, 2, (3, 3)), embed_dim=24, num_heads=3, mlp_dim=60)


def _moved(spec):
    """In float64, every parameter off its first value."""
    torch.manual_seed(0)
    return perturbed(make_pooling(spec, CONTEXT).double(), scale=0.3)


@pytest.fixture
def pooling():
    return _moved("map")


@pytest.fixture
def tokens(generator):
    return torch.randn(4, 9, 24, generator=generator, dtype=torch.float64)


def _same(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


def test_attention_pooling_has_timms_keys_and_numbers(pooling, tokens, generator):
    theirs = AttentionPoolLatent(24, num_heads=3, mlp_ratio=2.5, norm_layer=torch.nn.LayerNorm).double()
    theirs.norm.eps = 1e-6
    assert list(pooling.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(pooling.state_dict())
    _same(pooling(tokens), theirs(tokens))
    mask = torch.rand(4, 9, generator=generator) < 0.6
    mask[:, 4] = True
    for i, row in enumerate(pooling(tokens, mask)):
        _same(row, theirs(tokens[i : i + 1, mask[i]])[0])


def test_attention_weights_are_those_that_pool(pooling, tokens):
    values = pooling.kv(tokens)[..., 24:].reshape(4, 9, 3, 8)
    mixed = pooling.proj(torch.einsum("bhn,bnhd->bhd", pooling.attention(tokens), values).reshape(4, 24))
    _same(pooling(tokens), mixed + pooling.mlp(pooling.norm(mixed)[:, None])[:, 0])


def test_the_query_starts_with_timms_spread():
    torch.manual_seed(0)
    context = PoolingContext(TokenLayout(True, 0, (2, 2)), embed_dim=768, num_heads=12, mlp_dim=3072)
    pooling = make_pooling("map", context)
    assert isinstance(pooling, AttentionPool)
    assert pooling.latent.std().item() == pytest.approx(768**-0.5, rel=0.1)
    assert pooling.kv.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_an_uncovered_edge_of_the_image_is_allowed_by_name_alone(tiny, generator):
    with pytest.raises(ConfigError, match=r"got 18 and 4"):
        make_vit(tiny, img_size=18)
    model = make_vit(tiny, img_size=18, floor_grid=True).eval()
    images = torch.randn(1, 3, 18, 18, generator=generator)
    assert model.layout.grid_size == (4, 4)
    other = images.clone()
    other[..., 16:, :] = 9.0
    other[..., 16:] = 9.0
    torch.testing.assert_close(model(other), model(images), rtol=0, atol=0)


# --- attention without a key or value for each token, against the same with them


@pytest.mark.parametrize("queries", [1, 3, 8, 24])
def test_efficient_probing_equals_its_published_form(queries, tokens):
    pooling = _moved(f"ep:{queries}")
    values = tokens @ pooling.value.T  # of every token
    parts = []
    for j, query in enumerate(pooling.query):
        attn = ((tokens @ query) / 24**0.5).softmax(dim=1)
        mine = values[..., j * 24 // queries : (j + 1) * 24 // queries]
        parts.append((attn[..., None] * mine).sum(dim=1))
    _same(pooling(tokens), torch.cat(parts, dim=1))


def test_multi_head_attention_of_one_query_is_efficient_probing_with_a_query_a_head(tokens):
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(24, 3, bias=False, batch_first=True).double()
    query = torch.randn(1, 1, 24, dtype=torch.float64)
    w_q, w_k, w_v = theirs.in_proj_weight.detach().chunk(3)
    ours = make_pooling("ep:3", CONTEXT).double()
    q = (query[0, 0] @ w_q.T).view(3, 8)
    with torch.no_grad():
        ours.query.copy_(torch.einsum("hd,hdc->hc", q, w_k.view(3, 8, 24)) * (24 / 8) ** 0.5)
        ours.value.copy_(w_v)
    expected, weights = theirs(query.expand(4, -1, -1), tokens, tokens, average_attn_weights=False)
    _same(ours(tokens) @ theirs.out_proj.weight.T, expected[:, 0])
    _same(ours.attention(tokens), weights[:, :, 0])


def test_with_a_query_of_zero_the_values_of_the_mean_are_left(tokens):
    pooling = _moved("ep:8")
    torch.nn.init.zeros_(pooling.query)
    _same(pooling(tokens), tokens.mean(1) @ pooling.value.T)


def _reference_timm_class_attention(block) -> LayerScaleBlockClassAttn:
    theirs = LayerScaleBlockClassAttn(24, 3, mlp_ratio=2.5, qkv_bias=True).double().eval()
    state = dict(block.state_dict())
    for part in ("weight", "bias"):
        q, k, v = state.pop(f"attn.qkv.{part}").chunk(3)
        state |= {f"attn.q.{part}": q, f"attn.k.{part}": k, f"attn.v.{part}": v}
    state |= {f"gamma_{i}": state.pop(f"ls{i}.gamma") for i in (1, 2)}
    theirs.load_state_dict(state)
    theirs.norm1.eps = theirs.norm2.eps = 1e-6
    return theirs


@pytest.mark.parametrize("count", [1, 2, 3])
def test_class_attention_has_timms_numbers(count, tokens):
    pooling = _moved(f"cait:{count}")
    latent = pooling.latent.expand(4, -1, -1)
    for block in pooling.layers:
        latent = _reference_timm_class_attention(block)(tokens, latent)
    _same(pooling(tokens), latent[:, 0])


def test_simpool_equals_its_published_form(tokens):
    pooling = _moved("simpool")
    expected = []
    for image in tokens:
        normed = F.layer_norm(image, (24,), pooling.norm.weight, pooling.norm.bias, 1e-6)
        query, keys = pooling.q @ image.mean(0), normed @ pooling.k.weight.T
        expected.append((keys @ query / 24**0.5).softmax(0) @ normed)
    _same(pooling(tokens), torch.stack(expected))


def test_gated_attention_equals_a_loop_over_the_tokens(tokens):
    pooling = _moved("abmil")
    expected = []
    for image in tokens:
        scores = [
            pooling.query[0]
            @ (
                torch.tanh(pooling.value.weight @ x + pooling.value.bias)
                * torch.sigmoid(pooling.gate.weight @ x + pooling.gate.bias)
            )
            for x in image
        ]
        weights = torch.stack(scores).softmax(0)
        expected.append(sum(w * x for w, x in zip(weights, image, strict=True)))
    _same(pooling(tokens), torch.stack(expected))


# --- between the mean and the maximum


def test_the_generalised_mean_goes_from_the_mean_to_the_maximum(tokens):
    positive = tokens.abs() + 0.1
    _same(generalised_mean(positive, 1.0), positive.mean(1))
    torch.testing.assert_close(generalised_mean(positive, 2000.0), positive.amax(1), rtol=2e-3, atol=0)
    steps = torch.stack([generalised_mean(positive, p) for p in (1.0, 2.0, 3.0, 8.0, 50.0)])
    assert (steps.diff(dim=0) > 0).all()


def test_the_generalised_mean_does_not_leave_the_range_of_floats():
    """Of values of 1e-6, where what is negative ends, the seventh power is 0 in float32."""
    tokens = torch.tensor([[[-1.0, 1e8], [-2.0, 3e8]]], requires_grad=True)
    p = torch.tensor(7.0, requires_grad=True)
    pooled = generalised_mean(tokens, p)
    assert pooled.tolist() == [[pytest.approx(1e-6), pytest.approx(3e8 * 0.5 ** (1 / 7), rel=1e-3)]]
    pooled.sum().backward()
    assert tokens.grad.isfinite().all()
    assert p.grad.isfinite()


def test_gradients_of_the_generalised_mean_are_those_of_its_formula(tokens):
    p = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    positive = (tokens.abs() + 0.1).requires_grad_()
    ours = torch.autograd.grad(generalised_mean(positive, p).sum(), [positive, p])
    theirs = torch.autograd.grad(((positive**p).mean(1) ** (1 / p)).sum(), [positive, p])
    for mine, expected in zip(ours, theirs, strict=True):
        _same(mine, expected)


def test_the_log_of_the_mean_of_exponentials_goes_from_the_mean_to_the_maximum(tokens):
    torch.testing.assert_close(log_mean_exp(tokens, 1e-6), tokens.mean(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(log_mean_exp(tokens, 1e4), tokens.amax(1), rtol=0, atol=1e-3)
    _same(log_mean_exp(tokens, 2.0), ((2 * tokens).exp().mean(1).log()) / 2)


@pytest.mark.parametrize(
    ("spec", "name", "low", "least"), [("gem", "p", -5.0, 1.0), ("lse", "r", -5.0, 0.01)]
)
def test_a_learned_exponent_does_not_pass_the_mean(spec, name, low, least, tokens):
    pooling = make_pooling(spec, CONTEXT).double()
    formula = {"gem": generalised_mean, "lse": log_mean_exp}[spec]
    first = {"gem": 3.0, "lse": 1.0}[spec]
    assert getattr(pooling, name).item() == first
    _same(pooling(tokens), formula(tokens, first))
    torch.nn.init.constant_(getattr(pooling, name), low)
    _same(pooling(tokens), formula(tokens, least))


# --- several class tokens


def test_several_class_tokens_by_hand(generator):
    tokens = torch.randn(4, 3, 24, generator=generator, dtype=torch.float64)
    first, second, third = tokens.unbind(1)
    _same(make_pooling("multicls:3", CONTEXT)(tokens), (first + second + third) / 3)
    _same(make_pooling("multicls-concat:3", CONTEXT)(tokens), torch.cat([first, second, third], dim=1))
    diverse = _moved("multicls-diverse:3")
    a, b, c = diverse.weight
    mean = (a + b + c) / 3
    _same(diverse(tokens), first @ (a - mean).T + second @ (b - mean).T + third @ (c - mean).T)
    _same(diverse(first[:, None].expand(-1, 3, -1)), torch.zeros(4, 24, dtype=torch.float64))


def test_a_matrix_for_each_class_token_starts_with_xaviers_spread():
    torch.manual_seed(0)
    bound = (6 / (24 + 24)) ** 0.5
    for matrix in make_pooling("multicls-diverse:3", CONTEXT).weight:
        assert 0.9 * bound < matrix.abs().max() <= bound

"""Poolings with weights or several parts: numbers against timm's and by hand."""

from __future__ import annotations

import pytest
import torch
from timm.layers import AttentionPoolLatent

from vit_cls.errors import ConfigError
from vit_cls.model.config import ViTConfig
from vit_cls.model.pooling import AttentionPool, PoolingContext, make_pooling, pool_parts
from vit_cls.model.tokens import TokenLayout
from vit_cls.model.vit import VisionTransformer

CONTEXT = PoolingContext(TokenLayout(True, 2, (3, 3)), embed_dim=24, num_heads=3, mlp_dim=60)


@pytest.fixture
def pooling():
    torch.manual_seed(0)
    pooling = make_pooling("map", CONTEXT).double()
    with torch.no_grad():
        for parameter in pooling.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return pooling.eval()


def test_attention_pooling_has_timms_keys_and_numbers(pooling, generator):
    theirs = (
        AttentionPoolLatent(24, num_heads=3, mlp_ratio=2.5, norm_layer=torch.nn.LayerNorm).double().eval()
    )
    theirs.norm.eps = 1e-6
    assert list(pooling.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(pooling.state_dict())
    tokens = torch.randn(4, 9, 24, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(pooling(tokens), theirs(tokens), rtol=0, atol=1e-12)


def test_attention_weights_are_those_that_pool(pooling, generator):
    tokens = torch.randn(2, 9, 24, generator=generator, dtype=torch.float64)
    weights = pooling.attention(tokens)
    assert weights.shape == (2, 3, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    values = pooling.kv(tokens)[..., 24:].reshape(2, 9, 3, 8)
    mixed = pooling.proj(torch.einsum("bhn,bnhd->bhd", weights, values).reshape(2, 24))
    expected = mixed + pooling.mlp(pooling.norm(mixed)[:, None])[:, 0]
    torch.testing.assert_close(pooling(tokens), expected, rtol=0, atol=1e-12)


def test_attention_pooling_does_not_depend_on_the_order_of_the_patches(pooling, generator):
    tokens = torch.randn(1, 9, 24, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(pooling(tokens.flip(1)), pooling(tokens), rtol=0, atol=1e-12)


def test_the_query_starts_with_timms_spread():
    torch.manual_seed(0)
    context = PoolingContext(TokenLayout(True, 0, (2, 2)), embed_dim=768, num_heads=12, mlp_dim=3072)
    pooling = make_pooling("map", context)
    assert isinstance(pooling, AttentionPool)
    assert pooling.latent.std().item() == pytest.approx(768**-0.5, rel=0.1)
    assert pooling.kv.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_class_token_and_mean_stand_side_by_side():
    pooling = make_pooling("cls+gap", CONTEXT)
    tokens = torch.arange(12.0).view(1, 12, 1).repeat(1, 1, 24)  # 0 class, 1-2 registers, 3-11 patches
    pooled = pooling(tokens[:, pooling.read])
    assert pooled.shape == (1, 48) == (1, pooling.out_dim)
    assert pooled[0, [0, 23, 24, 47]].tolist() == [0.0, 0.0, 7.0, 7.0]
    assert pool_parts("cls+gap") == ("cls", "gap")


@pytest.mark.parametrize(("spec", "mean"), [("gap", 5.5), ("max", 11.0)])
def test_prefix_tokens_are_pooled_only_where_that_is_asked_for(spec, mean):
    context = PoolingContext(CONTEXT.layout, embed_dim=1, include_prefix=True)
    pooling = make_pooling(spec, context)
    tokens = torch.arange(12.0).view(1, 12, 1)
    assert pooling.read == slice(0, 12)
    assert pooling(tokens[:, pooling.read]).item() == mean


def test_a_norm_cannot_follow_a_concatenation(tiny):
    with pytest.raises(ConfigError, match=r"fc_norm must not be true with model.pool cls\+gap"):
        VisionTransformer(ViTConfig.from_dict({**tiny, "pool": "cls+gap", "fc_norm": True}))
    with pytest.raises(ConfigError, match=r"model.pool cls\+gap reads the class token"):
        VisionTransformer(ViTConfig.from_dict({**tiny, "pool": "cls+gap", "class_token": False}))


def test_the_gated_mlp_needs_two_equal_halves(tiny):
    with pytest.raises(ConfigError, match=r"swiglu_packed needs an even hidden width; got 25"):
        ViTConfig.from_dict({**tiny, "mlp": "swiglu_packed", "mlp_ratio": 25 / 24 + 1e-9})


def test_an_uncovered_edge_of_the_image_is_allowed_by_name_alone(tiny, generator):
    with pytest.raises(ConfigError, match=r"got 18 and 4"):
        ViTConfig.from_dict({**tiny, "img_size": 18})
    model = VisionTransformer(ViTConfig.from_dict({**tiny, "img_size": 18, "floor_grid": True})).eval()
    images = torch.randn(1, 3, 18, 18, generator=generator)
    assert model.layout.grid_size == (4, 4)
    other = images.clone()
    other[..., 16:, :] = 9.0
    other[..., 16:] = 9.0
    torch.testing.assert_close(model(other), model(images), rtol=0, atol=0)

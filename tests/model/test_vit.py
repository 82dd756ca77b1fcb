"""The Vision Transformer's own properties."""

from __future__ import annotations

import json

import pytest
import torch

from tests.models import POOLS, make_vit, perturbed
from vit_cls import create_model
from vit_cls.errors import ConfigError
from vit_cls.model.block import DropPath
from vit_cls.model.config import ViTConfig
from vit_cls.model.pooling import PoolingContext, make_pooling, num_class_tokens
from vit_cls.model.presets import PRESETS, preset_config
from vit_cls.model.tokens import TokenLayout, sincos_2d_positions
from vit_cls.model.vit import VisionTransformer


def _model(tiny, **settings) -> VisionTransformer:
    return make_vit(tiny, **settings).eval()


def test_the_pooling_table_has_the_rows_that_are_documented():
    listed = (
        "cls gap max avgmax token:2 last:2 gem gem:2 lse seqpool abmil simpool ep:2 map cait:2 multicls:2 "
        "multicls-concat:2 multicls-diverse:2 classtok cls+gap gem+last:2+token:1"
    )
    assert listed.split() == POOLS


@pytest.mark.parametrize(
    ("spec", "expected", "of_valid", "with_prefix"),
    [
        ("cls", 0.0, 0.0, 0.0),
        ("gap", 5.5, 5.0, 3.5),
        ("max", 7.0, 6.0, 7.0),
        ("avgmax", 6.25, 5.5, 5.25),
        ("token:2", 6.0, 6.0, 6.0),
    ],
)
def test_poolings_on_a_hand_worked_sequence(spec, expected, of_valid, with_prefix):
    layout = TokenLayout(class_token=True, reg_tokens=3, grid_size=(2, 2))
    tokens = torch.arange(8.0).view(1, 8, 1).repeat(1, 1, 2)  # 0 class, 1-3 registers, 4-7 patches
    pooling = make_pooling(spec, PoolingContext(layout))
    read = tokens[:, pooling.read]
    assert pooling(read).tolist() == [[expected, expected]]
    assert pooling(read, read[..., 0] < 7).tolist() == [[of_valid, of_valid]]
    pooling = make_pooling(spec, PoolingContext(layout, include_prefix=True))
    assert pooling(tokens[:, pooling.read]).tolist() == [[with_prefix, with_prefix]]


def test_gap_does_not_change_when_patches_change_places(tiny, generator):
    model = _model(tiny, pool="gap", pos_embed="none")
    images = torch.randn(2, 3, 16, 16, generator=generator)
    rows = images.view(2, 3, 4, 4, 16)[:, :, [2, 0, 3, 1]].reshape(2, 3, 16, 16)
    torch.testing.assert_close(model(rows), model(images), rtol=1e-4, atol=1e-6)
    learned = _model(tiny, pool="gap")
    assert not torch.allclose(learned(rows), learned(images), atol=1e-6)


def test_token_k_reads_the_patch_at_k_in_raster_order(tiny, generator):
    images = torch.randn(2, 3, 16, 16, generator=generator)
    for k in (0, 6, 15):
        model = _model(tiny, pool=f"token:{k}", reg_tokens=2)
        expected = model.head(model.encode(images)[:, 3 + k])
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-6)


def test_encode_gives_every_token_whatever_the_pooling_reads(tiny, generator):
    images = torch.randn(2, 3, 16, 16, generator=generator)
    for spec in POOLS:
        model = _model(tiny, pool=spec)
        assert model.encode(images).shape == (2, num_class_tokens(spec, 5) + 16, 24)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_class_tokens_of_the_last_blocks_are_normed_and_joined_in_order(count, tiny, generator):
    model = perturbed(_model(tiny, pool=f"last:{count}", depth=3, reg_tokens=1), generator)
    found = []
    for block in list(model.blocks)[:-1]:
        block.register_forward_hook(lambda _, __, output: found.append(output[:, 0]))
    images = torch.randn(2, 3, 16, 16, generator=generator)
    features = model.forward_features(images)
    found = [*found[:2], model.run_blocks(model.embed_tokens(images))[:, 0]]
    expected = torch.cat([model.norm(token) for token in found[3 - count :]], dim=1)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(images), model.head(expected), rtol=1e-5, atol=1e-5)


def test_equal_class_tokens_stay_equal_for_ever_and_fresh_ones_part(tiny, generator):
    model = _model(tiny, pool="multicls:3", depth=4).double()
    images = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    fresh = model.encode(images)[:, :3]
    assert (fresh[:, 0] - fresh[:, 1]).abs().max() > 1e-2
    with torch.no_grad():
        for tokens in (model.cls_token, model.pos_embed[:, :3]):
            tokens.copy_(tokens[:, :1].expand(-1, 3, -1).clone())
    equal = model.encode(images)[:, :3]
    torch.testing.assert_close(equal[:, 1:], equal[:, :1].expand(-1, 2, -1), rtol=0, atol=1e-13)
    model(images).square().sum().backward()
    gradient = model.cls_token.grad[0]
    torch.testing.assert_close(gradient[1:], gradient[:1].expand(2, -1), rtol=0, atol=1e-13)


def test_each_class_is_scored_by_its_own_token_and_the_same_weights(tiny, generator):
    model = perturbed(_model(tiny, pool="classtok", reg_tokens=2), generator)
    images = torch.randn(2, 3, 16, 16, generator=generator)
    tokens = model.encode(images)
    assert tokens.shape == (2, 5 + 2 + 16, 24)
    (weight,), bias = model.head.weight, model.head.bias
    expected = torch.stack([tokens[:, c] @ weight + bias[0] for c in range(5)], dim=1)
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    assert model.forward_features(images).shape == (2, 5, 24)
    order = [3, 0, 4, 1, 2]  # another order of the tokens is another order of the classes
    with torch.no_grad():
        for tokens in (model.cls_token, model.pos_embed[:, :5]):
            tokens.copy_(tokens[:, order].clone())
    torch.testing.assert_close(model(images), expected[:, order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", POOLS)
def test_no_pooling_reads_a_register_after_the_last_block(spec, tiny, generator):
    model = perturbed(_model(tiny, pool=spec, reg_tokens=2), generator)
    tokens = model.encode(torch.randn(2, 3, 16, 16, generator=generator))
    first = model.layout.num_prefix_tokens - 2
    changed = tokens.clone()
    changed[:, first : first + 2] = 1e4
    read, times = model.pool.read, model.pool.num_layers
    pooled = [model.pool(t[:, read].repeat(1, times, 1)) for t in (tokens, changed)]
    assert torch.equal(pooled[0], pooled[1])


def test_patch_tokens_are_in_raster_order(tiny):
    model = _model(tiny, pos_embed="none")
    images = torch.zeros(1, 3, 16, 16)
    images[:, :, 4:8, 8:12] = 1.0  # row 1, column 2: patch 6
    tokens = model.patch_embed(images) - model.patch_embed(torch.zeros(1, 3, 16, 16))
    assert tokens.abs().sum(dim=2).nonzero().tolist() == [[0, 6]]


def test_tokens_stand_in_the_order_class_registers_patches(tiny):
    model = _model(tiny, reg_tokens=2, pos_embed="none")
    with torch.no_grad():
        model.cls_token.fill_(1.0)
        model.reg_token.fill_(2.0)
    tokens = model.embed_tokens(torch.zeros(1, 3, 16, 16))
    assert tokens[0, :3, 0].tolist() == [1.0, 2.0, 2.0]
    torch.testing.assert_close(tokens[:, 3:], model.patch_embed(torch.zeros(1, 3, 16, 16)))


def test_sincos_positions_are_fixed_and_zero_for_the_class_token(tiny):
    model = _model(tiny, pos_embed="sincos2d")
    assert not model.pos_embed.requires_grad
    assert model.pos_embed[0, 0].abs().max() == 0
    torch.testing.assert_close(model.pos_embed[0, 1:], sincos_2d_positions((4, 4), 24))


def test_sincos_positions_tell_rows_from_columns():
    positions = sincos_2d_positions((2, 3), 8)
    col, row = positions[:, :4].view(2, 3, 4), positions[:, 4:].view(2, 3, 4)
    torch.testing.assert_close(col[0], col[1])  # the first half knows the column alone
    torch.testing.assert_close(row[:, 0], row[:, 2])  # the second the row alone
    assert len(torch.unique(positions, dim=0)) == 6


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"img_size": 30},
            r"model.img_size must be divisible by model.patch_size; got 30 and 4. Use .* 28 or 32",
        ),
        ({"img_size": (16, 18)}, r"got 16x18 and 4"),
        ({"num_heads": 5}, r"model.num_heads must divide model.embed_dim; got 5 heads and width 24.*is 4"),
        ({"pool": "cls", "class_token": False}, r"model.pool cls reads the class token.*Use model.pool gap"),
        ({"pool": "mean"}, r"model.pool must be one of cls, gap, max, avgmax, token:K, .*; got 'mean'"),
        ({"pool": "gap:3"}, r"model.pool gap takes no index"),
        ({"pool": "token"}, r"needs a patch K from 0 to 15"),
        ({"pool": "token:16"}, r"from 0 to 15 for a 4x4 grid; got 16"),
        ({"pool": "token:-1"}, r"needs a whole number K; got 'token:-1'"),
        ({"depth": 0}, r"model.depth must be at least 1; got 0"),
        ({"drop_path_rate": 1.0}, r"model.drop_path_rate must be at least 0 and below 1; got 1.0"),
        ({"act": "relu"}, r"model.act must be one of gelu, gelu_tanh, quick_gelu, silu; got 'relu'"),
        ({"pos_embed": "rope"}, r"model.pos_embed must be one of"),
        ({"embed_dim": 26, "num_heads": 2, "pos_embed": "sincos2d"}, r"divisible by 4; got 26"),
        ({"pool": "cls+gap", "fc_norm": True}, r"fc_norm must not be true with model.pool cls\+gap"),
        ({"mlp": "swiglu_packed", "mlp_ratio": 25 / 24 + 1e-9}, r"needs an even hidden width; got 25"),
        ({"depht": 3}, r"unknown architecture setting `depht`. Did you mean `depth`"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_impossible_settings_say_what_is_required_and_what_was_received(setting, message, tiny):
    with pytest.raises(ConfigError, match=message):
        VisionTransformer(ViTConfig.from_dict({**tiny, **setting}))


def test_a_wrong_image_shape_names_both_shapes(tiny):
    with pytest.raises(ValueError, match=r"\(batch, 3, 16, 16\); got \(2, 3, 16, 20\)"):
        _model(tiny)(torch.zeros(2, 3, 16, 20))


def test_a_config_survives_json(tiny):
    config = ViTConfig.from_dict({**tiny, "img_size": (16, 24), "pool": "token:3", "fc_norm": True})
    assert ViTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_preset_builds_and_has_the_size_in_its_name():
    assert len(PRESETS) >= 25
    for name in PRESETS:
        with torch.device("meta"):
            model = create_model(name)
        _, _, patch, img = name.split("_")
        assert f"patch{model.config.patch_size}" == patch
        assert str(model.config.image_hw[0]) == img


@pytest.mark.parametrize(
    ("name", "millions"),
    [("tiny", 5.717), ("small", 22.051), ("base", 86.568), ("large", 304.327)],
)
def test_parameter_counts_are_the_published_ones(name, millions):
    with torch.device("meta"):
        model = create_model(f"vit_{name}_patch16_224")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean `vit_tiny_patch16_224`"):
        preset_config("vit_tiny_patch16_244")


def test_drop_path_keeps_the_mean_and_is_silent_in_evaluation():
    drop = DropPath(0.3).train()
    torch.manual_seed(0)
    out = drop(torch.ones(20_000, 2, 2))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert abs(out[:, 0, 0].mean() - 1) < 0.02
    assert torch.equal(out[:, 0, 0], out[:, 1, 1])  # one draw a sample
    assert torch.equal(drop.eval()(out), out)

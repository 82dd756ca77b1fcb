"""Changing an architecture while loading: each change is seen in what the model computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed

from tests.models import assert_every_key_has_one_fate
from tests.weights.checkpoints import assert_close
from vit_cls.errors import ConfigError, ModelFileError


def _raw(model, images):
    """Every token before the final norm."""
    return model.run_blocks(model.embed_tokens(images))


def _norm(checkpoint):
    norm = checkpoint.model.norm if hasattr(checkpoint.model.norm, "weight") else checkpoint.model.fc_norm
    return lambda tokens: F.layer_norm(tokens, (24,), norm.weight, norm.bias, norm.eps)


def test_nothing_changed_gives_the_same_logits_and_every_key_loaded(make, images):
    checkpoint = make()
    model = checkpoint.load()
    assert torch.equal(model(images), checkpoint.model(images))
    assert model.load_report.counts() == {
        "loaded": len(checkpoint.model.state_dict()),
        "resized": 0,
        "moved": 0,
        "dropped": 0,
        "fresh": 0,
    }
    assert model.load_report.fresh_share == 0.0


@pytest.mark.parametrize("fc_norm", [None, False])
@pytest.mark.parametrize("pool", ["gap", "max", "avgmax", "token:3", "cls", "map", "cls+gap"])
@pytest.mark.parametrize("source", ["cls", "gap", "map"])
def test_a_changed_pool_keeps_the_pretrained_norm_and_head(make, images, source, pool, fc_norm):
    checkpoint = make(pool=source)
    model = checkpoint.load(pool=pool, fc_norm=fc_norm)
    norm, raw = _norm(checkpoint), _raw(checkpoint.model, images)
    assert_close(_raw(model, images), raw)
    patches = raw[:, 1:]
    after = model.config.pool in ("gap", "max", "avgmax") and fc_norm is None
    before = (lambda x: x) if after else norm
    read = {
        "cls": lambda: before(raw[:, 0]),
        "gap": lambda: before(patches).mean(1),
        "max": lambda: before(patches).amax(1),
        "avgmax": lambda: 0.5 * (before(patches).mean(1) + before(patches).amax(1)),
        "token:3": lambda: before(patches[:, 3]),
        "map": lambda: model.pool(before(patches)),
    }
    head = checkpoint.model.head
    if pool == "cls+gap":
        if source == "map":
            assert "head.weight" in model.load_report.of("fresh")
            return
        # the half that the old head did not read starts at zero: the same logits as the old pooling's
        expected = head(norm(raw[:, 0]) if source == "cls" else norm(patches).mean(1))
    else:
        pooled = read[pool]()
        expected = head(norm(pooled) if after else pooled)
    assert_close(model(images), expected, atol=1e-4)
    report = model.load_report
    moved = report.of("moved")
    was_after = source == "gap"
    if after != was_after:
        there = "fc_norm" if after else "norm"
        assert set(moved) == {f"{there}.weight", f"{there}.bias"}
        assert any("pretrained final norm is kept" in note for note in report.notes)
    else:
        assert not moved
    if source == "map" and pool != "map":
        assert "attn_pool.latent" in report.of("dropped")
    if pool == "map" and source != "map":
        assert "attn_pool.latent" in report.of("fresh")


def test_from_cls_and_gap_back_to_one_of_them_takes_its_columns(make, images):
    checkpoint = make(pool="cls+gap")
    tokens = checkpoint.model.encode(images)
    weight, bias = checkpoint.model.head.weight, checkpoint.model.head.bias
    assert_close(checkpoint.load(pool="cls")(images), tokens[:, 0] @ weight[:, :24].T + bias)
    gap = checkpoint.load(pool="gap", fc_norm=False)(images)
    assert_close(gap, tokens[:, 1:].mean(1) @ weight[:, 24:].T + bias)


def test_a_removed_class_token_takes_its_position_with_it(make, images):
    checkpoint = make()
    model = checkpoint.load(class_token=False, pool="gap")
    source = checkpoint.model
    patches = source.patch_embed(images) + source.pos_embed[:, 1:]
    assert_close(model.embed_tokens(images), patches)
    pooled = source.blocks(patches).mean(1)
    assert_close(model(images), source.head(_norm(checkpoint)(pooled)))
    assert model.load_report.of("dropped") == {"cls_token": "class token removed"}
    assert model.load_report.of("resized") == {"pos_embed": "17 -> 16 tokens, patches keep theirs"}


def test_an_added_class_token_leaves_the_patches_where_they_were(make, images):
    checkpoint = make(class_token=False, pool="gap")
    model = checkpoint.load(class_token=True, pool="cls")
    tokens = model.embed_tokens(images)
    assert_close(tokens[:, 1:], checkpoint.model.embed_tokens(images))
    assert_close(tokens[:, 0], model.cls_token[:, 0].expand(3, -1))  # its position is zero
    assert "cls_token" in model.load_report.of("fresh")
    # hidden from the patches, it changes nothing; the norm is kept, now before the head
    assert set(model.load_report.of("moved")) == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize("no_embed_class", [False, True])
@pytest.mark.parametrize(("have", "want"), [(0, 3), (3, 0), (2, 4), (4, 1)])
def test_registers_come_and_go_without_moving_the_others(make, images, have, want, no_embed_class):
    checkpoint = make(reg_tokens=have, no_embed_class=no_embed_class)
    model = checkpoint.load(reg_tokens=want)
    before, after = checkpoint.model.embed_tokens(images), model.embed_tokens(images)
    kept = min(have, want)
    assert_close(after[:, : 1 + kept], before[:, : 1 + kept])
    assert_close(after[:, 1 + want :], before[:, 1 + have :])
    assert after.shape[1] == 17 + want
    if want > kept:
        assert after[:, 1 + kept : 1 + want].abs().max() < 1e-4


@pytest.mark.parametrize("source", [False, True])
def test_positions_of_prefix_tokens_are_added_to_the_tokens_or_start_at_zero(make, images, source):
    checkpoint = make(reg_tokens=2, no_embed_class=source)
    model = checkpoint.load(no_embed_class=not source)
    assert_close(model(images), checkpoint.model(images))
    assert model.pos_embed.shape[1] == (19 if source else 16)


@pytest.mark.parametrize("img_size", [24, (16, 24), 8])
@pytest.mark.parametrize("no_embed_class", [False, True])
def test_positions_are_resized_and_those_of_prefix_tokens_are_not(make, generator, img_size, no_embed_class):
    checkpoint = make(reg_tokens=1, no_embed_class=no_embed_class)
    model = checkpoint.load(img_size=img_size)
    prefix = 0 if no_embed_class else 2
    old = checkpoint.model.pos_embed
    expected = resample_abs_pos_embed(old, model.layout.grid_size, num_prefix_tokens=prefix)
    assert_close(model.pos_embed, expected)
    assert torch.equal(model.pos_embed[:, :prefix], old[:, :prefix])
    rows, cols = model.layout.grid_size
    assert model.load_report.of("resized") == {"pos_embed": f"4x4 -> {rows}x{cols} patches"}
    assert torch.isfinite(model(torch.randn(1, 3, *model.config.image_hw, generator=generator))).all()


def test_larger_patches_see_the_enlarged_image_as_the_smaller_saw_the_small_one(make, generator):
    """What the pseudo-inverse resize promises. Source: FlexiViT, arXiv 2212.08013, section 3.4."""
    checkpoint = make()
    model = checkpoint.load(patch_size=8, img_size=32)
    small = torch.randn(1, 3, 4, 4, generator=generator)
    large = F.interpolate(small, size=(8, 8), mode="bicubic", antialias=True)
    before = checkpoint.model.patch_embed.proj(small).flatten()
    assert_close(model.patch_embed.proj(large).flatten(), before, atol=1e-3)
    assert model.load_report.of("resized") == {"patch_embed.proj.weight": "4x4 pixels -> 8x8 pixels"}


def test_smaller_patches_change_grid_and_positions_too(make):
    model = make().load(patch_size=2)
    assert model.load_report.of("resized") == {
        "patch_embed.proj.weight": "4x4 pixels -> 2x2 pixels",
        "pos_embed": "4x4 -> 8x8 patches",
    }


def test_one_channel_sees_a_grey_image_as_three_saw_it(make, images):
    checkpoint = make()
    model = checkpoint.load(in_chans=1)
    grey = images[:, :1]
    assert_close(model(grey), checkpoint.model(grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("in_chans", [6, 4, 2])
def test_other_channels_repeat_the_three_and_keep_the_scale(make, images, in_chans):
    checkpoint = make()
    model = checkpoint.load(in_chans=in_chans)
    weight = checkpoint.model.patch_embed.proj.weight
    expected = weight[:, [i % 3 for i in range(in_chans)]] * 3 / in_chans
    assert_close(model.patch_embed.proj.weight, expected)
    if in_chans == 6:
        assert_close(model(torch.cat([images, images], dim=1)), checkpoint.model(images))
    assert model.load_report.of("resized") == {"patch_embed.proj.weight": f"3 -> {in_chans} channels"}


def test_layer_scale_is_multiplied_in_where_the_model_has_none(make, images):
    checkpoint = make(init_values=0.5)
    model = checkpoint.load(init_values=None)
    assert_close(model(images), checkpoint.model(images))
    assert len(model.load_report.of("moved")) == 8


def test_layer_scale_that_is_new_starts_at_one_and_does_not_count_as_missing(make, images):
    checkpoint = make()
    model = checkpoint.load(init_values=1e-5)
    assert_close(model(images), checkpoint.model(images))
    assert model.load_report.fresh_share == 0.0


def test_fewer_blocks_are_the_first_ones(make, images):
    checkpoint = make()
    model = checkpoint.load(depth=1)
    source = checkpoint.model
    tokens = source.norm(source.blocks[0](source.embed_tokens(images)))
    assert_close(model(images), source.head(tokens[:, 0]))
    dropped = model.load_report.of("dropped")
    assert len(dropped) == 12
    assert all(key.startswith("blocks.1.") for key in dropped)
    assert "of the weights' 2 blocks the model has the first 1" in model.load_report.notes


def test_more_blocks_are_refused_unless_allowed_by_name(make):
    checkpoint = make()
    message = r"3\d % of the encoder would be fresh.*wants blocks\.2\.norm1\.weight.*raise model\.max_fresh"
    with pytest.raises(ModelFileError, match=message):
        checkpoint.load(depth=3)
    model = checkpoint.load(depth=3, max_fresh=0.5)
    assert 0.3 < model.load_report.fresh_share < 0.4
    assert {key[:9] for key in model.load_report.of("fresh")} == {"blocks.2."}
    assert torch.equal(model.blocks[1].attn.qkv.weight, checkpoint.model.blocks[1].attn.qkv.weight)
    assert "encoder's parameters are fresh" in model.load_report.table()
    with pytest.raises(ConfigError, match=r"model\.max_fresh must be at least 0 and at most 1; got 1\.5"):
        checkpoint.load(depth=3, max_fresh=1.5)


def test_another_width_is_refused_and_names_both_shapes(make):
    message = (
        r"weights\.safetensors does not fit the model: cls_token is \(1, 1, 24\), not \(1, 1, 48\);.* "
        r"and \d+ more\. Is it another architecture\? Check model.name"
    )
    with pytest.raises(ModelFileError, match=message):
        make().load(embed_dim=48)


def test_a_setting_without_a_trace_in_the_shapes_is_said(make):
    model = make().load(norm_eps=1e-5, act="quick_gelu")
    assert any("model.act is quick_gelu, but" in note for note in model.load_report.notes)
    assert any("model.norm_eps is 1e-05, but" in note for note in model.load_report.notes)


def test_every_key_has_one_fate(make):
    checkpoint = make(reg_tokens=2, init_values=0.3, pool="map")
    model = checkpoint.load(
        reg_tokens=1, init_values=None, pool="gap", img_size=24, num_classes=2, class_token=False
    )
    report = model.load_report
    assert_every_key_has_one_fate(model, checkpoint.model.state_dict())
    keys = {row.key for row in report.keys}
    assert set(checkpoint.model.state_dict()) <= keys | {"norm.weight", "norm.bias"}
    text = report.table()
    for fate in ("resized", "moved", "dropped", "fresh"):
        assert report.of(fate)
        assert fate in text

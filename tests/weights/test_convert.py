"""Changing an architecture while loading: each change is seen in what the model computes."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from tests.models import assert_every_key_has_one_fate, make_vit, perturbed
from vit_cls import create_model
from vit_cls.errors import ConfigError, ModelFileError
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.weights.bundle import save_classifier
from vit_cls.weights.convert import match_class_names
from vit_cls.weights.factory import create_classifier

NAME = "vit_tiny_patch16_224"
TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 4}


class Checkpoint:
    """A perturbed tiny model, and the file that holds its weights alone."""

    def __init__(self, folder, **settings):
        self.settings = {**TINY, "num_classes": 5, **settings}
        self.model = perturbed(make_vit(self.settings), torch.Generator().manual_seed(3), 0.3)
        self.path = folder / "weights.safetensors"
        save_file(self.model.state_dict(), self.path)

    def load(self, **changes):
        """The weights in another architecture."""
        settings = {**self.settings, **changes}
        if "class_names" in changes:
            settings.pop("num_classes")
        return create_model(NAME, pretrained=self.path, **settings).eval()


@pytest.fixture
def make(tmp_path):
    """Makes a checkpoint of the settings given."""
    return lambda **settings: Checkpoint(tmp_path, **settings)


@pytest.fixture
def images(generator):
    return torch.randn(3, 3, 16, 16, generator=generator)


def _raw(model, images):
    """Every token before the final norm."""
    return model.run_blocks(model.embed_tokens(images))


def _same(first, second, atol=1e-5):
    torch.testing.assert_close(first, second, rtol=1e-4, atol=atol)


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
    _same(_raw(model, images), raw)
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
    _same(model(images), expected, atol=1e-4)
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
    _same(checkpoint.load(pool="cls")(images), tokens[:, 0] @ weight[:, :24].T + bias)
    gap = checkpoint.load(pool="gap", fc_norm=False)(images)
    _same(gap, tokens[:, 1:].mean(1) @ weight[:, 24:].T + bias)


def test_a_removed_class_token_takes_its_position_with_it(make, images):
    checkpoint = make()
    model = checkpoint.load(class_token=False, pool="gap")
    source = checkpoint.model
    patches = source.patch_embed(images) + source.pos_embed[:, 1:]
    _same(model.embed_tokens(images), patches)
    pooled = source.blocks(patches).mean(1)
    _same(model(images), source.head(_norm(checkpoint)(pooled)))
    assert model.load_report.of("dropped") == {"cls_token": "class token removed"}
    assert model.load_report.of("resized") == {"pos_embed": "17 -> 16 tokens, patches keep theirs"}


def test_an_added_class_token_leaves_the_patches_where_they_were(make, images):
    checkpoint = make(class_token=False, pool="gap")
    model = checkpoint.load(class_token=True, pool="cls")
    tokens = model.embed_tokens(images)
    _same(tokens[:, 1:], checkpoint.model.embed_tokens(images))
    _same(tokens[:, 0], model.cls_token[:, 0].expand(3, -1))  # its position is zero
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
    _same(after[:, : 1 + kept], before[:, : 1 + kept])
    _same(after[:, 1 + want :], before[:, 1 + have :])
    assert after.shape[1] == 17 + want
    if want > kept:
        assert after[:, 1 + kept : 1 + want].abs().max() < 1e-4


@pytest.mark.parametrize("source", [False, True])
def test_positions_of_prefix_tokens_are_added_to_the_tokens_or_start_at_zero(make, images, source):
    checkpoint = make(reg_tokens=2, no_embed_class=source)
    model = checkpoint.load(no_embed_class=not source)
    _same(model(images), checkpoint.model(images))
    assert model.pos_embed.shape[1] == (19 if source else 16)


@pytest.mark.parametrize("img_size", [24, (16, 24), 8])
@pytest.mark.parametrize("no_embed_class", [False, True])
def test_positions_are_resized_and_those_of_prefix_tokens_are_not(make, generator, img_size, no_embed_class):
    checkpoint = make(reg_tokens=1, no_embed_class=no_embed_class)
    model = checkpoint.load(img_size=img_size)
    prefix = 0 if no_embed_class else 2
    old = checkpoint.model.pos_embed
    expected = resample_abs_pos_embed(old, model.layout.grid_size, num_prefix_tokens=prefix)
    _same(model.pos_embed, expected)
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
    _same(model.patch_embed.proj(large).flatten(), before, atol=1e-3)
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
    _same(model(grey), checkpoint.model(grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("in_chans", [6, 4, 2])
def test_other_channels_repeat_the_three_and_keep_the_scale(make, images, in_chans):
    checkpoint = make()
    model = checkpoint.load(in_chans=in_chans)
    weight = checkpoint.model.patch_embed.proj.weight
    expected = weight[:, [i % 3 for i in range(in_chans)]] * 3 / in_chans
    _same(model.patch_embed.proj.weight, expected)
    if in_chans == 6:
        _same(model(torch.cat([images, images], dim=1)), checkpoint.model(images))
    assert model.load_report.of("resized") == {"patch_embed.proj.weight": f"3 -> {in_chans} channels"}


def test_layer_scale_is_multiplied_in_where_the_model_has_none(make, images):
    checkpoint = make(init_values=0.5)
    model = checkpoint.load(init_values=None)
    _same(model(images), checkpoint.model(images))
    assert len(model.load_report.of("moved")) == 8


def test_layer_scale_that_is_new_starts_at_one_and_does_not_count_as_missing(make, images):
    checkpoint = make()
    model = checkpoint.load(init_values=1e-5)
    _same(model(images), checkpoint.model(images))
    assert model.load_report.fresh_share == 0.0


def test_fewer_blocks_are_the_first_ones(make, images):
    checkpoint = make()
    model = checkpoint.load(depth=1)
    source = checkpoint.model
    tokens = source.norm(source.blocks[0](source.embed_tokens(images)))
    _same(model(images), source.head(tokens[:, 0]))
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


# --- the head


def test_another_number_of_classes_gets_a_new_head(make, images):
    checkpoint = make()
    torch.manual_seed(0)
    model = checkpoint.load(num_classes=3)
    assert model.load_report.of("fresh") == {
        "head.weight": "not the checkpoint's: 5 -> 3 classes",
        "head.bias": "not the checkpoint's: 5 -> 3 classes",
    }
    assert 0.01 < model.head.weight.std() < 0.03
    assert model.head.bias.abs().max() == 0
    assert torch.equal(checkpoint.load(num_classes=3, head_init="zero")(images), torch.zeros(3, 3))


def test_a_headless_model_gives_the_features(make, images):
    checkpoint = make()
    model = checkpoint.load(num_classes=0)
    _same(model(images), checkpoint.model.forward_features(images))
    gone = dict.fromkeys(("head.weight", "head.bias"), "the model has no head")
    assert model.load_report.of("dropped") == gone


def test_a_head_can_be_left_behind(make):
    model = make().load(keep_head=False)
    assert "head.weight" in model.load_report.of("fresh")
    with pytest.raises(ConfigError, match=r"head_init must be one of normal, zero; got 'ones'"):
        make().load(head_init="ones")


def test_a_head_whose_classes_are_the_same_is_kept_in_the_new_order(make, images, tmp_path):
    checkpoint = make()
    names = ["ant", "bee", "cat", "dog", "eel"]
    path = save_classifier(
        ImageClassifier(checkpoint.model, Preprocess((16, 16)), names), tmp_path / "m.safetensors"
    )
    logits = checkpoint.model(images)
    same = create_classifier("auto", ["dog", "ant", "eel", "cat", "bee"], pretrained=path).eval()
    _same(same.model(images), logits[:, [3, 0, 4, 2, 1]])
    subset = create_classifier("auto", ["eel", "bee"], pretrained=path).eval()
    _same(subset.model(images), logits[:, [4, 1]])
    assert subset.model.load_report.of("resized")["head.bias"] == "2 of 5 classes, matched by name"
    other = create_classifier("auto", ["eel", "fox"], pretrained=path, head_init="zero").eval()
    assert torch.equal(other.model(images), torch.zeros(3, 2))
    assert "its 5 classes are not the model's 2" in other.model.load_report.of("fresh")["head.weight"]
    kept = create_classifier("auto", names, pretrained=path, keep_head=False, head_init="zero").eval()
    assert torch.equal(kept.model(images), torch.zeros(3, 5))


def test_imagenet_classes_are_found_by_wordnet_id_or_by_name(tmp_path, images):
    torch.manual_seed(0)
    theirs = timm.create_model(NAME, **TINY).eval()
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    tag = f"{NAME}.augreg_in21k_ft_in1k"
    options = {"pretrained": tmp_path / "weights.safetensors", **TINY}
    by_id = create_classifier(tag, ["n01443537", "n01440764"], **options).eval()
    by_name = create_classifier(tag, ["Goldfish", "tinca_tinca"], **options).eval()
    logits = theirs(images)
    _same(by_id.model(images), logits[:, [1, 0]])
    _same(by_name.model(images), logits[:, [1, 0]])
    # "crane" is a bird and a machine, "cat" no class of ImageNet-1k: nobody guesses
    for names in (["crane", "goldfish"], ["cat", "goldfish"]):
        assert "head.weight" in create_classifier(tag, names, **options).model.load_report.of("fresh")
    assert by_id.preprocess == Preprocess((16, 16))
    whole = create_classifier(tag, **options)
    assert (len(whole.class_names), whole.class_names[1]) == (1000, "n01443537")


def test_names_are_matched_one_to_one():
    assert match_class_names(["b", "a"], ["a", "b"]) == [1, 0]
    assert match_class_names(["a", "a"], ["a", "b"]) is None
    assert match_class_names(["A"], ["a"]) is None  # without aliases, case counts
    aliases = {"n1": ("tench", "Tinca"), "n2": ("crane",), "n3": ("crane",)}.get
    assert match_class_names(["tinca"], ["n1", "n2", "n3"], aliases) == [0]
    assert match_class_names(["crane"], ["n1", "n2", "n3"], aliases) is None
    assert match_class_names(["n3"], ["n1", "n2", "n3"], aliases) == [2]


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


# --- several class tokens


def _save(checkpoint, folder, names="abcde"):
    """The same weights as a file of ours, with its architecture."""
    classifier = ImageClassifier(checkpoint.model, Preprocess((16, 16)), list(names))
    return save_classifier(classifier, folder / "model.safetensors")


@pytest.mark.parametrize("no_embed_class", [False, True])
@pytest.mark.parametrize("file", ["raw", "own"])
def test_several_class_tokens_from_one_are_that_one_with_noise(make, tmp_path, file, no_embed_class):
    checkpoint = make(reg_tokens=2, no_embed_class=no_embed_class)
    torch.manual_seed(0)
    if file == "raw":
        model = checkpoint.load(pool="multicls:3")
    else:
        model = create_model("auto", pretrained=_save(checkpoint, tmp_path), pool="multicls:3").eval()
    source = checkpoint.model
    assert torch.equal(model.cls_token[:, :1], source.cls_token)
    noise = (model.cls_token[0, 1:] - source.cls_token[0]).detach()
    assert noise.std().item() == pytest.approx(0.02, rel=0.4)
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(model.reg_token, source.reg_token)
    if no_embed_class:
        assert torch.equal(model.pos_embed, source.pos_embed)
    else:
        first = source.pos_embed[:, :1].expand(-1, 3, -1)
        assert torch.equal(model.pos_embed, torch.cat([first, source.pos_embed[:, 1:]], dim=1))
    assert model.load_report.of("resized")["cls_token"] == (
        "1 -> 3 class tokens, new ones are the first with noise of 0.02 (equal ones would stay equal)"
    )
    assert not model.load_report.of("fresh")
    assert model.load_report.fresh_share == 0


def test_the_copies_of_a_class_token_start_near_the_old_function_and_can_part(make, images):
    checkpoint = make()
    tokens = checkpoint.load(pool="multicls:2").encode(images)
    apart = (tokens[:, 0] - tokens[:, 1]).abs().max()
    between = (tokens[0, 0] - tokens[1, 0]).abs().max()
    assert 0 < apart < 0.2 * between


def test_the_noise_depends_on_the_seed_and_leaves_other_draws_alone(make):
    checkpoint, found, heads = make(), [], []
    for pool, seed in (("multicls:2", 0), ("multicls:2", 0), ("multicls:2", 1), ("cls", 0)):
        torch.manual_seed(seed)
        model = checkpoint.load(pool=pool, num_classes=3)
        found.append(model.cls_token)
        heads.append(model.head.weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(heads[0], heads[3])


@pytest.mark.parametrize("file", ["raw", "own"])
@pytest.mark.parametrize("want", ["cls", "gap", "multicls:2", "multicls:3", "multicls:5"])
def test_of_several_class_tokens_the_first_are_kept(make, images, tmp_path, want, file):
    checkpoint = make(pool="multicls:3", reg_tokens=1)
    if file == "raw":
        model = checkpoint.load(pool=want)
    else:
        model = create_model("auto", pretrained=_save(checkpoint, tmp_path), pool=want).eval()
    before, after = checkpoint.model.embed_tokens(images), model.embed_tokens(images)
    count = model.layout.num_class_tokens
    kept = min(3, count)
    _same(after[:, :kept], before[:, :kept])
    _same(after[:, count:], before[:, 3:])  # register and patches
    if want == "multicls:3":
        assert torch.equal(model(images), checkpoint.model(images))
        assert model.load_report.counts()["resized"] == 0
    elif count < 3:
        assert model.load_report.of("resized")["cls_token"] == f"3 -> {count} class tokens, the first kept"
        assert model.load_report.of("resized")["pos_embed"].startswith(f"20 -> {17 + count} tokens")


def test_several_class_tokens_leave_and_enter_with_their_positions(make, images):
    gone = make(pool="multicls:3", reg_tokens=1)
    model = gone.load(pool="gap", class_token=False)
    _same(model.embed_tokens(images), gone.model.embed_tokens(images)[:, 3:])
    assert model.load_report.of("dropped")["cls_token"] == "class tokens removed"
    none = make(pool="gap", class_token=False)
    torch.manual_seed(0)
    model = none.load(pool="multicls:3", class_token=True, max_fresh=0.5)
    tokens = model.embed_tokens(images)
    _same(tokens[:, 3:], none.model.embed_tokens(images))
    _same(tokens[:, :3], model.cls_token.expand(3, -1, -1))
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.4)


@pytest.mark.parametrize("img_size", [24, 8])
def test_with_several_class_tokens_positions_of_patches_alone_are_resized(make, tmp_path, img_size):
    checkpoint = make(pool="multicls:3", reg_tokens=1)
    old = checkpoint.model.pos_embed
    for model in (
        checkpoint.load(img_size=img_size),
        create_model("auto", pretrained=_save(checkpoint, tmp_path), img_size=img_size),
    ):
        expected = resample_abs_pos_embed(old, model.layout.grid_size, num_prefix_tokens=4)
        _same(model.pos_embed, expected)
        side = img_size // 4
        assert model.load_report.of("resized") == {"pos_embed": f"4x4 -> {side}x{side} patches"}


def test_positions_of_several_class_tokens_are_added_to_them(make, images):
    checkpoint = make(pool="multicls:3", reg_tokens=1)
    model = checkpoint.load(no_embed_class=True)
    _same(model(images), checkpoint.model(images))
    assert set(model.load_report.of("moved")) == {"cls_token", "reg_token"}


@pytest.mark.parametrize("kind", ["multicls", "multicls-concat", "multicls-diverse"])
def test_a_file_of_tensors_alone_tells_how_many_class_tokens_it_has(make, images, kind):
    checkpoint = make(pool=f"{kind}:2")
    model = checkpoint.load()
    assert torch.equal(model(images), checkpoint.model(images))
    assert model.load_report.counts()["loaded"] == len(checkpoint.model.state_dict())


@pytest.mark.parametrize("pool", ["last:2", "multicls-concat:2"])
def test_a_joined_pooling_starts_as_the_class_token_that_it_holds_and_gives_it_back(
    make, images, tmp_path, pool
):
    checkpoint = make()
    model = checkpoint.load(pool=pool)
    mine = slice(24, 48) if pool == "last:2" else slice(0, 24)
    assert torch.equal(model.head.weight[:, mine], checkpoint.model.head.weight)
    assert model.head.weight.count_nonzero() == checkpoint.model.head.weight.count_nonzero()
    if pool == "last:2":
        _same(model(images), checkpoint.model(images))
    joined = make(pool=pool)
    back = create_model("auto", pretrained=_save(joined, tmp_path), pool="cls").eval()
    assert torch.equal(back.head.weight, joined.model.head.weight[:, mine])
    assert back.load_report.of("resized")["head.weight"] == f"pool {pool} -> cls: 48 -> 24 columns"


def test_tokens_of_classes_follow_the_names_of_the_classes(make, images, tmp_path):
    checkpoint = make(pool="classtok", reg_tokens=1)
    path = _save(checkpoint, tmp_path)
    logits = checkpoint.model(images)
    same = create_classifier("auto", list("dbaec"), pretrained=path).eval()
    _same(same.model(images), logits[:, [3, 1, 0, 4, 2]])
    assert same.model.load_report.of("resized") == {
        "cls_token": "5 -> 5 class tokens, matched by class name",
        "pos_embed": "22 -> 22 tokens, patches keep theirs",
    }
    few = create_classifier("auto", list("eb"), pretrained=path).eval().model
    assert torch.equal(few.cls_token, checkpoint.model.cls_token[:, [4, 1]])
    assert torch.equal(few.pos_embed, checkpoint.model.pos_embed[:, [4, 1, *range(5, 22)]])
    assert torch.equal(few.head.weight, checkpoint.model.head.weight)
    other = create_classifier("auto", list("xyz"), pretrained=path).eval().model
    assert torch.equal(other.cls_token, checkpoint.model.cls_token[:, :3])
    assert "head.weight" in other.load_report.of("fresh")


@pytest.mark.parametrize(("have", "want"), [("cls", "classtok"), ("classtok", "cls"), ("classtok", "gap")])
def test_a_head_for_tokens_of_classes_and_another_have_no_use_for_each_other(
    make, images, tmp_path, have, want
):
    checkpoint = make(pool=have)
    model = create_model("auto", pretrained=_save(checkpoint, tmp_path), pool=want).eval()
    assert model(images).shape == (3, 5)
    note = f"not the checkpoint's: pool {have} -> {want}"
    assert model.load_report.of("fresh") == {"head.weight": note, "head.bias": note}


@pytest.mark.parametrize(
    ("have", "want"),
    [("ep:8", "ep:4"), ("seqpool", "abmil"), ("map", "cait:1"), ("multicls-diverse:2", "multicls-diverse:3")],
)
def test_weights_of_another_pooling_are_not_taken_for_this_ones(make, images, tmp_path, have, want):
    checkpoint = make(pool=have)
    path = _save(checkpoint, tmp_path)
    model = create_model("auto", pretrained=path, pool=want).eval()
    report = model.load_report
    own = {key for key in model.state_dict() if key.startswith("attn_pool.")}
    assert own <= set(report.of("fresh"))
    assert model(images).isfinite().all()
    again = create_model("auto", pretrained=path, pool=have.replace(":", "")).eval()
    assert torch.equal(again(images), checkpoint.model(images))


def test_a_fresh_pooling_with_layer_scale_on_pretrained_weights_starts_as_it_should(make):
    model = make().load(pool="cait:2")
    for layer in model.attn_pool.layers:
        for scale in (layer.ls1, layer.ls2):
            assert scale.gamma.unique().tolist() == [pytest.approx(0.1)]
        assert layer.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert 0 < model.attn_pool.latent.std() < 0.1

"""Several class tokens, or other poolings, from one and back, while loading."""

from __future__ import annotations

import pytest
import torch
from timm.layers import resample_abs_pos_embed

from tests.weights.checkpoints import assert_close
from vit_cls import create_model
from vit_cls.weights.factory import create_classifier


@pytest.mark.parametrize("no_embed_class", [False, True])
@pytest.mark.parametrize("file", ["raw", "own"])
def test_several_class_tokens_from_one_are_that_one_with_noise(make, file, no_embed_class):
    checkpoint = make(reg_tokens=2, no_embed_class=no_embed_class)
    torch.manual_seed(0)
    if file == "raw":
        model = checkpoint.load(pool="multicls:3")
    else:
        model = create_model("auto", pretrained=checkpoint.own_file(), pool="multicls:3").eval()
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
def test_of_several_class_tokens_the_first_are_kept(make, images, want, file):
    checkpoint = make(pool="multicls:3", reg_tokens=1)
    if file == "raw":
        model = checkpoint.load(pool=want)
    else:
        model = create_model("auto", pretrained=checkpoint.own_file(), pool=want).eval()
    before, after = checkpoint.model.embed_tokens(images), model.embed_tokens(images)
    count = model.layout.num_class_tokens
    kept = min(3, count)
    assert_close(after[:, :kept], before[:, :kept])
    assert_close(after[:, count:], before[:, 3:])  # register and patches
    if want == "multicls:3":
        assert torch.equal(model(images), checkpoint.model(images))
        assert model.load_report.counts()["resized"] == 0
    elif count < 3:
        assert model.load_report.of("resized")["cls_token"] == f"3 -> {count} class tokens, the first kept"
        assert model.load_report.of("resized")["pos_embed"].startswith(f"20 -> {17 + count} tokens")


def test_several_class_tokens_leave_and_enter_with_their_positions(make, images):
    gone = make(pool="multicls:3", reg_tokens=1)
    model = gone.load(pool="gap", class_token=False)
    assert_close(model.embed_tokens(images), gone.model.embed_tokens(images)[:, 3:])
    assert model.load_report.of("dropped")["cls_token"] == "class tokens removed"
    none = make(pool="gap", class_token=False)
    torch.manual_seed(0)
    model = none.load(pool="multicls:3", class_token=True, max_fresh=0.5)
    tokens = model.embed_tokens(images)
    assert_close(tokens[:, 3:], none.model.embed_tokens(images))
    assert_close(tokens[:, :3], model.cls_token.expand(3, -1, -1))
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.4)


@pytest.mark.parametrize("img_size", [24, 8])
def test_with_several_class_tokens_positions_of_patches_alone_are_resized(make, img_size):
    checkpoint = make(pool="multicls:3", reg_tokens=1)
    old = checkpoint.model.pos_embed
    for model in (
        checkpoint.load(img_size=img_size),
        create_model("auto", pretrained=checkpoint.own_file(), img_size=img_size),
    ):
        expected = resample_abs_pos_embed(old, model.layout.grid_size, num_prefix_tokens=4)
        assert_close(model.pos_embed, expected)
        side = img_size // 4
        assert model.load_report.of("resized") == {"pos_embed": f"4x4 -> {side}x{side} patches"}


def test_positions_of_several_class_tokens_are_added_to_them(make, images):
    checkpoint = make(pool="multicls:3", reg_tokens=1)
    model = checkpoint.load(no_embed_class=True)
    assert_close(model(images), checkpoint.model(images))
    assert set(model.load_report.of("moved")) == {"cls_token", "reg_token"}


@pytest.mark.parametrize("kind", ["multicls", "multicls-concat", "multicls-diverse"])
def test_a_file_of_tensors_alone_tells_how_many_class_tokens_it_has(make, images, kind):
    checkpoint = make(pool=f"{kind}:2")
    model = checkpoint.load()
    assert torch.equal(model(images), checkpoint.model(images))
    assert model.load_report.counts()["loaded"] == len(checkpoint.model.state_dict())


@pytest.mark.parametrize("pool", ["last:2", "multicls-concat:2"])
def test_a_joined_pooling_starts_as_the_class_token_that_it_holds_and_gives_it_back(make, images, pool):
    checkpoint = make()
    model = checkpoint.load(pool=pool)
    mine = slice(24, 48) if pool == "last:2" else slice(0, 24)
    assert torch.equal(model.head.weight[:, mine], checkpoint.model.head.weight)
    assert model.head.weight.count_nonzero() == checkpoint.model.head.weight.count_nonzero()
    if pool == "last:2":
        assert_close(model(images), checkpoint.model(images))
    joined = make(pool=pool)
    back = create_model("auto", pretrained=joined.own_file(), pool="cls").eval()
    assert torch.equal(back.head.weight, joined.model.head.weight[:, mine])
    assert back.load_report.of("resized")["head.weight"] == f"pool {pool} -> cls: 48 -> 24 columns"


def test_tokens_of_classes_follow_the_names_of_the_classes(make, images):
    checkpoint = make(pool="classtok", reg_tokens=1)
    path = checkpoint.own_file()
    logits = checkpoint.model(images)
    same = create_classifier("auto", list("dbaec"), pretrained=path).eval()
    assert_close(same.model(images), logits[:, [3, 1, 0, 4, 2]])
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
def test_a_head_for_tokens_of_classes_and_another_have_no_use_for_each_other(make, images, have, want):
    checkpoint = make(pool=have)
    model = create_model("auto", pretrained=checkpoint.own_file(), pool=want).eval()
    assert model(images).shape == (3, 5)
    note = f"not the checkpoint's: pool {have} -> {want}"
    assert model.load_report.of("fresh") == {"head.weight": note, "head.bias": note}


@pytest.mark.parametrize(
    ("have", "want"),
    [("ep:8", "ep:4"), ("seqpool", "abmil"), ("map", "cait:1"), ("multicls-diverse:2", "multicls-diverse:3")],
)
def test_weights_of_another_pooling_are_not_taken_for_this_ones(make, images, have, want):
    checkpoint = make(pool=have)
    path = checkpoint.own_file()
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

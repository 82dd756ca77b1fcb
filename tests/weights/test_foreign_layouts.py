"""Other people's layouts, which timm converts, give timm's numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn

from tests.models import assert_every_key_has_one_fate
from tests.weights.timm_weights import SMALL, assert_same_logits, random_images, reference_timm
from vit_cls import create_model

pytestmark = pytest.mark.usefixtures("here", "one_thread")


def _reference_openai_clip(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's weights under the names of OpenAI's CLIP, with a text tower beside them."""
    names = [
        (r"^cls_token$", "class_embedding"),
        (r"^pos_embed$", "positional_embedding"),
        (r"^patch_embed\.proj\.", "conv1."),
        (r"^norm_pre\.", "ln_pre."),
        (r"^norm\.", "ln_post."),
        (r"^head\.weight$", "proj"),
        (r"^blocks\.(\d+)\.norm", r"transformer.resblocks.\1.ln_"),
        (r"^blocks\.(\d+)\.attn\.qkv\.", r"transformer.resblocks.\1.attn.in_proj_"),
        (r"^blocks\.(\d+)\.attn\.proj\.", r"transformer.resblocks.\1.attn.out_proj."),
        (r"^blocks\.(\d+)\.mlp\.fc1\.", r"transformer.resblocks.\1.mlp.c_fc."),
        (r"^blocks\.(\d+)\.mlp\.fc2\.", r"transformer.resblocks.\1.mlp.c_proj."),
    ]
    clip = {}
    for key, tensor in state.items():
        if key == "head.bias":
            continue
        name = next(re.sub(pattern, new, key) for pattern, new in names if re.search(pattern, key))
        if name in ("class_embedding", "positional_embedding"):
            tensor = tensor[0, 0] if name == "class_embedding" else tensor[0]
        clip[f"visual.{name}"] = tensor.T if name == "proj" else tensor
    generator = torch.Generator().manual_seed(7)
    for name, shape in TEXT_TOWER.items():
        clip[name] = torch.randn(shape, generator=generator)
    return {name: tensor.half().contiguous() for name, tensor in clip.items()}


TEXT_TOWER = {
    "transformer.resblocks.0.attn.in_proj_weight": (144, 48),
    "transformer.resblocks.0.ln_1.weight": (48,),
    "token_embedding.weight": (20, 48),
    "positional_embedding": (7, 48),
    "ln_final.weight": (48,),
    "text_projection": (48, 10),
    "logit_scale": (),
}
CLIP = "vit_base_patch32_clip_224"


@pytest.fixture
def clip_file():
    """A tiny CLIP in half precision, in ``clip.pt``; its image tower as timm itself loads it."""
    theirs = reference_timm(CLIP)
    file = _reference_openai_clip(theirs.state_dict())
    torch.save(file, "clip.pt")
    theirs.load_state_dict(checkpoint_filter_fn(dict(file), theirs))
    return theirs, file


def test_openais_clip_gives_timms_logits_and_its_text_tower_is_dropped(clip_file):
    theirs, file = clip_file
    ours = create_model(CLIP, pretrained="clip.pt", **SMALL)
    assert ours.config.act == "gelu"
    assert not any("QuickGELU" in note for note in ours.load_report.notes)
    assert_same_logits(ours, theirs)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert set(ours.load_report.of("dropped")) == set(TEXT_TOWER)
    assert ours.load_report.of("fresh") == {}
    assert_every_key_has_one_fate(ours, file)


def test_a_tag_trained_with_quickgelu_is_built_with_it_and_says_so(clip_file):
    _, file = clip_file
    theirs = reference_timm("vit_base_patch32_clip_quickgelu_224")
    theirs.load_state_dict(checkpoint_filter_fn(dict(file), theirs))
    ours = create_model(f"{CLIP}.openai", pretrained="clip.pt", **SMALL)
    assert ours.config.act == "quick_gelu"
    assert any("QuickGELU" in note for note in ours.load_report.notes)
    assert_same_logits(ours, theirs)
    with torch.inference_mode():
        plain = create_model(CLIP, pretrained="clip.pt", **SMALL).eval()(random_images())
        assert (ours(random_images()) - plain).abs().max() > 1e-4  # the activation is no detail
    assert_every_key_has_one_fate(ours, file)


def test_the_head_of_another_number_of_classes_is_dropped_with_the_text_tower(clip_file):
    _, file = clip_file
    ours = create_model(CLIP, pretrained="clip.pt", pool="gap", **{**SMALL, "num_classes": 3})
    assert set(ours.load_report.of("dropped")) == set(TEXT_TOWER)
    assert set(ours.load_report.of("fresh")) == {"head.weight", "head.bias"}
    assert set(ours.load_report.of("moved")) == {"fc_norm.weight", "fc_norm.bias"}
    assert_every_key_has_one_fate(ours, file)


def test_what_was_renamed_and_resized_at_once_is_reported_as_resized(clip_file):
    _, file = clip_file
    theirs = reference_timm(CLIP, img_size=48, patch_size=4)
    theirs.load_state_dict(checkpoint_filter_fn(dict(file), theirs))
    sizes = {**SMALL, "img_size": 48, "patch_size": 4}
    ours = create_model(CLIP, pretrained="clip.pt", **sizes)
    assert_same_logits(ours, theirs, size=48, atol=1e-4)
    assert ours.load_report.of("resized") == {
        "pos_embed": "4x4 -> 12x12 patches",
        "patch_embed.proj.weight": "8x8 pixels -> 4x4 pixels",
    }
    assert set(ours.load_report.of("dropped")) == set(TEXT_TOWER)
    assert_every_key_has_one_fate(ours, file)


def _reference_dinov2(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's weights in the layout of DINOv2's own files, with registers or without."""
    state = dict(state)
    generator = torch.Generator().manual_seed(7)
    file = {"mask_token": torch.randn(1, 48, generator=generator)}
    if "reg_token" in state:  # timm has added the class token's position to it
        position = torch.randn(1, 1, 48, generator=generator)
        file["register_tokens"] = state.pop("reg_token")
        file["cls_token"] = state.pop("cls_token") - position
        file["pos_embed"] = torch.cat([position, state.pop("pos_embed")], dim=1)
    return {**file, **state}


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
@pytest.mark.parametrize("img_size", [32, 48])
def test_dinov2s_own_files_give_timms_tokens(name, img_size):
    small = reference_timm(name, num_classes=0)
    file = _reference_dinov2(small.state_dict())
    torch.save({"teacher": file}, "dinov2.pth")
    theirs = reference_timm(name, num_classes=0, img_size=img_size)
    theirs.load_state_dict(checkpoint_filter_fn(dict(file), theirs))
    settings = {**SMALL, "num_classes": 0, "img_size": img_size}
    ours = create_model(name, pretrained="dinov2.pth", **settings).eval()
    images = random_images(img_size)
    with torch.inference_mode():
        expected = theirs.forward_features(images)
        torch.testing.assert_close(ours.encode(images), expected, rtol=0, atol=1e-5)
    assert_same_logits(ours, theirs, size=img_size)
    assert set(ours.load_report.of("dropped")) == {"mask_token"}
    assert ours.load_report.of("fresh") == {}
    note = ours.load_report.of("resized").get("pos_embed")
    if "reg4" in name:
        added = "positions of prefix tokens were added to the tokens"
        assert note == (added if img_size == 32 else "4x4 -> 6x6 patches")
        assert ours.load_report.of("moved") == {"cls_token": "its position was added to it"}
    else:
        assert note == (None if img_size == 32 else "4x4 -> 6x6 patches")
    assert_every_key_has_one_fate(ours, file)


def test_deit3s_own_files_give_timms_logits():
    name = "deit3_small_patch16_224"
    theirs = reference_timm(name)
    file = {
        re.sub(r"ls([12])\.gamma", r"gamma_\1", key): tensor for key, tensor in theirs.state_dict().items()
    }
    assert "blocks.1.gamma_2" in file
    torch.save({"model": file}, "deit3.pth")
    ours = create_model(name, pretrained="deit3.pth", **SMALL)
    assert_same_logits(ours, theirs)
    assert ours.load_report.counts()["loaded"] == len(file)
    assert_every_key_has_one_fate(ours, file)


def test_ijepas_own_files_give_timms_tokens():
    name = "vit_huge_patch14_gap_224"
    theirs = reference_timm(name, num_classes=0)
    encoder = {f"module.{key}": tensor for key, tensor in theirs.state_dict().items()}
    doubled = {key: tensor * 2 for key, tensor in encoder.items()}
    content = {"encoder": encoder, "predictor": {"module.a": torch.ones(1)}, "target_encoder": doubled}
    torch.save({**content, "epoch": 300, "scaler": None}, "ijepa.pth.tar")
    ours = create_model(name, pretrained="ijepa.pth.tar", **{**SMALL, "num_classes": 0})
    assert_same_logits(ours, theirs)
    assert "encoder was taken" in ours.load_report.notes[0]


def test_a_timm_tower_inside_open_clip_gives_timms_features():
    name = "vit_base_patch16_siglip_224"
    theirs = reference_timm(name, num_classes=0)
    file = {f"visual.trunk.{key}": tensor for key, tensor in theirs.state_dict().items()}
    text = {"text.token_embedding.weight": torch.ones(5, 8), "logit_bias": torch.ones([])}
    save_file({**file, **text}, "open_clip.safetensors")
    ours = create_model(name, pretrained="open_clip.safetensors", **{**SMALL, "num_classes": 0})
    assert_same_logits(ours, theirs)
    assert set(ours.load_report.of("dropped")) == set(text)
    assert_every_key_has_one_fate(ours, [*file, *text])

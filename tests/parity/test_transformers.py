"""A folder of transformers gives the same logits, and every key is accounted for."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from tests.models import assert_every_key_has_one_fate, relative_difference
from tests.parity.hf_models import MODELS, VIT, make_model, random_images, saved_model
from vit_cls import create_model, load

pytestmark = pytest.mark.usefixtures("one_thread")

DISTILLED = {
    "gelu": VIT,
    "quick_gelu": {**VIT, "hidden_act": "quick_gelu"},
    "no qkv_bias": {**VIT, "qkv_bias": False},
}
NO_PLACE = ("mask_token", "pooler.", "decoder.")
"""What a classifier of ours has no use for."""


def _reference_transformers_outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Logits; of a model without a head, the class token after the final norm."""
    outputs = getattr(model, "vit", model)(images) if not hasattr(model, "classifier") else model(images)
    return outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state[:, 0]


@torch.inference_mode()
@pytest.mark.parametrize("case", MODELS)
def test_logits_equal_those_of_transformers_and_no_key_is_fresh(case, tmp_path):
    theirs = saved_model(case, tmp_path)
    images = random_images(theirs.config)
    expected = _reference_transformers_outputs(theirs, images)
    ours = load(tmp_path).model
    report, names = ours.load_report, load_file(tmp_path / "model.safetensors")
    assert_every_key_has_one_fate(ours, names)
    assert not report.of("fresh")
    assert set(report.of("dropped")) == {name for name in names if any(part in name for part in NO_PLACE)}
    registers = case.startswith("registers")
    assert set(report.of("moved")) == ({"cls_token"} if registers else set())
    assert set(report.of("resized")) == ({"pos_embed"} if registers else set())
    assert relative_difference(ours(images), expected) <= 1e-5
    assert torch.equal(create_model("auto", pretrained=tmp_path).eval()(images), ours(images))
    expected = _reference_transformers_outputs(theirs.double(), images.double())
    assert relative_difference(ours.double()(images.double()), expected) <= 1e-10


@torch.inference_mode()
@pytest.mark.parametrize("case", DISTILLED)
def test_two_heads_of_a_distilled_model_are_averaged_as_in_transformers(case, tmp_path):
    """Through timm's distilled architecture, whose norms have an epsilon of 1e-6, not 1e-12: 1.4e-5 seen."""
    theirs = make_model("DeiTForImageClassificationWithTeacher", "DeiTConfig", DISTILLED[case])
    theirs.save_pretrained(tmp_path)
    images = random_images(theirs.config)
    ours = load(tmp_path).model
    assert ours.config.pool == "distilled"
    assert relative_difference(ours(images), theirs(images).logits) <= 5e-5
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    assert relative_difference(ours(images), theirs(images).logits) <= 1e-5
    images = images.double()
    assert relative_difference(ours.double()(images), theirs.double()(images).logits) <= 1e-10
    assert not ours.load_report.of("fresh")
    assert not ours.load_report.of("dropped")


@torch.inference_mode()
def test_no_registers_are_no_token(tmp_path):
    name, config, _ = MODELS["registers"]
    theirs = make_model(name, config, {"num_register_tokens": 0})
    theirs.save_pretrained(tmp_path)
    images = random_images(theirs.config)
    ours = load(tmp_path).model
    assert ours.layout.num_tokens == 17
    assert relative_difference(ours(images), theirs(images).logits) <= 1e-5
    assert create_model("auto", pretrained=tmp_path, reg_tokens=2).load_report.of("fresh").keys() == {
        "reg_token"
    }


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["vit", "deit", "dinov2 swiglu", "registers"])
def test_the_names_of_transformers_5_and_weights_of_any_precision_are_read_too(case, dtype, tmp_path):
    theirs = make_model(*MODELS[case]).to(dtype)
    theirs.save_pretrained(tmp_path, save_original_format=False)
    assert any(".q_proj." in name for name in load_file(tmp_path / "model.safetensors"))
    ours, images = load(tmp_path).model, random_images(theirs.config)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert relative_difference(ours(images), theirs.float()(images).logits) <= 1e-5


@torch.inference_mode()
def _tokens(theirs: nn.Module, images: Tensor) -> Tensor:
    """Before the final norm, shape (batch, tokens, dim)."""
    base = theirs.base_model
    found = []
    handle = base.layernorm.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    base(images)
    handle.remove()
    return found[0]


@torch.inference_mode()
@pytest.mark.parametrize("case", ["vit", "deit", "dinov2", "registers"])
def test_pool_gap_reads_the_patches_through_the_pretrained_norm(case, tmp_path):
    theirs = saved_model(case, tmp_path)
    images = random_images(theirs.config)
    ours = create_model("auto", pretrained=tmp_path, pool="gap").eval()
    first = ours.layout.num_prefix_tokens
    assert first == {"vit": 1, "deit": 2, "dinov2": 1, "registers": 5}[case]
    pooled = theirs.base_model.layernorm(_tokens(theirs, images)[:, first:].mean(dim=1))
    weight = theirs.classifier.weight[:, -pooled.shape[1] :]  # of cls+gap, the columns of gap
    expected = nn.functional.linear(pooled, weight, theirs.classifier.bias)
    assert relative_difference(ours(images), expected) <= 1e-5
    assert "fc_norm.weight" in ours.load_report.of("moved")


@torch.inference_mode()
@pytest.mark.parametrize("case", ["dinov2", "registers"])
def test_pool_cls_reads_the_columns_of_the_class_token(case, tmp_path):
    theirs = saved_model(case, tmp_path)
    images = random_images(theirs.config)
    ours = create_model("auto", pretrained=tmp_path, pool="cls").eval()
    token = theirs.base_model.layernorm(_tokens(theirs, images)[:, 0])
    expected = nn.functional.linear(token, theirs.classifier.weight[:, :48], theirs.classifier.bias)
    assert relative_difference(ours(images), expected) <= 1e-5
    assert ours.load_report.of("resized")["head.weight"] == "pool cls+gap -> cls: 96 -> 48 columns"


@torch.inference_mode()
@pytest.mark.parametrize("case", ["vit", "deit"])
def test_pool_cls_and_gap_keeps_the_logits_of_a_head_on_the_class_token(case, tmp_path):
    theirs = saved_model(case, tmp_path)
    images = random_images(theirs.config)
    ours = create_model("auto", pretrained=tmp_path, pool="cls+gap").eval()
    assert ours.head.in_features == 96
    assert relative_difference(ours(images), theirs(images).logits) <= 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("pool", ["cls", "gap", "cls+gap"])
def test_a_distilled_model_can_leave_its_second_head_behind(pool, tmp_path):
    theirs = make_model("DeiTForImageClassificationWithTeacher", "DeiTConfig", VIT)
    theirs.save_pretrained(tmp_path)
    images = random_images(theirs.config)
    ours = create_model("auto", pretrained=tmp_path, pool=pool).eval()
    assert set(ours.load_report.of("dropped")) == {"head_dist.weight", "head_dist.bias"}
    assert ours(images).shape == (3, 5)
    if pool == "cls":
        assert relative_difference(ours(images), theirs(images).cls_logits) <= 5e-5


@torch.inference_mode()
@pytest.mark.parametrize("case", ["vit", "dinov2 swiglu", "registers"])
def test_another_number_of_classes_makes_a_new_head_on_the_same_features(case, tmp_path):
    theirs = saved_model(case, tmp_path)
    images = random_images(theirs.config)
    torch.manual_seed(0)
    ours = create_model("auto", pretrained=tmp_path, num_classes=7).eval()
    assert set(ours.load_report.of("fresh")) == {"head.weight", "head.bias"}
    features = ours.forward_features(images)
    expected = nn.functional.linear(features, theirs.classifier.weight, theirs.classifier.bias)
    assert relative_difference(expected, theirs(images).logits) <= 1e-5
    assert ours(images).shape == (3, 7)


@torch.inference_mode()
@pytest.mark.parametrize("case", ["vit", "deit", "dinov2", "registers"])
def test_another_image_size_interpolates_the_positions_as_timm_does(case, tmp_path):
    small = saved_model(case, tmp_path)
    name, config, settings = MODELS[case]
    theirs = make_model(name, config, {**settings, "image_size": 48})
    state = small.state_dict()
    key = next(key for key in state if key.endswith("position_embeddings"))
    prefix = 2 if case == "deit" else 1
    state[key] = resample_abs_pos_embed(state[key], new_size=[6, 6], num_prefix_tokens=prefix)
    theirs.load_state_dict(state)
    images = random_images(theirs.config)
    ours = create_model("auto", pretrained=tmp_path, img_size=48).eval()
    assert "4x4 -> 6x6 patches" in ours.load_report.of("resized")["pos_embed"]
    assert relative_difference(ours(images), theirs(images).logits) <= 1e-5
    if case == "registers":  # the only one that transformers interpolates with antialiasing
        assert relative_difference(ours(images), small(images).logits) <= 1e-5

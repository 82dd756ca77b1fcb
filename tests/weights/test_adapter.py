"""Models of timm behind our interface: poolings, tokens, files and settings."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer as TimmViT

from tests.models import POOLS
from vit_cls import create_model
from vit_cls.errors import ConfigError
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.pooling import num_class_tokens
from vit_cls.training.optim import Freezer, parameter_groups
from vit_cls.weights.adapter import TimmAdapter
from vit_cls.weights.bundle import load_classifier, save_classifier

SMALL = {"depth": 2, "embed_dim": 128, "num_heads": 2, "img_size": 48}
NAMES = [
    "beit_base_patch16_224",
    "eva02_base_patch16_clip_224",
    "vit_small_patch16_dinov3",
    "beit3_base_patch16_224",
]
DISTILLED = "deit_tiny_distilled_patch16_224"


def _model(name: str, **settings) -> TimmAdapter:
    torch.manual_seed(0)
    model = create_model(name, **{**SMALL, "num_classes": 5, **settings})
    assert isinstance(model, TimmAdapter)
    return model.eval()


@pytest.fixture
def images(generator):
    return torch.randn(2, 3, 48, 48, generator=generator)


def _class_tokens_after_each_block(model, images):
    found = []
    hooks = [b.register_forward_hook(lambda m, i, output: found.append(output[:, :1])) for b in model.blocks]
    model.encode(images)
    for hook in hooks:
        hook.remove()
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("name", [*NAMES, DISTILLED])
@pytest.mark.parametrize("spec", [spec for spec in POOLS if num_class_tokens(spec, 5) == 1])
def test_every_pooling_reads_the_tokens_that_it_names(name, spec, images):
    model = _model(name, pool=spec)
    tokens = model.encode(images)
    layout = model.layout
    first = layout.num_prefix_tokens
    assert tokens.shape == (2, layout.num_tokens, 128)
    patches = tokens[:, first:]
    expected = {"cls": tokens[:, 0], "gap": patches.mean(1), "max": patches.amax(1), "token:2": patches[:, 2]}
    if spec in expected:
        features = model.fc_norm(expected[spec])
    elif spec == "cls+gap":
        features = torch.cat([tokens[:, 0], patches.mean(1)], dim=1)
    elif spec == "last:2":
        features = model.pool(model.norm(_class_tokens_after_each_block(model, images)))
    elif spec == "gem+last:2+token:1":
        gem, last, _ = model.pool.poolings
        of_blocks = last(model.norm(_class_tokens_after_each_block(model, images)))
        features = torch.cat([gem(patches), of_blocks, patches[:, 1]], dim=1)
    else:
        features = model.fc_norm(model.pool(patches))
    torch.testing.assert_close(model(images), model.head(features), rtol=1e-5, atol=1e-6)
    assert model(images).shape == (2, 5)


@pytest.mark.parametrize("spec", ["multicls:2", "multicls-concat:2", "multicls-diverse:2", "classtok"])
def test_an_adapted_model_has_one_class_token_and_says_so(spec):
    with pytest.raises(ConfigError, match=r"model.pool .*needs several class tokens; beit_base"):
        _model("beit_base_patch16_224", pool=spec)


@pytest.mark.parametrize("name", [*NAMES, DISTILLED])
def test_tokens_and_blocks_are_within_reach(name, images):
    model = _model(name)
    patches = model.patch_embed(images)
    assert patches.shape == (2, 9, 128)
    tokens = model.embed_tokens(images)
    assert tokens.shape == (2, 9 + model.layout.num_prefix_tokens, 128)
    torch.testing.assert_close(model.norm(model.run_blocks(tokens)), model.encode(images), rtol=0, atol=0)
    torch.testing.assert_close(
        model.run_blocks(tokens, slice(1, 4)), model.run_blocks(tokens)[:, 1:4], rtol=0, atol=0
    )
    assert len(model.blocks) == 2


def test_two_heads_are_averaged_and_each_reads_its_own_token(images):
    model = _model(DISTILLED)
    tokens = model.encode(images)
    expected = (model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-6)
    assert (model.config.pool, model.layout.num_prefix_tokens) == ("distilled", 2)
    assert "head_dist.weight" not in _model(DISTILLED, pool="cls").state_dict()


@pytest.mark.parametrize("name", [*NAMES, DISTILLED])
def test_a_file_rebuilds_the_model_with_timms_keys(name, images, tmp_path):
    model = _model(name)
    classifier = ImageClassifier(model, Preprocess((48, 48)), list("abcde"))
    classifier.weights_licence = "mit"
    path = save_classifier(classifier, tmp_path / "model.safetensors")
    again = load_classifier(path)
    torch.testing.assert_close(again.model(images), model(images), rtol=0, atol=0)
    assert again.weights_licence == "mit"
    assert not any(key.startswith("body.") for key in model.state_dict())
    assert again.model.config == model.config


def test_keys_are_timms_inside_another_module_too(images):
    model = _model(NAMES[0])
    wrapped = torch.nn.Sequential(model)
    state = wrapped.state_dict()
    assert "0.cls_token" in state
    assert "0.blocks.0.norm1.weight" in state
    other = copy.deepcopy(wrapped)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(state)
    torch.testing.assert_close(other(images), wrapped(images), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.0\.norm1\.weight"):
        model.load_state_dict({k: v for k, v in model.state_dict().items() if k != "blocks.0.norm1.weight"})


@pytest.mark.parametrize("name", [*NAMES, DISTILLED])
def test_layers_are_known_by_name_for_decay_and_freezing(name):
    model = _model(name).train()
    groups = parameter_groups(model.named_parameters(), weight_decay=0.1, lr=1.0, layer_decay=0.5)
    rates = {group["name"].removesuffix(" decayed").removesuffix(" not"): group["lr"] for group in groups}
    assert rates == {"after blocks": 1.0, "block 1": 0.5, "block 0": 0.25, "embedding": 0.125}
    Freezer(model, "backbone")
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == ({"head", "head_dist"} if name == DISTILLED else {"head"})


def test_gradients_reach_every_weight(images):
    for name in NAMES:
        model = _model(name, pool="map").train()
        model(images).square().sum().backward()
        assert not [key for key, p in model.named_parameters() if p.grad is None], name


def test_registers_can_be_added_and_a_class_token_removed(images):
    model = _model("beit3_base_patch16_224", reg_tokens=3)
    assert model.encode(images).shape[1] == 1 + 3 + 9
    assert model.config.reg_tokens == 3
    model = _model("eva02_base_patch16_clip_224", reg_tokens=2)
    assert model.encode(images).shape[1] == 1 + 2 + 9
    model = _model("beit3_base_patch16_224", class_token=False)
    assert model.encode(images).shape[1] == 9


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (DISTILLED, {"reg_tokens": 4}, r"has its tokens built in"),
        ("beit_base_patch16_224", {"class_token": False}, r"has its tokens built in"),
        ("beit_base_patch16_224", {"pool": "distilled"}, r"model.pool (must be one of|distilled)"),
        ("beit_base_patch16_224", {"img_size": 50}, r"divisible by model.patch_size; got 50x50 and 16"),
        ("beit_base_patch16_224", {"depht": 2}, r"cannot be built with .*depht=2"),
        ("beit3_base_patch16_224", {"class_token": False, "pool": "cls"}, r"class_token is false"),
    ],
)
def test_settings_that_do_not_fit_are_refused(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        _model(name, **settings)


def test_a_wrong_image_shape_names_both_shapes(images):
    with pytest.raises(ValueError, match=r"\(batch, 3, 48, 48\); got \(2, 3, 48, 40\)"):
        _model(NAMES[0])(images[..., :40])


def test_timms_environment_variable_does_not_swap_the_class():
    code = (
        "from vit_cls.weights.timm_models import skeleton; "
        "print(*(type(skeleton(n)).__name__ for n in ('vit_tiny_patch16_224', 'eva02_tiny_patch14_224')))"
    )
    env = {"TIMM_USE_NAFLEXVIT": "true", "TIMM_USE_NAFLEX": "1", "PATH": "/usr/bin:/bin"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.stdout.split() == [TimmViT.__name__, "Eva"], run.stderr

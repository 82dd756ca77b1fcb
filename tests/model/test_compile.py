"""The compiled encoder: graphs of every family, and the same numbers as without."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch

from tests.models import make_vit, perturbed
from vit_cls import create_model
from vit_cls.inference import layer_tokens
from vit_cls.model.block import DropPath
from vit_cls.model.classifier import ImageClassifier, Preprocess
from vit_cls.model.token_model import TokenModel

NATIVE = {
    "class token": {},
    "mean": {"pool": "gap"},
    "two layers": {"pool": "last:2"},
    "attention": {"pool": "map"},
    "registers": {"pool": "gap+max", "reg_tokens": 2},
    "causal": {"pool": "cls+gap", "reg_tokens": 2, "causal": True, "class_position": "last"},
    "class tokens": {"pool": "multicls:2"},
    "a token a class": {"pool": "classtok"},
    "dropout, norms, scales": {"attn_drop_rate": 0.1, "qk_norm": True, "init_values": 0.1},
}
ADAPTED = {
    # one of each kind of block that timm has and native ones do not cover
    **dict.fromkeys(["beit_base_patch16_224", "beit3_base_patch16_224", "eva02_base_patch14_224"]),
    **dict.fromkeys(["eva02_enormous_patch14_clip_224", "eva02_tiny_patch14_224", "eva_giant_patch14_224"]),
    **dict.fromkeys(["vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3"]),
    **dict.fromkeys(["vit_base_patch16_rope_224", "vit_base_patch16_rope_mixed_224"]),
    **dict.fromkeys(["vit_pe_core_base_patch16_224", "vit_pe_spatial_base_patch16_512"]),
    **dict.fromkeys(["vit_base_patch16_rope_reg1_gap_256", "deit_tiny_distilled_patch16_224"]),
    **dict.fromkeys(["aimv2_large_patch14_224", "vit_small_patch16_18x2_224", "vit_base_patch16_rpn_224"]),
    **dict.fromkeys(["vit_base_patch16_xp_224", "vit_dwee_patch16_reg1_gap_256"]),
    "vit_large_patch16_sapiens2": {"num_kv_heads": 1},
}
SAMPLE = [
    *("class token", "beit_base_patch16_224", "eva02_base_patch14_224"),
    *("vit_small_patch16_dinov3", "vit_pe_spatial_base_patch16_512"),
]
FAMILIES = [*NATIVE, *ADAPTED] if os.environ.get("EVERY_FAMILY") else SAMPLE
SIZES = (4, 3, 2)
"""A whole batch, a partial one, and one that lacks an image."""


class Counter:
    """A backend that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def _make(name: str, **settings) -> TokenModel:
    """Three blocks, whose rates of drop path all differ."""
    tiny = {"embed_dim": 16, "depth": 3, "num_heads": 2, "drop_path_rate": 0.4, "num_classes": 5, **settings}
    torch.manual_seed(0)
    if name in NATIVE:
        return make_vit({**tiny, "img_size": 8, "patch_size": 4, **NATIVE[name]})
    patch = 14 if "patch14" in name else 16
    width = {"embed_dim": 128} | (ADAPTED[name] or {})  # rotations want heads of 64
    return create_model(name, **{**tiny, "img_size": 2 * patch, **width})


def _images(model: TokenModel, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, model.config.in_chans, *model.config.image_hw, generator=generator)


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_blocks_of_every_family_compile_to_few_graphs_for_batches_of_any_size(name):
    model, counter = _make(name), Counter()
    images = [_images(model, size) for size in SIZES]
    keys = list(model.state_dict())
    with torch.inference_mode():
        expected = [model.eval()(some) for some in images]
    model.train().compile_encoder(counter)
    found = []
    for some in images:
        model(some).sum().backward()
        found.append(counter.graphs)
    # The first block drops no path, and the last native one may compute fewer tokens.
    assert 2 <= found[0] <= 3
    assert found[1] <= 2 * found[0]
    assert found[2] == found[1]
    model.eval()
    for some, logits in zip(images, expected, strict=True):
        with torch.inference_mode():
            torch.testing.assert_close(model(some), logits, rtol=1e-5, atol=1e-5)
        found.append(counter.graphs - found[2])
    assert 1 <= found[3] <= 2
    assert found[5] == found[4] <= 2 * found[3]
    model.compile_encoder(counter)
    with torch.inference_mode():
        model(images[0])
    assert counter.graphs == found[2] + found[5]  # asked for twice, compiled once
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", ["class token", "vit_small_patch16_dinov3"])
def test_compiled_blocks_give_the_same_gradients(name):
    model = perturbed(_make(name, drop_path_rate=0.0))
    images = _images(model, 3)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(images).square().mean(), parameters)
    model.compile_encoder(counter := Counter())
    found = torch.autograd.grad(model(images).square().mean(), parameters)
    assert counter.graphs > 0
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_compiled_drop_path_drops_whole_samples_as_often_as_it_should():
    drop = DropPath(0.25).train()
    torch.manual_seed(0)
    out = torch.compile(drop, backend="eager", fullgraph=True)(torch.ones(20_000, 2, 2))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert abs(out[:, 0, 0].mean() - 1) < 0.02
    assert torch.equal(out[:, 0, 0], out[:, 1, 1])


def test_a_hook_is_called_though_its_block_was_compiled_before():
    model = _make("mean").eval()
    model.compile_encoder(counter := Counter())
    classifier = ImageClassifier(model, Preprocess((8, 8)), list("abcde"))
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with torch.inference_mode():
        classifier(pixels)
        graphs = counter.graphs
        tokens = layer_tokens(classifier, [0, 2, 3])(pixels)
        torch.testing.assert_close(tokens[3], model.run_blocks(tokens[0]), rtol=1e-5, atol=1e-5)
    assert graphs > 0


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
def test_every_kind_of_hook_is_called(kind):
    model = _make("mean", depth=1)
    model.compile_encoder("eager")
    images = _images(model, 2)
    model(images).sum().backward()
    calls = []
    part = model.blocks[0].mlp if kind.startswith("forward") else model.blocks[0]
    getattr(part, f"register_{kind}_hook")(lambda *_: calls.append(kind))
    model(images).sum().backward()
    assert calls == [kind]


def test_a_copy_is_of_its_own_and_a_compiled_model_can_be_pickled():
    model = _make("mean").eval()
    images = _images(model, 2)
    model.compile_encoder("eager")
    expected = model(images)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(model(images), expected)
    assert not copied(images).any()
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), expected)

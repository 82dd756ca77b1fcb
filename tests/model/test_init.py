"""Fresh weights: one seed, one encoder, whatever stands before and after it."""

from __future__ import annotations

import pytest
import torch

from tests.models import POOLS, make_vit
from vit_cls.model.block import LayerScale
from vit_cls.model.config import ViTConfig
from vit_cls.model.init import SkipInit
from vit_cls.model.vit import VisionTransformer
from vit_cls.weights.architecture import build_model


def _encoder(model):
    state = {k: v for k, v in model.state_dict().items() if k.startswith(("patch_embed.", "blocks."))}
    assert len(state) == 2 + 2 * 12
    return {**state, "positions": model.pos_embed[:, -model.layout.num_patches :].detach()}


@pytest.mark.parametrize(
    "settings",
    [
        *({"pool": spec} for spec in POOLS),
        {"pool": "gap", "class_token": False},
        {"reg_tokens": 4},
        {"num_classes": 100},
        {"num_classes": 0},
        {"no_embed_class": True},
        {"causal": True, "class_position": "last"},
        {"drop_path_rate": 0.2, "drop_rate": 0.1},
    ],
    ids=str,
)
def test_the_encoder_starts_from_the_same_bits_whatever_reads_it(settings, tiny):
    expected = _encoder(make_vit(tiny))
    for name, tensor in _encoder(make_vit(tiny, **settings)).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_deeper_encoder_begins_with_the_blocks_of_the_shallower(tiny):
    shallow, deep = make_vit(tiny).state_dict(), make_vit(tiny, depth=4).state_dict()
    for name, tensor in shallow.items():
        assert torch.equal(tensor, deep[name]), name


def test_another_seed_draws_other_weights(tiny):
    first, again, second = (make_vit(tiny, seed=seed, reg_tokens=1).state_dict() for seed in (0, 0, 1))
    for name, tensor in first.items():
        fixed = tensor.std() == 0  # norms and biases
        assert torch.equal(tensor, again[name]), name
        assert torch.equal(tensor, second[name]) == bool(fixed), name


def test_layers_of_one_shape_do_not_start_equal(tiny):
    state = make_vit(tiny).state_dict()
    assert not torch.equal(state["blocks.0.attn.qkv.weight"], state["blocks.1.attn.qkv.weight"])
    assert not torch.equal(state["blocks.0.attn.proj.weight"], state["blocks.1.attn.proj.weight"])


@pytest.mark.parametrize("spec", POOLS)
def test_building_moves_the_global_generator_by_one_draw(spec, tiny):
    torch.manual_seed(7)
    torch.randint(2**62, ())
    expected = torch.get_rng_state()
    make_vit(tiny, seed=7, pool=spec, reg_tokens=2)
    assert torch.equal(torch.get_rng_state(), expected)


def test_on_the_meta_device_nothing_is_drawn(tiny):
    torch.manual_seed(7)
    expected = torch.get_rng_state()
    with torch.device("meta"):
        model = VisionTransformer(ViTConfig.from_dict({**tiny, "pool": "map"}))
    assert model.head.weight.is_meta
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("spec", POOLS)
def test_no_weight_is_left_as_memory_had_it(spec, tiny):
    settings = {"pool": spec, "init_values": 0.1, "qk_norm": True, "reg_tokens": 1, "pre_norm": True}
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        assert torch.empty(1).isnan()
        first = make_vit(tiny, **settings)
        second = build_model(first.config, init=False)
        assert second.head.weight.isnan().all()
        torch.manual_seed(0)
        second.init_weights()
    finally:
        torch.use_deterministic_algorithms(False)
    for name, tensor in first.state_dict().items():
        assert tensor.isfinite().all(), name
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_only_the_named_weights_are_drawn_anew(tiny):
    model = make_vit(tiny, pool="cait:1")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    torch.manual_seed(0)
    model.init_weights({"head.weight", "attn_pool.layers.0.ls1.gamma"})
    again = {name for name, tensor in model.state_dict().items() if not (tensor == 3).all()}
    assert again == {"head.weight", "head.bias", "attn_pool.layers.0.ls1.gamma"}
    assert torch.equal(model.head.weight, before["head.weight"])


@pytest.mark.parametrize(("spec", "spread"), [("cls", 1e-6), ("multicls:64", 0.02), ("classtok", 0.02)])
def test_several_class_tokens_start_far_enough_apart_to_part(spec, spread, tiny):
    model = make_vit(tiny, pool=spec, embed_dim=96, num_classes=64)
    assert model.cls_token.std().item() == pytest.approx(spread, rel=0.25)
    assert len(torch.unique(model.cls_token[0], dim=0)) == model.layout.num_class_tokens


@pytest.mark.parametrize("spec", ["abmil", "simpool", "map", "cait:2"])
def test_the_linear_layers_of_a_pooling_start_like_those_of_the_encoder(spec, tiny):
    model = make_vit(tiny, pool=spec, embed_dim=96)
    layers = [m for m in model.attn_pool.modules() if isinstance(m, torch.nn.Linear)]
    assert layers
    for layer in layers:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert layer.bias is None or not layer.bias.any()
    scales = [m.gamma.unique().tolist() for m in model.attn_pool.modules() if isinstance(m, LayerScale)]
    assert scales == [[pytest.approx(0.1)]] * (4 if spec == "cait:2" else 0)


def test_skip_init_draws_nothing_for_any_layer():
    torch.manual_seed(3)
    expected = torch.get_rng_state()
    with SkipInit():
        for make in (lambda: torch.nn.Linear(3, 3), lambda: torch.nn.Conv2d(3, 3, 2)):
            make()
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_weights_depend_on_the_seed_alone_and_its_generator_stays(tiny):
    with torch.device("cuda"):
        first = make_vit(tiny, reg_tokens=1).state_dict()
        torch.randn(5)
        torch.manual_seed(0)
        before = torch.cuda.get_rng_state()
        second = VisionTransformer(ViTConfig.from_dict({**tiny, "num_classes": 5, "reg_tokens": 1}))
    assert torch.equal(torch.cuda.get_rng_state(), before)
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor, first[name]), name

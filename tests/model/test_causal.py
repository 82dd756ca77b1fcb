"""Causal attention: where the class token stands is everything; without a mask it is nothing."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange

from tests.models import make_vit, perturbed
from vit_cls.errors import ConfigError
from vit_cls.model.config import ViTConfig
from vit_cls.model.pooling import make_pooling
from vit_cls.model.tokens import CLASS_POSITIONS, TokenLayout, causal_mask
from vit_cls.model.vit import VisionTransformer


def _model(tiny, generator, **settings):
    """In float64, every parameter off its first value."""
    return perturbed(make_vit(tiny, **settings).double(), generator)


def _images(generator, batch=3):
    return torch.randn(batch, 3, 16, 16, generator=generator, dtype=torch.float64)


def _gradient_of_patches(model, images):
    """Largest gradient of the logits at the pixels of each patch, shape (patches,)."""
    images = images.clone().requires_grad_()
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    (model(images) @ weights).sum().backward()
    return rearrange(images.grad.abs(), "b c (r p) (s q) -> (r s) (b c p q)", p=4, q=4).amax(1)


@pytest.mark.parametrize(
    ("layout", "position", "expected"),
    [
        (TokenLayout(True, 0, (2, 2)), "first", ["10000", "11000", "11100", "11110", "11111"]),
        (TokenLayout(True, 0, (2, 2)), "middle", ["11100", "01000", "01100", "11110", "11111"]),
        (TokenLayout(True, 0, (2, 2)), "last", ["11111", "01000", "01100", "01110", "01111"]),
        # two class tokens, a register, three patches: r p | c c | p p with one patch before the middle
        (
            TokenLayout(True, 1, (1, 3), num_class_tokens=2),
            "middle",
            ["101100", "111100", "001000", "001100", "111110", "111111"],
        ),
        (
            TokenLayout(True, 1, (1, 3), num_class_tokens=2),
            "last",
            ["101111", "111111", "001000", "001100", "001110", "001111"],
        ),
        (TokenLayout(False, 0, (1, 3)), "last", ["100", "110", "111"]),
    ],
)
def test_the_mask_lets_each_token_see_itself_and_what_comes_before(layout, position, expected):
    mask = causal_mask(layout, position)
    assert mask.dtype == torch.bool
    assert ["".join(map(str, row)) for row in mask.int().tolist()] == expected


SEES = [("cls", "last", 16), ("cls", "middle", 8), ("multicls:2", "middle", 8)]
SEES += [("token:5", position, 6) for position in CLASS_POSITIONS]


@pytest.mark.parametrize(("pool", "position", "count"), SEES)
def test_what_is_read_sees_the_patches_before_it_alone(pool, position, count, tiny, generator):
    model = _model(tiny, generator, causal=True, class_position=position, reg_tokens=2, pool=pool)
    found = _gradient_of_patches(model, _images(generator))
    assert (found[:count] > 0).all()
    assert not found[count:].any()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_class_token_in_front_never_learns_of_the_image(dropout, tiny, generator):
    model = _model(tiny, generator, causal=True, reg_tokens=1, attn_drop_rate=dropout)
    logits = model(_images(generator))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert not _gradient_of_patches(model.train(), _images(generator)).any()


@pytest.mark.parametrize("pool", ["cls", "gap", "last:2", "multicls:2", "classtok", "map"])
@pytest.mark.parametrize("position", CLASS_POSITIONS)
def test_the_narrowed_last_block_equals_the_full_one_under_the_mask(position, pool, tiny, generator):
    model = _model(tiny, generator, causal=True, class_position=position, reg_tokens=1, pool=pool, depth=3)
    tokens = model.embed_tokens(_images(generator))
    read, layers = model.pool.read, model.pool.num_layers
    whole = model.run_blocks(tokens, None, layers).unflatten(1, (layers, -1))
    expected = whole[:, :, read].flatten(1, 2)
    torch.testing.assert_close(model.run_blocks(tokens, read, layers), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pool", ["cls", "multicls:2"])
@pytest.mark.parametrize("position", CLASS_POSITIONS)
def test_the_mask_equals_really_moving_the_tokens(position, pool, tiny, generator):
    model = _model(tiny, generator, causal=True, class_position=position, reg_tokens=2, pool=pool)
    tokens = model.embed_tokens(_images(generator))
    layout = model.layout
    classes = list(range(layout.num_class_tokens))
    others = list(range(len(classes), layout.num_tokens))
    before = {"first": 0, "middle": 2 + 8, "last": len(others)}[position]
    order = torch.tensor([*others[:before], *classes, *others[before:]])
    moved = tokens[:, order]
    triangle = torch.ones(layout.num_tokens, layout.num_tokens).tril().bool()
    for block in model.blocks:
        moved = block(moved, None, triangle)
    back = torch.empty_like(moved)
    back[:, order] = moved
    torch.testing.assert_close(model.run_blocks(tokens), back, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pool", ["cls", "gap", "multicls:2"])
def test_without_the_mask_the_place_of_the_class_token_makes_no_difference_at_all(pool, tiny, generator):
    models = [
        _model(tiny, torch.Generator().manual_seed(4), class_position=p, pool=pool) for p in CLASS_POSITIONS
    ]
    images = _images(generator)
    for model in models[1:]:
        assert torch.equal(model(images), models[0](images))


def test_really_moving_the_class_token_makes_no_difference_without_the_mask(tiny, generator):
    model = _model(tiny, generator)
    tokens = model.embed_tokens(_images(generator))
    moved = torch.cat([tokens[:, 1:8], tokens[:, :1], tokens[:, 8:]], dim=1)
    torch.testing.assert_close(model.blocks(moved)[:, 7], model.blocks(tokens)[:, 0], rtol=0, atol=1e-12)


def test_an_unknown_place_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"model.class_position must be one of first, middle, last"):
        ViTConfig.from_dict({**tiny, "class_position": "end"})


def test_a_config_from_before_causal_attention_is_bidirectional(tiny):
    values = ViTConfig.from_dict(tiny).to_dict()
    del values["causal"], values["class_position"]
    config = ViTConfig.from_dict(values)
    assert not config.causal
    assert make_pooling("cls", VisionTransformer(config).pooling_context).read == slice(0, 1)

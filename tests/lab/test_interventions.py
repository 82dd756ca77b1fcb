"""Hooks that look at tokens or change them, and leave nothing behind."""

from __future__ import annotations

import pytest
import torch

from vit_cls import create_model
from vit_cls.errors import ConfigError
from vit_cls.lab.interventions import (
    capture_tokens,
    changed_tokens,
    insert_tokens,
    reorder_tokens,
    replace_token,
    shuffle_token,
)


@pytest.fixture
def model(tiny):
    torch.manual_seed(0)
    return create_model("vit_pico_patch7_28", num_classes=3, **tiny).eval().requires_grad_(False)


@pytest.fixture
def images(generator):
    return torch.randn(3, 3, 16, 16, generator=generator)


def test_captured_tokens_are_those_of_the_blocks_one_by_one(model, images):
    tokens = model.embed_tokens(images)
    with capture_tokens(model) as found:
        model.run_blocks(tokens)
    expected = [model.blocks[0](tokens)]
    expected.append(model.blocks[1](expected[0]))
    assert len(found) == 2
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    model(images)
    assert len(found) == 2


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_change_is_made_at_its_layer_and_nowhere_else(model, images, layer):
    tokens = model.embed_tokens(images)
    with changed_tokens(model, layer, lambda tokens: tokens * 2):
        found = model.run_blocks(tokens)
    expected = tokens
    for i, block in enumerate(model.blocks):
        expected = block(expected * 2 if i == layer else expected)
    assert torch.equal(found, expected * 2 if layer == 2 else expected)


def test_hooks_are_gone_even_after_an_error(model, images):
    expected = model(images)
    with pytest.raises(RuntimeError, match="inside"), changed_tokens(model, 0, lambda t: t * 0):
        raise RuntimeError("inside")
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_is_not_there_is_refused(model, layer):
    with (
        pytest.raises(ConfigError, match=rf"from 0 to 2, the number of blocks; got {layer}"),
        changed_tokens(model, layer, lambda t: t),
    ):
        pass


def test_shuffled_class_tokens_carry_the_logits_with_them_at_the_output_alone(model, images):
    order = torch.tensor([2, 0, 1])
    expected = model(images)
    with changed_tokens(model, 2, shuffle_token(0, order)):
        torch.testing.assert_close(model(images), expected[order])
    with changed_tokens(model, 1, shuffle_token(0, order)):
        assert not torch.allclose(model(images), expected[order])


def test_changes_leave_their_input_alone():
    tokens = torch.arange(8.0).view(2, 2, 2)
    kept = tokens.clone()
    replaced = replace_token(1, torch.tensor([[9.0, 9.0], [8.0, 8.0]]))(tokens)
    shuffle_token(-1, torch.tensor([1, 0]))(tokens)
    assert torch.equal(tokens, kept)
    assert replaced[:, 1].tolist() == [[9.0, 9.0], [8.0, 8.0]]
    assert torch.equal(replaced[:, 0], kept[:, 0])


def test_inserted_tokens_attend_and_are_attended_to(model, images):
    tokens = model.embed_tokens(images)
    new = torch.ones(2, 24)
    with changed_tokens(model, 1, insert_tokens(17, new)):
        found = model.run_blocks(tokens)
    middle = torch.cat([model.blocks[0](tokens), new.expand(3, -1, -1)], dim=1)
    assert torch.equal(found, model.blocks[1](middle))
    with pytest.raises(ConfigError, match="from position 0 to 17, the end; got 18"):
        insert_tokens(18, new)(tokens)


def test_reordering_takes_one_order_or_one_for_each_image():
    tokens = torch.arange(6.0).view(2, 3, 1)
    assert reorder_tokens(tokens, torch.tensor([2, 0, 1])).flatten().tolist() == [2, 0, 1, 5, 3, 4]
    orders = torch.tensor([[0, 1, 2], [2, 1, 0]])
    assert reorder_tokens(tokens, orders).flatten().tolist() == [0, 1, 2, 5, 4, 3]

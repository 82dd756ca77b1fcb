"""Computing the last block for the read tokens alone is the same function, gradients included."""

from __future__ import annotations

import pytest
import torch

from tests.models import make_vit, perturbed
from vit_cls.model.vit import VisionTransformer


def _full_last_block(model: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """Every token through every block, then the pooling's tokens are picked."""
    tokens = model.blocks(model.embed_tokens(images))[:, model.pool.read]
    return model.head(model.head_drop(model.fc_norm(model.pool(model.norm(tokens)))))


def _logits_and_gradients(model, forward, images, weights):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)  # the same drop path
    logits = forward(images)
    (logits * weights).sum().backward()
    return logits.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("pool", ["cls", "gap", "max", "token:0", "token:7", "multicls:2"])
@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"drop_path_rate": 0.4},
        {"reg_tokens": 2, "qk_norm": True},
        {"qkv_bias": False, "init_values": 0.5},
        {"causal": True, "class_position": "last", "reg_tokens": 1},
    ],
    ids=str,
)
def test_narrowed_last_block_equals_the_full_one_in_logits_and_every_gradient(pool, setting, tiny, generator):
    model = perturbed(make_vit(tiny, depth=3, pool=pool, **setting).double(), generator, 0.05).train()
    images = torch.randn(6, 3, 16, 16, generator=generator, dtype=torch.float64)
    weights = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    full, full_gradients = _logits_and_gradients(model, lambda x: _full_last_block(model, x), images, weights)
    narrow, narrow_gradients = _logits_and_gradients(model, model, images, weights)
    assert (narrow - full).abs().max() <= 1e-12 * full.abs().max()
    assert narrow_gradients.keys() == full_gradients.keys()
    assert len(full_gradients) == sum(1 for _ in model.parameters())
    for name, gradient in full_gradients.items():
        # against the largest gradient too: a key bias has gradient 0 up to rounding
        scale = max(gradient.abs().max(), 1e-3 * max(g.abs().max() for g in full_gradients.values()))
        assert (narrow_gradients[name] - gradient).abs().max() <= 1e-12 * scale, name


def test_the_last_block_computes_one_query_and_one_mlp_row_for_a_class_token(tiny):
    model = make_vit(tiny)
    rows = {}
    for i, block in enumerate(model.blocks):
        block.mlp.fc1.register_forward_hook(
            lambda _, inputs, __, i=i: rows.__setitem__(i, inputs[0].shape[1])
        )
    model(torch.zeros(1, 3, 16, 16))
    assert rows == {0: 17, 1: 1}

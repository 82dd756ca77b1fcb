"""Activation checkpointing: the same loss and gradients, from less memory."""

from __future__ import annotations

import pytest
import torch

from tests.models import make_vit, perturbed
from vit_cls import create_model
from vit_cls.model.token_model import TokenModel

NATIVE = {
    "class token": {"pool": "cls"},
    "two layers, causal": {"pool": "gap+last:2", "causal": True, "reg_tokens": 1},
}
ADAPTED = ["beit_base_patch16_224", "vit_small_patch16_dinov3", "vit_base_patch16_rope_mixed_224"]
RATES = {"drop_path_rate": 0.4, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "pos_drop_rate": 0.1}


def _make(name: str) -> TokenModel:
    torch.manual_seed(0)
    small = {"depth": 3, "num_heads": 2, "num_classes": 5, **RATES}
    if name in NATIVE:
        return perturbed(
            make_vit({**small, "embed_dim": 16, "img_size": 16, "patch_size": 4, **NATIVE[name]})
        )
    return perturbed(create_model(name, **small, embed_dim=128, img_size=32))


def _trained(model: TokenModel, checkpointing: bool) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Loss, gradients, and the bytes that were kept for them, beside the weights."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, *model.config.image_hw, generator=generator)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train().grad_checkpointing = checkpointing
    model.zero_grad()
    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(images).square().mean()
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return loss.detach(), gradients, sum(kept.values())


@pytest.mark.parametrize("name", [*NATIVE, *ADAPTED])
def test_loss_and_gradients_are_the_same_to_the_bit_with_dropout_and_drop_path(name):
    model = _make(name)
    loss, gradients, kept = _trained(model, checkpointing=False)
    again, found, less = _trained(model, checkpointing=True)
    assert torch.equal(again, loss)
    assert len(found) == len(gradients) > 10
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, gradients, strict=True))
    assert less < kept / 2


def test_compiled_blocks_can_be_checkpointed():
    torch.compiler.reset()
    model = _make("vit_small_patch16_dinov3")
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    model.compile_encoder("aot_eager")
    loss, gradients, kept = _trained(model, checkpointing=False)
    again, found, less = _trained(model, checkpointing=True)
    torch.testing.assert_close(again, loss)
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert less < kept / 2
    torch.compiler.reset()


def test_evaluation_and_frozen_blocks_are_computed_once(tiny, generator):
    model = make_vit(tiny, depth=3)
    model.grad_checkpointing = True
    calls = []
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    images = torch.randn(2, 3, 16, 16, generator=generator)
    model.eval()(images).sum().backward()
    assert calls == [0, 1, 2]
    calls.clear()
    model.train()
    model.blocks[0].eval().requires_grad_(False)
    model(images).sum().backward()
    assert sorted(calls) == [0, 1, 1, 2, 2]

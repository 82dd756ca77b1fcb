"""How models of timm turn images into tokens, and send tokens through their blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor


def _embed_vit(body: Any, images: Tensor) -> Tensor:
    return body.norm_pre(body.patch_drop(body._pos_embed(body.patch_embed(images))))


def _run_vit(body: Any, tokens: Tensor) -> Tensor:
    return body.blocks(tokens)


def _embed_eva(body: Any, images: Tensor) -> Tensor:
    tokens, _ = body._pos_embed(body.patch_embed(images))
    return body.norm_pre(tokens)


def _run_eva(body: Any, tokens: Tensor) -> Tensor:
    rope = body.rope
    if rope is not None:
        known = getattr(rope, "feat_shape", None) is not None
        rope = rope.get_embed() if known else rope.get_embed(shape=body.patch_embed.grid_size)
    for i, block in enumerate(body.blocks):
        tokens = block(tokens, rope=rope[i] if body.rope_mixed and rope is not None else rope)
    return tokens


def _embed_beit(body: Any, images: Tensor) -> Tensor:
    patches = body.patch_embed(images)
    tokens = torch.cat([body.cls_token.expand(len(patches), -1, -1), patches], dim=1)
    return body.pos_drop(tokens if body.pos_embed is None else tokens + body.pos_embed)


def _run_beit(body: Any, tokens: Tensor) -> Tensor:
    bias = None if body.rel_pos_bias is None else body.rel_pos_bias()
    for block in body.blocks:
        tokens = block(tokens, shared_rel_pos_bias=bias)
    return tokens


# timm's class: (images to tokens, tokens through the blocks)
STEPS: dict[type, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any, Tensor], Tensor]]] = {
    TimmViT: (_embed_vit, _run_vit),
    Eva: (_embed_eva, _run_eva),
    Beit: (_embed_beit, _run_beit),
}

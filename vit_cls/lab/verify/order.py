"""Identities about the order of tokens and about what the class token can know, and when."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from vit_cls.lab.attention import attention_parts
from vit_cls.lab.interventions import (
    changed_tokens,
    insert_tokens,
    reorder_tokens,
    replace_token,
    shuffle_token,
)
from vit_cls.lab.verify.subject import (
    Check,
    NotApplicableError,
    Subject,
    exact,
    greater,
    largest,
    need_class_token,
    need_native,
    need_symmetry,
)
from vit_cls.model.encoder import Encoder
from vit_cls.model.token_model import TokenModel


def prepend_equals_append(subject: Subject) -> Check:
    """The class token may stand behind the patches, with its position embedding, and nothing changes."""
    need_class_token(subject)
    need_symmetry(subject)
    count = subject.layout.num_tokens
    order = torch.cat([torch.arange(1, count), torch.zeros(1, dtype=torch.long)])
    return _reordered(subject, order)


def class_token_anywhere(subject: Subject) -> Check:
    """The class token may stand between any two patches, elsewhere for each image, and nothing changes."""
    need_class_token(subject)
    need_symmetry(subject)
    count, images = subject.layout.num_tokens, len(subject.tokens)
    orders = []
    for i in range(images):
        place = (i + 1) * (count - 1) // (images + 1)
        others = torch.arange(1, count)
        orders.append(torch.cat([others[:place], torch.zeros(1, dtype=torch.long), others[place:]]))
    return _reordered(subject, torch.stack(orders))


def patch_permutation_equivariance(subject: Subject) -> Check:
    """Patches in another order, with their position embeddings, give the same outputs in that order."""
    need_symmetry(subject)
    first, patches = subject.layout.num_prefix_tokens, subject.layout.num_patches
    shuffled = first + torch.randperm(patches, generator=subject.generator("permutation"))
    return _reordered(subject, torch.cat([torch.arange(first), shuffled]))


def _reordered(subject: Subject, order: Tensor) -> Check:
    found = subject.model.run_blocks(reorder_tokens(subject.tokens, order))
    return subject.relative(found, reorder_tokens(subject.layers[-1], order))


def identical_class_tokens_stay_identical(subject: Subject) -> Check:
    """A second class token that starts like the first ends like it: copies cannot specialise.

    Source:
        The collapse of equal class tokens: DeiT, https://arxiv.org/abs/2012.12877, section 4.
    """
    need_class_token(subject)
    need_symmetry(subject)
    second = subject.tokens[:, :1]
    with changed_tokens(subject.model, 0, insert_tokens(subject.layout.num_tokens, second)):
        found = subject.model.run_blocks(subject.tokens)
    return subject.relative(found[:, -1], found[:, 0])


def shuffle_at_input(subject: Subject) -> Check:
    """Exchanging the class tokens of images before block 1 changes nothing: they are all the same yet."""
    need_class_token(subject)
    order = torch.arange(len(subject.inputs)).roll(1)
    with changed_tokens(subject.model, 0, shuffle_token(0, order)):
        found = subject.model(subject.inputs)
    return exact(largest(found - subject.logits))


def shuffle_at_output(subject: Subject) -> Check:
    """An image that gets the class token of another after the last block gets its logits."""
    need_class_token(subject)
    if subject.config.pool != "cls":
        raise NotApplicableError(f"the head reads more than the class token (pool {subject.config.pool})")
    residual = 0.0
    # Each in a batch of its own: the same sizes of matrices, hence the same rounding.
    for i in range(len(subject.inputs)):
        other = subject.alone[i - 1]
        with changed_tokens(subject.model, len(subject.model.blocks), replace_token(0, other.read_token)):
            found = subject.model(subject.inputs[i : i + 1])
        residual = max(residual, largest(found - other.logits))
    return exact(residual)


def block_1_query_constant(subject: Subject) -> Check:
    """The class token asks the same question of every image in block 1: its query does not depend on them."""
    need_class_token(subject)
    call = subject.call(0)
    tokens = call.args[0][:, :1]
    # One image at a time: the same sizes of matrices, hence the same rounding. A token without a patch
    # beside it needs no mask and no positions.
    queries = torch.cat([attention_parts(call.attn, tokens[i : i + 1]).queries for i in range(len(tokens))])
    return exact(max(largest(tokens - tokens[:1]), largest(queries - queries[:1])))


def class_token_sees_image_in_block_1(subject: Subject) -> Check:
    """After block 1 the class token differs between images: its first block already reads them."""
    need_class_token(subject)
    config: Any = subject.config
    if getattr(config, "causal", False) and config.class_position == "first":
        raise NotApplicableError("attention is causal and the class token stands first: it sees no patch")
    return greater(largest(torch.stack([alone.after_block_1 for alone in subject.alone]).std(dim=0)))


def causal_prepend_no_gradient(subject: Subject) -> Check:
    """Under a causal mask a class token in front of the patches is the same for all images: no gradient."""
    model = _causal(subject, "first")
    found = [_class_token_and_gradient(subject, model, image) for image in subject.inputs[:2].split(1)]
    (one, gradient), (other, other_gradient) = found
    return exact(max(largest(one - other), largest(gradient), largest(other_gradient)))


def causal_append_has_gradient(subject: Subject) -> Check:
    """Under a causal mask a class token behind the patches sees them: its gradient is not zero."""
    model = _causal(subject, "last")
    return greater(largest(_class_token_and_gradient(subject, model, subject.inputs[:1])[1]))


def _causal(subject: Subject, class_position: str) -> TokenModel:
    """The same model, its weights shared and not copied, under a causal mask."""
    need_class_token(subject)
    need_native(subject, "take no mask")
    shared = {id(weights): weights for weights in subject.model.parameters()}
    model = copy.deepcopy(subject.model, shared)
    assert isinstance(model.blocks, Encoder)
    model.blocks.causal_order = class_position
    return model


def _class_token_and_gradient(subject: Subject, model: TokenModel, image: Tensor) -> tuple[Tensor, Tensor]:
    """The class token after the last block, and the gradient of a random projection of it."""
    pixels = image.clone().requires_grad_()
    with torch.enable_grad():
        # All tokens are computed, as a language model would.
        token = model.norm(model.run_blocks(model.embed_tokens(pixels)))[:, 0]
        # Not the sum: that of a layer norm's output is constant.
        score = (token * subject.random("cotangent", token.shape[1])).sum()
    (gradient,) = torch.autograd.grad(score, pixels)
    return token.detach(), gradient

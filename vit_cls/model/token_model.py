"""The interface that every model here has, native or adapted: tokens, encoder, norm, pooling, head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vit_cls.model.block_calls import Backend, call_plainly, compiled_call, has_hooks
from vit_cls.model.config import ModelConfig
from vit_cls.model.pooling_base import Pooling, PoolingContext
from vit_cls.model.tokens import TokenLayout


class TokenModel(nn.Module):
    """Images to tokens to logits; what evaluation, probes and explanations may rely on.

    A subclass sets the attributes and defines `patch_embed`, `embed_tokens` and `run_blocks`.
    """

    config: ModelConfig
    layout: TokenLayout
    pooling_context: PoolingContext
    """What a pooling of these tokens needs to know."""
    blocks: nn.ModuleList | nn.Sequential
    norm: nn.Module
    """The final norm where it stands before the pooling; else the identity."""
    attn_pool: Pooling
    """The pooling, under the name that timm gives to one with weights."""
    fc_norm: nn.Module
    """The final norm where it stands after the pooling; else the identity."""
    head_drop: nn.Dropout
    head: nn.Module
    load_report: Any = None
    """The fate of every key (`vit_cls.weights.load_report.LoadReport`); None with fresh weights."""
    preprocess: Any = None
    """What the weights were trained with (`vit_cls.model.classifier.Preprocess`); None where nobody knows."""
    weights_licence: str | None = None
    """Licence of the weights, or of those they were fine-tuned from."""
    weights_source: str | None = None
    """What the weights were fine-tuned from; None for fresh ones."""
    encoder_backend: Backend | None = None
    """What compiles the blocks; None runs them as they are."""
    grad_checkpointing: bool = False
    """Whether a block in training keeps its input alone and is computed again for its gradient."""

    def compile_encoder(self, backend: Backend = "inductor") -> None:
        """Compile each block when it is first called; keys, copies and pickles of the model stay as they are.

        Blocks that are alike share a graph, whatever their number, and batches of all sizes share two. A
        block with a hook runs as it is. Called again, this changes nothing.

        Args:
            backend: As for `torch.compile`.

        Source:
            Regional compilation: https://docs.pytorch.org/tutorials/recipes/regional_compilation.html
        """
        self.encoder_backend = backend

    def call_block(self, block: nn.Module, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One block's output, compiled and checkpointed as was asked for; for `run_blocks` alone.

        Source:
            Checkpointing: https://arxiv.org/abs/1604.06174; random draws of the block are repeated.
        """
        call = call_plainly
        if self.encoder_backend is not None and not has_hooks(block):
            call = compiled_call(self.encoder_backend)
        if self.grad_checkpointing and block.training and torch.is_grad_enabled():
            return checkpoint(call, block, tokens, *args, use_reentrant=False, **kwargs)
        return call(block, tokens, *args, **kwargs)

    @property
    def pool(self) -> Pooling:
        """How tokens become the vector that the head reads."""
        return self.attn_pool

    def embed_tokens(self, images: Tensor) -> Tensor:
        """Images to the encoder's input.

        Args:
            images: Normalised floats, shape ``(batch, channels, height, width)``; others are a ValueError.

        Returns:
            Class token, registers and patches with positions, shape ``(batch, tokens, dim)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define embed_tokens")

    def run_blocks(self, tokens: Tensor, read: slice | None = None, num_layers: int = 1) -> Tensor:
        """Every block in order.

        Args:
            tokens: From `embed_tokens`, shape ``(batch, tokens, dim)``.
            read: The tokens wanted from the last blocks; None means all.
            num_layers: How many of the last blocks' tokens are wanted.

        Returns:
            Before the final norm, shape ``(batch, num_layers * read tokens, dim)``, the last block's last.
        """
        raise NotImplementedError(f"{type(self).__name__} must define run_blocks")

    def encode(self, images: Tensor) -> Tensor:
        """Every token after the last block, whatever the pooling reads; images as for `embed_tokens`.

        Returns:
            Shape ``(batch, tokens, dim)``, after the final norm where that stands before the pooling.
        """
        return self.norm(self.run_blocks(self.embed_tokens(images)))

    def forward_features(self, images: Tensor) -> Tensor:
        """The vector that the head reads; images as for `embed_tokens`.

        Returns:
            Features, shape ``(batch, pool.out_dim)``; ``(batch, classes, dim)`` where each class has a token.
        """
        pool = self.pool
        tokens = self.run_blocks(self.embed_tokens(images), pool.read, pool.num_layers)
        return self.fc_norm(pool(self.norm(tokens)))

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits, shape ``(batch, classes)``; to features where the model is headless."""
        return self.head(self.head_drop(self.forward_features(images)))

"""How a block of an encoder is called: as it is, or compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MAX_GRAPHS = 64
"""Graphs of one encoder: first, middle and last block, each in training, evaluation and inference mode, and
each for the first batch size, for any other, and for one image."""

Backend = str | Callable[..., Any]


def call_plainly(block: nn.Module, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The block's output, by its own code and its hooks."""
    return block(tokens, *args, **kwargs)


@functools.cache
def compiled_call(backend: Backend) -> Callable[..., Tensor]:
    """`call_plainly`, compiled: one graph for all blocks that are alike, of one model or of several.

    The block is an argument, so its weights are too. The batch size is compiled in at first and free from
    the second on: batches of any size need no more graphs.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MAX_GRAPHS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 64 * MAX_GRAPHS)
    return torch.compile(call_plainly, backend=backend, fullgraph=True)


def has_hooks(block: nn.Module) -> bool:
    """Whether somebody listens to the block or to a part of it, which a graph would not notice."""
    # Not `modules()`: this runs for every block of every batch, and is several times as fast.
    parts = [block]
    while parts:
        part = parts.pop()
        forward, backward = part._forward_hooks, part._backward_hooks
        if forward or backward or part._forward_pre_hooks or part._backward_pre_hooks:
            return True
        parts += [child for child in part._modules.values() if child is not None]
    return False

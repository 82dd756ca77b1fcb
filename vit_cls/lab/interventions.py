"""Hooks that look at, shuffle, replace or insert tokens inside an encoder, for the length of a ``with``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vit_cls.errors import ConfigError
from vit_cls.model.token_model import TokenModel

Change = Callable[[Tensor], Tensor]
"""Tokens in, tokens out, shape ``(batch, tokens, dim)``; the number of tokens may change."""


@contextlib.contextmanager
def capture_tokens(model: TokenModel) -> Iterator[list[Tensor]]:
    """Collect the tokens after each block that runs inside the ``with``, in order.

    What the last block of a native model gives is the tokens that were read.
    """
    found: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        for block in model.blocks:
            handle = block.register_forward_hook(lambda _block, _args, output: found.append(output))
            stack.callback(handle.remove)
        yield found


@contextlib.contextmanager
def changed_tokens(model: TokenModel, layer: int, change: Change) -> Iterator[None]:
    """Change the tokens between two blocks.

    Args:
        layer: Blocks that run before the change, from 0 (the encoder's input) to the depth (its output, which
            in a native model is the read tokens alone).

    Raises:
        ConfigError: If there is no such layer.

    Example:
        >>> from vit_cls.model.presets import preset_config
        >>> from vit_cls.model.vit import VisionTransformer
        >>> model = VisionTransformer(preset_config("vit_pico_patch7_28", num_classes=2)).eval()
        >>> images = torch.rand(2, 3, 28, 28)
        >>> with changed_tokens(model, model.config.depth, shuffle_token(0, torch.tensor([1, 0]))):
        ...     swapped = model(images)
        >>> torch.allclose(swapped, model(images).flip(0))
        True
    """
    depth = len(model.blocks)
    if not 0 <= layer <= depth:
        raise ConfigError(f"layer must be from 0 to {depth}, the number of blocks; got {layer}.")

    def before(_block: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(args[0]), *args[1:])

    def after(_block: Any, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        return change(output)

    if layer < depth:
        handle = model.blocks[layer].register_forward_pre_hook(before)
    else:
        handle = model.blocks[depth - 1].register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def shuffle_token(position: int, order: Tensor) -> Change:
    """Exchange one token between the images of a batch: image i gets that of image ``order[i]``."""

    return lambda tokens: replace_token(position, tokens[order.to(tokens.device), position])(tokens)


def replace_token(position: int, value: Tensor) -> Change:
    """Put another vector in the place of one token: ``(dim,)``, or ``(batch, dim)`` for one each."""

    def change(tokens: Tensor) -> Tensor:
        tokens = tokens.clone()
        tokens[:, position] = value.to(tokens)
        return tokens

    return change


def insert_tokens(position: int, values: Tensor) -> Change:
    """Put tokens, ``(new tokens, dim)`` or ``(batch, new tokens, dim)``, before a position, or at the end."""

    def change(tokens: Tensor) -> Tensor:
        if not 0 <= position <= tokens.shape[1]:
            raise ConfigError(
                f"tokens can be inserted from position 0 to {tokens.shape[1]}, the end; got {position}."
            )
        new = values.to(tokens).expand(len(tokens), -1, -1)
        return torch.cat([tokens[:, :position], new, tokens[:, position:]], dim=1)

    return change


def reorder_tokens(tokens: Tensor, order: Tensor) -> Tensor:
    """The same tokens in another order: the old position of each new one, for all images or for each."""
    index = order.to(tokens.device).expand(len(tokens), -1)
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))

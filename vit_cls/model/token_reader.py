"""Read the tokens of a frozen model as a head with some pooling would get them, at any layer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vit_cls.errors import ConfigError
from vit_cls.model.pooling import make_pooling, num_class_tokens
from vit_cls.model.pooling_base import Pooling
from vit_cls.model.pooling_tokens import ConcatenatedPool
from vit_cls.model.token_model import TokenModel


class TokenReader:
    """Norm, pooling, norm, as in the model's own head; one of the norms is the identity.

    The model's own pooling is read with its weights. Of the others those without weights can be read; each
    part of a concatenation is normed on its own.

    Args:
        model: Its norms and its pooling are used as they are, not copied.
        setting: What the user called the setting that names a pooling, for error messages.

    Example:
        >>> from vit_cls import create_model
        >>> model = create_model("vit_pico_patch7_28", pool="gap").eval()
        >>> reader = TokenReader(model)
        >>> reader.read("cls+gem:3", {4: torch.zeros(2, 17, 96)}, 4).shape, reader.layers("last:2", 4)
        (torch.Size([2, 192]), [3, 4])
    """

    def __init__(self, model: TokenModel, setting: str = "--pools") -> None:
        self.layout = model.layout
        self.depth = len(model.blocks)
        self.norm, self.fc_norm = model.norm, model.fc_norm
        self.context = dataclasses.replace(model.pooling_context, include_prefix=False, setting=setting)
        self._own = {model.config.pool: model.pool}
        self._made: dict[str, list[Any]] = {}

    def on_cpu(self) -> TokenReader:
        """The same with copies of the weights on the CPU, in float32, for inference."""
        found = copy.deepcopy(self)
        for module in (found.norm, found.fc_norm, *found._own.values()):
            module.cpu().float().eval()
        return found

    def poolings(self, pool: str) -> list[Any]:
        """The poolings that a concatenation joins, one where it is none.

        Raises:
            ConfigError: If it is unknown, reads what the model does not have, or has weights to be trained.
        """
        if pool not in self._made:
            own = pool in self._own
            pooling = self._own[pool] if own else make_pooling(pool, self.context)
            self._check(pool, pooling)
            self._made[pool] = [pooling]
            if isinstance(pooling, ConcatenatedPool) and not own:
                self._made[pool] = list(pooling.poolings)
        return self._made[pool]

    def layers(self, pool: str, layer: int) -> list[int]:
        """The layers whose tokens are needed, ascending, to read at a layer; 0 is before the first block.

        Raises:
            ConfigError: As for `poolings`, or if there are fewer blocks up to that layer than are read.
        """
        count = max(pooling.num_layers for pooling in self.poolings(pool))
        if count > max(layer, 1):
            raise ConfigError(
                f"{self.context.setting} {pool} needs {count} blocks, but layer {layer} comes after {layer}."
            )
        return list(range(layer - count + 1, layer + 1))

    @torch.inference_mode()
    def normed(self, tokens: Tensor) -> Tensor:
        """Tokens, shape ``(..., dim)``, after the final norm, token by token, whichever side it stands on."""
        return self.fc_norm(self.norm(tokens))

    @torch.inference_mode()
    def read(self, pool: str, tokens: Mapping[int, Tensor], layer: int) -> Tensor:
        """One vector an image, shape ``(batch, dim)``, a multiple of the width for a concatenation.

        Args:
            tokens: The tokens of each layer that `layers` names, shape ``(batch, tokens, dim)``, as the
                blocks left them.

        Raises:
            ConfigError: As for `layers`.
        """
        self.layers(pool, layer)
        vectors = []
        for pooling in self.poolings(pool):
            blocks = range(layer - pooling.num_layers + 1, layer + 1)
            read = torch.cat([self.norm(tokens[block][:, pooling.read]) for block in blocks], dim=1)
            vector = pooling(read)
            vectors.append(self.fc_norm(vector.unflatten(1, (-1, read.shape[2]))).flatten(1))
        return torch.cat(vectors, dim=1)

    def _check(self, pool: str, pooling: Pooling) -> None:
        setting, own = self.context.setting, pool in self._own
        if pooling.per_class:
            raise ConfigError(f"{setting} {pool} has a vector for each class, not one for an image. Use cls.")
        if own:
            return
        if any(True for _ in pooling.parameters()):
            raise ConfigError(
                f"{setting} {pool} has weights of its own, which this model has not trained. Read a pooling "
                "without weights, such as gap or gem:3, or train it: `vit-cls probe attentive --heads "
                f"{pool}`."
            )
        wanted, there = num_class_tokens(pool, 1), self.layout.num_class_tokens
        if wanted > there:
            raise ConfigError(f"{setting} {pool} reads {wanted} class tokens, but the model has {there}.")

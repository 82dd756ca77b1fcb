"""Parts of a model that are not trained: no gradient, no dropout, no drop path."""

from __future__ import annotations

from torch import nn

from vit_cls.errors import ConfigError
from vit_cls.model.token_model import TokenModel
from vit_cls.training.optim import is_head, layer_of
from vit_cls.training.options import BACKBONE


class Freezer:
    """Keeps part of a model frozen.

    Args:
        model: The model.
        freeze: ``backbone``, a number of blocks (with the embedding below them), or None for nothing.

    Raises:
        ConfigError: If the model has fewer blocks, or nothing would be left to train.
    """

    def __init__(self, model: TokenModel, freeze: int | str | None) -> None:
        depth = model.config.depth
        if isinstance(freeze, int) and freeze > depth:
            raise ConfigError(
                f"optim.freeze is {freeze}, but the model has {depth} blocks. Use {BACKBONE} for all."
            )
        self.model = model
        self.base = freeze
        # Fixed positions are never trained, whatever is frozen.
        self._trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        if freeze == BACKBONE and not any(is_head(name) for name in self._trainable):
            raise ConfigError(
                "optim.freeze backbone leaves nothing to train: the model has no head. Set num_classes."
            )
        self.current = freeze
        self.set(freeze)

    def set(self, freeze: int | str | None) -> None:
        """Freeze that much, and thaw the rest.

        Args:
            freeze: As for the class.
        """
        self.current = freeze
        depth = self.model.config.depth
        trainable = set(self._trainable)
        for name, parameter in self.model.named_parameters():
            if name in trainable:
                parameter.requires_grad_(not _is_frozen(name, freeze, depth))
        self.model.train(self.model.training)
        self.calm()

    def calm(self) -> None:
        """Put the frozen parts in evaluation mode; after every call of ``train``."""
        freeze = self.current
        if freeze is None or not self.model.training:
            return
        for name, module in self.model.named_modules():
            if (
                name
                and not isinstance(module, nn.ModuleList)
                and _is_frozen(f"{name}.", freeze, self.model.config.depth)
            ):
                module.training = False


def _is_frozen(name: str, freeze: int | str | None, depth: int) -> bool:
    if freeze is None:
        return False
    if freeze == BACKBONE:
        return not is_head(name) and not name.startswith("head_drop")
    assert isinstance(freeze, int)
    return layer_of(name, depth) <= freeze and not name.startswith("head_drop")

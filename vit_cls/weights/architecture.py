"""Plain data to an architecture, and an architecture to a model: native, or one of timm's behind the adapter.

timm takes seconds to import, and native models do without: it is imported where an adapted one is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vit_cls.errors import ConfigError
from vit_cls.model.config import ViTConfig
from vit_cls.model.init import SkipInit
from vit_cls.model.token_model import TokenModel
from vit_cls.model.vit import VisionTransformer


def architecture_from_dict(values: Mapping[str, Any]) -> Any:
    """The `ViTConfig` or `AdapterConfig` whose ``to_dict`` gave these values; ConfigError for others."""
    if "timm_architecture" not in values:
        return ViTConfig.from_dict(values)
    from vit_cls.weights.adapter import AdapterConfig

    return AdapterConfig.from_dict(values)


def changed(config: Any, **changes: Any) -> Any:
    """An architecture with some settings changed; for an adapted one also arguments of timm's constructor.

    Example:
        >>> changed(ViTConfig(), pool="gap").pool
        'gap'
    """
    if changes.get("pool", config.pool) != config.pool:
        changes.setdefault("pool_include_prefix", False)
    if isinstance(config, ViTConfig):
        return ViTConfig.from_dict({**config.to_dict(), **changes})
    from vit_cls.weights.adapter import changed_adapter

    return changed_adapter(config, changes)


def check_shapes(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse (ConfigError) tensors, by timm's names, that are not those of an architecture.

    Nothing is allocated: a file whose settings ask for terabytes, or for one block less than it holds, is
    told by its header.

    Args:
        shapes: Of the tensors that are there.
    """
    if config.depth > len(shapes):
        raise ConfigError(f"by it there are {config.depth} blocks, in the weights {len(shapes)} tensors")
    with torch.device("meta"), SkipInit():
        model = build_model(config)
    ours = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for key in [*ours, *shapes]:
        if ours.get(key) != shapes.get(key):
            by_config, by_weights = (
                f"of shape {by[key]}" if key in by else "absent" for by in (ours, shapes)
            )
            raise ConfigError(f"by it {key} is {by_config}, in the weights it is {by_weights}")


def build_model(config: Any, *, init: bool = True) -> TokenModel:
    """A model with fresh weights, drawn from torch's global generator.

    Args:
        init: Whether the weights of a native model are drawn; without, they are whatever was in memory.

    Raises:
        ConfigError: If its settings do not fit together.
    """
    if isinstance(config, ViTConfig):
        if init:
            return VisionTransformer(config)
        with torch.device("meta"), SkipInit():
            model = VisionTransformer(config)
        return model.to_empty(device="cpu")
    from vit_cls.weights.adapter import TimmAdapter

    return TimmAdapter(config)

"""Train, fine-tune, evaluate and understand Vision Transformer image classifiers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "ClassificationTask",
    "ImageClassifier",
    "ImageDataModule",
    "__version__",
    "create_model",
    "load",
]

if TYPE_CHECKING:
    from vit_cls.api import load
    from vit_cls.data.datamodule import ImageDataModule
    from vit_cls.model.classifier import ImageClassifier
    from vit_cls.training.task import ClassificationTask
    from vit_cls.weights.factory import create_model

# Public name -> module that defines it. Loaded on first use, so that `vit-cls --help` needs no torch.
_LAZY = {
    "ClassificationTask": "vit_cls.training.task",
    "ImageClassifier": "vit_cls.model.classifier",
    "ImageDataModule": "vit_cls.data.datamodule",
    "create_model": "vit_cls.weights.factory",
    "load": "vit_cls.api",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"vit_cls has no attribute {name!r}; public names: {', '.join(__all__)}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)

"""What a classifier says about images from anywhere: files, or pixels in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vit_cls.data.dataset import ArraySource, FolderSource, ImageDataset, ImageSource
from vit_cls.data.loader import default_num_workers, make_loader
from vit_cls.data.sampler import EpochSampler
from vit_cls.data.splits import match_classes
from vit_cls.errors import DataError, ModelFileError
from vit_cls.evaluation.predictions import choose_bf16, choose_device
from vit_cls.model.classifier import ImageClassifier
from vit_cls.weights.file_classifier import transform_of


@dataclass(frozen=True)
class Answered:
    """Logits of the images that could be read.

    Args:
        logits: float32, shape ``(images, classes)``.
        targets: True classes by the model's order, int64, shape ``(images,)``.
        positions: Where each image stands in its source.
        failures: Why an image has none, by its position.
    """

    logits: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    failures: dict[int, str]


@torch.inference_mode()
def logits_of(
    classifier: ImageClassifier,
    source: ImageSource,
    *,
    device: str = "auto",
    precision: str = "32",
    batch_size: int = 256,
) -> Answered:
    """Classify every image once.

    Args:
        classifier: Is moved to the device and put in evaluation mode.
        source: Images whose classes the model has.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        precision: ``auto``, ``32`` or ``bf16``.
        batch_size: Images a forward pass.

    Raises:
        DataError: If no image can be read, or a class is not the model's.
        ModelFileError: If logits are not finite.
        ConfigError: If there is no such device or precision.
    """
    where = choose_device(device)
    low = choose_bf16(precision, where)
    index = match_classes(source.index, classifier.class_names)
    files = isinstance(source, FolderSource)
    read = FolderSource(source.index, classifier.preprocess.background) if files else source
    loader = make_loader(
        ImageDataset(read, transform_of(classifier.preprocess)),
        EpochSampler(len(source.index), seed=0, shuffle=False),
        batch_size=batch_size,
        num_workers=0 if isinstance(source, ArraySource) else default_num_workers(),
    )
    classifier.to(where).eval()
    logits: list[Tensor] = []
    positions: list[Tensor] = []
    failures: dict[int, str] = {}
    for batch in loader:
        failures |= dict(batch.failures)
        if len(batch.indices):
            with torch.autocast(where.type, dtype=torch.bfloat16, enabled=low):
                logits.append(classifier(batch.images.to(where)).float().cpu())
            positions.append(batch.indices)
    if not logits:
        raise DataError(f"none of {len(source.index)} images of {source.index.root} can be read.")
    kept = torch.cat(positions).numpy()
    if not all(bool(torch.isfinite(part).all()) for part in logits):
        raise ModelFileError("logits are not finite: the weights diverged. Use a lower learning rate.")
    return Answered(torch.cat(logits).numpy(), index.labels[kept], kept, failures)
